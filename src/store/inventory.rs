//! What is held, image by image: how large each is, what it shares with others, and what letting one go would free.
//!
//! A look at everything; for the operator, not for a pull. Content is named by many: a layer belongs to every manifest
//! that lists it, and a manifest to every tag and index that names it. So the size of an image is told twice: all of it,
//! and what of it no other image needs.
//!
//! What goes with an image is what nothing else needs: no other tag, and no manifest that was pulled by its digest alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use super::refs::{TagKey, TagRecord};
use super::volume::Volume;
use super::{Fault, Store, content_path, size_of};
use crate::oci::manifest::Role;
use crate::oci::{Algorithm, AnyDigest, Digest};

/// Tags looked at. A store with more is listed up to there.
pub const TAGS_MAX: usize = 50_000;

const TAGS_PER_LOOK: usize = 1_000;

/// How deep indexes may lie in each other.
const DEPTH_MAX: u32 = 3;

/// Everything that tags name.
#[derive(Debug, Default)]
pub struct Inventory {
    /// In the order of their names.
    pub images: Vec<Stocked>,
    /// How many images need each digest held.
    holders: HashMap<Digest, usize>,
}

/// A tag, and what of it is held.
#[derive(Debug)]
pub struct Stocked {
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
pub struct Freed {
    /// Tags forgotten.
    pub tags: u64,
    /// Manifests removed.
    pub manifests: u64,
    /// Blobs removed.
    pub blobs: u64,
    /// Their size together.
    pub bytes: u64,
}

impl Inventory {
    /// The bytes of an image: all that is held of it, and what of that no other image needs.
    pub fn sizes(&self, image: &Stocked) -> (u64, u64) {
        let own = |(digest, _): &(&Digest, &Content)| self.holders.get(*digest) == Some(&1);
        let all = image.content.values().map(|content| content.bytes).sum();
        let unique = image
            .content
            .iter()
            .filter(own)
            .map(|(_, content)| content.bytes)
            .sum();
        (all, unique)
    }

    /// How many images need what is held under this digest.
    pub fn holders(&self, digest: &Digest) -> usize {
        self.holders.get(digest).copied().unwrap_or_default()
    }
}

impl Store {
    /// Looks at everything. Blocks.
    pub fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::default();
        let mut sizes = HashMap::new();
        let mut after: Option<TagKey> = None;
        loop {
            let page = self.tags(after.as_ref(), TAGS_PER_LOOK);
            let is_last = page.len() < TAGS_PER_LOOK;
            after = page.last().map(|(key, _)| key.clone());
            for (key, record) in page {
                let content = self.content(&record, &mut sizes);
                for digest in content.keys() {
                    *inventory.holders.entry(*digest).or_default() += 1;
                }
                inventory.images.push(Stocked { key, record, content });
            }
            if is_last || inventory.images.len() >= TAGS_MAX {
                return inventory;
            }
        }
    }

    /// What of one tag is held. Blocks.
    pub fn stocked(&self, key: &TagKey) -> Result<Option<Stocked>, Fault> {
        let record = self.tag(key)?;
        Ok(record.map(|record| Stocked {
            key: key.clone(),
            content: self.content(&record, &mut HashMap::new()),
            record: (*record).clone(),
        }))
    }

    /// Forgets these tags and removes what nothing else needs; with `is_trial`, only says what that would be. A client
    /// that reads such a blob now reads it to its end. Blocks.
    pub fn let_go(&self, keys: &[TagKey], is_trial: bool) -> Result<Freed, Fault> {
        let inventory = self.inventory();
        let (going, staying): (Vec<_>, Vec<_>) = inventory
            .images
            .iter()
            .partition(|image| keys.contains(&image.key));
        let mut candidates = BTreeMap::new();
        for image in &going {
            candidates.extend(image.content.iter().map(|(digest, content)| (*digest, *content)));
        }
        let mut needed: HashSet<Digest> = staying
            .iter()
            .flat_map(|image| image.content.keys())
            .copied()
            .collect();
        self.needed_by_untagged(&candidates, &mut needed);
        let mut freed = Freed {
            tags: going.len() as u64,
            ..Freed::default()
        };
        if !is_trial {
            for image in &going {
                self.remove_tag(&image.key)?;
            }
        }
        for (digest, content) in candidates {
            if needed.contains(&digest) {
                continue;
            }
            let was_there = match (is_trial, content.is_manifest) {
                (true, _) => true,
                (false, true) => self.remove_manifest(&digest)?,
                (false, false) => self.remove_blob(&digest)?,
            };
            if was_there {
                freed.bytes += content.bytes;
                *if content.is_manifest {
                    &mut freed.manifests
                } else {
                    &mut freed.blobs
                } += 1;
            }
        }
        Ok(freed)
    }

    /// Adds what manifests need that no tag leads to: they were pulled by their digest.
    fn needed_by_untagged(&self, candidates: &BTreeMap<Digest, Content>, needed: &mut HashSet<Digest>) {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let tree = format!("manifests/{algorithm}");
            for folder in self.volume.list(Path::new(&tree)).unwrap_or_default() {
                let folder = Path::new(&tree).join(folder.name);
                for file in self.volume.list(&folder).unwrap_or_default() {
                    let Some(digest) = Digest::from_hex(algorithm, &file.name).ok() else {
                        continue;
                    };
                    if candidates.contains_key(&digest) {
                        continue;
                    }
                    if let Ok(Some(held)) = self.manifest(&digest) {
                        needed.extend(
                            held.manifest
                                .children
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
            if let Some(earlier) = &variant.earlier {
                self.gather(&earlier.digest, DEPTH_MAX, &mut content, sizes);
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
        for child in &held.manifest.children {
            let Some(child_digest) = known(&child.digest) else {
                continue;
            };
            if child.role == Role::Manifest {
                if let Some(depth) = depth.checked_sub(1) {
                    self.gather(&child_digest, depth, content, sizes);
                }
                continue;
            }
            let size = *sizes
                .entry(child_digest)
                .or_insert_with(|| size_of(self.volume.as_ref(), &content_path("blobs", &child_digest)));
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
        AnyDigest::Known(digest) => Some(*digest),
        AnyDigest::Foreign(_) => None,
    }
}
