//! Pins: tags (with everything they point to at any time) and digests that are never evicted.
//!
//! Each pin is a small self-describing file. All are in memory: an operator sets them by hand, so there are few.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use super::access_times::AccessTimes;
use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode};
use super::fs::FileSystem;
use super::tags::TagKey;
use super::walk::record_files;
use super::{Store, StoreError, hashed_path, quarantine, remove_file};
use crate::oci::Digest;

const TREE: &str = "pins";

/// A pin.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pin {
    /// A tag, with everything it points to now and later.
    Tag(TagKey),
    /// A manifest with everything it refers to, or a blob. It need not be cached yet.
    Digest(Digest),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Record {
    Tag {
        upstream: String,
        repository: String,
        tag: String,
    },
    Digest {
        digest: String,
    },
}

/// The full name of the tag, or the digest.
impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(TagKey {
                upstream,
                repository,
                tag,
            }) => write!(f, "{upstream}/{repository}:{tag}"),
            Self::Digest(digest) => write!(f, "{digest}"),
        }
    }
}

impl Store {
    /// Adds a pin. Returns whether it is new. Durable when it returns.
    pub fn pin(&self, pin: &Pin) -> Result<bool, StoreError> {
        self.pins.add(pin)
    }

    /// Removes a pin. Returns whether it existed. Durable when it returns.
    pub fn unpin(&self, pin: &Pin) -> Result<bool, StoreError> {
        self.pins.remove(pin)
    }

    /// Whether exactly this pin exists.
    pub fn is_pinned(&self, pin: &Pin) -> bool {
        self.pins.has(pin)
    }

    /// All pins, in order.
    pub fn pins(&self) -> Vec<Pin> {
        self.pins.all()
    }
}

pub(super) struct Pins {
    fs: Arc<dyn FileSystem>,
    access_times: Arc<AccessTimes>,
    /// All pins with the path of their file. Not locked while a file is written or removed.
    entries: RwLock<BTreeMap<Pin, PathBuf>>,
    /// Serialises changes.
    changing: Mutex<()>,
}

impl Pins {
    /// Loads the pins. An unreadable one is logged; a damaged one is quarantined.
    pub(super) fn read(fs: &Arc<dyn FileSystem>, access_times: &Arc<AccessTimes>) -> Self {
        let mut entries = BTreeMap::new();
        for (path, _) in record_files(fs.as_ref(), TREE).filter_map(Result::ok) {
            let Ok(bytes) = fs.read_file(&path, RECORD_BYTES_MAX) else {
                tracing::error!(path = %path.display(), "failed to read pin; its content may be evicted");
                continue;
            };
            match decode(&bytes).and_then(|record: Record| record.pin()) {
                Some(pin) => {
                    entries.insert(pin, path);
                }
                None => {
                    quarantine(fs.as_ref(), &path, "damaged pin, its content may be evicted");
                }
            }
        }
        Self {
            fs: Arc::clone(fs),
            access_times: Arc::clone(access_times),
            entries: RwLock::new(entries),
            changing: Mutex::default(),
        }
    }

    pub(super) fn has(&self, pin: &Pin) -> bool {
        self.entries.read().contains_key(pin)
    }

    fn all(&self) -> Vec<Pin> {
        let entries = self.entries.read();
        entries.keys().cloned().collect()
    }

    pub(super) fn count(&self) -> usize {
        self.entries.read().len()
    }

    fn add(&self, pin: &Pin) -> Result<bool, StoreError> {
        let _changing = self.changing.lock();
        if self.has(pin) {
            return Ok(false);
        }
        let path = pin.path();
        // In memory first, so that nothing pinned is evicted while the file is written.
        self.entries.write().insert(pin.clone(), path.clone());
        // After the insertion: an eviction that begins later sees the pin.
        if let Pin::Digest(digest) = pin {
            self.access_times.mark_needed([*digest]);
        }
        // Wait for a running eviction that has already checked for pins, so that it cannot remove content after the pin
        // is acknowledged.
        drop(self.access_times.removing());
        let written = self.fs.write_durable(&path, &encode(&Record::of(pin)));
        written.map_err(|error| {
            self.entries.write().remove(pin);
            StoreError::io("write", &path, &error)
        })?;
        Ok(true)
    }

    fn remove(&self, pin: &Pin) -> Result<bool, StoreError> {
        let _changing = self.changing.lock();
        let path = {
            let entries = self.entries.read();
            entries.get(pin).cloned()
        };
        let Some(path) = path else {
            return Ok(false);
        };
        remove_file(self.fs.as_ref(), &path)?;
        self.entries.write().remove(pin);
        // Without this, a power cut could restore the pin.
        if let Some(folder) = path.parent() {
            self.fs
                .sync_dir(folder)
                .map_err(|error| StoreError::io("fsync", folder, &error))?;
        }
        Ok(true)
    }
}

impl Pin {
    fn path(&self) -> PathBuf {
        match self {
            Self::Tag(key) => hashed_path(TREE, &[&key.upstream, key.repository.as_str(), key.tag.as_str()]),
            Self::Digest(digest) => hashed_path(TREE, &[&digest.to_string()]),
        }
    }
}

impl Record {
    fn of(pin: &Pin) -> Self {
        match pin {
            Pin::Tag(key) => Self::Tag {
                upstream: key.upstream.to_string(),
                repository: key.repository.as_str().to_owned(),
                tag: key.tag.as_str().to_owned(),
            },
            Pin::Digest(digest) => Self::Digest {
                digest: digest.to_string(),
            },
        }
    }

    fn pin(&self) -> Option<Pin> {
        Some(match self {
            Self::Tag {
                upstream,
                repository,
                tag,
            } => Pin::Tag(TagKey {
                upstream: upstream.as_str().into(),
                repository: repository.parse().ok()?,
                tag: tag.parse().ok()?,
            }),
            Self::Digest { digest } => Pin::Digest(digest.parse().ok()?),
        })
    }
}
