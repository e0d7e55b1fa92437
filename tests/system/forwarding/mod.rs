//! Routing to an upstream, CONNECT, and writes that are forwarded to the registry.

pub mod chained_caches;
pub mod connect;
pub mod host_routing;
pub mod host_spellings;
pub mod routing;
pub mod write_invalidation;
pub mod writes;
