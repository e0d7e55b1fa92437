//! Whether an image can be pulled whole from what is held.
//!
//! A manifest promises its config and layers. Whoever is given one while the upstream is silent relies on that promise,
//! so it is looked at before the manifest is served: every blob must be here, and proven in the same repository, for
//! else this repository's readers could not have it. Of an index one image is enough: which one a client wants is not
//! known, and most are only ever pulled for one platform.
//!
//! What was found whole stays so until a part of it is removed (`RemovedDigests`); so a hot tag costs one look-up, also while
//! other content is evicted.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;

use super::cache_key::{ImageKey, ImageRef, RepoKey, RepoKeyRef, bounded_cache};
use super::manifests::StoredManifest;
use super::{Store, View};
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind};
use crate::oci::{AnyDigest, Digest, Repository};

/// Images remembered as whole.
const COMPLETE_MAX: usize = 16_384;

/// Removals remembered. After so many, what was found whole is looked at once more.
const REMOVED_MAX: usize = 65_536;

/// How deep indexes may lie in each other. Real ones do not.
const INDEX_DEPTH_MAX: u32 = 2;

/// Blobs that are not held but arriving count as held, where what arrives may be read in the repository looked at.
pub type InFlight<'a> = &'a dyn Fn(&Digest) -> bool;

/// Where an image is looked at.
#[derive(Clone, Copy)]
struct Scope<'a> {
    upstream: &'a str,
    repository: &'a Repository,
    in_flight: InFlight<'a>,
    /// What was looked at, where that is to be remembered.
    prefixes: Option<&'a RefCell<Vec<DigestPrefix>>>,
}

impl Store {
    /// [`View::is_image_complete`] of everything that is held. Blocks.
    pub fn is_image_complete(
        &self,
        upstream: &str,
        repository: &Repository,
        manifest: &StoredManifest,
        in_flight: InFlight<'_>,
    ) -> bool {
        self.view()
            .is_image_complete(upstream, repository, manifest, in_flight)
    }
}

impl View<'_> {
    /// Whether all that `manifest` points to is held, or `in_flight`, and was seen in this repository.
    pub fn is_image_complete(
        &self,
        upstream: &str,
        repository: &Repository,
        manifest: &StoredManifest,
        in_flight: InFlight<'_>,
    ) -> bool {
        if self
            .store
            .complete_images
            .contains(RepoKeyRef::new(upstream, repository), &manifest.digest)
        {
            return true;
        }
        // Read first: a removal during the look makes what was found outdated, not wrong.
        let removals = self.store.removed.count();
        let lacks_any = Cell::new(false);
        let prefixes = RefCell::default();
        let scope = Scope {
            upstream,
            repository,
            in_flight: &|digest| {
                lacks_any.set(true);
                in_flight(digest)
            },
            prefixes: Some(&prefixes),
        };
        let is_complete = self.is_complete_in(scope, manifest, INDEX_DEPTH_MAX);
        // What is only arriving may yet fail.
        if is_complete && !lacks_any.get() && self.needed_no_disk() {
            let repo = RepoKey::of(upstream, repository);
            self.store
                .complete_images
                .note(repo, manifest.digest, removals, prefixes.into_inner());
        }
        is_complete
    }

    /// The blobs that `manifest` points to and that are missing here, in its order: the config first.
    pub fn missing_blobs<'a>(
        &'a self,
        upstream: &'a str,
        repository: &'a Repository,
        manifest: &'a StoredManifest,
        in_flight: InFlight<'a>,
    ) -> impl Iterator<Item = &'a Descriptor> {
        let scope = Scope {
            upstream,
            repository,
            in_flight,
            prefixes: None,
        };
        let blobs = manifest.manifest.descriptors.iter();
        blobs.filter(move |child| child.kind != DescriptorKind::Manifest && !self.has_blob(scope, child))
    }

    /// The images of an index that can be pulled whole.
    pub fn complete_children<'a>(
        &'a self,
        upstream: &'a str,
        repository: &'a Repository,
        index: &'a StoredManifest,
    ) -> impl Iterator<Item = &'a Descriptor> {
        let scope = Scope {
            upstream,
            repository,
            in_flight: &|_| false,
            prefixes: None,
        };
        let children = index.manifest.descriptors.iter();
        children.filter(move |child| is_image(child) && self.has_manifest(scope, child, INDEX_DEPTH_MAX))
    }

    fn is_complete_in(&self, scope: Scope<'_>, manifest: &StoredManifest, depth: u32) -> bool {
        let children = &manifest.manifest.descriptors;
        let mut blobs = children
            .iter()
            .filter(|child| child.kind != DescriptorKind::Manifest);
        if !blobs.all(|child| self.has_blob(scope, child)) {
            return false;
        }
        let mut images = children.iter().filter(|child| is_image(child)).peekable();
        manifest.manifest.kind != ManifestKind::Index
            || images.peek().is_none()
            || images.any(|child| self.has_manifest(scope, child, depth))
    }

    fn has_blob(&self, scope: Scope<'_>, child: &Descriptor) -> bool {
        // Its own place is named in the manifest; the registry need not have it.
        if child.has_urls {
            return true;
        }
        let AnyDigest::Supported(digest) = &child.digest else {
            return false;
        };
        scope.note(digest);
        let is_held = self.is_member(scope.upstream, scope.repository, digest) && self.has_blob_file(digest);
        is_held || (scope.in_flight)(digest)
    }

    fn has_manifest(&self, scope: Scope<'_>, child: &Descriptor, depth: u32) -> bool {
        let (AnyDigest::Supported(digest), Some(depth)) = (&child.digest, depth.checked_sub(1)) else {
            return false;
        };
        scope.note(digest);
        self.is_member(scope.upstream, scope.repository, digest)
            && matches!(self.manifest(digest), Ok(Some(held)) if self.is_complete_in(scope, &held, depth))
    }
}

/// Not an attestation, which `BuildKit` lists beside the images as of an unknown platform.
fn is_image(child: &Descriptor) -> bool {
    let is_known = |platform: &crate::oci::manifest::Platform| platform.os != "unknown";
    child.kind == DescriptorKind::Manifest && child.platform.as_ref().is_none_or(is_known)
}

impl Scope<'_> {
    fn note(&self, digest: &Digest) {
        if let Some(prefixes) = self.prefixes {
            prefixes.borrow_mut().push(prefix(digest));
        }
    }
}

/// The beginning of a digest, which tells content apart well enough: taken for another, it is looked at once more.
type DigestPrefix = u64;

fn prefix(digest: &Digest) -> DigestPrefix {
    let first = digest.as_bytes().first_chunk();
    first.map_or(0, |first| u64::from_be_bytes(*first))
}

/// The content removed of late.
#[derive(Default)]
pub(super) struct RemovedDigests {
    count: AtomicU64,
    recent: RwLock<Recent>,
}

#[derive(Default)]
struct Recent {
    /// What was removed earlier is forgotten.
    since: u64,
    /// Which removal it was.
    nth: HashMap<DigestPrefix, u64>,
}

impl RemovedDigests {
    /// A blob or manifest was removed, or is no longer known to be in a repository.
    pub(super) fn note(&self, digest: &Digest) {
        let mut recent = self.recent.write().unwrap_or_else(PoisonError::into_inner);
        let nth = self.count.fetch_add(1, Ordering::AcqRel) + 1;
        if recent.nth.len() >= REMOVED_MAX {
            recent.nth.clear();
            recent.since = nth;
        }
        recent.nth.insert(prefix(digest), nth);
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// How many removals there were by now, if none since `count` was of one of these parts.
    fn none_since(&self, count: u64, prefixes: &[DigestPrefix]) -> Option<u64> {
        let recent = self.recent.read().unwrap_or_else(PoisonError::into_inner);
        let is_gone = |prefix: &DigestPrefix| recent.nth.get(prefix).is_some_and(|nth| *nth > count);
        (count >= recent.since && !prefixes.iter().any(is_gone)).then(|| self.count())
    }
}

/// An image found whole.
struct CompleteImage {
    /// Of the removals up to this one, none was of a part.
    removals: AtomicU64,
    prefixes: Box<[DigestPrefix]>,
}

/// The images found whole.
pub(super) struct CompleteImages {
    entries: Cache<ImageKey, Arc<CompleteImage>>,
    removed: Arc<RemovedDigests>,
}

impl CompleteImages {
    pub(super) fn new(removed: &Arc<RemovedDigests>) -> Self {
        Self {
            entries: bounded_cache(COMPLETE_MAX),
            removed: Arc::clone(removed),
        }
    }

    fn contains(&self, repo: RepoKeyRef<'_>, digest: &Digest) -> bool {
        let image = ImageRef { repo, digest };
        let Some(entry) = self.entries.get(&image) else {
            return false;
        };
        let removals = entry.removals.load(Ordering::Acquire);
        if removals == self.removed.count() {
            return true;
        }
        if let Some(now) = self.removed.none_since(removals, &entry.prefixes) {
            entry.removals.store(now, Ordering::Release);
            return true;
        }
        self.entries.remove(&image);
        false
    }

    fn note(&self, repo: RepoKey, digest: Digest, removals: u64, prefixes: Vec<DigestPrefix>) {
        let entry = CompleteImage {
            removals: removals.into(),
            prefixes: prefixes.into(),
        };
        self.entries.insert(ImageKey { repo, digest }, Arc::new(entry));
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
        let removed = Arc::new(RemovedDigests::default());
        let complete = CompleteImages::new(&removed);
        let repository = "library/alpine".parse().unwrap();
        let repo = || RepoKey::of("docker.io", &repository);
        let image = digest(0);
        let prefixes = vec![prefix(&digest(1)), prefix(&digest(2))];
        complete.note(repo(), image, removed.count(), prefixes.clone());
        for other in 10..10_010 {
            removed.note(&digest(other));
            assert!(complete.contains(repo().borrowed(), &image));
        }
        removed.note(&digest(2));
        assert!(!complete.contains(repo().borrowed(), &image));

        // A removal during the look counts.
        let before = removed.count();
        removed.note(&digest(1));
        complete.note(repo(), image, before, prefixes.clone());
        assert!(!complete.contains(repo().borrowed(), &image));

        // What is forgotten may have been a part.
        complete.note(repo(), image, removed.count(), prefixes);
        for other in 0..=REMOVED_MAX as u64 {
            removed.note(&digest(100_000 + other));
        }
        assert!(!complete.contains(repo().borrowed(), &image));
    }
}
