//! Tag record and its JSON file format.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::oci::{Digest, MediaType, Repository, Tag};
use crate::store::checksummed_json::{decode, encode, from_millis, to_millis};
use crate::store::{hashed_name, named_path};

/// Maximum number of `Accept` sets stored per tag. Clients in use send fewer.
pub const VARIANTS_MAX: usize = 8;

/// Maximum number of previous digests stored per tag.
pub const HISTORY_MAX: usize = 10;

pub(in crate::store) const TREE: &str = "refs";
pub(super) const KEY_PREFIX: u8 = b't';

/// Confirmation time of a tag that the operator set and no upstream confirmed. It is never fresh, and older than any
/// `stale_if_error` except `forever`.
pub const NEVER_CONFIRMED: SystemTime = SystemTime::UNIX_EPOCH;

/// Key of a tag: upstream, repository and tag.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TagKey {
    /// The name of the upstream.
    pub upstream: Arc<str>,
    /// The repository at the upstream.
    pub repository: Repository,
    /// The tag.
    pub tag: Tag,
}

/// The response for one set of accepted media types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// The key of the set ([`crate::oci::Accept::key`]).
    pub accept: u64,
    /// The digest that the tag pointed to.
    pub digest: Digest,
    /// The media type that the upstream sent.
    pub media_type: MediaType,
    /// Whether the set lists both index types ([`crate::oci::Accept::lists_indexes`]). If so, an image in the response
    /// is what the tag points to, and not a substitute for an index.
    pub accepts_indexes: bool,
    /// When the last request with this response was sent; [`NEVER_CONFIRMED`] if the operator set the tag.
    pub confirmed_at: SystemTime,
    /// When the upstream first sent this digest.
    pub first_seen_at: SystemTime,
    /// The previous complete image; dropped when this one is complete.
    pub previous: Option<Previous>,
    /// Whether `confirmed_at` is the time of a response of the upstream to another cache, by its record in the shared
    /// storage.
    pub is_by_record: bool,
    /// Previous digests, the last first, at most [`HISTORY_MAX`]. For display only: it does not protect content from
    /// eviction.
    pub history: Vec<HistoryEntry>,
}

/// A previous digest and the period in which the upstream sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The digest.
    pub digest: Digest,
    /// When the upstream first sent it.
    pub first_seen_at: SystemTime,
    /// When the upstream last sent it.
    pub confirmed_at: SystemTime,
}

/// The previous complete image of a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Previous {
    /// The digest.
    pub digest: Digest,
    /// The media type that the upstream sent.
    pub media_type: MediaType,
    /// When the upstream last confirmed it.
    pub confirmed_at: SystemTime,
}

/// All variants of a tag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TagRecord {
    /// One for each set of accepted media types, at most [`VARIANTS_MAX`], the newest first.
    pub variants: Vec<Variant>,
}

impl Variant {
    /// Whether the file has the same content, apart from the confirmation time.
    pub(super) fn equals_on_disk(&self, on_disk: &Self) -> bool {
        self.same_target(on_disk)
            && self.accepts_indexes == on_disk.accepts_indexes
            && self.previous == on_disk.previous
    }

    fn same_target(&self, other: &Self) -> bool {
        self.digest == other.digest && self.media_type == other.media_type
    }

    /// Whether this variant, from the index, is at least as new as that of the file.
    fn supersedes(&self, on_disk: &Self) -> bool {
        self.same_target(on_disk) || self.confirmed_at > on_disk.confirmed_at
    }
}

impl TagRecord {
    /// When the upstream last confirmed the tag, for any set of accepted media types.
    pub fn confirmed_at(&self) -> SystemTime {
        let confirmed = self.variants.iter().map(|variant| variant.confirmed_at);
        confirmed.max().unwrap_or(NEVER_CONFIRMED)
    }

    pub(super) fn for_accept(&self, accept: u64) -> Option<&Variant> {
        self.variants.iter().find(|variant| variant.accept == accept)
    }

    /// Merges the record of the file with that of the index. Where the digests agree, the index has the newer time.
    /// Where they differ, one of them missed a write (crash, full disk), and the later confirmation wins.
    pub(super) fn merge(file: Option<Self>, index: Option<Self>) -> Option<Self> {
        let (file, index) = match (file, index) {
            (None, None) => return None,
            (Some(record), None) | (None, Some(record)) => return Some(record),
            (Some(file), Some(index)) => (file, index),
        };
        let mut variants = file.variants;
        for indexed in index.variants {
            match variants
                .iter_mut()
                .find(|variant| variant.accept == indexed.accept)
            {
                None => variants.push(indexed),
                Some(on_disk) if indexed.supersedes(on_disk) => {
                    // Only in the file.
                    let history = std::mem::take(&mut on_disk.history);
                    *on_disk = Variant { history, ..indexed };
                }
                Some(_) => {}
            }
        }
        Some(Self::from_variants(variants))
    }

    /// All digests that the tag protects from eviction.
    pub(in crate::store) fn digests(&self) -> Vec<Digest> {
        let previous = |variant: &Variant| variant.previous.as_ref().map(|previous| previous.digest);
        let named = |variant: &Variant| [Some(variant.digest), previous(variant)];
        self.variants.iter().flat_map(named).flatten().collect()
    }

    /// Whether this record, from the index, contains everything in the file.
    pub(super) fn covers(&self, file: &Self) -> bool {
        file.variants.iter().all(|on_disk| {
            self.variants
                .iter()
                .any(|indexed| indexed.accept == on_disk.accept && indexed.supersedes(on_disk))
        })
    }
}

#[derive(Serialize, Deserialize)]
struct VariantRecord {
    accept: String,
    digest: String,
    media_type: String,
    #[serde(default, rename = "takes_indexes", skip_serializing_if = "std::ops::Not::not")]
    accepts_indexes: bool,
    confirmed_at_ms: u64,
    first_held_at_ms: u64,
    #[serde(default, rename = "earlier", skip_serializing_if = "Option::is_none")]
    previous: Option<PreviousRecord>,
    #[serde(default, rename = "by_record", skip_serializing_if = "std::ops::Not::not")]
    is_by_record: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    history: Vec<HistoryRecord>,
}

#[derive(Serialize, Deserialize)]
struct HistoryRecord {
    digest: String,
    first_held_at_ms: u64,
    confirmed_at_ms: u64,
}

#[derive(Serialize, Deserialize)]
struct PreviousRecord {
    digest: String,
    media_type: String,
    confirmed_at_ms: u64,
}

#[derive(Serialize, Deserialize)]
struct TagFile {
    upstream: String,
    repository: String,
    tag: String,
    variants: Vec<VariantRecord>,
}

/// Path of the tag file with this name.
pub(in crate::store) fn path_of(name: &Digest) -> PathBuf {
    named_path(TREE, name)
}

impl TagKey {
    /// Path of its file.
    pub(in crate::store) fn path(&self) -> PathBuf {
        path_of(&self.name())
    }

    /// Name of its file.
    pub(in crate::store) fn name(&self) -> Digest {
        hashed_name(&[&self.upstream, self.repository.as_str(), self.tag.as_str()])
    }

    /// Its index key, ordered by upstream, repository, tag.
    pub(in crate::store) fn to_index(&self) -> Vec<u8> {
        let names = [&self.upstream, self.repository.as_str(), self.tag.as_str()].join("\0");
        [&[KEY_PREFIX], names.as_bytes()].concat()
    }

    /// The beginning of the index keys of a repository's tags.
    pub(super) fn index_prefix(upstream: &str, repository: &Repository) -> Vec<u8> {
        let names = [upstream, repository.as_str(), ""].join("\0");
        [&[KEY_PREFIX], names.as_bytes()].concat()
    }

    pub(super) fn from_index(key: &[u8]) -> Option<Self> {
        let names = std::str::from_utf8(key.strip_prefix(&[KEY_PREFIX])?).ok()?;
        let mut names = names.split('\0');
        let (upstream, repository, tag) = (names.next()?, names.next()?, names.next()?);
        Some(Self {
            upstream: upstream.into(),
            repository: repository.parse().ok()?,
            tag: tag.parse().ok()?,
        })
    }
}

impl TagRecord {
    pub(super) fn to_file(&self, key: &TagKey) -> Vec<u8> {
        encode(&TagFile {
            upstream: key.upstream.to_string(),
            repository: key.repository.as_str().to_owned(),
            tag: key.tag.as_str().to_owned(),
            variants: self.to_records(),
        })
    }

    pub(super) fn from_file(bytes: &[u8]) -> Option<(TagKey, Self)> {
        let record: TagFile = decode(bytes)?;
        let key = TagKey {
            upstream: record.upstream.into(),
            repository: record.repository.parse().ok()?,
            tag: record.tag.parse().ok()?,
        };
        Some((key, Self::from_records(&record.variants)))
    }

    fn from_records(records: &[VariantRecord]) -> Self {
        let known = records.iter().filter_map(Variant::from_record);
        let mut variants: Vec<_> = known.take(VARIANTS_MAX).collect();
        variants.shrink_to_fit();
        Self { variants }
    }

    fn to_records(&self) -> Vec<VariantRecord> {
        self.variants.iter().map(Variant::to_record).collect()
    }
}

impl HistoryEntry {
    fn to_record(&self) -> HistoryRecord {
        HistoryRecord {
            digest: self.digest.to_string(),
            first_held_at_ms: to_millis(self.first_seen_at),
            confirmed_at_ms: to_millis(self.confirmed_at),
        }
    }

    fn from_record(record: &HistoryRecord) -> Option<Self> {
        Some(Self {
            digest: record.digest.parse().ok()?,
            first_seen_at: from_millis(record.first_held_at_ms),
            confirmed_at: from_millis(record.confirmed_at_ms),
        })
    }
}

impl Previous {
    fn from_record(record: &PreviousRecord) -> Option<Self> {
        Some(Self {
            digest: record.digest.parse().ok()?,
            media_type: record.media_type.parse().ok()?,
            confirmed_at: from_millis(record.confirmed_at_ms),
        })
    }
}

impl Variant {
    fn to_record(&self) -> VariantRecord {
        VariantRecord {
            accept: format!("{:016x}", self.accept),
            digest: self.digest.to_string(),
            media_type: self.media_type.as_str().to_owned(),
            accepts_indexes: self.accepts_indexes,
            confirmed_at_ms: to_millis(self.confirmed_at),
            first_held_at_ms: to_millis(self.first_seen_at),
            previous: self.previous.as_ref().map(|previous| PreviousRecord {
                digest: previous.digest.to_string(),
                media_type: previous.media_type.as_str().to_owned(),
                confirmed_at_ms: to_millis(previous.confirmed_at),
            }),
            is_by_record: self.is_by_record,
            history: self.history.iter().map(HistoryEntry::to_record).collect(),
        }
    }

    fn from_record(record: &VariantRecord) -> Option<Self> {
        Some(Self {
            accept: u64::from_str_radix(&record.accept, 16).ok()?,
            digest: record.digest.parse().ok()?,
            media_type: record.media_type.parse().ok()?,
            accepts_indexes: record.accepts_indexes,
            confirmed_at: from_millis(record.confirmed_at_ms),
            first_seen_at: from_millis(record.first_held_at_ms),
            previous: record.previous.as_ref().and_then(Previous::from_record),
            is_by_record: record.is_by_record,
            history: record
                .history
                .iter()
                .filter_map(HistoryEntry::from_record)
                .take(HISTORY_MAX)
                .collect(),
        })
    }
}
