//! Repository membership: the digests that an upstream was observed to have in a repository.
//!
//! A digest is served through a repository only if it is a member, because one digest can be public in one repository
//! and private in another.
//!
//! One append-only file of lines per repository:
//!
//! ```text
//! repository <upstream> <repository> <checksum>
//! <digest> <checksum>
//! gone <digest> <checksum>
//! public <seconds since 1970> <checksum>
//! private <checksum>
//! served <url> <checksum>
//! ```
//!
//! Each checksum covers the line *and* the names, so a line is invalid in another repository's file. Torn, invalid or
//! unknown lines are ignored: a lost line costs one upstream request. Each append begins with a line feed, so that a
//! torn line does not damage the next one. The total size of the files is limited (`prune`).

mod append;
mod in_use;
mod prune;

pub use self::append::{MembershipUpdate, PendingAppend};

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, RwLock};
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::cache_key::{RepoKey, RepoKeyRef, weighted_cache};
use super::checksummed_json::{checksum, from_millis, hex, to_millis};
use super::completeness::RemovedDigests;
use super::fs::FileSystem;
use super::{Store, StoreError, hashed_path};
use crate::oci::{Digest, Repository};

/// Maximum number of digests in one repository's file. Further members are kept in memory only.
pub const REPO_DIGESTS_MAX: usize = 200_000;

/// Enough for [`REPO_DIGESTS_MAX`] lines of the longest digest, twice.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Digests cached in memory, over all repositories: some 20 MiB.
const READY_DIGESTS_MAX: u64 = 262_144;

/// Cache weight of a repository without digests.
const REPO_WEIGHT: u64 = 8;

/// Maximum number of endpoint URLs recorded per repository. A denial from an unrecorded URL is treated as from one that
/// never served the repository.
const SERVED_URLS_MAX: usize = 32;

/// Minimum time between two `public` lines of one repository.
const PUBLIC_AGAIN_AFTER: Duration = Duration::from_secs(3600);

/// A file with this many superfluous lines is rewritten.
const SURPLUS_LINES_MAX: usize = 1024;

const TREE: &str = "seen";
const CHECKSUM_HEX: usize = 8;

impl Store {
    /// Whether `digest` is a member of this repository.
    pub fn is_member(&self, upstream: &str, repository: &Repository, digest: &Digest) -> bool {
        self.membership
            .get(upstream, repository)
            .is_some_and(|repo| repo.read(|repo| repo.digests.contains(digest)))
    }

    /// Records that the upstream has `digest` in this repository. Written once per digest.
    pub fn add_member(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        self.membership.add(upstream, repository, digest)
    }

    /// Removes a member that was deleted at the upstream.
    pub fn remove_member(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        self.membership.remove_member(upstream, repository, digest)
    }

    /// When the repository was last proven readable anonymously, if it is public.
    pub fn public_since(&self, upstream: &str, repository: &Repository) -> Option<SystemTime> {
        self.membership
            .get(upstream, repository)?
            .read(|repo| repo.public)
    }

    /// Records that the repository was public at `since`, or that it is private (`None`).
    pub fn set_public(
        &self,
        upstream: &str,
        repository: &Repository,
        since: Option<SystemTime>,
    ) -> Result<(), StoreError> {
        self.membership.set_public(upstream, repository, since)
    }

    /// Whether this URL of the upstream has served the repository. Also true if the repository has members but no
    /// recorded URL: it was served before URLs were recorded.
    pub fn has_served(&self, upstream: &str, url: &str, repository: &Repository) -> bool {
        let Some(repo) = self.membership.get(upstream, repository) else {
            return true;
        };
        repo.read(|repo| {
            let is_older = repo.served.is_empty() && (!repo.digests.is_empty() || repo.public.is_some());
            is_older || repo.served.iter().any(|served| served == url)
        })
    }

    /// Records that this URL of the upstream has served the repository. Written once per URL.
    pub fn record_served(
        &self,
        upstream: &str,
        url: &str,
        repository: &Repository,
    ) -> Result<(), StoreError> {
        self.membership.record_served(upstream, url, repository)
    }
}

/// Members and visibility of one repository.
#[derive(Debug, Default)]
struct RepoDigests {
    digests: HashSet<Digest>,
    public: Option<SystemTime>,
    /// The value of `public` in the file.
    persisted_public: Option<SystemTime>,
    /// The URLs that have served it, for an upstream with several endpoints.
    served: Vec<String>,
    /// Whether the file has its header line.
    has_header: bool,
    /// Lines that are not yet in the file, in order.
    pending_lines: Vec<String>,
}

/// [`RepoDigests`], shared by all users of one repository.
#[derive(Default)]
struct SharedRepoDigests {
    repo: RwLock<RepoDigests>,
    /// Held while lines are appended, to keep them in order.
    appending: Mutex<()>,
}

impl SharedRepoDigests {
    fn read<T>(&self, look: impl FnOnce(&RepoDigests) -> T) -> T {
        look(&self.repo.read())
    }

    fn write<T>(&self, change: impl FnOnce(&mut RepoDigests) -> T) -> T {
        change(&mut self.repo.write())
    }
}

/// A cached repository with its weight at insertion, because a weight must not change in place.
#[derive(Clone)]
struct CachedRepo {
    repo: Arc<SharedRepoDigests>,
    weight: u64,
}

#[derive(Clone)]
struct ByDigests;

impl Weighter<RepoKey, CachedRepo> for ByDigests {
    fn weight(&self, _: &RepoKey, ready: &CachedRepo) -> u64 {
        ready.weight
    }
}

pub(super) struct MembershipStore {
    fs: Arc<dyn FileSystem>,
    ready: Cache<RepoKey, CachedRepo, ByDigests>,
    in_use: in_use::LiveRepos,
    /// Estimated size of all files.
    bytes: AtomicU64,
    bytes_max: u64,
    /// Shared lock for appends, exclusive lock for the removal of a file.
    order: RwLock<()>,
    removed: Arc<RemovedDigests>,
}

impl MembershipStore {
    pub(super) fn new(fs: &Arc<dyn FileSystem>, removed: &Arc<RemovedDigests>) -> Self {
        Self {
            removed: Arc::clone(removed),
            ..Self::with_quota(fs, prune::MEMBERSHIP_BYTES_MAX)
        }
    }

    fn with_quota(fs: &Arc<dyn FileSystem>, bytes_max: u64) -> Self {
        Self {
            fs: Arc::clone(fs),
            ready: weighted_cache(READY_DIGESTS_MAX, 2 * REPO_WEIGHT, ByDigests),
            in_use: in_use::LiveRepos::default(),
            bytes: AtomicU64::new(0),
            bytes_max,
            order: RwLock::default(),
            removed: Arc::default(),
        }
    }

    /// Whether `digest` is a member; `None` if the file must be read.
    pub(super) fn contains_in_memory(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<bool> {
        let ready = self.ready.get(&RepoKeyRef::new(upstream, repository))?;
        Some(ready.repo.read(|repo| repo.digests.contains(digest)))
    }

    /// Since when the repository is public, if it is; the outer `None` if the file must be read.
    #[expect(clippy::option_option, reason = "whether it is known, and what is known")]
    pub(super) fn public_in_memory(
        &self,
        upstream: &str,
        repository: &Repository,
    ) -> Option<Option<SystemTime>> {
        let ready = self.ready.get(&RepoKeyRef::new(upstream, repository))?;
        Some(ready.repo.read(|repo| repo.public))
    }

    /// `None` if the file cannot be read now; nothing is cached then.
    fn get(&self, upstream: &str, repository: &Repository) -> Option<Arc<SharedRepoDigests>> {
        let known = self.ready.get(&RepoKeyRef::new(upstream, repository));
        known
            .map(|ready| ready.repo)
            .or_else(|| self.load(upstream, repository).ok())
    }

    fn load(&self, upstream: &str, repository: &Repository) -> Result<Arc<SharedRepoDigests>, StoreError> {
        let key = RepoKey::of(upstream, repository);
        let ready = self.ready.get_or_insert_with(&key, || {
            if let Some(repo) = self.in_use.find(&key) {
                return Ok(CachedRepo {
                    weight: repo.read(weight),
                    repo,
                });
            }
            let path = path(&key);
            let text = match self.fs.read_file(&path, FILE_BYTES_MAX) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(StoreError::io("read", &path, &error)),
            };
            let (repo, lines) = RepoDigests::from_lines(&key, &text);
            if lines > repo.digests.len() + SURPLUS_LINES_MAX {
                // If the rewrite fails, the file is still valid, only longer.
                let _ = self.fs.write_durable(&path, &repo.to_lines(&key));
            }
            let weight = weight(&repo);
            let repo = Arc::new(SharedRepoDigests {
                repo: RwLock::new(repo),
                appending: Mutex::default(),
            });
            self.in_use.enter(&key, &repo);
            Ok(CachedRepo { repo, weight })
        })?;
        Ok(ready.repo)
    }

    fn get_or_load(
        &self,
        upstream: &str,
        repository: &Repository,
    ) -> Result<Arc<SharedRepoDigests>, StoreError> {
        match self.ready.get(&RepoKeyRef::new(upstream, repository)) {
            Some(ready) => Ok(ready.repo),
            None => self.load(upstream, repository),
        }
    }

    fn add(&self, upstream: &str, repository: &Repository, digest: &Digest) -> Result<(), StoreError> {
        let _order = self.order.read();
        let repo = self.get_or_load(upstream, repository)?;
        match self.add_in_memory(upstream, repository, digest, &repo) {
            Some(key) => self.append(&key, &repo),
            None => Ok(()),
        }
    }

    /// Adds the member in memory. Returns the key if it must be persisted.
    fn add_in_memory(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
        repo: &Arc<SharedRepoDigests>,
    ) -> Option<RepoKey> {
        if repo.read(|repo| repo.digests.contains(digest)) {
            return None;
        }
        let has_quota = self.has_quota();
        let (is_new, count) = repo.write(|repo| {
            let is_new = repo.digests.insert(*digest);
            let count = repo.digests.len();
            if is_new && has_quota && count <= REPO_DIGESTS_MAX {
                repo.pending_lines.push(digest.to_string());
            }
            (is_new, count)
        });
        if !is_new {
            return None;
        }
        let key = RepoKey::of(upstream, repository);
        let weight = repo.read(weight);
        self.ready.insert(
            key.clone(),
            CachedRepo {
                repo: Arc::clone(repo),
                weight,
            },
        );
        if count > REPO_DIGESTS_MAX {
            tracing::warn!(upstream, %repository, "repository membership is full; new digests are kept in memory only");
            return None;
        }
        has_quota.then_some(key)
    }

    fn remove_member(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        let _order = self.order.read();
        let repo = self.get_or_load(upstream, repository)?;
        let was_member = repo.write(|repo| {
            let was_member = repo.digests.remove(digest);
            if was_member {
                repo.pending_lines.push(format!("gone {digest}"));
            }
            was_member
        });
        if !was_member {
            return Ok(());
        }
        self.removed.record(digest);
        self.append(&RepoKey::of(upstream, repository), &repo)
    }

    fn set_public(
        &self,
        upstream: &str,
        repository: &Repository,
        since: Option<SystemTime>,
    ) -> Result<(), StoreError> {
        let _order = self.order.read();
        let repo = self.get_or_load(upstream, repository)?;
        let has_quota = since.is_none() || self.has_quota();
        let is_changed = repo.write(|repo| {
            repo.public = since;
            let is_changed = match (repo.persisted_public, since) {
                (None, None) => false,
                // Also if the clock was set back: the recorded time must not be in the future.
                (Some(written), Some(since)) => since
                    .duration_since(written)
                    .map_or(true, |age| age >= PUBLIC_AGAIN_AFTER),
                (Some(_), None) | (None, Some(_)) => true,
            };
            if is_changed {
                repo.persisted_public = since;
                repo.pending_lines.extend(has_quota.then(|| public_line(since)));
            }
            is_changed && has_quota
        });
        if is_changed {
            self.append(&RepoKey::of(upstream, repository), &repo)
        } else {
            Ok(())
        }
    }

    fn record_served(&self, upstream: &str, url: &str, repository: &Repository) -> Result<(), StoreError> {
        let _order = self.order.read();
        let repo = self.get_or_load(upstream, repository)?;
        let has_quota = self.has_quota();
        let is_changed = repo.write(|repo| {
            let is_changed = repo.add_served(url) && has_quota;
            repo.pending_lines.extend(is_changed.then(|| served_line(url)));
            is_changed
        });
        if is_changed {
            self.append(&RepoKey::of(upstream, repository), &repo)
        } else {
            Ok(())
        }
    }
}

impl RepoDigests {
    /// Parses the lines of a file. Also returns the number of lines.
    fn from_lines(key: &RepoKey, text: &[u8]) -> (Self, usize) {
        let mut repo = Self::default();
        let mut lines = 0;
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            lines += 1;
            if let Some(content) = content_of(key, line) {
                repo.apply_line(content);
            }
        }
        repo.persisted_public = repo.public;
        (repo, lines)
    }

    fn apply_line(&mut self, content: &str) {
        match content.split_once(' ') {
            Some(("repository", _)) => self.has_header = true,
            Some(("public", seconds)) => {
                self.public = seconds
                    .parse()
                    .ok()
                    .map(|seconds: u64| from_millis(seconds.saturating_mul(1000)));
            }
            Some(("served", url)) => {
                self.add_served(url);
            }
            Some(("gone", digest)) => {
                if let Ok(digest) = digest.parse() {
                    self.digests.remove(&digest);
                }
            }
            None if content == "private" => self.public = None,
            None => {
                if let Ok(digest) = content.parse() {
                    self.digests.insert(digest);
                }
            }
            Some(_) => {}
        }
    }

    /// Returns whether the URL is new.
    fn add_served(&mut self, url: &str) -> bool {
        let is_changed =
            self.served.len() < SERVED_URLS_MAX && !self.served.iter().any(|served| served == url);
        if is_changed {
            self.served.push(url.to_owned());
        }
        is_changed
    }

    /// Resets the state after the file was removed; only pending lines remain.
    fn forget_file(&mut self) {
        *self = Self {
            pending_lines: std::mem::take(&mut self.pending_lines),
            ..Self::default()
        };
        for line in self.pending_lines.clone() {
            self.apply_line(&line);
        }
        self.persisted_public = self.public;
    }

    fn to_lines(&self, key: &RepoKey) -> Vec<u8> {
        let mut lines = String::new();
        push_line(&mut lines, key, &header_line(key));
        push_line(&mut lines, key, &public_line(self.public));
        for url in &self.served {
            push_line(&mut lines, key, &served_line(url));
        }
        for digest in &self.digests {
            push_line(&mut lines, key, &digest.to_string());
        }
        lines.into_bytes()
    }
}

fn weight(repo: &RepoDigests) -> u64 {
    repo.digests.len() as u64 + REPO_WEIGHT
}

fn path(key: &RepoKey) -> PathBuf {
    hashed_path(TREE, &[&key.upstream, key.repository.as_str()])
}

fn header_line(key: &RepoKey) -> String {
    format!("repository {} {}", key.upstream, key.repository)
}

fn public_line(since: Option<SystemTime>) -> String {
    since.map_or_else(
        || "private".to_owned(),
        |since| format!("public {}", to_millis(since) / 1000),
    )
}

fn served_line(url: &str) -> String {
    format!("served {url}")
}

fn push_line(lines: &mut String, key: &RepoKey, content: &str) {
    lines.push('\n');
    lines.push_str(content);
    lines.push(' ');
    lines.push_str(&line_checksum(key, content));
    lines.push('\n');
}

/// The content of a line with a valid checksum.
fn content_of<'a>(key: &RepoKey, line: &'a [u8]) -> Option<&'a str> {
    let line = std::str::from_utf8(line).ok()?;
    let (content, sum) = line.rsplit_once(' ')?;
    (sum == line_checksum(key, content)).then_some(content)
}

fn line_checksum(key: &RepoKey, content: &str) -> String {
    let text = [&key.upstream, "\0", key.repository.as_str(), "\0", content].concat();
    let mut sum = hex(&checksum(text.as_bytes()));
    sum.truncate(CHECKSUM_HEX);
    sum
}
