//! Last responses to tag-list and referrers requests, for outages: a page of a list, or a 404.
//!
//! A list is not content-addressed: it can be fetched again, and a lost one is a miss. So it is stored in a fixed
//! number of slots, selected by the hash of the request; a newer list overwrites an older one. Long lists have fewer
//! slots of their own.
//!
//! A file is one line of JSON with a checksum, followed by the list as the upstream sent it.

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

/// Longer lists are not stored. The longest of 20,000 images at gcr.io has 5.9 MB.
pub const LISTING_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Longer lists use the slots for long lists. With this bound, neither kind takes more than 2 GiB.
const SHORT_BYTES_MAX: usize = 512 * 1024;

/// Hexadecimal digits of a short list's slot: 4096 slots.
const SLOT_HEX: usize = 3;

/// Hexadecimal digits of a long list's slot: 256 slots.
const LONG_SLOT_HEX: usize = 2;

/// Number of long lists whose last write is remembered.
const WRITTEN_MAX: usize = 1024;

/// Limit of the first line: a request of 2 KiB and the response headers.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

const READY_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// An unchanged response is rewritten after this time, to update its date.
const REWRITE_AFTER: Duration = Duration::from_secs(3600);

const TREE: &str = "listings";

/// Key of a list request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListingKey {
    /// The name of the upstream.
    pub upstream: Arc<str>,
    /// Path and query of the upstream request.
    pub path: String,
}

/// A page of a list, as last received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredListing {
    /// Digest of `bytes`, to compare lists.
    pub digest: Digest,
    /// The exact body.
    pub bytes: Bytes,
    /// Its media type.
    pub media_type: MediaType,
    /// Path and query of the next page, if any.
    pub next: Option<String>,
    /// The filters that the upstream applied (`OCI-Filters-Applied`).
    pub filters: Option<String>,
    /// When it was received.
    pub listed_at: SystemTime,
}

impl StoredListing {
    /// A list received at `listed_at`.
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

/// A 404 response to a list request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredNotFound {
    /// The registry's error code, if it sent one.
    pub code: Option<String>,
    /// When it was received.
    pub received_at: SystemTime,
}

/// The last response to a list request.
#[derive(Clone, Debug)]
pub enum StoredListResponse {
    /// A page of a list.
    List(Arc<StoredListing>),
    /// 404.
    NotFound(StoredNotFound),
}

impl StoredListResponse {
    /// When it was received.
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

    /// Whether both have the same content.
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
    /// Present for a 404; the registry's error code, or empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absent: Option<String>,
}

impl Store {
    /// The last list for this request, if still stored and not superseded by a 404.
    pub fn listing(&self, key: &ListingKey) -> Result<Option<Arc<StoredListing>>, StoreError> {
        self.view().listing(key)
    }

    /// The last response to this request, if still stored.
    pub fn listing_response(&self, key: &ListingKey) -> Result<Option<StoredListResponse>, StoreError> {
        self.listings.find(key)
    }

    /// Stores a list in place of the last response. A list longer than [`LISTING_BYTES_MAX`] is not stored.
    pub fn put_listing(&self, key: &ListingKey, listing: StoredListing) -> Result<(), StoreError> {
        self.listings
            .put(key, StoredListResponse::List(Arc::new(listing)))
    }

    /// Stores a 404 in place of the last response.
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
    /// Last write of each long list; long lists are not cached in memory.
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

    /// The last response, if in memory.
    pub(super) fn ready(&self, key: &ListingKey) -> Option<StoredListResponse> {
        self.ready.get(key)
    }

    fn find(&self, key: &ListingKey) -> Result<Option<StoredListResponse>, StoreError> {
        if let Some(response) = self.ready.get(key) {
            return Ok(Some(response));
        }
        let short = self.read_at(key, Slot::Short)?;
        let long = self.read_at(key, Slot::Long)?;
        // A list that grew or shrank may have an older version in a slot of the other kind.
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
        // Do not overwrite a concurrent put.
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

/// Kind of slot.
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

/// An unchanged response is only rewritten to keep its date from falling far behind.
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

/// `None` for a damaged file, and for another request in the same slot.
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
