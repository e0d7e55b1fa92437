//! The images held: how large each is, what it shares with others, and what letting one go would free.
//!
//! For the operator, not for a pull. Content is named by many: a layer belongs to every manifest that lists it, and a
//! manifest to every tag and index that names it. So the size of an image is told twice: all of it, and what of it no
//! other image needs.
//!
//! A page of images costs what it shows. Only what is shared is a matter of all images: [`ReferenceCounts`] counts that in some
//! 16 bytes for each digest, and is kept until something changes. Tags are always gone through a page at a time.
//!
//! What goes with an image is what nothing else needs: no other tag, and no manifest that was pulled by its digest alone.

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

/// Tags looked at for what they share. In a store with more, what only later ones need counts as nobody's.
pub const TAGS_MAX: usize = 50_000;

const TAGS_PER_PAGE: usize = 256;

/// How deep indexes may lie in each other.
const DEPTH_MAX: u32 = 3;

/// In a store with more tags, a count of what is shared is used for a while after a change, so that counting takes at most
/// a twentieth of the time.
const EXACT_TAGS_MAX: usize = 1_000;
const RECOUNT_PAUSE_FACTOR: u32 = 20;

/// How many tags need each digest held.
#[derive(Debug, Default)]
pub struct ReferenceCounts {
    /// By a keyed hash of the digest: a stranger cannot make two digests count as one.
    counts: HashMap<u64, u32>,
    keys: RandomState,
}

impl ReferenceCounts {
    /// How many images need what is held under this digest.
    pub fn count(&self, digest: &Digest) -> usize {
        let count = self.counts.get(&self.keys.hash_one(digest));
        count.map_or(0, |count| usize::try_from(*count).unwrap_or(usize::MAX))
    }

    /// The bytes of an image: all that is held of it, and what of that no other image needs.
    pub fn sizes(&self, image: &TagUsage) -> (u64, u64) {
        let own = |(digest, _): &(&Digest, &Content)| self.count(digest) <= 1;
        let own = image.content.iter().filter(own);
        (image.bytes(), own.map(|(_, content)| content.bytes).sum())
    }

    fn add<'a>(&mut self, content: impl Iterator<Item = &'a Digest>) {
        for digest in content {
            let count = self.counts.entry(self.keys.hash_one(digest)).or_default();
            *count = count.saturating_add(1);
        }
    }
}

/// The last [`ReferenceCounts`] counted.
#[derive(Default)]
pub(super) struct ReferenceCountCache(Mutex<Option<Counted>>);

struct Counted {
    counts: Arc<ReferenceCounts>,
    /// The count of changes before the look.
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

/// A tag, and what of it is held.
#[derive(Debug)]
pub struct TagUsage {
    /// Which.
    pub key: TagKey,
    /// What is known of it.
    pub record: TagRecord,
    /// The manifests and blobs held that it names, directly or not, with their sizes in bytes.
    pub content: BTreeMap<Digest, Content>,
}

/// Something held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether it is a manifest, not a blob.
    pub is_manifest: bool,
}

/// What went, or would go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Tags forgotten.
    pub tags: u64,
    /// Manifests removed.
    pub manifests: u64,
    /// Blobs removed.
    pub blobs: u64,
    /// Their size together.
    pub bytes: u64,
}

impl TagUsage {
    /// The bytes of all that is held of it.
    pub fn bytes(&self) -> u64 {
        self.content.values().map(|content| content.bytes).sum()
    }
}

impl Store {
    /// Goes through all tags in order, until `each` breaks off. Blocks.
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

    /// What is shared. One look at everything after a change, and none until the next. Blocks.
    pub fn reference_counts(&self) -> Arc<ReferenceCounts> {
        // Held during the look: those that wait want the same.
        let mut known = self
            .reference_counts
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Read first: a change during the look makes what was found outdated, not wrong.
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

    /// At most `limit` images in the order of their names, after the first `skip`. Blocks.
    pub fn tag_usages(&self, skip: usize, limit: usize) -> Vec<TagUsage> {
        let tags = self.tags_from(skip, limit).into_iter();
        tags.map(|(key, record)| self.usage_of(key, record)).collect()
    }

    /// What of a tag is held. Blocks.
    pub fn usage_of(&self, key: TagKey, record: TagRecord) -> TagUsage {
        TagUsage {
            key,
            content: self.content(&record, &mut HashMap::new()),
            record,
        }
    }

    /// What of one tag is held. Blocks.
    pub fn tag_usage(&self, key: &TagKey) -> Result<Option<TagUsage>, StoreError> {
        let record = self.tag(key)?;
        Ok(record.map(|record| self.usage_of(key.clone(), (*record).clone())))
    }

    /// Forgets these tags and removes what nothing else needs; with `is_dry_run`, only says what that would be. A client
    /// that reads such a blob now reads it to its end. Blocks.
    pub fn delete_images(&self, keys: &[TagKey], is_dry_run: bool) -> Result<Reclaimed, StoreError> {
        let going: HashSet<&TagKey> = keys.iter().collect();
        let (mut candidates, mut found) = (BTreeMap::new(), Vec::new());
        for key in &going {
            if let Some(image) = self.tag_usage(key)? {
                candidates.extend(image.content);
                found.push(*key);
            }
        }
        let (mut needed, mut sizes) = (HashSet::new(), HashMap::new());
        self.each_tag(|key, record| {
            if !going.contains(&key) {
                let content = self.content(&record, &mut sizes);
                needed.extend(
                    content
                        .into_keys()
                        .filter(|digest| candidates.contains_key(digest)),
                );
            }
            ControlFlow::Continue(())
        });
        self.needed_by_untagged(&candidates, &mut needed);
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
            if needed.contains(&digest) {
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

    /// Adds what manifests need that no tag leads to: they were pulled by their digest.
    fn needed_by_untagged(&self, candidates: &BTreeMap<Digest, Content>, needed: &mut HashSet<Digest>) {
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
                    if let Ok(Some(held)) = self.manifest(&digest) {
                        needed.extend(
                            held.manifest
                                .descriptors
                                .iter()
                                .filter_map(|child| known(&child.digest)),
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
            self.gather(&variant.digest, DEPTH_MAX, &mut content, sizes);
            if let Some(previous) = &variant.previous {
                self.gather(&previous.digest, DEPTH_MAX, &mut content, sizes);
            }
        }
        content
    }

    fn gather(
        &self,
        digest: &Digest,
        depth: u32,
        content: &mut BTreeMap<Digest, Content>,
        sizes: &mut HashMap<Digest, Option<u64>>,
    ) {
        if content.contains_key(digest) {
            return;
        }
        let Ok(Some(held)) = self.manifest(digest) else {
            return;
        };
        let manifest = Content {
            bytes: held.bytes.len() as u64,
            is_manifest: true,
        };
        content.insert(*digest, manifest);
        for child in &held.manifest.descriptors {
            let Some(child_digest) = known(&child.digest) else {
                continue;
            };
            if child.kind == DescriptorKind::Manifest {
                if let Some(depth) = depth.checked_sub(1) {
                    self.gather(&child_digest, depth, content, sizes);
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

fn known(digest: &AnyDigest) -> Option<Digest> {
    match digest {
        AnyDigest::Supported(digest) => Some(*digest),
        AnyDigest::Unsupported(_) => None,
    }
}
