//! Admission to a bounded number of places, fair over clients.

mod peer;

pub use peer::Peer;
