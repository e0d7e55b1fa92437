//! The last answers to questions for lists of tags and of referrers, for an outage: a page of a list, or a 404.
//!
//! A list is no content with a name of its own: it can be had again, and a lost one is a miss. So there is a fixed number
//! of places for them, chosen by the hash of the question; a newer list takes the place of an older one. Long lists have
//! fewer places of their own.
//!
//! A file is one line of JSON with a checksum, then the list as the upstream sent it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

use super::cache_key::weighted_cache;
use super::checksummed_json::{decode, encode, from_millis, to_millis};
use super::fs::FileSystem;
use super::{Store, StoreError};
use crate::oci::{Algorithm, Digest, MediaType};

/// A longer list is not kept. The longest of 20,000 images at gcr.io has 5.9 MB.
pub const LISTING_BYTES_MAX: usize = 8 * 1024 * 1024;

/// A list longer than this goes to the places of the long ones. With it, neither kind ever takes more than 2 GiB.
const SHORT_BYTES_MAX: usize = 512 * 1024;

/// Hexadecimal digits of a place: 4096 of them …
const SLOT_HEX: usize = 3;

/// … and 256 for long lists.
const LONG_SLOT_HEX: usize = 2;

/// Long lists of which it is known what was written last, and when.
const WRITTEN_MAX: usize = 1024;

/// Room for the first line: a question of 2 KiB and the answer's header lines.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

const READY_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// How far the time of a file may fall behind that of the last same answer.
const REWRITE_AFTER: Duration = Duration::from_secs(3600);

const TREE: &str = "listings";

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListingKey {
    /// The name of the upstream.
    pub upstream: Arc<str>,
    /// Path and query, as asked of the upstream.
    pub path: String,
}

/// A page of a list, as the upstream last gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredListing {
    /// Of these bytes, to compare lists by.
    pub digest: Digest,
    /// The list, as sent.
    pub bytes: Bytes,
    /// Its media type.
    pub media_type: MediaType,
    /// Path and query of the next page, if there was one.
    pub next: Option<String>,
    /// The filters that the upstream said it applied.
    pub filters: Option<String>,
    /// When the upstream gave it.
    pub listed_at: SystemTime,
}

impl StoredListing {
    /// A list given at `listed_at`.
    pub fn new(
        bytes: Bytes,
        media_type: MediaType,
        next: Option<String>,
        filters: Option<String>,
        listed_at: SystemTime,
    ) -> Self {
        Self {
            digest: Digest::of(Algorithm::Sha256, &bytes),
            bytes,
            media_type,
            next,
            filters,
            listed_at,
        }
    }
}

/// The upstream said that there is no such list (404).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredNotFound {
    /// The registry's error code, where it gave one.
    pub code: Option<String>,
    /// When the upstream said so.
    pub received_at: SystemTime,
}

/// What the upstream last answered to a question for a list.
#[derive(Clone, Debug)]
pub enum StoredListResponse {
    /// A page of a list.
    List(Arc<StoredListing>),
    /// 404.
    NotFound(StoredNotFound),
}

impl StoredListResponse {
    /// When the upstream gave it.
    pub fn received_at(&self) -> SystemTime {
        match self {
            Self::List(listing) => listing.listed_at,
            Self::NotFound(absence) => absence.received_at,
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::List(listing) => &listing.bytes,
            Self::NotFound(_) => &[],
        }
    }

    /// Whether it is the same answer, whenever it was given.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::List(one), Self::List(other)) => one.digest == other.digest,
            (Self::NotFound(one), Self::NotFound(other)) => one.code == other.code,
            (Self::List(_), Self::NotFound(_)) | (Self::NotFound(_), Self::List(_)) => false,
        }
    }
}

/// The first line of a file.
#[derive(Serialize, Deserialize)]
struct Record {
    upstream: String,
    path: String,
    digest: String,
    /// Empty for a 404.
    media_type: String,
    next: Option<String>,
    filters: Option<String>,
    listed_at_ms: u64,
    /// There is no such list; the registry's error code, or nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absent: Option<String>,
}

impl Store {
    /// The last list given to this question, if it is still kept and no 404 came since.
    pub fn listing(&self, key: &ListingKey) -> Result<Option<Arc<StoredListing>>, StoreError> {
        self.view().listing(key)
    }

    /// The last answer to this question, if it is still kept.
    pub fn listing_response(&self, key: &ListingKey) -> Result<Option<StoredListResponse>, StoreError> {
        self.listings.find(key)
    }

    /// Keeps a list in place of the last answer. One longer than [`LISTING_BYTES_MAX`] is not kept.
    pub fn put_listing(&self, key: &ListingKey, listing: StoredListing) -> Result<(), StoreError> {
        self.listings
            .put(key, StoredListResponse::List(Arc::new(listing)))
    }

    /// Keeps in place of the last answer that there is no such list.
    pub fn put_listing_not_found(&self, key: &ListingKey, absence: StoredNotFound) -> Result<(), StoreError> {
        self.listings.put(key, StoredListResponse::NotFound(absence))
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<ListingKey, StoredListResponse> for ByLength {
    fn weight(&self, key: &ListingKey, response: &StoredListResponse) -> u64 {
        (response.bytes().len() + key.path.len()) as u64 + 512
    }
}

pub(super) struct Listings {
    fs: Arc<dyn FileSystem>,
    ready: Cache<ListingKey, StoredListResponse, ByLength>,
    /// What is in the places of long lists, which are too long to be ready.
    written: Cache<ListingKey, (Digest, SystemTime)>,
}

impl Listings {
    pub(super) fn new(fs: &Arc<dyn FileSystem>) -> Self {
        Self {
            fs: Arc::clone(fs),
            ready: weighted_cache(READY_BYTES_MAX, 16 * 1024, ByLength),
            written: Cache::new(WRITTEN_MAX),
        }
    }

    /// The last answer, if it is in memory.
    pub(super) fn ready(&self, key: &ListingKey) -> Option<StoredListResponse> {
        self.ready.get(key)
    }

    fn find(&self, key: &ListingKey) -> Result<Option<StoredListResponse>, StoreError> {
        if let Some(response) = self.ready.get(key) {
            return Ok(Some(response));
        }
        let short = self.read_at(key, Slot::Short)?;
        let long = self.read_at(key, Slot::Long)?;
        // A list that grew or shrank has left an older one in a place of the other kind.
        let newest = short
            .into_iter()
            .chain(long)
            .max_by_key(StoredListResponse::received_at);
        let Some(response) = newest else {
            return Ok(None);
        };
        if Slot::of(&response) == Slot::Long {
            return Ok(Some(response));
        }
        // Not over what was kept meanwhile.
        self.ready.get_or_insert_with(key, || Ok(response)).map(Some)
    }

    fn read_at(&self, key: &ListingKey, slot: Slot) -> Result<Option<StoredListResponse>, StoreError> {
        let path = slot.path(key);
        let bytes_max = RECORD_BYTES_MAX + slot.bytes_max();
        match self.fs.read_file(&path, bytes_max) {
            Ok(bytes) => Ok(read(key, &Bytes::from(bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("read", path, &error)),
        }
    }

    fn put(&self, key: &ListingKey, response: StoredListResponse) -> Result<(), StoreError> {
        if response.bytes().len() > LISTING_BYTES_MAX {
            return Ok(());
        }
        let slot = Slot::of(&response);
        let before = self.ready.get(key);
        let mut file = encode(&record(key, &response));
        file.extend_from_slice(response.bytes());
        let mut is_changed =
            before.is_none_or(|before| !before.is_same(&response) || needs_rewrite(&before, &response));
        if let (Slot::Long, StoredListResponse::List(listing)) = (slot, &response) {
            self.ready.remove(key);
            let (digest, now) = (listing.digest, listing.listed_at);
            is_changed = self.written.get(key).is_none_or(|(written, at)| {
                written != digest || now.duration_since(at).map_or(true, |age| age >= REWRITE_AFTER)
            });
            self.written.insert(key.clone(), (digest, now));
        } else {
            self.written.remove(key);
            self.ready.insert(key.clone(), response);
        }
        if !is_changed {
            return Ok(());
        }
        let path = slot.path(key);
        let placed = self.fs.write_atomic(&path, &file);
        placed.map_err(|error| {
            self.written.remove(key);
            StoreError::io("write", path, &error)
        })
    }
}

/// Where an answer is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Short,
    Long,
}

impl Slot {
    fn of(response: &StoredListResponse) -> Self {
        if response.bytes().len() > SHORT_BYTES_MAX {
            Self::Long
        } else {
            Self::Short
        }
    }

    const fn bytes_max(self) -> u64 {
        match self {
            Self::Short => SHORT_BYTES_MAX as u64,
            Self::Long => LISTING_BYTES_MAX as u64,
        }
    }

    fn path(self, key: &ListingKey) -> PathBuf {
        let request = [&key.upstream, "\0", &key.path].concat();
        let mut slot = Digest::of(Algorithm::Sha256, request.as_bytes()).hex();
        let name = match self {
            Self::Short => {
                slot.truncate(SLOT_HEX);
                slot
            }
            Self::Long => {
                slot.truncate(LONG_SLOT_HEX);
                ["long-", &slot].concat()
            }
        };
        [TREE, &name].iter().collect()
    }
}

/// The same answer again is written again only to keep its time from falling far behind.
fn needs_rewrite(before: &StoredListResponse, now: &StoredListResponse) -> bool {
    let age = now.received_at().duration_since(before.received_at());
    age.map_or(true, |age| age >= REWRITE_AFTER)
}

fn record(key: &ListingKey, response: &StoredListResponse) -> Record {
    let (listing, absent) = match response {
        StoredListResponse::List(listing) => (Some(listing), None),
        StoredListResponse::NotFound(absence) => (None, Some(absence.code.clone().unwrap_or_default())),
    };
    Record {
        upstream: key.upstream.to_string(),
        path: key.path.clone(),
        digest: listing.map_or_else(String::new, |listing| listing.digest.to_string()),
        media_type: listing.map_or_else(String::new, |listing| listing.media_type.as_str().to_owned()),
        next: listing.and_then(|listing| listing.next.clone()),
        filters: listing.and_then(|listing| listing.filters.clone()),
        listed_at_ms: to_millis(response.received_at()),
        absent,
    }
}

/// `None` for a damaged file, and for the answer to another question in the same place.
fn read(key: &ListingKey, file: &Bytes) -> Option<StoredListResponse> {
    let end = file.iter().position(|byte| *byte == b'\n')? + 1;
    let record: Record = decode(file.get(..end)?)?;
    if record.path != key.path || *record.upstream != *key.upstream {
        return None;
    }
    let received_at = from_millis(record.listed_at_ms);
    if let Some(code) = record.absent {
        let code = Some(code).filter(|code| !code.is_empty());
        return Some(StoredListResponse::NotFound(StoredNotFound { code, received_at }));
    }
    let media_type = record.media_type.parse().ok()?;
    let listing = StoredListing::new(
        file.slice(end..),
        media_type,
        record.next,
        record.filters,
        received_at,
    );
    (listing.digest.to_string() == record.digest).then(|| StoredListResponse::List(Arc::new(listing)))
}
