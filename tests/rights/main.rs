//! Who may read what, held against a model: the whole road in this process, over a registry in memory, under a paused
//! clock, with a time of day that jumps.
//!
//! * `registry`: the upstream, which remembers every word it said, and to whom. * `model`: what those words entitle a
//!   client to; it shares no code with the program. * `cache`: the program under test, from request to bytes.
//! * `walk`: random steps, each answer held against the model. `life`: the same over reloads, restarts, kills and pushes,
//!   with slow answers. * `cases`: the interleavings found dangerous, one by one.
//! * `fronts`: what answers in the registry's place. `timing`: whether how long a no takes tells what is held; `looks`: a disk that counts.
//!
//! `IFNEWER_MODEL_STEPS` and `IFNEWER_MODEL_SEED` make the walk longer, or another one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]
#![allow(clippy::panic, clippy::indexing_slicing, reason = "tests may fail loudly")]
#![allow(clippy::print_stderr, reason = "what a walk covered is worth knowing")]
#![allow(clippy::disallowed_methods, reason = "how long to walk is said from outside")]
#![allow(
    unreachable_pub,
    reason = "`pub` says what the other files of this test may use"
)]
#![allow(
    clippy::cast_precision_loss,
    clippy::disallowed_types,
    reason = "times are compared"
)]

mod cache;
mod cases;
mod fronts;
mod life;
mod looks;
mod model;
mod registry;
mod slow_disk;
mod timing;
mod walk;
