//! ifnewer: a pull-through cache for container images.
//!
//! **As fresh as the policy `always`, as cheap and outage-proof as `if-not-present`, without bypassing the
//! registry's authorization.** For a tag, the cache sends a `HEAD` upstream for the current digest. If the
//! digest is unchanged or the upstream is unavailable, it serves the cached copy. If the digest has changed, it
//! fetches the new image.
//!
//! The layers, from the inside out. Each may use those before it, which `tests/layers.rs` checks:
//!
//! 1. [`oci`]: values and grammar of the protocol; [`trace_context`]: W3C Trace Context; [`clock`]; [`fast_map`]. Pure. And
//!    [`terminal`]: the only writer to standard output and standard error.
//! 2. [`policy`]: the decision, and [`policy::authz`]: authorization. Pure, without a clock.
//! 3. [`store`] (disk), [`upstream`] (network to registries), [`bucket`] (object storage), [`telemetry`] (logs, metrics, decision log),
//!    [`queue`] (admission), [`single_flight`] (request coalescing), [`blocking`] (threads for blocking operations).
//! 4. [`download`]: one transfer per blob with many readers; [`shared`]: storage that several caches share; [`archive`]: export and import of images as files.
//! 5. [`proxy`]: the pull-through request pipeline.
//! 6. [`server`] and [`admin`] (network to clients), [`config`], [`cli`] (with the commands that use the admin
//!    API), [`demo`], [`process`]; [`setup`] (client configuration), [`ca`] (trust stores), [`doctor`] (whether
//!    clients use the cache).
//!
//! Left out on purpose: registry functions (a push is forwarded unparsed), and decisions outside pure
//! functions.

pub mod admin;
pub mod age;
pub mod archive;
pub mod blocking;
pub mod bucket;
pub mod ca;
pub mod cli;
pub mod clock;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod download;
pub mod fast_map;
pub mod oci;
#[cfg(feature = "otlp")]
pub mod otlp;
pub mod policy;
pub mod process;
pub mod proxy;
pub mod queue;
pub mod server;
pub mod setup;
pub mod shared;
pub mod single_flight;
pub mod store;
pub mod telemetry;
pub mod terminal;
pub mod trace_context;
pub mod upstream;
