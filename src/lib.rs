//! ifnewer: a pull-through cache for container images.
//!
//! **`always`, as cheap and outage-proof as `if-not-present`, and nobody reads what they may not.** For a tag the
//! upstream is asked by `HEAD` which digest it names now; the held copy is served when that is unchanged or the
//! upstream is silent, and fetched anew when it is not.
//!
//! The map, from the inside out; each layer may use those before it, and `tests/layers.rs` holds it to that:
//!
//! 1. [`oci`]: the protocol's values and grammar, [`trace_context`] (which request belongs to which) and [`clock`]. Pure. And
//!    [`terminal`]: the one way to standard output and standard error.
//! 2. [`policy`]: the decision, and [`policy::authz`]: authorization. Pure, without a clock.
//! 3. [`store`] (the disk), [`upstream`] (the network outwards), [`telemetry`] (logs, metrics, the decision log), [`single_flight`] (one question
//!    for many askers).
//! 4. [`download`]: one transfer, many readers; [`archive`]: images as files, out of the store and into it.
//! 5. [`proxy`]: the road of a request.
//! 6. [`server`] and [`admin`] (the network inwards), [`config`], [`cli`] (with the commands that ask a
//!    running cache), [`demo`], [`process`]; [`setup`] (clients' files), [`ca`] (their trust),
//!    [`doctor`] (whether they use us).
//!
//! Left out on purpose: a registry of its own (a push passes through, and is not understood), and any judgement that is not a
//! pure function.

pub mod admin;
pub mod age;
pub mod archive;
pub mod ca;
pub mod cli;
pub mod clock;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod download;
pub mod oci;
#[cfg(feature = "otlp")]
pub mod otlp;
pub mod policy;
pub mod process;
pub mod proxy;
pub mod queue;
pub mod server;
pub mod setup;
pub mod single_flight;
pub mod store;
pub mod telemetry;
pub mod terminal;
pub mod trace_context;
pub mod upstream;
