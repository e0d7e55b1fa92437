//! Image completeness: whether a manifest and everything it refers to are cached.
//!
//! A client that gets a manifest during an outage relies on its config and layers. So completeness is checked before
//! the manifest is served: every blob must be cached and be a member of the same repository, because otherwise the
//! repository's readers could not pull it. An index is complete if one of its images is: the platform that a client
//! needs is unknown, and most indexes are only ever pulled for one platform.
//!
//! A complete image stays so until one of its parts is removed (`RemovedDigests`). So a hot tag costs one lookup, also
//! while other content is evicted.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use quick_cache::sync::Cache;

use super::cache_key::{ImageKey, ImageRef, RepoKey, RepoKeyRef, bounded_cache};
use super::manifests::StoredManifest;
use super::{Store, View};
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind};
use crate::oci::{AnyDigest, Digest, Repository};

/// Maximum number of cached completeness results.
const COMPLETE_MAX: usize = 16_384;

/// Maximum number of recorded removals. Beyond it, earlier results are checked again.
const REMOVED_MAX: usize = 65_536;

/// Maximum nesting depth of indexes. Real indexes are not nested.
const INDEX_DEPTH_MAX: u32 = 2;

/// Whether a missing blob is being downloaded and may be read in this repository; it then counts as cached.
pub type InFlight<'a> = &'a dyn Fn(&Digest) -> bool;

/// Parameters of one completeness check.
#[derive(Clone, Copy)]
struct Scope<'a> {
    upstream: &'a str,
    repository: &'a Repository,
    in_flight: InFlight<'a>,
    /// Collects the digests checked, if the result is to be cached.
    prefixes: Option<&'a RefCell<Vec<DigestPrefix>>>,
}

impl Store {
    /// [`View::is_image_complete`] on the disk view. Blocks.
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
    /// Whether everything that `manifest` refers to is cached, or `in_flight`, and is a member of this repository.
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
        // Read first: a removal during the check makes the cached result outdated, not wrong.
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
        // A download in flight may still fail, so the result is not cached.
        if is_complete && !lacks_any.get() && self.needed_no_disk() {
            let repo = RepoKey::of(upstream, repository);
            self.store
                .complete_images
                .insert(repo, manifest.digest, removals, prefixes.into_inner());
        }
        is_complete
    }

    /// The missing blobs of `manifest`, in its order: the config first.
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

    /// The complete images of an index.
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
        // It is fetched from the URLs in the manifest; the registry need not have it.
        if child.has_urls {
            return true;
        }
        let AnyDigest::Supported(digest) = &child.digest else {
            return false;
        };
        scope.collect(digest);
        let is_held = self.is_member(scope.upstream, scope.repository, digest) && self.has_blob_file(digest);
        is_held || (scope.in_flight)(digest)
    }

    fn has_manifest(&self, scope: Scope<'_>, child: &Descriptor, depth: u32) -> bool {
        let (AnyDigest::Supported(digest), Some(depth)) = (&child.digest, depth.checked_sub(1)) else {
            return false;
        };
        scope.collect(digest);
        self.is_member(scope.upstream, scope.repository, digest)
            && matches!(self.manifest(digest), Ok(Some(held)) if self.is_complete_in(scope, &held, depth))
    }
}

/// True unless it is an attestation, which `BuildKit` lists beside the images with an unknown platform.
fn is_image(child: &Descriptor) -> bool {
    let is_known = |platform: &crate::oci::manifest::Platform| platform.os != "unknown";
    child.kind == DescriptorKind::Manifest && child.platform.as_ref().is_none_or(is_known)
}

impl Scope<'_> {
    fn collect(&self, digest: &Digest) {
        if let Some(prefixes) = self.prefixes {
            prefixes.borrow_mut().push(prefix(digest));
        }
    }
}

/// The first 8 bytes of a digest. A collision only costs an extra check.
type DigestPrefix = u64;

fn prefix(digest: &Digest) -> DigestPrefix {
    let first = digest.as_bytes().first_chunk();
    first.map_or(0, |first| u64::from_be_bytes(*first))
}

/// Recently removed digests.
#[derive(Default)]
pub(super) struct RemovedDigests {
    count: AtomicU64,
    recent: RwLock<Recent>,
}

#[derive(Default)]
struct Recent {
    /// Removals before this one are no longer recorded.
    since: u64,
    /// Sequence number of the last removal, by digest.
    nth: HashMap<DigestPrefix, u64>,
}

impl RemovedDigests {
    /// Records the removal of a blob or manifest, or of a repository member.
    pub(super) fn record(&self, digest: &Digest) {
        let mut recent = self.recent.write();
        let nth = self.count.fetch_add(1, Ordering::AcqRel) + 1;
        if recent.nth.len() >= REMOVED_MAX {
            recent.nth.clear();
            recent.since = nth;
        }
        recent.nth.insert(prefix(digest), nth);
    }

    /// Number of removals so far.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Whether this digest was removed since there were so many removals. Also true if that is no longer known.
    pub(super) fn is_removed_since(&self, count: u64, digest: &Digest) -> bool {
        self.none_since(count, &[prefix(digest)]).is_none()
    }

    /// The current number of removals, if none since `count` was of one of these digests.
    fn none_since(&self, count: u64, prefixes: &[DigestPrefix]) -> Option<u64> {
        let recent = self.recent.read();
        let is_gone = |prefix: &DigestPrefix| recent.nth.get(prefix).is_some_and(|nth| *nth > count);
        (count >= recent.since && !prefixes.iter().any(is_gone)).then(|| self.count())
    }
}

/// A cached result: this image was complete.
struct CompleteImage {
    /// No removal up to this one concerned the image.
    removals: AtomicU64,
    prefixes: Box<[DigestPrefix]>,
}

/// Cache of complete images.
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

    fn insert(&self, repo: RepoKey, digest: Digest, removals: u64, prefixes: Vec<DigestPrefix>) {
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
    fn e10_unrelated_removal_keeps_image_complete() {
        let removed = Arc::new(RemovedDigests::default());
        let complete = CompleteImages::new(&removed);
        let repository = "library/alpine".parse().unwrap();
        let repo = || RepoKey::of("docker.io", &repository);
        let image = digest(0);
        let prefixes = vec![prefix(&digest(1)), prefix(&digest(2))];
        complete.insert(repo(), image, removed.count(), prefixes.clone());
        for other in 10..10_010 {
            removed.record(&digest(other));
            assert!(complete.contains(repo().borrowed(), &image));
        }
        removed.record(&digest(2));
        assert!(!complete.contains(repo().borrowed(), &image));

        // A removal during the check counts.
        let before = removed.count();
        removed.record(&digest(1));
        complete.insert(repo(), image, before, prefixes.clone());
        assert!(!complete.contains(repo().borrowed(), &image));

        // A removal that is no longer recorded may have been of this image.
        complete.insert(repo(), image, removed.count(), prefixes);
        for other in 0..=REMOVED_MAX as u64 {
            removed.record(&digest(100_000 + other));
        }
        assert!(!complete.contains(repo().borrowed(), &image));
    }
}
