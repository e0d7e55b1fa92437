//! Requirements of real clients, by row of the client checklist. `row_NN_` in a test name is its row.
//!
//! Rows 6, 18 and 19 (private repositories) are in `auth/authorization`, row 14 (completeness) in
//! `cache/completeness`, row 34 (pushes and deletions) in `forwarding/writes`, CONNECT (of row 31) in
//! `forwarding/connect`. Row 32 does not apply: the cache has no token realm.

mod blobs;
mod edge;
mod lists;
mod manifests;
mod upstreams;
