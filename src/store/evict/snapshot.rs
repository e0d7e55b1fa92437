//! The look at everything held that a plan is made from.

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
    /// What is held, and when it was used. What comes after the look is [`AccessTimes::mark_needed`].
    pub(super) fn snapshot(&self) -> Snapshot {
        let mut images = Vec::new();
        self.tags.walk_with_times(&self.stop, |key, record, modified| {
            let is_pinned = self.pins.has(&Pin::Tag(key.clone()));
            images.push(Image {
                targets: exactly(self.tags.digests_of(&key, &record)),
                // Written when what it names changed; its uses are those of its manifests.
                used_at: self.access_times.plausible(modified),
                is_pinned,
                key,
            });
        });
        let mut listed = Vec::new();
        self.walk(manifests::TREE, |path, entry, digest| {
            let content = self.content(ContentId::Manifest(digest), entry, false);
            let bytes = self.fs.read_file(path, MANIFEST_BYTES_MAX as u64).ok();
            // A damaged one leads nowhere; it is found damaged by whoever asks for it.
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
            listed.push(ManifestNode {
                content,
                children,
                subject,
            });
        });
        let mut blobs = Vec::new();
        self.walk(blobs::TREE, |_, entry, digest| {
            let is_in_use = self.blobs.is_in_use(&digest);
            blobs.push(self.content(ContentId::Blob(digest), entry, is_in_use));
        });
        Snapshot {
            images,
            manifests: listed,
            blobs,
        }
    }

    fn content(&self, used: ContentId, entry: &Entry, is_in_use: bool) -> Node {
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
                    // Not a record beside a manifest, nor anything that is not ours.
                    if let Ok(digest) = format!("{algorithm}:{}", entry.name).parse() {
                        each(&folder.join(&entry.name), &entry, digest);
                    }
                }
            }
        }
    }
}

/// There may be hundreds of thousands of them, most with fewer than a vector makes room for.
fn exactly(mut digests: Vec<Digest>) -> Vec<Digest> {
    digests.shrink_to_fit();
    digests
}
