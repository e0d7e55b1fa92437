//! The rows of the checklist of what real clients need: one test or more for each that concerns reading, by its number.
//!
//! Rows 6, 18 and 19 (private repositories) are in `forbidden`, row 14 (a manifest that can be completed) in
//! `promise`. Rows 34 and 32 have nothing here yet: writes are not passed through, and there is no token realm of our own.

mod blobs;
mod edge;
mod lists;
mod manifests;
mod upstreams;
