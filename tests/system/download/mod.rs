//! Blob downloads: coalescing, ranges, resumption, prefetch and verification.

pub mod coalescing;
pub mod corruption;
pub mod mislabelled_content;
pub mod parallel;
pub mod partial_downloads;
pub mod prefetch;
pub mod queue;
pub mod range_fetch;
pub mod ranges;
pub mod redirects;
pub mod resume;
pub mod shared_downloads;
pub mod slow_first_byte;
