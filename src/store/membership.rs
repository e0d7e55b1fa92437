//! What an upstream was seen to have in a repository: the proof that a digest may be read through it.
//!
//! One file per repository, of lines that are only ever appended:
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
//! Each checksum is over the line *and* the names, so that a line proves nothing in another repository's file. Lines
//! that are torn, wrong or unknown are ignored: a lost proof costs one question. Each append begins with a line feed,
//! so that a torn line before it spoils nothing after it. How much the files may take together has a limit (`limit`).

mod append;
mod in_use;
mod prune;

pub use self::append::{Noted, Unwritten};

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::cache_key::{Place, PlaceRef, weighted};
use super::checksummed_json::{checksum, from_millis, hex, to_millis};
use super::completeness::Removed;
use super::fs::FileSystem;
use super::{Fault, Store, named_path};
use crate::oci::{Digest, Repository};

/// How many digests one repository's file names. Beyond it, proofs are kept in memory only.
pub const SEEN_DIGESTS_MAX: usize = 200_000;

/// Enough for [`SEEN_DIGESTS_MAX`] lines of the longest digest, twice.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Digests kept ready in memory, of all repositories together: some 20 MiB.
const READY_DIGESTS_MAX: u64 = 262_144;

/// What a repository without digests counts for.
const PLACE_WEIGHT: u64 = 8;

/// URLs of one upstream that have served one repository. More are not kept: their noes then count as noes of a stranger.
const SERVED_URLS_MAX: usize = 32;

/// A repository that stays public is written down anew this often, not each time someone proves it.
const PUBLIC_AGAIN_AFTER: Duration = Duration::from_secs(3600);

/// A file with this many lines too many is written anew.
const SURPLUS_LINES_MAX: usize = 1024;

const TREE: &str = "seen";
const CHECKSUM_HEX: usize = 8;

impl Store {
    /// Whether the upstream was seen to have `digest` in this repository.
    pub fn has_seen(&self, upstream: &str, repository: &Repository, digest: &Digest) -> bool {
        self.seen
            .of(upstream, repository)
            .is_some_and(|seen| seen.read(|seen| seen.digests.contains(digest)))
    }

    /// Keeps the proof that the upstream has `digest` in this repository. Written once for each.
    pub fn note_seen(&self, upstream: &str, repository: &Repository, digest: &Digest) -> Result<(), Fault> {
        self.seen.note(upstream, repository, digest)
    }

    /// The upstream no longer has `digest` in this repository: it was deleted there.
    pub fn note_gone(&self, upstream: &str, repository: &Repository, digest: &Digest) -> Result<(), Fault> {
        self.seen.note_gone(upstream, repository, digest)
    }

    /// When the repository was last proven readable by anyone, if that still holds.
    pub fn public_since(&self, upstream: &str, repository: &Repository) -> Option<SystemTime> {
        self.seen.of(upstream, repository)?.read(|seen| seen.public)
    }

    /// Keeps that the repository is public, proven at `since`, or that it is not (`None`).
    pub fn note_public(
        &self,
        upstream: &str,
        repository: &Repository,
        since: Option<SystemTime>,
    ) -> Result<(), Fault> {
        self.seen.note_public(upstream, repository, since)
    }

    /// Whether this URL of the upstream has served the repository. Also true where nothing is known of any URL, and the
    /// repository has been served: that was before URLs were noted.
    pub fn has_served(&self, upstream: &str, url: &str, repository: &Repository) -> bool {
        let Some(seen) = self.seen.of(upstream, repository) else {
            return true;
        };
        seen.read(|seen| {
            let is_older = seen.served.is_empty() && (!seen.digests.is_empty() || seen.public.is_some());
            is_older || seen.served.iter().any(|served| served == url)
        })
    }

    /// Keeps that this URL of the upstream has served the repository. Written once for each.
    pub fn record_served(&self, upstream: &str, url: &str, repository: &Repository) -> Result<(), Fault> {
        self.seen.record_served(upstream, url, repository)
    }
}

/// One repository's proofs.
#[derive(Debug, Default)]
struct Seen {
    digests: HashSet<Digest>,
    public: Option<SystemTime>,
    /// What the file says of it.
    written_public: Option<SystemTime>,
    /// The URLs that have served it, of an upstream with several.
    served: Vec<String>,
    /// Whether the file has its first line.
    is_headed: bool,
    /// Lines that are not in the file yet, in order.
    unwritten: Vec<String>,
}

/// [`Seen`], shared by all who look at one repository.
#[derive(Default)]
struct SharedSeen {
    seen: RwLock<Seen>,
    /// Held while lines are appended, so that they come in order.
    appending: Mutex<()>,
}

impl SharedSeen {
    fn read<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.seen.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        change(&mut self.seen.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A cached repository with its weight when it was put there, which must not change in place.
#[derive(Clone)]
struct Ready {
    seen: Arc<SharedSeen>,
    weight: u64,
}

#[derive(Clone)]
struct ByDigests;

impl Weighter<Place, Ready> for ByDigests {
    fn weight(&self, _: &Place, ready: &Ready) -> u64 {
        ready.weight
    }
}

pub(super) struct SeenFiles {
    fs: Arc<dyn FileSystem>,
    ready: Cache<Place, Ready, ByDigests>,
    in_use: in_use::InUse,
    /// About how much the files take.
    bytes: AtomicU64,
    bytes_max: u64,
    /// Whoever writes down something holds it to read, whoever removes a file to write.
    order: RwLock<()>,
    removed: Arc<Removed>,
}

impl SeenFiles {
    pub(super) fn new(fs: &Arc<dyn FileSystem>, removed: &Arc<Removed>) -> Self {
        Self {
            removed: Arc::clone(removed),
            ..Self::with_room(fs, prune::SEEN_BYTES_MAX)
        }
    }

    fn with_room(fs: &Arc<dyn FileSystem>, bytes_max: u64) -> Self {
        Self {
            fs: Arc::clone(fs),
            ready: weighted(READY_DIGESTS_MAX, 2 * PLACE_WEIGHT, ByDigests),
            in_use: in_use::InUse::default(),
            bytes: AtomicU64::new(0),
            bytes_max,
            order: RwLock::default(),
            removed: Arc::default(),
        }
    }

    /// Whether `digest` was seen; `None` where that takes the file to know.
    pub(super) fn is_ready_with(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<bool> {
        let ready = self.ready.get(&PlaceRef::new(upstream, repository))?;
        Some(ready.seen.read(|seen| seen.digests.contains(digest)))
    }

    /// Since when the repository is public, if it is; `None` where that takes the file to know.
    #[expect(clippy::option_option, reason = "whether it is known, and what is known")]
    pub(super) fn ready_public(&self, upstream: &str, repository: &Repository) -> Option<Option<SystemTime>> {
        let ready = self.ready.get(&PlaceRef::new(upstream, repository))?;
        Some(ready.seen.read(|seen| seen.public))
    }

    /// `None` where the file cannot be read now: no proof, and nothing remembered of it.
    fn of(&self, upstream: &str, repository: &Repository) -> Option<Arc<SharedSeen>> {
        let known = self.ready.get(&PlaceRef::new(upstream, repository));
        known
            .map(|ready| ready.seen)
            .or_else(|| self.load(upstream, repository).ok())
    }

    fn load(&self, upstream: &str, repository: &Repository) -> Result<Arc<SharedSeen>, Fault> {
        let place = Place::of(upstream, repository);
        let ready = self.ready.get_or_insert_with(&place, || {
            if let Some(seen) = self.in_use.find(&place) {
                return Ok(Ready {
                    weight: seen.read(weight),
                    seen,
                });
            }
            let path = path(&place);
            let text = match self.fs.read_file(&path, FILE_BYTES_MAX) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(Fault::io("read", &path, &error)),
            };
            let (seen, lines) = Seen::of_lines(&place, &text);
            if lines > seen.digests.len() + SURPLUS_LINES_MAX {
                // It is as good as before where this fails, only longer.
                let _ = self.fs.write_durable(&path, &seen.to_lines(&place));
            }
            let weight = weight(&seen);
            let seen = Arc::new(SharedSeen {
                seen: RwLock::new(seen),
                appending: Mutex::default(),
            });
            self.in_use.enter(&place, &seen);
            Ok(Ready { seen, weight })
        })?;
        Ok(ready.seen)
    }

    fn known_or_loaded(&self, upstream: &str, repository: &Repository) -> Result<Arc<SharedSeen>, Fault> {
        match self.ready.get(&PlaceRef::new(upstream, repository)) {
            Some(ready) => Ok(ready.seen),
            None => self.load(upstream, repository),
        }
    }

    fn note(&self, upstream: &str, repository: &Repository, digest: &Digest) -> Result<(), Fault> {
        let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
        let seen = self.known_or_loaded(upstream, repository)?;
        match self.take_in(upstream, repository, digest, &seen) {
            Some(place) => self.append(&place, &seen),
            None => Ok(()),
        }
    }

    /// Keeps the proof in memory. Its place, if it is to be written down.
    fn take_in(
        &self,
        upstream: &str,
        repository: &Repository,
        digest: &Digest,
        seen: &Arc<SharedSeen>,
    ) -> Option<Place> {
        if seen.read(|seen| seen.digests.contains(digest)) {
            return None;
        }
        let has_room = self.has_room();
        let (is_new, count) = seen.write(|seen| {
            let is_new = seen.digests.insert(*digest);
            let count = seen.digests.len();
            if is_new && has_room && count <= SEEN_DIGESTS_MAX {
                seen.unwritten.push(digest.to_string());
            }
            (is_new, count)
        });
        if !is_new {
            return None;
        }
        let place = Place::of(upstream, repository);
        let weight = seen.read(weight);
        self.ready.insert(
            place.clone(),
            Ready {
                seen: Arc::clone(seen),
                weight,
            },
        );
        if count > SEEN_DIGESTS_MAX {
            tracing::warn!(upstream, %repository, "too many digests were seen here to keep the proof of one more");
            return None;
        }
        has_room.then_some(place)
    }

    fn note_gone(&self, upstream: &str, repository: &Repository, digest: &Digest) -> Result<(), Fault> {
        let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
        let seen = self.known_or_loaded(upstream, repository)?;
        let was_seen = seen.write(|seen| {
            let was_seen = seen.digests.remove(digest);
            if was_seen {
                seen.unwritten.push(format!("gone {digest}"));
            }
            was_seen
        });
        if !was_seen {
            return Ok(());
        }
        self.removed.note(digest);
        self.append(&Place::of(upstream, repository), &seen)
    }

    fn note_public(
        &self,
        upstream: &str,
        repository: &Repository,
        since: Option<SystemTime>,
    ) -> Result<(), Fault> {
        let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
        let seen = self.known_or_loaded(upstream, repository)?;
        let has_room = since.is_none() || self.has_room();
        let is_news = seen.write(|seen| {
            seen.public = since;
            let is_news = match (seen.written_public, since) {
                (None, None) => false,
                // Also when the clock was set back: what is written must not be in the future.
                (Some(written), Some(since)) => since
                    .duration_since(written)
                    .map_or(true, |age| age >= PUBLIC_AGAIN_AFTER),
                (Some(_), None) | (None, Some(_)) => true,
            };
            if is_news {
                seen.written_public = since;
                seen.unwritten.extend(has_room.then(|| public_line(since)));
            }
            is_news && has_room
        });
        if is_news {
            self.append(&Place::of(upstream, repository), &seen)
        } else {
            Ok(())
        }
    }

    fn record_served(&self, upstream: &str, url: &str, repository: &Repository) -> Result<(), Fault> {
        let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
        let seen = self.known_or_loaded(upstream, repository)?;
        let has_room = self.has_room();
        let is_news = seen.write(|seen| {
            let is_news = seen.take_in_served(url) && has_room;
            seen.unwritten.extend(is_news.then(|| served_line(url)));
            is_news
        });
        if is_news {
            self.append(&Place::of(upstream, repository), &seen)
        } else {
            Ok(())
        }
    }
}

impl Seen {
    /// What the lines of a file say, and how many there are.
    fn of_lines(place: &Place, text: &[u8]) -> (Self, usize) {
        let mut seen = Self::default();
        let mut lines = 0;
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            lines += 1;
            if let Some(content) = content_of(place, line) {
                seen.take_in(content);
            }
        }
        seen.written_public = seen.public;
        (seen, lines)
    }

    fn take_in(&mut self, content: &str) {
        match content.split_once(' ') {
            Some(("repository", _)) => self.is_headed = true,
            Some(("public", seconds)) => {
                self.public = seconds
                    .parse()
                    .ok()
                    .map(|seconds: u64| from_millis(seconds.saturating_mul(1000)));
            }
            Some(("served", url)) => {
                self.take_in_served(url);
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

    /// Whether that is news.
    fn take_in_served(&mut self, url: &str) -> bool {
        let is_news = self.served.len() < SERVED_URLS_MAX && !self.served.iter().any(|served| served == url);
        if is_news {
            self.served.push(url.to_owned());
        }
        is_news
    }

    /// The file is gone, and with it all that is written down.
    fn lose_file(&mut self) {
        *self = Self {
            unwritten: std::mem::take(&mut self.unwritten),
            ..Self::default()
        };
        for line in self.unwritten.clone() {
            self.take_in(&line);
        }
        self.written_public = self.public;
    }

    fn to_lines(&self, place: &Place) -> Vec<u8> {
        let mut lines = String::new();
        push_line(&mut lines, place, &head_line(place));
        push_line(&mut lines, place, &public_line(self.public));
        for url in &self.served {
            push_line(&mut lines, place, &served_line(url));
        }
        for digest in &self.digests {
            push_line(&mut lines, place, &digest.to_string());
        }
        lines.into_bytes()
    }
}

fn weight(seen: &Seen) -> u64 {
    seen.digests.len() as u64 + PLACE_WEIGHT
}

fn path(place: &Place) -> PathBuf {
    named_path(TREE, &[&place.upstream, place.repository.as_str()])
}

fn head_line(place: &Place) -> String {
    format!("repository {} {}", place.upstream, place.repository)
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

fn push_line(lines: &mut String, place: &Place, content: &str) {
    lines.push('\n');
    lines.push_str(content);
    lines.push(' ');
    lines.push_str(&line_checksum(place, content));
    lines.push('\n');
}

/// The content of a line whose checksum is right.
fn content_of<'a>(place: &Place, line: &'a [u8]) -> Option<&'a str> {
    let line = std::str::from_utf8(line).ok()?;
    let (content, sum) = line.rsplit_once(' ')?;
    (sum == line_checksum(place, content)).then_some(content)
}

fn line_checksum(place: &Place, content: &str) -> String {
    let text = [&place.upstream, "\0", place.repository.as_str(), "\0", content].concat();
    let mut sum = hex(&checksum(text.as_bytes()));
    sum.truncate(CHECKSUM_HEX);
    sum
}
