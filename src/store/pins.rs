//! What must not be evicted, whatever else has to go: a tag with all that it names at any time, or a digest.
//!
//! Each pin is a small file that explains itself. All of them are in memory: an operator sets them by hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use serde::{Deserialize, Serialize};

use super::access_times::AccessTimes;
use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode};
use super::fs::FileSystem;
use super::tags::TagKey;
use super::{Store, StoreError, hashed_path, quarantine, remove_file};
use crate::oci::Digest;

const TREE: &str = "pins";

/// What is kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pin {
    /// A tag, with what it names now and later.
    Tag(TagKey),
    /// A manifest with all that it leads to, or a blob. It need not be held yet.
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

impl Store {
    /// Keeps this from eviction; says whether it was news. Durable when it returns.
    pub fn pin(&self, pin: &Pin) -> Result<bool, StoreError> {
        self.pins.add(pin)
    }

    /// Ends a pin; says whether there was one. Durable when it returns.
    pub fn unpin(&self, pin: &Pin) -> Result<bool, StoreError> {
        self.pins.remove(pin)
    }

    /// Whether just this is pinned.
    pub fn is_pinned(&self, pin: &Pin) -> bool {
        self.pins.has(pin)
    }

    /// Everything pinned, in order.
    pub fn pins(&self) -> Vec<Pin> {
        self.pins.all()
    }
}

pub(super) struct Pins {
    fs: Arc<dyn FileSystem>,
    access_times: Arc<AccessTimes>,
    /// With the file of each. Not held while a file is written or removed.
    known: RwLock<BTreeMap<Pin, PathBuf>>,
    /// Changes come one after the other.
    changing: Mutex<()>,
    /// Held between the look whether something is pinned and its removal.
    evicting: Mutex<()>,
}

impl Pins {
    /// Reads the pins. One that cannot be read is told, and set aside.
    pub(super) fn read(fs: &Arc<dyn FileSystem>, access_times: &Arc<AccessTimes>) -> Self {
        let mut known = BTreeMap::new();
        for folder in fs.list(Path::new(TREE)).unwrap_or_default() {
            let folder = Path::new(TREE).join(folder.name);
            for file in fs.list(&folder).unwrap_or_default() {
                let path = folder.join(file.name);
                let Ok(bytes) = fs.read_file(&path, RECORD_BYTES_MAX) else {
                    tracing::error!(path = %path.display(), "a pin cannot be read; what it kept may be evicted");
                    continue;
                };
                match decode(&bytes).and_then(|record: Record| record.pin()) {
                    Some(pin) => {
                        known.insert(pin, path);
                    }
                    None => {
                        quarantine(
                            fs.as_ref(),
                            &path,
                            "a pin is damaged, and what it kept may be evicted",
                        );
                    }
                }
            }
        }
        Self {
            fs: Arc::clone(fs),
            access_times: Arc::clone(access_times),
            known: RwLock::new(known),
            changing: Mutex::default(),
            evicting: Mutex::default(),
        }
    }

    pub(super) fn has(&self, pin: &Pin) -> bool {
        self.known
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(pin)
    }

    /// Held by an eviction from the look whether something is pinned until it is gone.
    pub(super) fn evicting(&self) -> MutexGuard<'_, ()> {
        self.evicting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Pin> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.keys().cloned().collect()
    }

    pub(super) fn count(&self) -> usize {
        self.known.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn change(&self) -> RwLockWriteGuard<'_, BTreeMap<Pin, PathBuf>> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, pin: &Pin) -> Result<bool, StoreError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.has(pin) {
            return Ok(false);
        }
        let path = pin.path();
        // First: nothing is evicted any more while the file is written.
        self.change().insert(pin.clone(), path.clone());
        // After the insertion: an eviction that begins later finds the pin.
        if let Pin::Digest(digest) = pin {
            self.access_times.mark_needed([*digest]);
        }
        // What was found to be free before goes now, and not after it is said to be pinned.
        drop(self.evicting());
        let written = self.fs.write_durable(&path, &encode(&Record::of(pin)));
        written.map_err(|error| {
            self.change().remove(pin);
            StoreError::io("write", &path, &error)
        })?;
        Ok(true)
    }

    fn remove(&self, pin: &Pin) -> Result<bool, StoreError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            known.get(pin).cloned()
        };
        let Some(path) = path else {
            return Ok(false);
        };
        remove_file(self.fs.as_ref(), &path)?;
        self.change().remove(pin);
        // A power cut would bring it back.
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
