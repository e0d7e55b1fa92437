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

use super::cache_key::weighted;
use super::checksummed_json::{from_millis, opened, sealed, to_millis};
use super::fs::FileSystem;
use super::{Fault, Store};
use crate::oci::{Algorithm, Digest, MediaType};

/// A longer list is not kept. The longest of 20,000 images at gcr.io has 5.9 MB.
pub const LISTING_KEPT_BYTES_MAX: usize = 8 * 1024 * 1024;

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

/// The upstream said that there is no such list (404).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptAbsence {
    /// The registry's error code, where it gave one.
    pub code: Option<String>,
    /// When the upstream said so.
    pub answered_at: SystemTime,
}

/// What the upstream last answered to a question for a list.
#[derive(Clone, Debug)]
pub enum KeptAnswer {
    /// A page of a list.
    List(Arc<KeptListing>),
    /// 404.
    Absent(KeptAbsence),
}

impl KeptAnswer {
    /// When the upstream gave it.
    pub fn answered_at(&self) -> SystemTime {
        match self {
            Self::List(listing) => listing.listed_at,
            Self::Absent(absence) => absence.answered_at,
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::List(listing) => &listing.bytes,
            Self::Absent(_) => &[],
        }
    }

    /// Whether it is the same answer, whenever it was given.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::List(one), Self::List(other)) => one.digest == other.digest,
            (Self::Absent(one), Self::Absent(other)) => one.code == other.code,
            (Self::List(_), Self::Absent(_)) | (Self::Absent(_), Self::List(_)) => false,
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
    pub fn listing(&self, key: &ListingKey) -> Result<Option<Arc<KeptListing>>, Fault> {
        self.view().listing(key)
    }

    /// The last answer to this question, if it is still kept.
    pub fn listing_answer(&self, key: &ListingKey) -> Result<Option<KeptAnswer>, Fault> {
        self.listings.find(key)
    }

    /// Keeps a list in place of the last answer. One longer than [`LISTING_KEPT_BYTES_MAX`] is not kept.
    pub fn keep_listing(&self, key: &ListingKey, listing: KeptListing) -> Result<(), Fault> {
        self.listings.keep(key, KeptAnswer::List(Arc::new(listing)))
    }

    /// Keeps in place of the last answer that there is no such list.
    pub fn keep_listing_absent(&self, key: &ListingKey, absence: KeptAbsence) -> Result<(), Fault> {
        self.listings.keep(key, KeptAnswer::Absent(absence))
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<ListingKey, KeptAnswer> for ByLength {
    fn weight(&self, key: &ListingKey, answer: &KeptAnswer) -> u64 {
        (answer.bytes().len() + key.path.len()) as u64 + 512
    }
}

pub(super) struct Listings {
    fs: Arc<dyn FileSystem>,
    ready: Cache<ListingKey, KeptAnswer, ByLength>,
    /// What is in the places of long lists, which are too long to be ready.
    written: Cache<ListingKey, (Digest, SystemTime)>,
}

impl Listings {
    pub(super) fn new(fs: &Arc<dyn FileSystem>) -> Self {
        Self {
            fs: Arc::clone(fs),
            ready: weighted(READY_BYTES_MAX, 16 * 1024, ByLength),
            written: Cache::new(WRITTEN_MAX),
        }
    }

    /// The last answer, if it is in memory.
    pub(super) fn ready(&self, key: &ListingKey) -> Option<KeptAnswer> {
        self.ready.get(key)
    }

    fn find(&self, key: &ListingKey) -> Result<Option<KeptAnswer>, Fault> {
        if let Some(answer) = self.ready.get(key) {
            return Ok(Some(answer));
        }
        let short = self.read_at(key, Place::Short)?;
        let long = self.read_at(key, Place::Long)?;
        // A list that grew or shrank has left an older one in a place of the other kind.
        let newest = short.into_iter().chain(long).max_by_key(KeptAnswer::answered_at);
        let Some(answer) = newest else {
            return Ok(None);
        };
        if Place::of(&answer) == Place::Long {
            return Ok(Some(answer));
        }
        // Not over what was kept meanwhile.
        self.ready.get_or_insert_with(key, || Ok(answer)).map(Some)
    }

    fn read_at(&self, key: &ListingKey, place: Place) -> Result<Option<KeptAnswer>, Fault> {
        let path = place.path(key);
        let bytes_max = RECORD_BYTES_MAX + place.bytes_max();
        match self.fs.read_file(&path, bytes_max) {
            Ok(bytes) => Ok(read(key, &Bytes::from(bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Fault::io("read", path, &error)),
        }
    }

    fn keep(&self, key: &ListingKey, answer: KeptAnswer) -> Result<(), Fault> {
        if answer.bytes().len() > LISTING_KEPT_BYTES_MAX {
            return Ok(());
        }
        let place = Place::of(&answer);
        let before = self.ready.get(key);
        let mut file = sealed(&record(key, &answer));
        file.extend_from_slice(answer.bytes());
        let mut is_news =
            before.is_none_or(|before| !before.is_same(&answer) || is_hours_older(&before, &answer));
        if let (Place::Long, KeptAnswer::List(listing)) = (place, &answer) {
            self.ready.remove(key);
            let (digest, now) = (listing.digest, listing.listed_at);
            is_news = self.written.get(key).is_none_or(|(written, at)| {
                written != digest || now.duration_since(at).map_or(true, |age| age >= REWRITE_AFTER)
            });
            self.written.insert(key.clone(), (digest, now));
        } else {
            self.written.remove(key);
            self.ready.insert(key.clone(), answer);
        }
        if !is_news {
            return Ok(());
        }
        let path = place.path(key);
        let placed = self.fs.write_atomic(&path, &file);
        placed.map_err(|error| {
            self.written.remove(key);
            Fault::io("write", path, &error)
        })
    }
}

/// Where an answer is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Short,
    Long,
}

impl Place {
    fn of(answer: &KeptAnswer) -> Self {
        if answer.bytes().len() > SHORT_BYTES_MAX {
            Self::Long
        } else {
            Self::Short
        }
    }

    const fn bytes_max(self) -> u64 {
        match self {
            Self::Short => SHORT_BYTES_MAX as u64,
            Self::Long => LISTING_KEPT_BYTES_MAX as u64,
        }
    }

    fn path(self, key: &ListingKey) -> PathBuf {
        let question = [&key.upstream, "\0", &key.path].concat();
        let mut slot = Digest::of(Algorithm::Sha256, question.as_bytes()).hex();
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
fn is_hours_older(before: &KeptAnswer, now: &KeptAnswer) -> bool {
    let age = now.answered_at().duration_since(before.answered_at());
    age.map_or(true, |age| age >= REWRITE_AFTER)
}

fn record(key: &ListingKey, answer: &KeptAnswer) -> Record {
    let (listing, absent) = match answer {
        KeptAnswer::List(listing) => (Some(listing), None),
        KeptAnswer::Absent(absence) => (None, Some(absence.code.clone().unwrap_or_default())),
    };
    Record {
        upstream: key.upstream.to_string(),
        path: key.path.clone(),
        digest: listing.map_or_else(String::new, |listing| listing.digest.to_string()),
        media_type: listing.map_or_else(String::new, |listing| listing.media_type.as_str().to_owned()),
        next: listing.and_then(|listing| listing.next.clone()),
        filters: listing.and_then(|listing| listing.filters.clone()),
        listed_at_ms: to_millis(answer.answered_at()),
        absent,
    }
}

/// `None` for a damaged file, and for the answer to another question in the same place.
fn read(key: &ListingKey, file: &Bytes) -> Option<KeptAnswer> {
    let end = file.iter().position(|byte| *byte == b'\n')? + 1;
    let record: Record = opened(file.get(..end)?)?;
    if record.path != key.path || *record.upstream != *key.upstream {
        return None;
    }
    let answered_at = from_millis(record.listed_at_ms);
    if let Some(code) = record.absent {
        let code = Some(code).filter(|code| !code.is_empty());
        return Some(KeptAnswer::Absent(KeptAbsence { code, answered_at }));
    }
    let media_type = record.media_type.parse().ok()?;
    let listing = KeptListing::new(
        file.slice(end..),
        media_type,
        record.next,
        record.filters,
        answered_at,
    );
    (listing.digest.to_string() == record.digest).then(|| KeptAnswer::List(Arc::new(listing)))
}
