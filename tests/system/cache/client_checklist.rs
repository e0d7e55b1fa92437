//! The rows of the checklist of what real clients need: one test or more for each that concerns reading, by its number.
//!
//! Rows 6, 18 and 19 (private repositories) are in `forbidden`, row 14 (a manifest that can be completed) in
//! `promise`, row 34 (pushes and deletions) in `writes`, CONNECT (of row 31) in `connect`. There is no row 32: we have no token
//! realm of our own.

mod blobs;
mod edge;
mod lists;
mod manifests;
mod upstreams;
