//! Scrub: reads all stored content in the background at a limited rate and quarantines corrupt files before a client
//! requests them.
//!
//! A small file records the progress, so a restart continues where the last process stopped. The rate is kept by a
//! pause after each chunk. The time of the read itself is not measured, so a slow disk makes the scrub slower.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use super::access_times::AccessTimes;
use super::blobs::{self, Blobs};
use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode, from_millis, to_millis};
use super::fs::FileSystem;
use super::walk::content_files;
use super::{content_path, manifests};
use crate::oci::{Algorithm, Digest, Hasher};

/// Bytes read between two pauses.
const CHUNK_BYTES: usize = 256 * 1024;

/// Pause after a complete round.
const SCRUB_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Interval of the check whether a round is due.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

const PROGRESS_FILE: &str = "scrub";

/// Number of files between two writes of the progress.
const PROGRESS_EVERY_FILES: u64 = 256;

/// The content trees in scrub order.
const TREES: [&str; 2] = [blobs::TREE, manifests::TREE];

/// Progress of the current round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    /// The last digest that was read. Empty at the start of a round.
    after: String,
    /// End of the last round.
    ended_at_ms: Option<u64>,
}

/// Totals since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubTotals {
    /// Blobs and manifests read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Objects that did not match their digest.
    pub damaged: u64,
}

pub(super) struct Scrub {
    fs: Arc<dyn FileSystem>,
    blobs: Arc<Blobs>,
    manifests: Arc<manifests::Manifests>,
    access_times: Arc<AccessTimes>,
    stop: Arc<AtomicBool>,
    /// Bytes per second; 0 disables the scrub.
    rate: AtomicU64,
    totals: Totals,
    wake: (Mutex<()>, Condvar),
}

/// Read rate.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadRate {
    Limited,
    Unlimited,
}

#[derive(Default)]
struct Totals {
    objects: AtomicU64,
    bytes: AtomicU64,
    damaged: AtomicU64,
}

impl Scrub {
    pub(super) fn new(
        rate: u64,
        fs: &Arc<dyn FileSystem>,
        blobs: &Arc<Blobs>,
        manifests: &Arc<manifests::Manifests>,
        access_times: &Arc<AccessTimes>,
        stop: &Arc<AtomicBool>,
    ) -> Self {
        Self {
            fs: Arc::clone(fs),
            blobs: Arc::clone(blobs),
            manifests: Arc::clone(manifests),
            access_times: Arc::clone(access_times),
            stop: Arc::clone(stop),
            rate: AtomicU64::new(rate),
            totals: Totals::default(),
            wake: Default::default(),
        }
    }

    pub(super) fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
        self.wake();
    }

    pub(super) fn scrubbed(&self) -> ScrubTotals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ScrubTotals {
            objects: read(&self.totals.objects),
            bytes: read(&self.totals.bytes),
            damaged: read(&self.totals.damaged),
        }
    }

    /// Main loop of the scrub thread.
    pub(super) fn run(&self) {
        // The first requests after a start must not compete with the scrub for the disk.
        self.pause(CHECK_INTERVAL);
        while !self.is_stopped() {
            if self.rate.load(Ordering::Relaxed) > 0 && self.is_due() {
                self.round();
            }
            self.pause(CHECK_INTERVAL);
        }
    }

    fn is_due(&self) -> bool {
        let ended_at = self.progress().ended_at_ms.map(from_millis);
        let age = ended_at.map(|ended_at| self.access_times.now().duration_since(ended_at));
        // An end time in the future comes from a clock that was set back.
        age.is_none_or(|age| age.is_ok_and(|age| age >= SCRUB_INTERVAL) || !self.progress().after.is_empty())
    }

    /// Reads everything after the last recorded digest at the limited rate.
    pub(super) fn round(&self) {
        let mut progress = self.progress();
        let (after, mut files) = (position_of(&progress.after), 0);
        let is_complete = self.walk(after, ReadRate::Limited, |tree, digest, _, _| {
            progress.after = format!("{tree}/{digest}");
            files += 1;
            if files % PROGRESS_EVERY_FILES == 0 {
                self.write_progress(&progress);
            }
        });
        if !is_complete {
            self.write_progress(&progress);
            return;
        }
        let ended_at_ms = Some(to_millis(self.access_times.now()));
        self.write_progress(&Progress {
            after: String::new(),
            ended_at_ms,
        });
        let ScrubTotals {
            objects,
            bytes,
            damaged,
        } = self.scrubbed();
        tracing::info!(objects, bytes, damaged, "scrub round finished");
    }

    /// Reads everything once at full disk speed. `read` is called with the digest, the size and whether the content
    /// is intact. Returns `false` if it was stopped.
    pub(super) fn read_all(&self, mut read: impl FnMut(&Digest, u64, bool)) -> bool {
        self.walk(None, ReadRate::Unlimited, |_, digest, size, is_intact| {
            if let Some(is_intact) = is_intact {
                read(digest, size, is_intact);
            }
        })
    }

    /// Reads all content after a position. `each` is called with the tree, the digest, the size and whether the content
    /// is intact, if that is known. Returns `false` if it was stopped.
    fn walk(
        &self,
        after: Option<(&'static str, Digest)>,
        read_rate: ReadRate,
        mut each: impl FnMut(&'static str, &Digest, u64, Option<bool>),
    ) -> bool {
        let is_stopped = || {
            let is_off = read_rate == ReadRate::Limited && self.rate.load(Ordering::Relaxed) == 0;
            is_off || self.is_stopped()
        };
        for tree in TREES {
            let within = match after {
                Some((after, _)) if tree < after => continue,
                Some((after, digest)) => (tree == after).then_some(digest),
                None => None,
            };
            for (digest, entry) in content_files(self.fs.as_ref(), tree, within).filter_map(Result::ok) {
                if is_stopped() {
                    return false;
                }
                let is_intact = self.read(tree, &digest, read_rate);
                if self.is_stopped() {
                    return false;
                }
                each(tree, &digest, entry.size, is_intact);
            }
        }
        true
    }

    /// Returns whether the content is intact, or `None` if that is unknown.
    fn read(&self, tree: &str, digest: &Digest, read_rate: ReadRate) -> Option<bool> {
        let path = content_path(tree, digest);
        match self.hash(&path, digest.algorithm(), read_rate) {
            Ok(Some(found)) => {
                self.totals.objects.fetch_add(1, Ordering::Relaxed);
                if found == *digest {
                    return Some(true);
                }
                self.totals.damaged.fetch_add(1, Ordering::Relaxed);
                if tree == blobs::TREE {
                    self.blobs.quarantine_damaged(digest);
                } else {
                    self.manifests
                        .quarantine(digest, "manifest content does not match its digest");
                }
                Some(false)
            }
            // Stopped before the end of the file.
            Ok(None) => None,
            // Evicted meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "failed to read stored content");
                None
            }
        }
    }

    /// Returns `None` if it was stopped.
    fn hash(&self, path: &Path, algorithm: Algorithm, read_rate: ReadRate) -> io::Result<Option<Digest>> {
        let file = self.fs.open(path)?;
        let mut hasher = Hasher::new(algorithm);
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut at = 0;
        loop {
            let read = match file.read_at(&mut buffer, at) {
                Ok(0) => return Ok(Some(hasher.finish())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            hasher.update(buffer.get(..read).unwrap_or_default());
            at += read as u64;
            self.totals.bytes.fetch_add(read as u64, Ordering::Relaxed);
            if read_rate == ReadRate::Limited {
                let rate = self.rate.load(Ordering::Relaxed).max(1);
                let micros = (read as u64).saturating_mul(1_000_000) / rate;
                self.pause(Duration::from_micros(micros));
            }
            if self.is_stopped() {
                return Ok(None);
            }
        }
    }

    /// A stop or a new rate ends the pause early.
    fn pause(&self, time: Duration) {
        let (lock, wake) = &self.wake;
        let mut guard = lock.lock();
        if !self.is_stopped() {
            wake.wait_for(&mut guard, time);
        }
    }

    pub(super) fn wake(&self) {
        let _guard = self.wake.0.lock();
        self.wake.1.notify_all();
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn progress(&self) -> Progress {
        let record = self.fs.read_file(Path::new(PROGRESS_FILE), RECORD_BYTES_MAX);
        record.ok().and_then(|record| decode(&record)).unwrap_or_default()
    }

    /// If this fails, a restart reads the files after the last record again.
    fn write_progress(&self, progress: &Progress) {
        let _ = self.fs.write_atomic(Path::new(PROGRESS_FILE), &encode(progress));
    }
}

/// The tree and digest of a recorded position. `None` at the start of a round.
fn position_of(after: &str) -> Option<(&'static str, Digest)> {
    let (tree, digest) = after.split_once('/')?;
    let tree = TREES.into_iter().find(|known| *known == tree)?;
    Some((tree, digest.parse().ok()?))
}

#[cfg(test)]
mod tests;
