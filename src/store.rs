//! On-disk store of blobs, manifests, tags, grants and small records.
//!
//! All state is in self-describing files. A person can read the folder, and no other state is needed to use it:
//!
//! ```text
//! LOCK                        locked by the process that uses the folder
//! install-secret              key of the principal hashes; 32 bytes, readable by the owner only
//! store-id                    identity and generation, to detect a lost or foreign index
//! blobs/sha256/ab/<hex>       verified bytes, read-only
//! manifests/sha256/ab/<hex>   verified bytes; <hex>.meta: media type and source repositories
//! sightings/ab/<hash>         when a tag was first seen to name each digest, or a digest was first seen, for `min_age`
//! refs/ab/<hash>              tag record: upstream, repository, tag → digest, per set of accepted media types
//! seen/ab/<hash>              membership: the digests that the upstream has in a repository; whether it is public
//! listings/<slot>             last tag list or referrers list, for outages
//! ingest/<n>                  files being written; ingest/<digest>: partial downloads
//! doubts/ab/<hash>            invalidations: tags and digests that a write may have changed
//! challenges/ab/<hash>        last authentication challenge of an upstream, for outages
//! scrub                       position of the background scrub
//! pins/ab/<hash>              tags and digests that are never evicted
//! blocks/ab/<digest>-<hash>   digests that are never served, in one repository or everywhere
//! approvals/ab/<digest>-<hash> digests that are served before they are old enough
//! revocations/ab/<hash>       denials by an upstream that the shared storage does not have yet
//! offline                     present while offline mode is on; survives restarts
//! quarantine/                 files that failed verification
//! index/                      sled: a projection of the files, may be lost
//! ```
//!
//! Rules:
//!
//! 1. Bytes before names: a file is written under `ingest/`, fsynced, renamed and its folder fsynced before anything
//!    refers to it.
//! 2. A blob becomes visible only with proof of its digest ([`blobs::Verified`]).
//! 3. Small records carry a checksum.
//! 4. A damaged file is a cache miss and goes to `quarantine/`.
//! 5. A miss in the index is never final: the files are consulted as well.
//! 6. A failure here is a [`StoreError`]. It is logged and never fails a pull.
//!
//! Hot reads come from memory: open files, manifests, tags, membership and grants are in bounded caches that are looked
//! up by borrowed keys. Every call that may touch the disk blocks; async tasks use [`AsyncStore`] only.
//!
//! The modification time of a content file is its last access time. The least recently used images are evicted to make
//! room (`evict`).
//!
//! Not here: authorization of callers.

pub mod access_times;
mod async_store;
mod blob_handle;
pub mod blobs;
mod cache_key;
pub mod challenges;
mod checksummed_json;
pub mod completeness;
mod error;
mod evict;
pub mod file_read;
pub mod fs;
pub mod grants;
mod graph;
mod index;
pub mod ingest;
pub mod invalidations;
pub mod listings;
mod lock;
pub mod manifests;
pub mod membership;
mod offline;
pub mod partial;
pub mod pins;
mod quota;
pub mod revocations;
mod scrub;
mod secret;
mod tag_use;
pub mod tags;
pub mod usage;
pub mod usage_report;
pub mod verdicts;
pub mod verify;
mod view;
mod walk;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::oci::Digest;

use self::access_times::AccessTimes;
pub use self::async_store::AsyncStore;
use self::checksummed_json::to_millis;
pub use self::error::{HealthIssue, OpenError, StoreError};
use self::evict::Evictor;
pub use self::evict::{DeleteError, EVICTION_MIN_AGE, Evictions};
use self::fs::FileSystem;
pub use self::fs::disk_errors::LogLimit;
use self::fs::monitored::{DiskHealth, MonitoredFs};
use self::fs::pending::PendingIo;
pub use self::index::handle::IndexState;
use self::index::handle::{IndexHandle, Location};
use self::lock::Lock;
use self::pins::Pins;
pub use self::quota::Limits;
use self::quota::Quota;
pub use self::scrub::ScrubTotals;
use self::usage::{Counters, Usage};
use self::verdicts::Verdicts;
pub use self::view::View;

const QUARANTINE_FOLDER: &str = "quarantine";

/// Quarantined files kept per name. Beyond that, the first one is replaced.
const QUARANTINED_AGAIN_MAX: u32 = 4;

/// Configuration of the store.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Byte limit of the in-memory manifest cache.
    pub manifest_cache_bytes_max: u64,
    /// Byte limit of the in-memory cache of blobs of at most [`blobs::SMALL_BLOB_BYTES_MAX`].
    pub small_blob_cache_bytes_max: u64,
    /// Maximum number of cached open blob files.
    pub open_blobs_max: usize,
    /// Disk quota.
    pub limits: Limits,
    /// Rate of the background scrub in bytes per second; 0 disables it.
    pub scrub_rate: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            manifest_cache_bytes_max: 32 * 1024 * 1024,
            small_blob_cache_bytes_max: 16 * 1024 * 1024,
            open_blobs_max: 512,
            limits: Limits::default(),
            scrub_rate: 0,
        }
    }
}

/// The store. One per data folder.
pub struct Store {
    fs: Arc<MonitoredFs>,
    disk_health: DiskHealth,
    pending_io: PendingIo,
    blobs: Arc<blobs::Blobs>,
    manifests: Arc<manifests::Manifests>,
    tags: Arc<tags::Tags>,
    membership: Arc<membership::MembershipStore>,
    listings: listings::Listings,
    challenges: challenges::Challenges,
    invalidations: invalidations::Invalidations,
    sightings: tags::sightings::SightingFiles,
    grants: Arc<grants::Grants>,
    complete_images: completeness::CompleteImages,
    removed: Arc<completeness::RemovedDigests>,
    reference_counts: usage_report::ReferenceCountCache,
    usage: Arc<Counters>,
    access_times: Arc<AccessTimes>,
    pins: Arc<Pins>,
    verdicts: Verdicts,
    quota: Arc<Quota>,
    evictor: Arc<Evictor>,
    scrub: Arc<scrub::Scrub>,
    secret: [u8; 32],
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Rebuilds index entries that were lost.
    reindexing: Mutex<Option<JoinHandle<()>>>,
    verify_job: verify::VerifyJob,
    // Dropped before the lock, so the database is closed while this process still owns the folder.
    index: Arc<IndexHandle>,
    _lock: Option<Lock>,
}

impl Store {
    /// Opens the store on `fs` and locks its folder for this process. Does not wait for the index or for the usage
    /// scan.
    pub fn open(settings: &Settings, fs: Arc<dyn FileSystem>, now: SystemTime) -> Result<Self, OpenError> {
        Self::open_with(settings, fs, now, |fs| {
            fs.folder().map_or(Location::Memory, |folder| Location::Folder {
                fs: Arc::clone(fs),
                index: folder.join("index"),
                opened_at: to_millis(now) / 1000,
            })
        })
    }

    #[expect(clippy::too_many_lines, reason = "builds every part of the store, in order")]
    fn open_with(
        settings: &Settings,
        fs: Arc<dyn FileSystem>,
        now: SystemTime,
        location: impl FnOnce(&Arc<dyn FileSystem>) -> Location,
    ) -> Result<Self, OpenError> {
        let lock = fs.folder().map(Lock::take).transpose()?;
        let disk_health = DiskHealth::default();
        let pending_io = PendingIo::default();
        let monitored = Arc::new(MonitoredFs::new(fs, &disk_health, &pending_io));
        let fs: Arc<dyn FileSystem> = Arc::clone(&monitored) as _;
        let secret = secret::read_or_create(fs.as_ref())?;
        let verdicts = Verdicts::read(&fs)?;
        let partials = partial::PartialDownloads::find(fs.as_ref(), now);
        let index = IndexHandle::start(location(&fs))
            .map_err(|error| StoreError::io("start the thread of", "index", &error))?;
        let index = Arc::new(index);
        let usage = Arc::new(Counters::default());
        let tags = Arc::new(tags::Tags::new(&fs, &index, &usage));
        let stop = Arc::new(AtomicBool::new(false));
        let grants = Arc::new(grants::Grants::new(&index));
        let removed = Arc::new(completeness::RemovedDigests::default());
        let membership = Arc::new(membership::MembershipStore::new(&fs, &removed));
        let scan = {
            let (fs, usage, tags, membership, stop) = (
                Arc::clone(&fs),
                Arc::clone(&usage),
                Arc::clone(&tags),
                Arc::clone(&membership),
                Arc::clone(&stop),
            );
            let grants = Arc::clone(&grants);
            spawn_thread("store-scan", move || {
                grants.prune(now);
                usage::count_existing(fs.as_ref(), &usage, &stop);
                if tags.reindex(&stop) && !grants.is_filter_complete() {
                    grants.prune(now);
                }
                membership.count(&stop);
            })?
        };
        let access_times = Arc::new(AccessTimes::new(now));
        let pins = Arc::new(Pins::read(&fs, &access_times));
        let quota = Arc::new(Quota::new(settings.limits, &fs, &usage, partials.bytes()));
        let blobs = Arc::new(blobs::Blobs::new(
            settings,
            &fs,
            &index,
            (&usage, &removed),
            partials,
            &access_times,
            &disk_health,
        ));
        let manifests = Arc::new(manifests::Manifests::new(
            settings,
            &fs,
            &usage,
            &access_times,
            &removed,
        ));
        let evictor = Evictor::new(
            &fs,
            &blobs,
            &manifests,
            &tags,
            &pins,
            &access_times,
            &quota,
            &usage,
            &stop,
        );
        let evictor = Arc::new(evictor);
        let evicting = {
            let evictor = Arc::clone(&evictor);
            spawn_thread("store-evict", move || evictor.run())?
        };
        let scrub = scrub::Scrub::new(settings.scrub_rate, &fs, &blobs, &manifests, &access_times, &stop);
        let scrub = Arc::new(scrub);
        let scrubbing = {
            let scrub = Arc::clone(&scrub);
            spawn_thread("store-scrub", move || scrub.run())?
        };
        let store = Self {
            blobs,
            manifests,
            membership,
            listings: listings::Listings::new(&fs),
            challenges: challenges::Challenges::new(&fs),
            invalidations: invalidations::Invalidations::new(&fs),
            sightings: tags::sightings::SightingFiles::new(&fs),
            tags,
            grants,
            complete_images: completeness::CompleteImages::new(&removed),
            removed,
            reference_counts: usage_report::ReferenceCountCache::default(),
            usage,
            access_times,
            pins,
            verdicts,
            quota,
            evictor,
            scrub,
            secret,
            stop,
            threads: vec![scan, evicting, scrubbing],
            reindexing: Mutex::default(),
            verify_job: verify::VerifyJob::default(),
            fs: monitored,
            disk_health,
            pending_io,
            index,
            _lock: lock,
        };
        store.load_invalidations();
        Ok(store)
    }

    /// Flushes access times and the index. Call it before the process ends.
    pub fn close(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.evictor.wake();
        self.access_times.write(self.fs.as_ref());
        self.index.flush();
    }

    /// Periodic work: disk probe, eviction check, pending index removals, index rebuild. Call it every few seconds.
    /// Blocks.
    pub fn tick(&self, now: SystemTime) {
        self.access_times.set_now(now);
        self.fs.probe();
        self.evictor.wake_if_needed();
        self.index.send_pending_removals();
        self.rebuild_index_if_needed();
    }

    /// Rebuilds the index from the files, in a thread, if it lost entries since the start.
    fn rebuild_index_if_needed(&self) {
        let is_lacking = self.usage.read().is_complete
            && self.index.state() == IndexState::Ready
            && !self.index.is_complete();
        let mut reindexing = self.reindexing.lock();
        if !is_lacking || reindexing.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let (tags, stop) = (Arc::clone(&self.tags), Arc::clone(&self.stop));
        let thread = std::thread::Builder::new().name("store-reindex".to_owned());
        // If no thread can be started, the next call retries.
        *reindexing = thread.spawn(move || _ = tags.reindex(&stop)).ok();
    }

    /// Writes access times and pending membership lines, and prunes membership files. Call it every few minutes.
    pub fn housekeeping(&self) {
        self.evictor.tidy();
        let is_held = |digest: &Digest| self.blobs.has(digest) || self.manifests.has(digest);
        self.membership.append_pending();
        self.membership
            .prune(self.access_times.now(), &is_held, &self.stop);
    }

    /// Changes the quota and evicts what exceeds it.
    pub fn set_limits(&self, limits: Limits) {
        self.quota.set_limits(limits);
        self.evictor.wake_if_needed();
    }

    /// The quota.
    pub fn limits(&self) -> Limits {
        self.quota.limits()
    }

    /// Current health issues. The store continues to serve readable content.
    pub fn health_issues(&self) -> Vec<HealthIssue> {
        let mut issues: Vec<_> = self
            .disk_health
            .last_error()
            .map(HealthIssue::Disk)
            .into_iter()
            .collect();
        if let Some((operation, took)) = self.pending_io.slow(Instant::now()) {
            let seconds = took.as_secs();
            issues.push(HealthIssue::Slow { operation, seconds });
        }
        if let IndexState::Degraded { reason } = self.index.state() {
            issues.push(HealthIssue::Index { reason });
        } else if self.index.is_stuck() {
            let reason = "timeout".to_owned();
            issues.push(HealthIssue::Index { reason });
        }
        if self.evictor.is_short() {
            issues.push(HealthIssue::OverQuota {
                limits: self.quota.limits(),
            });
        }
        issues
    }

    /// Disk errors since the start, by operation.
    pub fn errors(&self) -> Vec<(&'static str, u64)> {
        self.fs.errors()
    }

    /// Changes the rate of the background scrub in bytes per second; 0 disables it.
    pub fn set_scrub_rate(&self, rate: u64) {
        self.scrub.set_rate(rate);
    }

    /// Totals of the background scrub since the start.
    pub fn scrubbed(&self) -> ScrubTotals {
        self.scrub.scrubbed()
    }

    /// Eviction totals since the start.
    pub fn evictions(&self) -> Evictions {
        self.evictor.totals()
    }

    /// The key of the principal hashes. Never leaves this machine.
    pub fn install_secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// State of the index. The store works without it.
    pub fn index_state(&self) -> IndexState {
        self.index.state()
    }

    /// Current usage.
    pub fn usage(&self) -> Usage {
        self.usage.read()
    }

    /// Free bytes on the disk.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        self.quota.free_bytes()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.evictor.wake();
        self.scrub.wake();
        let reindexing = self.reindexing.get_mut();
        let others = [reindexing.take(), self.verify_job.take()].into_iter().flatten();
        for thread in self.threads.drain(..).chain(others) {
            // The panic hook has already logged a panic of this thread.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("folder", &self.fs.folder())
            .finish_non_exhaustive()
    }
}

/// Starts a background thread.
fn spawn_thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StoreError> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let begun = thread.spawn(work);
    begun.map_err(|error| StoreError::io("start a thread", name, &error))
}

/// Moves a damaged file to quarantine, where it can be inspected; from then on it is a cache miss. Returns whether this
/// call removed it.
fn quarantine(fs: &dyn FileSystem, path: &Path, why: &str) -> bool {
    tracing::error!(path = %path.display(), "{why}: quarantined");
    let (tree, name) = (path.iter().next(), path.file_name());
    let name = [tree, name].map(|part| part.unwrap_or_default().to_string_lossy());
    let name = Path::new(QUARANTINE_FOLDER).join(name.join("-"));
    // A blob and a manifest can have the same digest, and a refetched file can be damaged again.
    let again = (2..=QUARANTINED_AGAIN_MAX).map(|nth| PathBuf::from(format!("{}-{nth}", name.display())));
    let mut names = std::iter::once(name.clone()).chain(again);
    let free = names.find(|name| fs.open(name).is_err()).unwrap_or(name);
    // If the rename fails, delete the file; if that fails as well, the next read finds the damage again.
    let moved = fs.rename(path, &free);
    moved.or_else(|_| fs.remove(path)).is_ok()
}

/// Size of a file, if it exists.
fn size_of(fs: &dyn FileSystem, path: &Path) -> Option<u64> {
    fs.open(path).and_then(|file| file.size()).ok()
}

/// Removes a file. Returns its size if it existed.
fn remove_file(fs: &dyn FileSystem, path: &Path) -> Result<Option<u64>, StoreError> {
    let size = size_of(fs, path);
    match fs.remove(path) {
        Ok(()) => Ok(Some(size.unwrap_or(0))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("remove", path, &error)),
    }
}

/// Path of content: `<tree>/<algorithm>/<first two digits>/<hex>`.
fn content_path(tree: &str, digest: &Digest) -> PathBuf {
    let hex = digest.hex();
    let shard = hex.get(..2).unwrap_or_default();
    [tree, &digest.algorithm().to_string(), shard, &hex]
        .iter()
        .collect()
}

/// Path of a record: `<tree>/<first two digits>/<hash>`, where the hash is over `parts`.
fn hashed_path(tree: &str, parts: &[&str]) -> PathBuf {
    named_path(tree, &hashed_name(parts))
}

/// The hash in the name of a record's file.
fn hashed_name(parts: &[&str]) -> Digest {
    Digest::of(crate::oci::Algorithm::Sha256, parts.join("\0").as_bytes())
}

/// Path of the record with this name.
fn named_path(tree: &str, name: &Digest) -> PathBuf {
    let hash = name.hex();
    let shard = hash.get(..2).unwrap_or_default();
    [tree, shard, &hash].iter().collect()
}
