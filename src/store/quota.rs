//! How much may be held, and how much of that is taken: by what is held, and by what is being written.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::StoreError;
use super::fs::FileSystem;
use super::usage::Counters;

/// Eviction in the background begins at this share of the size, and ends at the lower one: so that a pull seldom waits
/// for it, and it does not run for every pull.
const BEGIN_PERCENT: u64 = 95;
const END_PERCENT: u64 = 90;

/// How much the store may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of blobs and manifests, of what is being written too.
    pub bytes_max: u64,
    /// Bytes to leave free on the disk.
    pub free_bytes_min: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes_max: u64::MAX,
            free_bytes_min: 0,
        }
    }
}

/// Why something has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum QuotaKind {
    /// The store is at its size.
    Size,
    /// The disk has too little free space left.
    Free,
}

impl QuotaKind {
    /// Its name in the log, the metrics and the status.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Free => "free",
        }
    }
}

/// So much has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shortfall {
    pub(super) quota_kind: QuotaKind,
    /// For what was asked to have room.
    pub(super) bytes_min: u64,
    /// To be left alone for a while after it.
    pub(super) bytes_target: u64,
}

pub(super) struct Quota {
    fs: Arc<dyn FileSystem>,
    usage: Arc<Counters>,
    bytes_max: AtomicU64,
    free_bytes_min: AtomicU64,
    reserved: AtomicU64,
    /// As last measured; `u64::MAX` before the first time.
    free_bytes: AtomicU64,
}

/// Room set aside for what is being written; given back when dropped.
pub(super) struct Reservation {
    quota: Arc<Quota>,
    bytes: u64,
}

impl Reservation {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes over what another one set aside.
    pub(super) fn merge(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.quota.reserved.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

impl Quota {
    pub(super) fn new(limits: Limits, fs: &Arc<dyn FileSystem>, usage: &Arc<Counters>) -> Self {
        Self {
            fs: Arc::clone(fs),
            usage: Arc::clone(usage),
            bytes_max: AtomicU64::new(limits.bytes_max),
            free_bytes_min: AtomicU64::new(limits.free_bytes_min),
            reserved: AtomicU64::new(0),
            free_bytes: AtomicU64::new(u64::MAX),
        }
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            bytes_max: self.bytes_max.load(Ordering::Relaxed),
            free_bytes_min: self.free_bytes_min.load(Ordering::Relaxed),
        }
    }

    pub(super) fn set_limits(&self, limits: Limits) {
        self.bytes_max.store(limits.bytes_max, Ordering::Relaxed);
        self.free_bytes_min
            .store(limits.free_bytes_min, Ordering::Relaxed);
    }

    /// Sets room aside for `bytes`, or says what has to go first.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, Shortfall> {
        // Two that reserve at once see each other: one of them may then be sent to evict in vain, none gets too much.
        self.reserved.fetch_add(bytes, Ordering::SeqCst);
        let reservation = Reservation {
            quota: Arc::clone(self),
            bytes,
        };
        match self.shortfall(bytes, 100) {
            Some(shortfall) => Err(shortfall),
            None => Ok(reservation),
        }
    }

    /// What has to go when nobody asks for room.
    pub(super) fn background_shortfall(&self) -> Option<Shortfall> {
        self.shortfall(self.limits().free_bytes_min / 20, BEGIN_PERCENT)
    }

    /// Whether so much could ever fit.
    pub(super) fn fits_limit(&self, bytes: u64) -> bool {
        bytes <= self.limits().bytes_max
    }

    /// What has to go for what is held and reserved to stay below `percent` of the size, and for `coming` bytes of it
    /// not to take what is to be left free.
    fn shortfall(&self, coming: u64, percent: u64) -> Option<Shortfall> {
        let limits = self.limits();
        let usage = self.usage.read();
        let taken = usage
            .blob_bytes
            .saturating_add(usage.manifest_bytes)
            .saturating_add(self.reserved.load(Ordering::SeqCst));
        let over = |percent| taken.saturating_sub(share(limits.bytes_max, percent));
        // What has not been counted cannot be known to be too much.
        if usage.is_complete && over(percent) > 0 {
            return Some(Shortfall {
                quota_kind: QuotaKind::Size,
                bytes_min: over(percent),
                bytes_target: over(END_PERCENT),
            });
        }
        let free = self.free_bytes().unwrap_or(u64::MAX);
        let left = limits.free_bytes_min.saturating_add(coming);
        (free < left).then(|| Shortfall {
            quota_kind: QuotaKind::Free,
            bytes_min: left - free,
            bytes_target: (left - free).saturating_add(limits.free_bytes_min / 10),
        })
    }

    /// What was measured last, if anything was.
    pub(super) fn last_free_bytes(&self) -> Option<u64> {
        Some(self.free_bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes != u64::MAX)
    }

    pub(super) fn free_bytes(&self) -> Result<u64, StoreError> {
        let measured = self.fs.free_bytes();
        if let Ok(bytes) = &measured {
            self.free_bytes.store(*bytes, Ordering::Relaxed);
        }
        measured.map_err(|error| {
            let folder = self.fs.folder().unwrap_or(Path::new(""));
            StoreError::io("measure the free space of", folder, &error)
        })
    }
}

fn share(bytes: u64, percent: u64) -> u64 {
    let share = u128::from(bytes) * u128::from(percent) / 100;
    u64::try_from(share).unwrap_or(u64::MAX)
}
