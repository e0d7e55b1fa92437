//! Stored authentication challenges: each upstream's last response to `/v2/` without a credential.
//!
//! Docker, podman and crane learn from it how to authenticate, and cannot start without it, so it is stored for outages
//! and across restarts. One small file per upstream; a lost one costs one request.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode, from_millis, to_millis};
use super::fs::FileSystem;
use super::{Store, StoreError, hashed_path};

/// Longer challenges are not stored.
pub const CHALLENGE_BYTES_MAX: usize = 64 * 1024;

const TREE: &str = "challenges";

/// Response of an upstream to a request without a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChallenge {
    /// The `WWW-Authenticate` header lines, byte for byte; none if no credential is needed.
    pub lines: Vec<String>,
    /// When it was received.
    pub given_at: SystemTime,
}

#[derive(Serialize, Deserialize)]
struct Record {
    upstream: String,
    lines: Vec<String>,
    given_at_ms: u64,
}

impl Store {
    /// The stored challenge of an upstream.
    pub fn challenge(&self, upstream: &str) -> Option<Arc<StoredChallenge>> {
        self.challenges.find(upstream)
    }

    /// Stores a challenge. Visible at once, also if the disk write fails.
    pub fn put_challenge(&self, upstream: &str, challenge: StoredChallenge) -> Result<(), StoreError> {
        self.challenges.put(upstream, challenge)
    }
}

pub(super) struct Challenges {
    fs: Arc<dyn FileSystem>,
    /// One per upstream. `None`: no file exists.
    ready: Mutex<HashMap<String, Option<Arc<StoredChallenge>>>>,
}

impl Challenges {
    pub(super) fn new(fs: &Arc<dyn FileSystem>) -> Self {
        Self {
            fs: Arc::clone(fs),
            ready: Mutex::default(),
        }
    }

    /// The cached challenge; the outer `None` if the file must be read.
    #[expect(clippy::option_option, reason = "whether it is known, and what is known")]
    pub(super) fn ready(&self, upstream: &str) -> Option<Option<Arc<StoredChallenge>>> {
        self.ready.lock().get(upstream).cloned()
    }

    fn find(&self, upstream: &str) -> Option<Arc<StoredChallenge>> {
        if let Some(known) = self.ready(upstream) {
            return known;
        }
        let found = match self.fs.read_file(&path(upstream), RECORD_BYTES_MAX) {
            Ok(bytes) => read(upstream, &bytes).map(Arc::new),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Not cached: the next read may succeed.
            Err(_) => return None,
        };
        // Do not overwrite a concurrent put.
        self.ready
            .lock()
            .entry(upstream.to_owned())
            .or_insert(found)
            .clone()
    }

    fn put(&self, upstream: &str, challenge: StoredChallenge) -> Result<(), StoreError> {
        if challenge.lines.iter().map(String::len).sum::<usize>() > CHALLENGE_BYTES_MAX {
            return Ok(());
        }
        let before = self.find(upstream);
        let is_changed = before.is_none_or(|before| before.lines != challenge.lines);
        let file = encode(&Record {
            upstream: upstream.to_owned(),
            lines: challenge.lines.clone(),
            given_at_ms: to_millis(challenge.given_at),
        });
        self.ready
            .lock()
            .insert(upstream.to_owned(), Some(Arc::new(challenge)));
        if !is_changed {
            return Ok(());
        }
        let path = path(upstream);
        self.fs
            .write_durable(&path, &file)
            .map_err(|error| StoreError::io("write", path, &error))
    }
}

fn read(upstream: &str, file: &[u8]) -> Option<StoredChallenge> {
    let record: Record = decode(file)?;
    (record.upstream == upstream).then(|| StoredChallenge {
        lines: record.lines,
        given_at: from_millis(record.given_at_ms),
    })
}

fn path(upstream: &str) -> PathBuf {
    hashed_path(TREE, &[upstream])
}
