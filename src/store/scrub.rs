//! Reads everything held, over and over and slowly, and sets aside what the disk has changed, before anyone asks for it.
//!
//! How far it came is kept in a small file, so that a restart does not begin anew. The rate is kept by pausing after
//! each step for as long as the step may take; nothing is measured, so a slow disk makes it slower still.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::access_times::AccessTimes;
use super::blobs::{self, Blobs};
use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode, from_millis, to_millis};
use super::fs::FileSystem;
use super::{content_path, manifests};
use crate::oci::{Algorithm, Digest, Hasher};

/// Read at a time, and then paused for.
const CHUNK_BYTES: usize = 256 * 1024;

/// What was read through is left alone for so long.
const SCRUB_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Between two looks whether there is something to do.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

const PROGRESS_FILE: &str = "scrub";

/// How often the progress is written, in files read.
const PROGRESS_EVERY_FILES: u64 = 256;

/// How far it came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    /// The last digest that was read; empty at the beginning of a round.
    after: String,
    /// When the last round ended.
    ended_at_ms: Option<u64>,
}

/// What the scrub did since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubTotals {
    /// Blobs and manifests read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those that were not what their names say.
    pub damaged: u64,
}

pub(super) struct Scrub {
    fs: Arc<dyn FileSystem>,
    blobs: Arc<Blobs>,
    manifests: Arc<manifests::Manifests>,
    access_times: Arc<AccessTimes>,
    stop: Arc<AtomicBool>,
    /// Bytes in a second; 0 is off.
    rate: AtomicU64,
    totals: Totals,
    wake: (Mutex<()>, Condvar),
}

/// How fast it is read.
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

    /// The thread's work, until told to stop.
    pub(super) fn run(&self) {
        // Whoever asks first after a start is not to wait for the disk.
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
        // One that ended in the future was noted by another clock.
        age.is_none_or(|age| age.is_ok_and(|age| age >= SCRUB_INTERVAL) || !self.progress().after.is_empty())
    }

    /// Reads everything that comes after what was last read.
    pub(super) fn round(&self) {
        let mut progress = self.progress();
        let mut files = 0;
        for (tree, algorithm, shard) in shards() {
            let place = |name: &str| format!("{tree}/{algorithm}:{name}");
            if place(&format!("{shard}g")) < progress.after {
                continue;
            }
            let folder = Path::new(tree).join(algorithm.to_string()).join(&shard);
            for entry in self.fs.list(&folder).unwrap_or_default() {
                if self.is_stopped() || self.rate.load(Ordering::Relaxed) == 0 {
                    self.write_progress(&progress);
                    return;
                }
                let here = place(&entry.name);
                let Ok(digest) = format!("{algorithm}:{}", entry.name).parse() else {
                    continue;
                };
                if here <= progress.after {
                    continue;
                }
                self.read(tree, &digest, ReadRate::Limited);
                progress.after = here;
                files += 1;
                if files % PROGRESS_EVERY_FILES == 0 {
                    self.write_progress(&progress);
                }
            }
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
        tracing::info!(
            objects,
            bytes,
            damaged,
            "everything held was read again; counts since the start"
        );
    }

    /// Reads everything once, as fast as the disk can, and tells of each how long it is and whether it is right. `false`
    /// where it was stopped.
    pub(super) fn read_all(&self, mut read: impl FnMut(&Digest, u64, bool)) -> bool {
        for (tree, algorithm, shard) in shards() {
            let folder = Path::new(tree).join(algorithm.to_string()).join(&shard);
            for entry in self.fs.list(&folder).unwrap_or_default() {
                if self.is_stopped() {
                    return false;
                }
                let Ok(digest) = format!("{algorithm}:{}", entry.name).parse() else {
                    continue;
                };
                if let Some(is_intact) = self.read(tree, &digest, ReadRate::Unlimited) {
                    read(&digest, entry.size, is_intact);
                }
            }
        }
        true
    }

    /// Whether it is right; `None` where that cannot be said.
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
                    self.blobs.quarantine(digest, "a blob is not what its name says");
                } else {
                    self.manifests
                        .quarantine(digest, "a manifest is not what its name says");
                }
                Some(false)
            }
            // Stopped in the middle.
            Ok(None) => None,
            // Evicted meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "what is held could not be read");
                None
            }
        }
    }

    /// `None` where it was stopped.
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

    /// Stops and new rates end a pause.
    fn pause(&self, time: Duration) {
        let (lock, wake) = &self.wake;
        let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_stopped() {
            let _ = wake.wait_timeout(guard, time);
        }
    }

    pub(super) fn wake(&self) {
        let _guard = self.wake.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake.1.notify_all();
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn progress(&self) -> Progress {
        let record = self.fs.read_file(Path::new(PROGRESS_FILE), RECORD_BYTES_MAX);
        record.ok().and_then(|record| decode(&record)).unwrap_or_default()
    }

    /// What cannot be noted is read again.
    fn write_progress(&self, progress: &Progress) {
        let _ = self.fs.write_atomic(Path::new(PROGRESS_FILE), &encode(progress));
    }
}

/// The folders of content, in the order of what is noted.
fn shards() -> impl Iterator<Item = (&'static str, Algorithm, String)> {
    let trees = [blobs::TREE, manifests::TREE].into_iter();
    let trees = trees.flat_map(|tree| [(tree, Algorithm::Sha256), (tree, Algorithm::Sha512)]);
    trees.flat_map(|(tree, algorithm)| {
        (0..=255_u32).map(move |shard| (tree, algorithm, format!("{shard:02x}")))
    })
}

#[cfg(test)]
mod tests;
