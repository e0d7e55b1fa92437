//! Per-image usage: size, size shared with other images, and the space that a deletion would reclaim.
//!
//! For the operator, not for pulls. Content is referenced many times: a layer by every manifest that lists it, and a
//! manifest by every tag and index that refers to it. So an image has two sizes: the total, and the part that no other
//! image needs.
//!
//! A page of images costs only what it shows. Only sharing concerns all images: [`ReferenceCounts`] counts references
//! in some 16 bytes per digest, and is cached until something changes. Tags are always read a page at a time.
//!
//! Deleting an image deletes only what no other tag needs, and no manifest that was pulled by digest.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::BuildHasher as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::fs::FileSystem;
use super::tags::{TagKey, TagRecord};
use super::{Store, StoreError, content_path, size_of};
use crate::oci::manifest::DescriptorKind;
use crate::oci::{Algorithm, AnyDigest, Digest};

/// Maximum number of tags counted. In a larger store, content that only later tags need counts as unshared.
pub const TAGS_MAX: usize = 50_000;

const TAGS_PER_PAGE: usize = 256;

/// Maximum nesting depth of indexes.
const DEPTH_MAX: u32 = 3;

/// In a store with more tags, an outdated count is used for a while after a change, so that counting takes at most a
/// twentieth of the time.
const EXACT_TAGS_MAX: usize = 1_000;
const RECOUNT_PAUSE_FACTOR: u32 = 20;

/// Number of tags that reference each cached digest.
#[derive(Debug, Default)]
pub struct ReferenceCounts {
    /// By a keyed hash of the digest, so that a client cannot craft two digests with one hash.
    counts: HashMap<u64, u32>,
    keys: RandomState,
}

impl ReferenceCounts {
    /// Number of tags that reference this digest.
    pub fn count(&self, digest: &Digest) -> usize {
        let count = self.counts.get(&self.keys.hash_one(digest));
        count.map_or(0, |count| usize::try_from(*count).unwrap_or(usize::MAX))
    }

    /// Bytes of an image: the total cached, and the part that no other image references.
    pub fn sizes(&self, image: &TagUsage) -> (u64, u64) {
        let unshared = |(digest, _): &(&Digest, &Content)| self.count(digest) <= 1;
        let unshared = image.content.iter().filter(unshared);
        (image.bytes(), unshared.map(|(_, content)| content.bytes).sum())
    }

    fn add<'a>(&mut self, content: impl Iterator<Item = &'a Digest>) {
        for digest in content {
            let count = self.counts.entry(self.keys.hash_one(digest)).or_default();
            *count = count.saturating_add(1);
        }
    }
}

/// The last result, cached.
#[derive(Default)]
pub(super) struct ReferenceCountCache(Mutex<Option<Counted>>);

struct Counted {
    counts: Arc<ReferenceCounts>,
    /// The change counter before counting.
    changes: u64,
    tags: usize,
    ended: Instant,
    took: Duration,
}

impl Counted {
    fn is_current(&self, changes: u64) -> bool {
        self.changes == changes
            || (self.tags > EXACT_TAGS_MAX && self.ended.elapsed() < self.took * RECOUNT_PAUSE_FACTOR)
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
        let mut known = self
            .reference_counts
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Read first: a change while counting makes the result outdated, not wrong.
        let (changes, began) = (self.usage.changes(), Instant::now());
        if let Some(known) = known.as_ref().filter(|known| known.is_current(changes)) {
            return Arc::clone(&known.counts);
        }
        let (mut counts, mut tags, mut sizes) = (ReferenceCounts::default(), 0, HashMap::new());
        self.each_tag(|_, record| {
            counts.add(self.content(&record, &mut sizes).keys());
            tags += 1;
            if tags < TAGS_MAX {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        let counts = Arc::new(counts);
        *known = Some(Counted {
            counts: Arc::clone(&counts),
            changes,
            tags,
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
            content: self.content(&record, &mut HashMap::new()),
            record,
        }
    }

    /// Usage of one tag, if it is known. Blocks.
    pub fn tag_usage(&self, key: &TagKey) -> Result<Option<TagUsage>, StoreError> {
        let record = self.tag(key)?;
        Ok(record.map(|record| self.usage_of(key.clone(), (*record).clone())))
    }

    /// Deletes these tags and the content that nothing else references; with `is_dry_run`, only computes it. A client
    /// that is reading such a blob can read it to its end. Blocks.
    pub fn delete_images(&self, keys: &[TagKey], is_dry_run: bool) -> Result<Reclaimed, StoreError> {
        let deleted_keys: HashSet<&TagKey> = keys.iter().collect();
        let (mut candidates, mut found) = (BTreeMap::new(), Vec::new());
        for key in &deleted_keys {
            if let Some(image) = self.tag_usage(key)? {
                candidates.extend(image.content);
                found.push(*key);
            }
        }
        let (mut referenced, mut sizes) = (HashSet::new(), HashMap::new());
        self.each_tag(|key, record| {
            if !deleted_keys.contains(&key) {
                let content = self.content(&record, &mut sizes);
                referenced.extend(
                    content
                        .into_keys()
                        .filter(|digest| candidates.contains_key(digest)),
                );
            }
            ControlFlow::Continue(())
        });
        self.add_untagged_references(&candidates, &mut referenced);
        let mut reclaimed = Reclaimed {
            tags: found.len() as u64,
            ..Reclaimed::default()
        };
        if !is_dry_run {
            for key in found {
                self.remove_tag(key)?;
            }
        }
        for (digest, content) in candidates {
            if referenced.contains(&digest) {
                continue;
            }
            let was_there = match (is_dry_run, content.is_manifest) {
                (true, _) => true,
                (false, true) => self.remove_manifest(&digest)?,
                (false, false) => self.remove_blob(&digest)?,
            };
            if was_there {
                reclaimed.bytes += content.bytes;
                *if content.is_manifest {
                    &mut reclaimed.manifests
                } else {
                    &mut reclaimed.blobs
                } += 1;
            }
        }
        Ok(reclaimed)
    }

    /// Adds the digests that untagged manifests reference: those were pulled by digest.
    fn add_untagged_references(
        &self,
        candidates: &BTreeMap<Digest, Content>,
        referenced: &mut HashSet<Digest>,
    ) {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let tree = format!("manifests/{algorithm}");
            for folder in self.fs.list(Path::new(&tree)).unwrap_or_default() {
                let folder = Path::new(&tree).join(folder.name);
                for file in self.fs.list(&folder).unwrap_or_default() {
                    let Some(digest) = Digest::from_hex(algorithm, &file.name).ok() else {
                        continue;
                    };
                    if candidates.contains_key(&digest) {
                        continue;
                    }
                    if let Ok(Some(stored)) = self.manifest(&digest) {
                        referenced.extend(
                            stored
                                .manifest
                                .descriptors
                                .iter()
                                .filter_map(|child| supported(&child.digest)),
                        );
                    }
                }
            }
        }
    }

    fn content(
        &self,
        record: &TagRecord,
        sizes: &mut HashMap<Digest, Option<u64>>,
    ) -> BTreeMap<Digest, Content> {
        let mut content = BTreeMap::new();
        for variant in &record.variants {
            self.collect_content(&variant.digest, DEPTH_MAX, &mut content, sizes);
            if let Some(previous) = &variant.previous {
                self.collect_content(&previous.digest, DEPTH_MAX, &mut content, sizes);
            }
        }
        content
    }

    fn collect_content(
        &self,
        digest: &Digest,
        depth: u32,
        content: &mut BTreeMap<Digest, Content>,
        sizes: &mut HashMap<Digest, Option<u64>>,
    ) {
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
            let Some(child_digest) = supported(&child.digest) else {
                continue;
            };
            if child.kind == DescriptorKind::Manifest {
                if let Some(depth) = depth.checked_sub(1) {
                    self.collect_content(&child_digest, depth, content, sizes);
                }
                continue;
            }
            let size = *sizes
                .entry(child_digest)
                .or_insert_with(|| size_of(self.fs.as_ref(), &content_path("blobs", &child_digest)));
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

fn supported(digest: &AnyDigest) -> Option<Digest> {
    match digest {
        AnyDigest::Supported(digest) => Some(*digest),
        AnyDigest::Unsupported(_) => None,
    }
}
