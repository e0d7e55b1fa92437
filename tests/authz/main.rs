//! Authorization model tests: the complete request path in one process, over a registry in memory, with a paused
//! clock and a wall clock that jumps.
//!
//! * `registry`: the upstream, which records every response and its recipient. `model`: what those responses
//!   authorize; it shares no code with the program. `cache`: the program under test, from request to bytes.
//! * `random_walk`: random steps, each response checked against the model. `lifecycle`: the same over reloads,
//!   restarts, kills and pushes, with slow responses. `cases`: interleavings that were found dangerous.
//! * `min_age`, `min_age_by_digest`: ages of digests, with a wall clock that is stepped.
//! * `scheduled_refresh`: tags revalidated in the background. `scheduled_refresh_races`: what happens while one runs.
//!   `scheduled_refresh_use`: what counts as a use of a tag.
//! * `never`: the policy `never` with records of other caches.
//! * `shared_grants`: a walk over two caches with one bucket and grant records.
//! * `manifest_claims`: one of several caches over a bucket requests a manifest.
//! * `tag_records`: records of other caches about a tag, in a shared `bucket`.
//! * `hostile_fronts`: hosts that respond in the registry's place. `timing`: whether the time of a denial reveals
//!   what is cached. `counting_disk`: a disk that counts its reads. `slow_disk`: a disk with a blocked call.
//!
//! `IFNEWER_MODEL_STEPS` sets the length of the walk, `IFNEWER_MODEL_SEED` its seed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]
#![allow(clippy::panic, clippy::indexing_slicing, reason = "tests may fail loudly")]
#![allow(clippy::print_stderr, reason = "prints what a walk covered")]
#![allow(
    clippy::disallowed_methods,
    reason = "the length of a walk comes from the environment"
)]
#![allow(unreachable_pub, reason = "`pub` marks what the other files of this test use")]
#![allow(
    clippy::cast_precision_loss,
    clippy::disallowed_types,
    reason = "times are compared"
)]

mod bucket;
mod cache;
mod cases;
mod counting_disk;
mod hostile_fronts;
mod lifecycle;
mod manifest_claims;
mod min_age;
mod min_age_by_digest;
mod model;
mod never;
mod random_walk;
mod registry;
mod scheduled_refresh;
mod scheduled_refresh_races;
mod scheduled_refresh_use;
mod shared_grants;
mod slow_disk;
mod tag_records;
mod timing;
