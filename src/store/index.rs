//! Index in sled: confirmation times, grants and an ordered tag list. All of it can be rebuilt from the
//! files.
//!
//! The problem: sled 0.34.7 is cheap and is the engine of choice here, but it loses data. Its `flush()` ends in
//! `sync_file_range` and lost acknowledged data in 33 of 40 power cuts. Corrupt files make it panic or open empty
//! without an error. After one full disk it stays broken until it is opened again.
//!
//! The consequences: one thread owns the database ([`worker`]). It flushes and then fsyncs sled's file itself. It
//! opens sled under `catch_unwind` with a time limit. A corrupt index is moved to another name, and a new one is
//! filled from the files while the store serves requests. Each record carries a checksum. A miss in the index is
//! never final, because a partial loss cannot be detected: the caller also reads the files.
//!
//! Data that must not be lost is in the files of blobs, manifests, tags and membership.

mod compaction;
pub(super) mod handle;
mod identity;
mod pending_removals;
mod worker;
mod write_buffer;

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

/// Hot records are cached by the callers, and the kernel caches the file. With 32 MiB here, a store of a million
/// objects used some 20 MiB more when idle. With 8 MiB, a full scan was no faster than with 2.
const CACHE_BYTES: u64 = 2 * 1024 * 1024;

/// Accesses per read or write of a record. See [`SledIndex::touch_page`].
const PAGE_TOUCHES: usize = 4;

/// sled collects garbage only in this flusher, so it is never switched off.
const FLUSH_EVERY_MS: u64 = 500;

const OPEN_MAX: Duration = Duration::from_secs(60);

/// Most corrupt indexes kept for inspection.
const QUARANTINED_MAX: usize = 2;

const QUARANTINE_PREFIX: &str = "index.broken-";

/// Key-value index, ordered by key. Callers add a checksum to the values.
pub(super) trait Index: Send {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError>;
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexError>;
    fn remove(&mut self, key: &[u8]) -> Result<(), IndexError>;
    /// Returns at most `limit` pairs whose key begins with `prefix` and is greater than `after`.
    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError>;
    /// Makes all previous writes durable.
    fn sync(&mut self) -> Result<(), IndexError>;
    /// Size of the index file; 0 if there is none.
    fn file_bytes(&self) -> u64 {
        0
    }
    /// Closes the index after an error. Returns whether its files can be opened again in this process.
    fn abandon(self: Box<Self>, fault: &IndexError) -> bool;
}

pub(super) type Pair = (Vec<u8>, Vec<u8>);

/// Index failure. A pull never fails because of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum IndexError {
    /// The disk is full, read-only or failing. A later attempt to open the index may succeed.
    #[error("disk error: {reason}")]
    Disk {
        /// Error text of the system.
        reason: String,
        /// Whether the device fails, so that an orderly close of sled would panic.
        is_failing: bool,
    },
    /// The files are corrupt. They are quarantined.
    #[error("corrupt: {0}")]
    Damaged(String),
    /// The files are intact but belong to another store or time. They are quarantined.
    #[error("the index {0}")]
    Foreign(&'static str),
    /// Another handle still locks the files.
    #[error("the index files are locked")]
    Busy,
}

impl IndexError {
    fn is_permanent(&self) -> bool {
        matches!(self, Self::Damaged(_) | Self::Foreign(_))
    }
}

/// Runs `op`. A panic in it counts as corruption.
pub(super) fn catch_panic<T>(op: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
    catch_unwind(AssertUnwindSafe(op))
        .unwrap_or_else(|panic| Err(IndexError::Damaged(panic_message(panic.as_ref()))))
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("panic")
        .chars()
        .take(200)
        .collect()
}

/// In-memory index, for tests and for file systems that are not a local folder.
#[derive(Clone, Default)]
pub(super) struct MemoryIndex {
    pairs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Index for MemoryIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        Ok(self.pairs.get(key).cloned())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexError> {
        self.pairs.insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), IndexError> {
        self.pairs.remove(key);
        Ok(())
    }

    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError> {
        let start = lower_bound(prefix, after);
        let pairs = self.pairs.range::<[u8], _>((start, Bound::Unbounded));
        let pairs = pairs.take_while(|(key, _)| key.starts_with(prefix)).take(limit);
        Ok(pairs.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn sync(&mut self) -> Result<(), IndexError> {
        Ok(())
    }

    fn abandon(self: Box<Self>, _: &IndexError) -> bool {
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

/// sled with durable writes.
pub(super) struct SledIndex {
    /// `None` only during the drop.
    db: Option<sled::Db>,
    /// A second handle to sled's log, for the fsync that sled omits.
    log: File,
}

/// An index that was just opened.
pub(super) struct Opened {
    pub(super) index: SledIndex,
    /// Files existed, but sled found no data in them: the sign of a total loss.
    pub(super) is_emptied: bool,
}

impl SledIndex {
    /// Opens the index in `folder`, or creates it.
    pub(super) fn open(folder: &Path) -> Result<Opened, IndexError> {
        let existed = fs::metadata(folder.join("db")).is_ok_and(|metadata| metadata.len() > 0);
        // sled would create the folder readable by all users.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(disk)?;
        let db = open_within(folder.to_owned(), OPEN_MAX)?;
        let opened = catch_panic(|| {
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

    fn db(&self) -> Result<&sled::Db, IndexError> {
        self.db.as_ref().ok_or(IndexError::Busy)
    }

    /// Accesses the page of `key` so that sled's cache counts it. sled counts a page only on later accesses, not
    /// when it loads it, and evicts other pages only after 64 accesses in one of 256 cache shards. Without this, a
    /// scan of a million records would keep nearly all of them in memory for good, whatever the cache size.
    fn touch_page(&self, key: &[u8], times: usize) -> Result<(), IndexError> {
        for _ in 0..times {
            self.db()?.get(key).map_err(sled_error)?;
        }
        Ok(())
    }
}

/// Opens sled on a separate thread, because with corrupt files it can panic or never return.
fn open_within(folder: PathBuf, limit: Duration) -> Result<sled::Db, IndexError> {
    let (send, receive) = mpsc::sync_channel(1);
    let open = move || {
        let config = sled::Config::new()
            .path(folder)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(Some(FLUSH_EVERY_MS));
        let opened = catch_panic(|| config.open().map_err(sled_error));
        if let Err(mpsc::SendError(Ok(late))) = send.send(opened) {
            // The caller has timed out, and the folder has been quarantined.
            close(late, &IndexError::Busy);
        }
    };
    std::thread::Builder::new()
        .name("index-open".to_owned())
        .spawn(open)
        .map_err(disk)?;
    receive.recv_timeout(limit).unwrap_or_else(|_| {
        Err(IndexError::Damaged(format!(
            "not opened within {} s",
            limit.as_secs()
        )))
    })
}

/// The fsyncs that sled 0.34 omits when it creates its files.
fn sync_paths(folder: &Path) -> Result<(), IndexError> {
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

/// Drops sled under `catch_unwind`. On a failing disk sled is leaked instead: its drop would panic, and a second
/// panic during unwinding would abort the process. Returns whether it was dropped.
fn close(db: sled::Db, fault: &IndexError) -> bool {
    if matches!(
        fault,
        IndexError::Disk { is_failing: true, .. } | IndexError::Damaged(_)
    ) {
        std::mem::forget(db);
        return false;
    }
    catch_unwind(AssertUnwindSafe(|| drop(db))).is_ok()
}

#[expect(clippy::needless_pass_by_value, reason = "a function for `map_err`")]
fn disk(error: io::Error) -> IndexError {
    let is_failing = error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
    IndexError::Disk {
        reason: error.to_string(),
        is_failing,
    }
}

fn sled_error(error: sled::Error) -> IndexError {
    match error {
        // sled has no error kind for a locked database.
        sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => IndexError::Busy,
        sled::Error::Io(error) => match error.raw_os_error().or_else(|| os_error_code(&error)) {
            Some(code) => disk(io::Error::from_raw_os_error(code)),
            None => IndexError::Damaged(error.to_string()),
        },
        other => IndexError::Damaged(other.to_string()),
    }
}

/// sled repeats a system error as text only.
fn os_error_code(error: &io::Error) -> Option<i32> {
    let text = error.to_string();
    let (_, rest) = text.split_once("Os { code: ")?;
    rest.split_once(',')?.0.parse().ok()
}

impl Index for SledIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        let value = self.db()?.get(key).map_err(sled_error)?;
        self.touch_page(key, PAGE_TOUCHES)?;
        Ok(value.map(|value| value.to_vec()))
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexError> {
        self.db()?.insert(key, value).map_err(sled_error)?;
        self.touch_page(key, PAGE_TOUCHES)
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), IndexError> {
        self.db()?.remove(key).map_err(sled_error).map(drop)
    }

    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError> {
        let range = self
            .db()?
            .range::<&[u8], _>((lower_bound(prefix, after), Bound::Unbounded));
        let mut found = Vec::new();
        for pair in range.take(limit) {
            let (key, value) = pair.map_err(sled_error)?;
            if !key.starts_with(prefix) {
                break;
            }
            // Neighbouring records access the same page.
            self.touch_page(&key, 1)?;
            found.push((key.to_vec(), value.to_vec()));
        }
        Ok(found)
    }

    fn sync(&mut self) -> Result<(), IndexError> {
        self.db()?.flush().map_err(sled_error)?;
        self.log.sync_all().map_err(disk)
    }

    fn file_bytes(&self) -> u64 {
        self.log.metadata().map_or(0, |metadata| metadata.len())
    }

    fn abandon(mut self: Box<Self>, fault: &IndexError) -> bool {
        self.db.take().is_none_or(|db| close(db, fault))
    }
}

impl Drop for SledIndex {
    fn drop(&mut self) {
        if let Some(db) = self.db.take() {
            close(db, &IndexError::Busy);
        }
    }
}

/// Moves a corrupt index to another name and removes the oldest ones moved before.
pub(super) fn quarantine(folder: &Path, opened_at: u64, count: u32) -> Result<PathBuf, IndexError> {
    let parent = folder.parent().unwrap_or(folder);
    let mut aside = parent.join(format!("{QUARANTINE_PREFIX}{opened_at:012}-{count:04}"));
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
    let mut quarantined: Vec<String> = names.filter(|name| name.starts_with(QUARANTINE_PREFIX)).collect();
    quarantined.sort();
    for name in quarantined.iter().rev().skip(QUARANTINED_MAX) {
        // If this fails, it is tried again the next time.
        let _ = fs::remove_dir_all(parent.join(name));
    }
    Ok(aside)
}

#[cfg(test)]
pub(in crate::store) mod lossy;
#[cfg(test)]
pub(in crate::store) mod slow;
#[cfg(test)]
mod tests;
