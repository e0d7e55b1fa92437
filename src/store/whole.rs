//! Whether an image can be pulled whole from what is held.
//!
//! A manifest promises its config and layers. Whoever is given one while the upstream is silent relies on that promise,
//! so it is looked at before the manifest is served: every blob must be here, and proven in the same repository, for
//! else this repository's readers could not have it. Of an index one image is enough: which one a client wants is not
//! known, and most are only ever pulled for one platform.
//!
//! What was found whole stays so until something is removed, which is counted (`Counters::removals`); so a hot tag
//! costs one look-up.

use std::cell::Cell;
use std::sync::Arc;

use quick_cache::sync::Cache;

use super::cache::{ImageKey, ImageRef, Place, PlaceRef, counted};
use super::manifests::HeldManifest;
use super::usage::Counters;
use super::{Store, View};
use crate::oci::manifest::{Descriptor, Kind, Role};
use crate::oci::{AnyDigest, Digest, Repository};

/// Images remembered as whole.
const WHOLE_MAX: usize = 16_384;

/// How deep indexes may lie in each other. Real ones do not.
const INDEX_DEPTH_MAX: u32 = 2;

/// Blobs that are not held but arriving count as held, where what arrives may be read in the repository looked at.
pub type Arriving<'a> = &'a dyn Fn(&Digest) -> bool;

/// Where an image is looked at.
#[derive(Clone, Copy)]
struct Look<'a> {
    upstream: &'a str,
    repository: &'a Repository,
    arriving: Arriving<'a>,
}

impl Store {
    /// [`View::is_whole`] of everything that is held. Blocks.
    pub fn is_whole(
        &self,
        upstream: &str,
        repository: &Repository,
        manifest: &HeldManifest,
        arriving: Arriving<'_>,
    ) -> bool {
        self.view().is_whole(upstream, repository, manifest, arriving)
    }
}

impl View<'_> {
    /// Whether all that `manifest` points to is held, or `arriving`, and was seen in this repository.
    pub fn is_whole(
        &self,
        upstream: &str,
        repository: &Repository,
        manifest: &HeldManifest,
        arriving: Arriving<'_>,
    ) -> bool {
        if self
            .store
            .wholes
            .knows(PlaceRef::new(upstream, repository), &manifest.digest)
        {
            return true;
        }
        // Read first: a removal during the look makes what was found outdated, not wrong.
        let removals = self.store.usage.removals();
        let lacks_some = Cell::new(false);
        let look = Look {
            upstream,
            repository,
            arriving: &|digest| {
                lacks_some.set(true);
                arriving(digest)
            },
        };
        let is_whole = self.is_whole_to(look, manifest, INDEX_DEPTH_MAX);
        // What is only arriving may yet fail.
        if is_whole && !lacks_some.get() && self.is_complete() {
            let place = Place::of(upstream, repository);
            self.store.wholes.note(place, manifest.digest, removals);
        }
        is_whole
    }

    /// The blobs that `manifest` points to and that are missing here, in its order: the config first.
    pub fn missing_blobs<'a>(
        &'a self,
        upstream: &'a str,
        repository: &'a Repository,
        manifest: &'a HeldManifest,
        arriving: Arriving<'a>,
    ) -> impl Iterator<Item = &'a Descriptor> {
        let look = Look {
            upstream,
            repository,
            arriving,
        };
        let blobs = manifest.manifest.children.iter();
        blobs.filter(move |child| child.role != Role::Manifest && !self.has_blob(look, child))
    }

    /// The images of an index that can be pulled whole.
    pub fn whole_children<'a>(
        &'a self,
        upstream: &'a str,
        repository: &'a Repository,
        index: &'a HeldManifest,
    ) -> impl Iterator<Item = &'a Descriptor> {
        let look = Look {
            upstream,
            repository,
            arriving: &|_| false,
        };
        let children = index.manifest.children.iter();
        children.filter(move |child| is_image(child) && self.has_manifest(look, child, INDEX_DEPTH_MAX))
    }

    fn is_whole_to(&self, look: Look<'_>, manifest: &HeldManifest, depth: u32) -> bool {
        let children = &manifest.manifest.children;
        let mut blobs = children.iter().filter(|child| child.role != Role::Manifest);
        if !blobs.all(|child| self.has_blob(look, child)) {
            return false;
        }
        let mut images = children.iter().filter(|child| is_image(child)).peekable();
        manifest.manifest.kind != Kind::Index
            || images.peek().is_none()
            || images.any(|child| self.has_manifest(look, child, depth))
    }

    fn has_blob(&self, look: Look<'_>, child: &Descriptor) -> bool {
        // Its own place is named in the manifest; the registry need not have it.
        if child.foreign {
            return true;
        }
        let AnyDigest::Known(digest) = &child.digest else {
            return false;
        };
        let is_held = self.has_seen(look.upstream, look.repository, digest) && self.has_blob_file(digest);
        is_held || (look.arriving)(digest)
    }

    fn has_manifest(&self, look: Look<'_>, child: &Descriptor, depth: u32) -> bool {
        let (AnyDigest::Known(digest), Some(depth)) = (&child.digest, depth.checked_sub(1)) else {
            return false;
        };
        self.has_seen(look.upstream, look.repository, digest)
            && matches!(self.manifest(digest), Ok(Some(held)) if self.is_whole_to(look, &held, depth))
    }
}

/// Not an attestation, which `BuildKit` lists beside the images as of an unknown platform.
fn is_image(child: &Descriptor) -> bool {
    let is_known = |platform: &crate::oci::manifest::Platform| platform.os != "unknown";
    child.role == Role::Manifest && child.platform.as_ref().is_none_or(is_known)
}

/// The images found whole, each with the count of removals at that time.
pub(super) struct Wholes {
    known: Cache<ImageKey, u64>,
    usage: Arc<Counters>,
}

impl Wholes {
    pub(super) fn new(usage: &Arc<Counters>) -> Self {
        Self {
            known: counted(WHOLE_MAX),
            usage: Arc::clone(usage),
        }
    }

    fn knows(&self, place: PlaceRef<'_>, digest: &Digest) -> bool {
        self.known
            .get(&ImageRef { place, digest })
            .is_some_and(|removals| removals == self.usage.removals())
    }

    fn note(&self, place: Place, digest: Digest, removals: u64) {
        self.known.insert(ImageKey { place, digest }, removals);
    }
}
