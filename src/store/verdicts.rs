//! Operator verdicts about digests: approvals (exempt from a minimum age) and blocks (never served).
//!
//! A verdict holds in one repository or everywhere. Both kinds may exist for one digest; callers let a block beat an
//! approval. Each verdict is a small self-describing file, durable before its command returns. All are in memory, so
//! that a lookup on the request path never needs the disk.
//!
//! After a failure, blocked content stays blocked, and an approval is lost. The name of a block's file has the digest,
//! so a damaged or unreadable block still holds, then in every repository. A damaged approval is quarantined and no
//! longer holds. If the folder of blocks cannot be listed, the program does not start.

mod record;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, RwLock};

use self::record::{Record, files, files_of, load};
use super::checksummed_json::encode;
use super::fs::FileSystem;
use super::{AsyncStore, Store, StoreError, remove_file};
use crate::oci::{Digest, Repository};

/// Maximum number of verdicts.
pub const VERDICTS_MAX: usize = 8_192;

/// Longest actor or reason of a verdict, in bytes. A longer text is cut.
pub const NOTE_BYTES_MAX: usize = 1_024;

/// An operator's decision about a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VerdictKind {
    /// The digest is served before it is old enough.
    Approved,
    /// The digest is never served.
    Blocked,
}

impl VerdictKind {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::Approved, Self::Blocked];

    /// Name in the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Approved => "approved",
            Self::Blocked => "blocked",
        }
    }

    fn tree(self) -> &'static str {
        match self {
            Self::Approved => "approvals",
            Self::Blocked => "blocks",
        }
    }
}

/// Where a verdict holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum VerdictScope {
    /// In every repository of every upstream.
    Everywhere,
    /// In one repository.
    Repository {
        /// The name of the upstream.
        upstream: Arc<str>,
        /// The repository at the upstream.
        repository: Repository,
    },
}

impl VerdictScope {
    fn covers(&self, of: &str, name: &Repository) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Repository { upstream, repository } => &**upstream == of && repository == name,
        }
    }
}

/// Key of a verdict.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VerdictKey {
    /// Approved or blocked.
    pub kind: VerdictKind,
    /// Where it holds.
    pub scope: VerdictScope,
    /// The digest of a manifest or blob. It need not be cached.
    pub digest: Digest,
}

/// Who gave a verdict, when and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerdictNote {
    /// When it was given.
    pub at: SystemTime,
    /// Who gave it, as they called themselves.
    pub by: String,
    /// The operator's reason, if one was given.
    pub reason: Option<String>,
}

/// The first verdicts of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstVerdicts {
    /// In the order of their keys.
    pub verdicts: Vec<(VerdictKey, Arc<VerdictNote>)>,
    /// Number of all verdicts of this kind.
    pub total: usize,
}

/// A verdict that cannot be recorded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerdictError {
    /// [`VERDICTS_MAX`] is reached.
    #[error("{VERDICTS_MAX} digests are blocked or approved already, which is the limit; remove some first")]
    TooMany,
    /// A block could not be written. It holds until the cache restarts.
    #[error("the digest is blocked until the next restart only: {0}")]
    NotDurable(StoreError),
    /// The record of a durable block could not be replaced. The block outlasts a restart, its new note does not.
    #[error("the digest was blocked already and stays so; the new reason is lost at the next restart: {0}")]
    NoteNotDurable(StoreError),
    /// The disk failed. Nothing changed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Records a verdict, durable when this returns. Returns whether it is new; the note of an existing one is replaced.
    pub fn put_verdict(&self, key: &VerdictKey, note: VerdictNote) -> Result<bool, VerdictError> {
        self.verdicts.put(key, note)
    }

    /// Takes a verdict back, durably when this returns. Returns whether it existed, as a file if not in memory.
    pub fn remove_verdict(&self, key: &VerdictKey) -> Result<bool, StoreError> {
        self.verdicts.remove(key)
    }

    /// Takes back every verdict of this kind about `digest`, as [`Self::remove_verdict`].
    pub fn remove_verdicts_of(&self, kind: VerdictKind, digest: &Digest) -> Result<bool, StoreError> {
        self.verdicts.remove_of(kind, digest)
    }

    /// Whether a verdict of this kind holds for `digest` in any repository. Reads memory only.
    pub fn has_verdict(&self, kind: VerdictKind, digest: &Digest) -> bool {
        !self.verdicts.scopes_of(kind, digest).is_empty()
    }

    /// All verdicts of this kind, in order.
    pub fn verdicts(&self, kind: VerdictKind) -> Vec<(VerdictKey, Arc<VerdictNote>)> {
        self.verdicts.first(kind, usize::MAX).verdicts
    }

    /// The first verdicts of this kind in order, at most `count_max`. Reads memory only.
    pub fn first_verdicts(&self, kind: VerdictKind, count_max: usize) -> FirstVerdicts {
        self.verdicts.first(kind, count_max)
    }

    /// The verdict of this kind that holds for `digest` in this repository. Reads memory only.
    pub fn verdict(
        &self,
        kind: VerdictKind,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<VerdictNote>> {
        self.verdicts.find(kind, upstream, repository, digest)
    }
}

impl AsyncStore {
    /// The block of `digest` in this repository or everywhere. Reads memory only.
    pub fn block_of(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<VerdictNote>> {
        self.store
            .verdict(VerdictKind::Blocked, upstream, repository, digest)
    }

    /// The approval of `digest` in this repository or everywhere. Reads memory only.
    pub fn approval_of(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<VerdictNote>> {
        self.store
            .verdict(VerdictKind::Approved, upstream, repository, digest)
    }
}

/// A verdict in memory.
struct Entry {
    kind: VerdictKind,
    scope: VerdictScope,
    note: Arc<VerdictNote>,
    /// Its files. A damaged record does not say its scope, so paths cannot always be derived, and several damaged
    /// records of one digest are one verdict.
    paths: Vec<PathBuf>,
    /// Whether it is on disk, so that it outlasts a restart.
    is_durable: bool,
}

type Entries = HashMap<Digest, Vec<Entry>>;

pub(super) struct Verdicts {
    fs: Arc<dyn FileSystem>,
    /// Not locked while a file is written or removed.
    entries: RwLock<Entries>,
    /// Number of verdicts. Usually 0, which saves the lock.
    count: AtomicUsize,
    /// Serialises changes of files. A block is in memory before this is locked.
    changing: Mutex<()>,
}

impl Verdicts {
    /// Loads the verdicts. Fails if a folder cannot be listed, because a lost block would serve content that the
    /// operator has blocked.
    pub(super) fn read(fs: &Arc<dyn FileSystem>) -> Result<Self, StoreError> {
        let mut entries = Entries::new();
        for kind in VerdictKind::ALL {
            for path in files(fs.as_ref(), kind)? {
                if let Some((digest, entry)) = load(fs.as_ref(), kind, path) {
                    add_loaded(entries.entry(digest).or_default(), &digest, entry);
                }
            }
        }
        let count = AtomicUsize::new(entries.values().map(Vec::len).sum());
        Ok(Self {
            fs: Arc::clone(fs),
            entries: RwLock::new(entries),
            count,
            changing: Mutex::default(),
        })
    }

    fn find(
        &self,
        kind: VerdictKind,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<VerdictNote>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let entries = self.entries.read();
        let of_digest = entries.get(digest)?.iter();
        let mut holding =
            of_digest.filter(|entry| entry.kind == kind && entry.scope.covers(upstream, repository));
        holding.next().map(|entry| Arc::clone(&entry.note))
    }

    /// Copies and sorts only those that it returns.
    fn first(&self, kind: VerdictKind, count_max: usize) -> FirstVerdicts {
        let entries = self.entries.read();
        let mut found: Vec<_> = entries
            .iter()
            .flat_map(|(digest, of_digest)| of_digest.iter().map(move |entry| (&entry.scope, digest, entry)))
            .filter(|(.., entry)| entry.kind == kind)
            .collect();
        let total = found.len();
        let order = |one: &(&VerdictScope, &Digest, &Entry), other: &(&VerdictScope, &Digest, &Entry)| {
            (one.0, one.1).cmp(&(other.0, other.1))
        };
        if count_max < total {
            found.select_nth_unstable_by(count_max, order);
            found.truncate(count_max);
        }
        found.sort_unstable_by(order);
        let verdicts = found.into_iter().map(|(scope, digest, entry)| {
            let key = VerdictKey {
                kind,
                scope: scope.clone(),
                digest: *digest,
            };
            (key, Arc::clone(&entry.note))
        });
        FirstVerdicts {
            verdicts: verdicts.collect(),
            total,
        }
    }

    fn put(&self, key: &VerdictKey, note: VerdictNote) -> Result<bool, VerdictError> {
        let VerdictNote { at, by, reason } = note;
        let note = Arc::new(VerdictNote {
            at,
            by: cut(by),
            reason: reason.map(cut),
        });
        match key.kind {
            VerdictKind::Blocked => self.put_block(key, &note),
            VerdictKind::Approved => self.put_approval(key, note),
        }
    }

    /// In memory first, so that the block holds even if the disk is full or slow, or another change waits for it.
    fn put_block(&self, key: &VerdictKey, note: &Arc<VerdictNote>) -> Result<bool, VerdictError> {
        let is_new = self.insert(key, Arc::clone(note), VERDICTS_MAX)?;
        let _changing = self.changing.lock();
        // A removal or another note may have come first.
        let is_forgotten = self.insert(key, Arc::clone(note), usize::MAX)?;
        self.write(key, note).map_err(|error| {
            if self.is_durable(key) {
                VerdictError::NoteNotDurable(error)
            } else {
                VerdictError::NotDurable(error)
            }
        })?;
        self.set_durable(key, true);
        Ok(is_new || is_forgotten)
    }

    fn put_approval(&self, key: &VerdictKey, note: Arc<VerdictNote>) -> Result<bool, VerdictError> {
        let _changing = self.changing.lock();
        let is_new = self.paths_of(key).is_none();
        if is_new && self.count.load(Ordering::Acquire) >= VERDICTS_MAX {
            return Err(VerdictError::TooMany);
        }
        if let Err(error) = self.write(key, &note) {
            if is_new {
                // The write may have created the file. Its error is reported, not that of the removal.
                let _ = self.fs.remove(&key.path());
            }
            return Err(error.into());
        }
        // The limit was checked above; blocks given since then may pass it by this one.
        self.insert(key, note, usize::MAX)?;
        self.set_durable(key, true);
        Ok(is_new)
    }

    fn write(&self, key: &VerdictKey, note: &VerdictNote) -> Result<(), StoreError> {
        let path = key.path();
        let record = encode(&Record::of(key, note));
        let written = self.fs.write_durable(&path, &record);
        written.map_err(|error| StoreError::io("write", &path, &error))
    }

    fn remove(&self, key: &VerdictKey) -> Result<bool, StoreError> {
        let _changing = self.changing.lock();
        self.remove_locked(key)
    }

    fn remove_of(&self, kind: VerdictKind, digest: &Digest) -> Result<bool, StoreError> {
        let _changing = self.changing.lock();
        let mut was = false;
        for scope in self.scopes_of(kind, digest) {
            let digest = *digest;
            was |= self.remove_locked(&VerdictKey { kind, scope, digest })?;
        }
        // An unreadable approval is not in memory.
        if kind == VerdictKind::Approved {
            was |= self.remove_files(&files_of(self.fs.as_ref(), kind, digest)?)?;
        }
        Ok(was)
    }

    fn remove_locked(&self, key: &VerdictKey) -> Result<bool, StoreError> {
        let known = self.paths_of(key);
        let is_known = known.is_some();
        let mut paths = known.unwrap_or_default();
        // An unreadable approval is not in memory. It would hold again once it can be read.
        if key.kind == VerdictKind::Approved && !is_known {
            paths.push(key.path());
        }
        match key.kind {
            // The files first: after an error the digest stays blocked.
            VerdictKind::Blocked => {
                self.set_durable(key, false);
                self.remove_files(&paths)?;
                self.forget(key);
                Ok(is_known)
            }
            VerdictKind::Approved => {
                self.forget(key);
                let was = self.remove_files(&paths)?;
                Ok(is_known || was)
            }
        }
    }

    /// Returns whether one existed.
    fn remove_files(&self, paths: &[PathBuf]) -> Result<bool, StoreError> {
        let mut was = false;
        for path in paths {
            was |= self.remove_file(path)?;
        }
        Ok(was)
    }

    /// Returns whether the file existed.
    fn remove_file(&self, path: &Path) -> Result<bool, StoreError> {
        let was = remove_file(self.fs.as_ref(), path)?.is_some();
        // Without this, a power cut could restore the verdict.
        let Some(folder) = path.parent() else {
            return Ok(was);
        };
        match self.fs.sync_dir(folder) {
            // A block that could not be written may have no folder.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("fsync", folder, &error))
            }
            _ => Ok(was),
        }
    }

    fn paths_of(&self, key: &VerdictKey) -> Option<Vec<PathBuf>> {
        let entries = self.entries.read();
        let mut of_digest = entries.get(&key.digest)?.iter();
        of_digest
            .find(|entry| entry.is(key))
            .map(|entry| entry.paths.clone())
    }

    fn scopes_of(&self, kind: VerdictKind, digest: &Digest) -> Vec<VerdictScope> {
        let entries = self.entries.read();
        let of_digest = entries.get(digest).into_iter().flatten();
        let of_kind = of_digest.filter(|entry| entry.kind == kind);
        of_kind.map(|entry| entry.scope.clone()).collect()
    }

    /// Whether a block of this key outlasts a restart.
    fn is_durable(&self, key: &VerdictKey) -> bool {
        let entries = self.entries.read();
        let mut of_digest = entries.get(&key.digest).into_iter().flatten();
        of_digest.any(|entry| entry.is(key) && entry.is_durable)
    }

    fn set_durable(&self, key: &VerdictKey, is_durable: bool) {
        let mut entries = self.entries.write();
        let of_digest = entries.get_mut(&key.digest).into_iter().flatten();
        for entry in of_digest.filter(|entry| entry.is(key)) {
            entry.is_durable = is_durable;
        }
    }

    /// Returns whether it is new. A new one is refused if there are `count_max` verdicts.
    fn insert(
        &self,
        key: &VerdictKey,
        note: Arc<VerdictNote>,
        count_max: usize,
    ) -> Result<bool, VerdictError> {
        let mut entries = self.entries.write();
        let known = entries.get(&key.digest).into_iter().flatten();
        let is_new = !known.into_iter().any(|entry| entry.is(key));
        if is_new && self.count.load(Ordering::Acquire) >= count_max {
            return Err(VerdictError::TooMany);
        }
        let of_digest = entries.entry(key.digest).or_default();
        let before = of_digest.len();
        let path = key.path();
        let (mut paths, mut is_durable) = (vec![path.clone()], false);
        of_digest.retain_mut(|entry| {
            // A damaged record in this place was loaded with another scope. The new record overwrites it.
            let is_overwritten = entry.paths.contains(&path);
            entry.paths.retain(|other| *other != path);
            let is_known = entry.is(key);
            if is_known {
                paths.append(&mut entry.paths);
            }
            is_durable |= entry.is_durable && (is_known || is_overwritten);
            !entry.paths.is_empty()
        });
        let replaced = before - of_digest.len();
        of_digest.push(Entry {
            kind: key.kind,
            scope: key.scope.clone(),
            note,
            paths,
            is_durable,
        });
        self.count.fetch_add(1, Ordering::AcqRel);
        self.count.fetch_sub(replaced, Ordering::AcqRel);
        Ok(is_new)
    }

    fn forget(&self, key: &VerdictKey) {
        let mut entries = self.entries.write();
        let Some(of_digest) = entries.get_mut(&key.digest) else {
            return;
        };
        let before = of_digest.len();
        of_digest.retain(|entry| !entry.is(key));
        let removed = before - of_digest.len();
        if of_digest.is_empty() {
            entries.remove(&key.digest);
        }
        self.count.fetch_sub(removed, Ordering::AcqRel);
    }
}

impl Entry {
    fn is(&self, key: &VerdictKey) -> bool {
        self.kind == key.kind && self.scope == key.scope
    }
}

/// Adds a loaded verdict. Records of one scope are one verdict, with the note of the record that is in its own file.
fn add_loaded(of_digest: &mut Vec<Entry>, digest: &Digest, mut loaded: Entry) {
    let Some(known) = of_digest
        .iter_mut()
        .find(|entry| entry.kind == loaded.kind && entry.scope == loaded.scope)
    else {
        of_digest.push(loaded);
        return;
    };
    let key = VerdictKey {
        kind: loaded.kind,
        scope: loaded.scope,
        digest: *digest,
    };
    if loaded.paths.contains(&key.path()) {
        known.note = loaded.note;
    }
    known.paths.append(&mut loaded.paths);
}

/// `text` without control characters and at most [`NOTE_BYTES_MAX`] long.
pub(crate) fn cut(mut text: String) -> String {
    text.retain(|one| !one.is_control());
    while text.len() > NOTE_BYTES_MAX {
        text.pop();
    }
    text
}
