//! Per-image usage: size, and size shared with other images.
//!
//! For the operator, not for pulls. Content is referenced many times: a layer by every manifest that lists it, and a
//! manifest by every tag and index that refers to it. So an image has two sizes: the total, and the part that no other
//! image needs.
//!
//! A page of images costs only what it shows. Only sharing concerns all images: [`ReferenceCounts`] counts references
//! on the graph of all images, in 16 bytes per digest, and is cached until something changes.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::graph::{Graph, Node};
use super::tags::{TagKey, TagRecord};
use super::{Store, StoreError, content_path, size_of};
use crate::oci::manifest::DescriptorKind;
use crate::oci::{AnyDigest, Digest};

const TAGS_PER_PAGE: usize = 256;

/// Maximum nesting depth of indexes.
const DEPTH_MAX: u32 = 3;

/// In a store with more tags, manifests and blobs, an outdated count is used for a while after a change, so that
/// counting takes at most a twentieth of the time.
const EXACT_OBJECTS_MAX: usize = 5_000;
const RECOUNT_PAUSE_FACTOR: u32 = 20;

/// Number of tags that reference each cached digest.
#[derive(Debug, Default)]
pub struct ReferenceCounts {
    /// In order of a keyed hash of the digest, so that a client cannot craft two digests with one hash.
    counts: Vec<(u64, u32)>,
    keys: RandomState,
}

impl ReferenceCounts {
    fn of(graph: &Graph) -> Self {
        let keys = RandomState::new();
        let counted = graph.nodes().zip(graph.tag_counts());
        let counted = counted.filter_map(|(id, count)| match graph.names.node(id)? {
            Node::Manifest(digest) | Node::Blob(digest) if count > 0 => Some((keys.hash_one(digest), count)),
            _ => None,
        });
        let mut counts: Vec<(u64, u32)> = counted.collect();
        counts.sort_unstable();
        // A digest that is stored as both has two nodes. The later one here has more tags.
        counts.dedup_by(|later, kept| {
            let is_same = later.0 == kept.0;
            if is_same {
                *kept = *later;
            }
            is_same
        });
        counts.shrink_to_fit();
        Self { counts, keys }
    }

    /// Number of tags that reference this digest.
    pub fn count(&self, digest: &Digest) -> usize {
        let key = self.keys.hash_one(digest);
        let found = self.counts.binary_search_by_key(&key, |(key, _)| *key);
        let count = found.ok().and_then(|at| self.counts.get(at));
        count.map_or(0, |(_, count)| usize::try_from(*count).unwrap_or(usize::MAX))
    }

    /// Bytes of an image: the total cached, and the part that no other image references.
    pub fn sizes(&self, image: &TagUsage) -> (u64, u64) {
        let unshared = |(digest, _): &(&Digest, &Content)| self.count(digest) <= 1;
        let unshared = image.content.iter().filter(unshared);
        (image.bytes(), unshared.map(|(_, content)| content.bytes).sum())
    }
}

/// The last result, cached.
#[derive(Default)]
pub(super) struct ReferenceCountCache(Mutex<Option<Counted>>);

struct Counted {
    counts: Arc<ReferenceCounts>,
    /// The change counter before counting.
    changes: u64,
    objects: usize,
    ended: Instant,
    took: Duration,
}

impl Counted {
    fn is_current(&self, changes: u64) -> bool {
        self.changes == changes
            || (self.objects > EXACT_OBJECTS_MAX && self.ended.elapsed() < self.took * RECOUNT_PAUSE_FACTOR)
    }
}

/// A tag and its cached content.
#[derive(Debug)]
pub struct TagUsage {
    /// The tag.
    pub key: TagKey,
    /// The tag record.
    pub record: TagRecord,
    /// The cached manifests and blobs that it references, directly or not, with their sizes in bytes.
    pub content: BTreeMap<Digest, Content>,
}

/// A cached manifest or blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Size in bytes.
    pub bytes: u64,
    /// Whether it is a manifest, not a blob.
    pub is_manifest: bool,
}

/// Result of a deletion or of its dry run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Deleted tags.
    pub tags: u64,
    /// Deleted manifests.
    pub manifests: u64,
    /// Deleted blobs.
    pub blobs: u64,
    /// Their total size in bytes.
    pub bytes: u64,
}

impl Reclaimed {
    pub(super) fn count(&mut self, removed: &Node, bytes: u64) {
        self.bytes += bytes;
        match removed {
            Node::Tag(_) => self.tags += 1,
            Node::Manifest(_) => self.manifests += 1,
            Node::Blob(_) => self.blobs += 1,
        }
    }
}

impl TagUsage {
    /// Total cached bytes.
    pub fn bytes(&self) -> u64 {
        self.content.values().map(|content| content.bytes).sum()
    }
}

impl Store {
    /// Visits all tags in order, until `each` breaks. Blocks.
    pub fn each_tag(&self, mut each: impl FnMut(TagKey, TagRecord) -> ControlFlow<()>) {
        let mut after: Option<TagKey> = None;
        loop {
            let page = self.tags(after.as_ref(), TAGS_PER_PAGE);
            let is_last = page.len() < TAGS_PER_PAGE;
            after = page.last().map(|(key, _)| key.clone());
            for (key, record) in page {
                if each(key, record).is_break() {
                    return;
                }
            }
            if is_last {
                return;
            }
        }
    }

    /// Reference counts of all tags. Counts once after a change and returns the cached result until the next. Blocks.
    pub fn reference_counts(&self) -> Arc<ReferenceCounts> {
        // Held while counting: concurrent callers wait for the same result.
        let mut known = self.reference_counts.0.lock();
        // Read first: a change while counting makes the result outdated, not wrong.
        let (changes, began) = (self.usage.changes(), Instant::now());
        if let Some(known) = known.as_ref().filter(|known| known.is_current(changes)) {
            return Arc::clone(&known.counts);
        }
        let graph = match self.evictor.snapshot() {
            Ok(graph) => graph,
            Err(fault) => {
                tracing::warn!(%fault, "failed to count the references of images");
                return known
                    .as_ref()
                    .map(|known| Arc::clone(&known.counts))
                    .unwrap_or_default();
            }
        };
        let counts = Arc::new(ReferenceCounts::of(&graph));
        *known = Some(Counted {
            counts: Arc::clone(&counts),
            changes,
            objects: graph.len(),
            ended: Instant::now(),
            took: began.elapsed(),
        });
        counts
    }

    /// Usage of at most `limit` tags in order, after the first `skip`. Blocks.
    pub fn tag_usages(&self, skip: usize, limit: usize) -> Vec<TagUsage> {
        let tags = self.tags_from(skip, limit).into_iter();
        tags.map(|(key, record)| self.usage_of(key, record)).collect()
    }

    /// Usage of a tag with this record. Blocks.
    pub fn usage_of(&self, key: TagKey, record: TagRecord) -> TagUsage {
        TagUsage {
            key,
            content: self.content(&record),
            record,
        }
    }

    /// Usage of one tag, if it is known. Blocks.
    pub fn tag_usage(&self, key: &TagKey) -> Result<Option<TagUsage>, StoreError> {
        let record = self.tag(key)?;
        Ok(record.map(|record| self.usage_of(key.clone(), (*record).clone())))
    }

    fn content(&self, record: &TagRecord) -> BTreeMap<Digest, Content> {
        let mut content = BTreeMap::new();
        for variant in &record.variants {
            self.collect_content(&variant.digest, DEPTH_MAX, &mut content);
            if let Some(previous) = &variant.previous {
                self.collect_content(&previous.digest, DEPTH_MAX, &mut content);
            }
        }
        content
    }

    fn collect_content(&self, digest: &Digest, depth: u32, content: &mut BTreeMap<Digest, Content>) {
        if content.contains_key(digest) {
            return;
        }
        let Ok(Some(stored)) = self.manifest(digest) else {
            return;
        };
        let manifest = Content {
            bytes: stored.bytes.len() as u64,
            is_manifest: true,
        };
        content.insert(*digest, manifest);
        for child in &stored.manifest.descriptors {
            let AnyDigest::Supported(child_digest) = child.digest else {
                continue;
            };
            if child.kind == DescriptorKind::Manifest {
                if let Some(depth) = depth.checked_sub(1) {
                    self.collect_content(&child_digest, depth, content);
                }
                continue;
            }
            if content.contains_key(&child_digest) {
                continue;
            }
            let size = size_of(self.fs.as_ref(), &content_path("blobs", &child_digest));
            if let Some(bytes) = size {
                let blob = Content {
                    bytes,
                    is_manifest: false,
                };
                content.insert(child_digest, blob);
            }
        }
    }
}
