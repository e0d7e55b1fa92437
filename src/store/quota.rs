//! Storage quota: size limit of the store, minimum free disk space, and reservations for blobs being written.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::StoreError;
use super::fs::FileSystem;
use super::usage::Counters;

/// Background eviction starts at the first share of the size limit and stops at the second. So a pull seldom waits
/// for an eviction, and not every pull triggers one.
const BEGIN_PERCENT: u64 = 95;
const END_PERCENT: u64 = 90;

/// Storage limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of blobs, manifests, ingests and partial downloads.
    pub bytes_max: u64,
    /// Least free bytes on the disk.
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

/// The limit that was exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum QuotaKind {
    /// The size limit of the store.
    Size,
    /// The minimum free space of the disk.
    Free,
}

impl QuotaKind {
    /// Name of the limit in the log, the metrics and the status.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Free => "free",
        }
    }
}

/// Number of bytes to evict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shortfall {
    pub(super) quota_kind: QuotaKind,
    /// Least number that makes the reservation fit.
    pub(super) bytes_min: u64,
    /// Number that delays the next eviction.
    pub(super) bytes_target: u64,
}

pub(super) struct Quota {
    fs: Arc<dyn FileSystem>,
    usage: Arc<Counters>,
    bytes_max: AtomicU64,
    free_bytes_min: AtomicU64,
    reserved: AtomicU64,
    /// Bytes of partial downloads.
    partials: Arc<AtomicU64>,
    /// Last measured value; `u64::MAX` before the first measurement.
    free_bytes: AtomicU64,
}

/// Space reserved for an ingest. Dropping it releases the space.
pub(super) struct Reservation {
    quota: Arc<Quota>,
    bytes: u64,
}

impl Reservation {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds the bytes of another reservation to this one.
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
    pub(super) fn new(
        limits: Limits,
        fs: &Arc<dyn FileSystem>,
        usage: &Arc<Counters>,
        partials: Arc<AtomicU64>,
    ) -> Self {
        Self {
            fs: Arc::clone(fs),
            usage: Arc::clone(usage),
            bytes_max: AtomicU64::new(limits.bytes_max),
            free_bytes_min: AtomicU64::new(limits.free_bytes_min),
            reserved: AtomicU64::new(0),
            partials,
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

    /// Reserves `bytes`, or returns the shortfall to evict first.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, Shortfall> {
        // Add first, then check. Two concurrent reservations may both trigger an eviction, but together they never
        // exceed the limit.
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

    /// Number of bytes to evict in the background.
    pub(super) fn background_shortfall(&self) -> Option<Shortfall> {
        self.shortfall(self.limits().free_bytes_min / 20, BEGIN_PERCENT)
    }

    /// Returns whether the size limit allows a blob of this size at all.
    pub(super) fn fits_limit(&self, bytes: u64) -> bool {
        bytes <= self.limits().bytes_max
    }

    /// Bytes to evict so that stored and reserved bytes stay below `percent` of the size limit, and `coming` more
    /// bytes leave the minimum free space.
    fn shortfall(&self, coming: u64, percent: u64) -> Option<Shortfall> {
        let limits = self.limits();
        let usage = self.usage.read();
        let taken = usage
            .blob_bytes
            .saturating_add(usage.manifest_bytes)
            .saturating_add(self.reserved.load(Ordering::SeqCst))
            .saturating_add(self.partials.load(Ordering::Relaxed));
        let over = |percent| taken.saturating_sub(share(limits.bytes_max, percent));
        // Before the startup scan ends, the size of the store is unknown.
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

    /// The last measured free space.
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
