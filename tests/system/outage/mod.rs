//! Upstreams that are unavailable, faulty or rate limited.

pub mod circuit_breaker;
pub mod fault_matrix;
pub mod rate_limits;
pub mod unreachable;
