//! The last lists of tags and of referrers, for an outage.
//!
//! A list is no content with a name of its own: it can be had again, and a lost one is a miss. So there is a fixed number
//! of places for them, chosen by the hash of the question; a newer list takes the place of an older one.
//!
//! A file is one line of JSON with a checksum, then the list as the upstream sent it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

use super::cache::weighted;
use super::record::{from_millis, opened, sealed, to_millis};
use super::volume::Volume;
use super::{Fault, Store};
use crate::oci::{Algorithm, Digest, MediaType};

/// A longer list is not kept; with it, the kept ones never take more than 2 GiB.
pub const LISTING_KEPT_BYTES_MAX: usize = 512 * 1024;

/// Hexadecimal digits of a place: 4096 of them.
const SLOT_HEX: usize = 3;

/// Room for the first line: a question of 2 KiB and the answer's header lines.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

const READY_BYTES_MAX: u64 = 8 * 1024 * 1024;

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
pub struct KeptListing {
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

impl KeptListing {
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

/// The first line of a file.
#[derive(Serialize, Deserialize)]
struct Record {
    upstream: String,
    path: String,
    digest: String,
    media_type: String,
    next: Option<String>,
    filters: Option<String>,
    listed_at_ms: u64,
}

impl Store {
    /// The last list given to this question, if it is still kept.
    pub fn listing(&self, key: &ListingKey) -> Result<Option<Arc<KeptListing>>, Fault> {
        self.listings.find(key)
    }

    /// Keeps a list in place of the last one. One longer than [`LISTING_KEPT_BYTES_MAX`] is not kept.
    pub fn keep_listing(&self, key: &ListingKey, listing: KeptListing) -> Result<(), Fault> {
        self.listings.keep(key, listing)
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<ListingKey, Arc<KeptListing>> for ByLength {
    fn weight(&self, key: &ListingKey, listing: &Arc<KeptListing>) -> u64 {
        (listing.bytes.len() + key.path.len()) as u64 + 512
    }
}

pub(super) struct Listings {
    volume: Arc<dyn Volume>,
    ready: Cache<ListingKey, Arc<KeptListing>, ByLength>,
}

impl Listings {
    pub(super) fn new(volume: &Arc<dyn Volume>) -> Self {
        Self {
            volume: Arc::clone(volume),
            ready: weighted(READY_BYTES_MAX, 16 * 1024, ByLength),
        }
    }

    fn find(&self, key: &ListingKey) -> Result<Option<Arc<KeptListing>>, Fault> {
        if let Some(listing) = self.ready.get(key) {
            return Ok(Some(listing));
        }
        let path = path(key);
        let bytes = match self
            .volume
            .read_whole(&path, RECORD_BYTES_MAX + LISTING_KEPT_BYTES_MAX as u64)
        {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Fault::io("read", path, &error)),
        };
        let Some(listing) = read(key, &bytes) else {
            return Ok(None);
        };
        let listing = Arc::new(listing);
        // Not over what was kept meanwhile.
        self.ready.get_or_insert_with(key, || Ok(listing)).map(Some)
    }

    fn keep(&self, key: &ListingKey, listing: KeptListing) -> Result<(), Fault> {
        if listing.bytes.len() > LISTING_KEPT_BYTES_MAX {
            return Ok(());
        }
        let before = self.ready.get(key);
        let mut file = sealed(&Record {
            upstream: key.upstream.to_string(),
            path: key.path.clone(),
            digest: listing.digest.to_string(),
            media_type: listing.media_type.as_str().to_owned(),
            next: listing.next.clone(),
            filters: listing.filters.clone(),
            listed_at_ms: to_millis(listing.listed_at),
        });
        let is_news =
            before.is_none_or(|before| before.digest != listing.digest || is_hours_older(&before, &listing));
        file.extend_from_slice(&listing.bytes);
        self.ready.insert(key.clone(), Arc::new(listing));
        if !is_news {
            return Ok(());
        }
        let path = path(key);
        self.volume
            .place(&path, &file)
            .map_err(|error| Fault::io("write", path, &error))
    }
}

/// The same list again is written again only to keep its time from falling far behind.
fn is_hours_older(before: &KeptListing, now: &KeptListing) -> bool {
    let age = now.listed_at.duration_since(before.listed_at);
    age.map_or(true, |age| age.as_secs() >= 3600)
}

/// `None` for a damaged file, and for the answer to another question in the same place.
fn read(key: &ListingKey, file: &Bytes) -> Option<KeptListing> {
    let end = file.iter().position(|byte| *byte == b'\n')? + 1;
    let record: Record = opened(file.get(..end)?)?;
    if record.path != key.path || *record.upstream != *key.upstream {
        return None;
    }
    let listed_at = from_millis(record.listed_at_ms);
    let media_type = record.media_type.parse().ok()?;
    let listing = KeptListing::new(
        file.slice(end..),
        media_type,
        record.next,
        record.filters,
        listed_at,
    );
    (listing.digest.to_string() == record.digest).then_some(listing)
}

fn path(key: &ListingKey) -> PathBuf {
    let question = [&key.upstream, "\0", &key.path].concat();
    let mut slot = Digest::of(Algorithm::Sha256, question.as_bytes()).hex();
    slot.truncate(SLOT_HEX);
    [TREE, &slot].iter().collect()
}
