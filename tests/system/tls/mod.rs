//! TLS: client certificates at the listener and trust in upstream certificates.

pub mod client_certificates;
pub mod upstream_trust;
