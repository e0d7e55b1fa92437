//! Whether an image can be pulled whole from what is held.
//!
//! A manifest promises its config and layers. Whoever is given one while the upstream is silent relies on that promise,
//! so it is looked at before the manifest is served: every blob must be here, and proven in the same repository, for
//! else this repository's readers could not have it. Of an index one image is enough: which one a client wants is not
//! known, and most are only ever pulled for one platform.
//!
//! What was found whole stays so until a part of it is removed (`Removed`); so a hot tag costs one look-up, also while
//! other content is evicted.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;

use super::cache_key::{ImageKey, ImageRef, Place, PlaceRef, counted};
use super::manifests::HeldManifest;
use super::{Store, View};
use crate::oci::manifest::{Descriptor, Kind, Role};
use crate::oci::{AnyDigest, Digest, Repository};

/// Images remembered as whole.
const WHOLE_MAX: usize = 16_384;

/// Removals remembered. After so many, what was found whole is looked at once more.
const REMOVED_MAX: usize = 65_536;

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
    /// What was looked at, where that is to be remembered.
    parts: Option<&'a RefCell<Vec<Part>>>,
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
        let removals = self.store.removed.count();
        let lacks_some = Cell::new(false);
        let parts = RefCell::default();
        let look = Look {
            upstream,
            repository,
            arriving: &|digest| {
                lacks_some.set(true);
                arriving(digest)
            },
            parts: Some(&parts),
        };
        let is_whole = self.is_whole_to(look, manifest, INDEX_DEPTH_MAX);
        // What is only arriving may yet fail.
        if is_whole && !lacks_some.get() && self.is_complete() {
            let place = Place::of(upstream, repository);
            self.store
                .wholes
                .note(place, manifest.digest, removals, parts.into_inner());
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
            parts: None,
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
            parts: None,
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
        look.note(digest);
        let is_held = self.has_seen(look.upstream, look.repository, digest) && self.has_blob_file(digest);
        is_held || (look.arriving)(digest)
    }

    fn has_manifest(&self, look: Look<'_>, child: &Descriptor, depth: u32) -> bool {
        let (AnyDigest::Known(digest), Some(depth)) = (&child.digest, depth.checked_sub(1)) else {
            return false;
        };
        look.note(digest);
        self.has_seen(look.upstream, look.repository, digest)
            && matches!(self.manifest(digest), Ok(Some(held)) if self.is_whole_to(look, &held, depth))
    }
}

/// Not an attestation, which `BuildKit` lists beside the images as of an unknown platform.
fn is_image(child: &Descriptor) -> bool {
    let is_known = |platform: &crate::oci::manifest::Platform| platform.os != "unknown";
    child.role == Role::Manifest && child.platform.as_ref().is_none_or(is_known)
}

impl Look<'_> {
    fn note(&self, digest: &Digest) {
        if let Some(parts) = self.parts {
            parts.borrow_mut().push(part(digest));
        }
    }
}

/// The beginning of a digest, which tells content apart well enough: taken for another, it is looked at once more.
type Part = u64;

fn part(digest: &Digest) -> Part {
    let first = digest.as_bytes().first_chunk();
    first.map_or(0, |first| u64::from_be_bytes(*first))
}

/// The content removed of late.
#[derive(Default)]
pub(super) struct Removed {
    count: AtomicU64,
    recent: RwLock<Recent>,
}

#[derive(Default)]
struct Recent {
    /// What was removed earlier is forgotten.
    since: u64,
    /// Which removal it was.
    nth: HashMap<Part, u64>,
}

impl Removed {
    /// A blob or manifest was removed, or is no longer known to be in a repository.
    pub(super) fn note(&self, digest: &Digest) {
        let mut recent = self.recent.write().unwrap_or_else(PoisonError::into_inner);
        let nth = self.count.fetch_add(1, Ordering::AcqRel) + 1;
        if recent.nth.len() >= REMOVED_MAX {
            recent.nth.clear();
            recent.since = nth;
        }
        recent.nth.insert(part(digest), nth);
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// How many removals there were by now, if none since `count` was of one of these parts.
    fn none_since(&self, count: u64, parts: &[Part]) -> Option<u64> {
        let recent = self.recent.read().unwrap_or_else(PoisonError::into_inner);
        let is_gone = |part: &Part| recent.nth.get(part).is_some_and(|nth| *nth > count);
        (count >= recent.since && !parts.iter().any(is_gone)).then(|| self.count())
    }
}

/// An image found whole.
struct Whole {
    /// Of the removals up to this one, none was of a part.
    removals: AtomicU64,
    parts: Box<[Part]>,
}

/// The images found whole.
pub(super) struct Wholes {
    known: Cache<ImageKey, Arc<Whole>>,
    removed: Arc<Removed>,
}

impl Wholes {
    pub(super) fn new(removed: &Arc<Removed>) -> Self {
        Self {
            known: counted(WHOLE_MAX),
            removed: Arc::clone(removed),
        }
    }

    fn knows(&self, place: PlaceRef<'_>, digest: &Digest) -> bool {
        let image = ImageRef { place, digest };
        let Some(whole) = self.known.get(&image) else {
            return false;
        };
        let removals = whole.removals.load(Ordering::Acquire);
        if removals == self.removed.count() {
            return true;
        }
        if let Some(now) = self.removed.none_since(removals, &whole.parts) {
            whole.removals.store(now, Ordering::Release);
            return true;
        }
        self.known.remove(&image);
        false
    }

    fn note(&self, place: Place, digest: Digest, removals: u64, parts: Vec<Part>) {
        let whole = Whole {
            removals: removals.into(),
            parts: parts.into(),
        };
        self.known.insert(ImageKey { place, digest }, Arc::new(whole));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Algorithm;

    fn digest(number: u64) -> Digest {
        Digest::of(Algorithm::Sha256, &number.to_be_bytes())
    }

    #[test]
    fn e10_removal_of_other_content_leaves_an_image_complete() {
        let removed = Arc::new(Removed::default());
        let wholes = Wholes::new(&removed);
        let repository = "library/alpine".parse().unwrap();
        let place = || Place::of("docker.io", &repository);
        let image = digest(0);
        let parts = vec![part(&digest(1)), part(&digest(2))];
        wholes.note(place(), image, removed.count(), parts.clone());
        for other in 10..10_010 {
            removed.note(&digest(other));
            assert!(wholes.knows(place().borrowed(), &image));
        }
        removed.note(&digest(2));
        assert!(!wholes.knows(place().borrowed(), &image));

        // A removal during the look counts.
        let before = removed.count();
        removed.note(&digest(1));
        wholes.note(place(), image, before, parts.clone());
        assert!(!wholes.knows(place().borrowed(), &image));

        // What is forgotten may have been a part.
        wholes.note(place(), image, removed.count(), parts);
        for other in 0..=REMOVED_MAX as u64 {
            removed.note(&digest(100_000 + other));
        }
        assert!(!wholes.knows(place().borrowed(), &image));
    }
}
