//! The admin listener: API, page, metrics, access log and traces.

pub mod access_log;
pub mod api;
pub mod limits;
pub mod metrics;
#[cfg(feature = "otlp")]
pub mod otlp;
pub mod page;
pub mod requests;
pub mod status;
pub mod trace_context;
