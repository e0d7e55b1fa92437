//! Images as an OCI image layout in a tar archive: out of the store ([`export`]), and into it ([`import`]).
//!
//! For caches that no registry reaches: what one has pulled is carried to another, or what skopeo, buildah or `BuildKit`
//! wrote. The layout is that of image-spec, image-layout.md; `index.json` names each image in full.
//!
//! * `layout`: its documents and the names of its files; pure. * `export`, `import`: one direction each. * `pipe`: an
//!   archive on its way between a thread that may wait and a connection.
//!
//! Both directions are whole or refused: no half image leaves or enters, and nothing is believed of an archive but the
//! bytes it brings. Whether a caller may export or import at all is not decided here.

pub mod export;
pub mod import;
pub mod layout;
pub mod pipe;

use std::sync::Arc;

use crate::oci::{Reference, Repository};

/// How deep indexes may lie in each other.
const INDEX_DEPTH_MAX: u32 = 2;

/// What is read, hashed and written at a time.
const BUFFER_BYTES: usize = 256 * 1024;

/// Missing digests that are named; more are only counted.
const MISSING_LISTED_MAX: usize = 20;

/// An image and its whole name: what an archive must tell so that another cache knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// In full, as in `docker.io/library/alpine:3.20`.
    pub name: String,
    /// The name of its upstream.
    pub upstream: Arc<str>,
    /// The repository there.
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
