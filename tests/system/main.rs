//! System tests over loopback: the real binary, a scripted registry and a plain client, with one folder per topic.
//!
//! Tests do not sleep and use no fixed port. They wait for an event: a request at the upstream, a gate, a log line.
//! Every response passes the same checks (`tests/support/proxy/check.rs`).
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

#[path = "../support/proxy/mod.rs"]
mod proxy;
#[path = "../support/registry/mod.rs"]
mod registry;

mod admin;
mod auth;
mod cache;
mod cli;
mod download;
mod forwarding;
mod outage;
mod robustness;
#[cfg(feature = "shared")]
mod shared;
mod tls;
