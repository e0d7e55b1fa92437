//! sled as a projection of the files: times, grants and an ordered list of tags. All of it can be lost.
//!
//! The problem: sled 0.34.7 is cheap and it is the engine of choice here, but its `flush()` ends in `sync_file_range`
//! and lost acknowledged data in 33 of 40 power cuts; damaged files make it panic, or open empty without a word; after
//! one full disk it stays broken until it is opened again.
//!
//! What follows from that: one thread owns the database ([`keeper`]). It flushes and then fsyncs sled's file itself;
//! it opens under `catch_unwind` with a time limit; what is damaged is set aside under another name, and a fresh index
//! fills from the files while the store serves. Each record carries a checksum. A miss here is never final, for a
//! partial loss cannot be noticed: whoever asks looks at the files too.
//!
//! Not here: anything that must not be lost. That is in the blobs, manifests, refs and seen files.

mod compaction;
mod identity;
mod interim;
mod keeper;
pub(super) mod thread;
mod unsent;

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// What is hot is kept ready by those who ask, and the kernel keeps the file. With 32 MiB here a store of a million
/// objects took some 20 MiB more when idle; with 8 MiB all of it was read no faster than with 2.
const CACHE_BYTES: u64 = 2 * 1024 * 1024;

/// How often a page is used for one reading or writing of a record: see [`SledIndex::settle`].
const USES: usize = 4;

/// sled collects garbage only in this flusher, so it is never switched off.
const FLUSH_EVERY_MS: u64 = 500;

const OPEN_MAX: Duration = Duration::from_secs(60);

/// How many damaged indexes are kept for whoever wants to look into them.
const BROKEN_MAX: usize = 2;

const BROKEN_PREFIX: &str = "index.broken-";

/// Keys and values, ordered by key. Whoever calls it seals the values.
pub(super) trait Index: Send {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexFault>;
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexFault>;
    fn remove(&mut self, key: &[u8]) -> Result<(), IndexFault>;
    /// At most `limit` pairs whose key begins with `prefix` and is greater than `after`.
    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexFault>;
    /// Makes everything put so far durable.
    fn sync(&mut self) -> Result<(), IndexFault>;
    /// How long its file is; 0 for one without.
    fn file_bytes(&self) -> u64 {
        0
    }
    /// Ends its use after a fault; says whether its files may be opened again in this process.
    fn abandon(self: Box<Self>, fault: &IndexFault) -> bool;
}

pub(super) type Pair = (Vec<u8>, Vec<u8>);

/// Why the index does not answer. Ours, and never a reason to fail a pull.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum IndexFault {
    /// The disk refuses: full, read-only, failing. Opening it again later may help.
    #[error("the disk refuses: {reason}")]
    Disk {
        /// As the system says it.
        reason: String,
        /// Whether it is a failing device, on which closing sled in order would panic.
        is_failing: bool,
    },
    /// Its files are not what they were: set aside.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// Its files are whole but are not the ones that belong here: set aside.
    #[error("it {0}")]
    Foreign(&'static str),
    /// Another handle still has its files.
    #[error("its files are in use")]
    Busy,
}

impl IndexFault {
    fn is_lasting(&self) -> bool {
        matches!(self, Self::Damaged(_) | Self::Foreign(_))
    }
}

/// Runs `deed`; a panic in it is damage.
pub(super) fn guarded<T>(deed: impl FnOnce() -> Result<T, IndexFault>) -> Result<T, IndexFault> {
    catch_unwind(AssertUnwindSafe(deed))
        .unwrap_or_else(|panic| Err(IndexFault::Damaged(said(panic.as_ref()))))
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it panicked")
        .chars()
        .take(200)
        .collect()
}

/// An index that is gone with the process: for tests, and for a file system that is no folder.
#[derive(Clone, Default)]
pub(super) struct MemoryIndex {
    pairs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Index for MemoryIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexFault> {
        Ok(self.pairs.get(key).cloned())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexFault> {
        self.pairs.insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), IndexFault> {
        self.pairs.remove(key);
        Ok(())
    }

    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexFault> {
        let start = lower_bound(prefix, after);
        let pairs = self.pairs.range::<[u8], _>((start, Bound::Unbounded));
        let pairs = pairs.take_while(|(key, _)| key.starts_with(prefix)).take(limit);
        Ok(pairs.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn sync(&mut self) -> Result<(), IndexFault> {
        Ok(())
    }

    fn abandon(self: Box<Self>, _: &IndexFault) -> bool {
        true
    }
}

fn lower_bound<'a>(prefix: &'a [u8], after: &'a [u8]) -> Bound<&'a [u8]> {
    if after < prefix {
        Bound::Included(prefix)
    } else {
        Bound::Excluded(after)
    }
}

/// sled, made durable.
pub(super) struct SledIndex {
    /// `None` only while it is dropped.
    db: Option<sled::Db>,
    /// Our own handle to sled's log, for the fsync that sled leaves out.
    log: File,
}

/// An index just opened.
pub(super) struct Opened {
    pub(super) index: SledIndex,
    /// There were files, and sled found nothing in them: what a total loss looks like.
    pub(super) is_emptied: bool,
}

impl SledIndex {
    /// Opens the index in `folder`, or makes one.
    pub(super) fn open(folder: &Path) -> Result<Opened, IndexFault> {
        let existed = fs::metadata(folder.join("db")).is_ok_and(|metadata| metadata.len() > 0);
        // sled would make it readable by everyone.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(disk)?;
        let db = open_within(folder.to_owned(), OPEN_MAX)?;
        let opened = guarded(|| {
            sync_paths(folder)?;
            let log = File::open(folder.join("db")).map_err(disk)?;
            Ok((log, existed && !db.was_recovered()))
        });
        match opened {
            Ok((log, is_emptied)) => Ok(Opened {
                index: Self { db: Some(db), log },
                is_emptied,
            }),
            Err(fault) => {
                close(db, &fault);
                Err(fault)
            }
        }
    }

    fn db(&self) -> Result<&sled::Db, IndexFault> {
        self.db.as_ref().ok_or(IndexFault::Busy)
    }

    /// Makes sled count the page of `key`. It does not count a page when it reads it in, only when that is used again, and
    /// lets go of others only after 64 uses in one of 256 parts of its cache: of a look at a million records nearly all
    /// would stay in memory for good, whatever the size of the cache.
    fn settle(&self, key: &[u8], uses: usize) -> Result<(), IndexFault> {
        for _ in 0..uses {
            self.db()?.get(key).map_err(sled_fault)?;
        }
        Ok(())
    }
}

/// Opens sled on a thread of its own: on damaged files it can panic, and it can take for ever.
fn open_within(folder: PathBuf, limit: Duration) -> Result<sled::Db, IndexFault> {
    let (send, receive) = mpsc::sync_channel(1);
    let open = move || {
        let config = sled::Config::new()
            .path(folder)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(Some(FLUSH_EVERY_MS));
        let opened = guarded(|| config.open().map_err(sled_fault));
        if let Err(mpsc::SendError(Ok(late))) = send.send(opened) {
            // Nobody waits any more, and its folder has been set aside.
            close(late, &IndexFault::Busy);
        }
    };
    std::thread::Builder::new()
        .name("index-open".to_owned())
        .spawn(open)
        .map_err(disk)?;
    receive.recv_timeout(limit).unwrap_or_else(|_| {
        Err(IndexFault::Damaged(format!(
            "it did not open within {} s",
            limit.as_secs()
        )))
    })
}

/// What sled 0.34 leaves undone when it makes its files.
fn sync_paths(folder: &Path) -> Result<(), IndexFault> {
    let parent = folder.parent().unwrap_or(folder);
    let paths = [
        folder.join("conf"),
        folder.join("db"),
        folder.join("blobs"),
        folder.to_owned(),
        parent.to_owned(),
    ];
    for path in paths {
        match File::open(&path).and_then(|file| file.sync_all()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Drops sled where nothing can unwind through it. On a failing disk it is leaked instead: its drop would panic, and a
/// second panic on the way would end the process. Says whether it was dropped.
fn close(db: sled::Db, fault: &IndexFault) -> bool {
    if matches!(
        fault,
        IndexFault::Disk { is_failing: true, .. } | IndexFault::Damaged(_)
    ) {
        std::mem::forget(db);
        return false;
    }
    catch_unwind(AssertUnwindSafe(|| drop(db))).is_ok()
}

#[expect(clippy::needless_pass_by_value, reason = "a function for `map_err`")]
fn disk(error: io::Error) -> IndexFault {
    let is_failing = error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
    IndexFault::Disk {
        reason: error.to_string(),
        is_failing,
    }
}

fn sled_fault(error: sled::Error) -> IndexFault {
    match error {
        // sled gives this refusal no kind of its own.
        sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => IndexFault::Busy,
        sled::Error::Io(error) => match error.raw_os_error().or_else(|| told_code(&error)) {
            Some(code) => disk(io::Error::from_raw_os_error(code)),
            None => IndexFault::Damaged(error.to_string()),
        },
        other => IndexFault::Damaged(other.to_string()),
    }
}

/// sled hands out an error of the system a second time as its text alone.
fn told_code(error: &io::Error) -> Option<i32> {
    let text = error.to_string();
    let (_, rest) = text.split_once("Os { code: ")?;
    rest.split_once(',')?.0.parse().ok()
}

impl Index for SledIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexFault> {
        let value = self.db()?.get(key).map_err(sled_fault)?;
        self.settle(key, USES)?;
        Ok(value.map(|value| value.to_vec()))
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexFault> {
        self.db()?.insert(key, value).map_err(sled_fault)?;
        self.settle(key, USES)
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), IndexFault> {
        self.db()?.remove(key).map_err(sled_fault).map(drop)
    }

    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexFault> {
        let range = self
            .db()?
            .range::<&[u8], _>((lower_bound(prefix, after), Bound::Unbounded));
        let mut found = Vec::new();
        for pair in range.take(limit) {
            let (key, value) = pair.map_err(sled_fault)?;
            if !key.starts_with(prefix) {
                break;
            }
            // Its neighbours use the same page.
            self.settle(&key, 1)?;
            found.push((key.to_vec(), value.to_vec()));
        }
        Ok(found)
    }

    fn sync(&mut self) -> Result<(), IndexFault> {
        self.db()?.flush().map_err(sled_fault)?;
        self.log.sync_all().map_err(disk)
    }

    fn file_bytes(&self) -> u64 {
        self.log.metadata().map_or(0, |metadata| metadata.len())
    }

    fn abandon(mut self: Box<Self>, fault: &IndexFault) -> bool {
        self.db.take().is_none_or(|db| close(db, fault))
    }
}

impl Drop for SledIndex {
    fn drop(&mut self) {
        if let Some(db) = self.db.take() {
            close(db, &IndexFault::Busy);
        }
    }
}

/// Gives a damaged index another name, and removes all but the newest of those set aside before.
pub(super) fn set_aside(folder: &Path, opened_at: u64, count: u32) -> Result<PathBuf, IndexFault> {
    let parent = folder.parent().unwrap_or(folder);
    let mut aside = parent.join(format!("{BROKEN_PREFIX}{opened_at:012}-{count:04}"));
    if fs::symlink_metadata(&aside).is_ok() {
        // Two starts within one second.
        aside.as_mut_os_string().push("-again");
    }
    match fs::rename(folder, &aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk(error)),
        _ => {}
    }
    let Ok(entries) = fs::read_dir(parent) else {
        return Ok(aside);
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut broken: Vec<String> = names.filter(|name| name.starts_with(BROKEN_PREFIX)).collect();
    broken.sort();
    for name in broken.iter().rev().skip(BROKEN_MAX) {
        // What cannot be removed now is tried again the next time.
        let _ = fs::remove_dir_all(parent.join(name));
    }
    Ok(aside)
}

#[cfg(test)]
pub(in crate::store) mod losing;
#[cfg(test)]
pub(in crate::store) mod slow;
#[cfg(test)]
mod tests;
