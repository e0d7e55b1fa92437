//! Export and import of images as OCI image layouts in tar archives.
//!
//! They carry images to caches without access to a registry. An import also accepts archives written by skopeo,
//! buildah or `BuildKit`. The layout follows image-spec, image-layout.md; `index.json` contains the full name of each
//! image.
//!
//! * `layout`: documents and file names; pure. * `export`, `import`: one direction each. * `pipe`: byte channel
//!   between a blocking thread and a connection.
//!
//! An image is transferred completely or not at all. An import verifies every object by its digest. Authorization of
//! the caller is not decided here.

pub mod export;
pub mod import;
pub mod layout;
pub mod pipe;

use std::sync::Arc;

use crate::oci::{Reference, Repository};

/// Maximum nesting depth of indexes.
const INDEX_DEPTH_MAX: u32 = 2;

/// Buffer size for reading, hashing and writing.
const BUFFER_BYTES: usize = 256 * 1024;

/// Maximum number of missing digests listed in an error.
const MISSING_LISTED_MAX: usize = 20;

/// An image with its full name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Fully qualified, as in `docker.io/library/alpine:3.20`.
    pub name: String,
    /// The name of its upstream.
    pub upstream: Arc<str>,
    /// The repository at the upstream.
    pub repository: Repository,
    /// The tag or digest.
    pub reference: Reference,
}

fn list_missing(missing: &[String]) -> String {
    let named: Vec<&str> = missing
        .iter()
        .take(MISSING_LISTED_MAX)
        .map(String::as_str)
        .collect();
    match missing.len().saturating_sub(MISSING_LISTED_MAX) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests;
