//! The whole program over loopback: the real binary, a scripted upstream, a plain client. One file per promise.
//!
//! Nothing here sleeps and nothing has a fixed port: tests wait for what happens (a request at the upstream, a gate, a
//! line of the log). Every reply of the program passes one check (`proxy/check.rs`), whatever the test is about.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]
#![allow(clippy::panic, clippy::indexing_slicing, reason = "tests may fail loudly")]
#![allow(
    clippy::print_stderr,
    reason = "what the program said belongs beside the failure"
)]
#![allow(
    clippy::unnecessary_debug_formatting,
    reason = "a quoted path is a TOML string"
)]
#![allow(
    unreachable_pub,
    reason = "`pub` says what the other files of this test may use"
)]

mod proxy;
mod upstream;

mod absent;
mod access_log;
mod admin;
mod admin_api;
mod admin_limits;
mod archives;
mod ca;
mod certificates;
mod challenge;
mod circuit_breaker;
mod client_setup;
mod clients_2026;
mod commands;
mod config_exit;
mod connect;
mod connection_close;
mod connections;
mod denials;
mod doctor;
mod doors;
mod doubts;
mod drain;
mod entry;
mod eviction;
mod far_ahead;
mod fault_matrix;
mod first_byte;
mod first_start;
mod forbidden;
mod host_door;
mod host_spellings;
mod hostile_fronts;
mod incomplete;
mod leaks;
mod leftovers;
mod listening;
mod local_tokens;
mod lock;
mod lying_heads;
mod malformed;
mod memory;
mod metrics;
mod newer;
mod newest_word;
#[cfg(feature = "otlp")]
mod otlp;
mod own_credentials;
mod page;
mod policies;
mod prefetch;
mod promise;
mod queueing;
mod quirks;
mod ranges;
mod rate_limits;
mod realms;
mod redirected_registry;
mod redirects;
mod reload;
mod reload_state;
mod repository_prefix;
mod resume;
mod rows;
mod several_urls;
mod shared_address;
mod sharing;
mod stampede;
mod store_errors;
mod strangers;
mod tags_referrers;
mod terminal;
mod threats;
mod tokens;
mod traces;
mod truncated;
mod trust;
mod unchanged;
mod unreachable;
mod wire;
mod writes;
mod wrong_labels;
