//! Listeners, connections, malformed HTTP, limits, reload and shutdown.

pub mod captive_portals;
pub mod clients_behind_nat;
pub mod connection_close;
pub mod connection_limits;
pub mod data_folder_lock;
pub mod drain;
pub mod http;
pub mod listeners;
pub mod malformed_requests;
pub mod memory;
pub mod reload;
pub mod reload_state;
pub mod store_errors;
pub mod threats;
