//! Snapshot of the stored images, manifests and blobs, the input of an eviction plan.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::super::access_times::ContentId;
use super::super::fs::Entry;
use super::super::pins::Pin;
use super::super::{blobs, manifests};
use super::Evictor;
use super::plan::{Image, ManifestNode, Node, Snapshot};
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{Algorithm, AnyDigest, Digest, Manifest};

impl Evictor {
    /// Lists the stored content with its access times. Content needed after the snapshot is tracked by
    /// `AccessTimes::mark_needed`.
    pub(super) fn snapshot(&self) -> Snapshot {
        let mut images = Vec::new();
        self.tags.walk_with_times(&self.stop, |key, record, modified| {
            let is_pinned = self.pins.has(&Pin::Tag(key.clone()));
            images.push(Image {
                targets: exactly(self.tags.digests_of(&key, &record)),
                // The tag file is written when its target changes. Accesses are recorded on the manifests.
                used_at: self.access_times.plausible(modified),
                is_pinned,
                key,
            });
        });
        let mut manifests = Vec::new();
        self.walk(manifests::TREE, |path, entry, digest| {
            let node = self.node(ContentId::Manifest(digest), entry, false);
            let bytes = self.fs.read_file(path, MANIFEST_BYTES_MAX as u64).ok();
            // A corrupt manifest has no children here. The next request for it detects the corruption.
            let manifest = bytes.and_then(|bytes| Manifest::read(&bytes).ok());
            let (children, subject) = manifest.map_or_else(Default::default, |manifest| {
                let known = manifest
                    .descriptors
                    .iter()
                    .filter_map(|child| match &child.digest {
                        AnyDigest::Supported(digest) => Some(*digest),
                        AnyDigest::Unsupported(_) => None,
                    });
                (exactly(known.collect()), manifest.subject)
            });
            manifests.push(ManifestNode {
                node,
                children,
                subject,
            });
        });
        let mut blobs = Vec::new();
        self.walk(blobs::TREE, |_, entry, digest| {
            let is_in_use = self.blobs.is_in_use(&digest);
            blobs.push(self.node(ContentId::Blob(digest), entry, is_in_use));
        });
        Snapshot {
            images,
            manifests,
            blobs,
        }
    }

    fn node(&self, used: ContentId, entry: &Entry, is_in_use: bool) -> Node {
        let (ContentId::Blob(digest) | ContentId::Manifest(digest)) = used;
        Node {
            digest,
            bytes: entry.size,
            used_at: self.access_times.last_access(used, entry.modified),
            is_protected: is_in_use || self.pins.has(&Pin::Digest(digest)),
        }
    }

    fn walk(&self, tree: &str, mut each: impl FnMut(&Path, &Entry, Digest)) {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let tree = Path::new(tree).join(algorithm.to_string());
            for folder in self.fs.list(&tree).unwrap_or_default() {
                let folder = tree.join(folder.name);
                for entry in self.fs.list(&folder).unwrap_or_default() {
                    if self.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    // Skips metadata files and files that the store did not create.
                    if let Ok(digest) = format!("{algorithm}:{}", entry.name).parse() {
                        each(&folder.join(&entry.name), &entry, digest);
                    }
                }
            }
        }
    }
}

/// A snapshot may hold hundreds of thousands of short vectors, so their spare capacity is released.
fn exactly(mut digests: Vec<Digest>) -> Vec<Digest> {
    digests.shrink_to_fit();
    digests
}
