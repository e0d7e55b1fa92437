//! Verify job: reads all stored content once on request, at full disk speed, and quarantines corrupt files. One job
//! runs at a time, and its progress can be queried.

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::scrub::Scrub;
use super::{Store, StoreError};
use crate::oci::Digest;

/// Most corrupt digests listed in the result. Further ones are only counted.
const DAMAGED_LISTED_MAX: usize = 100;

/// Progress and result of a verify job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Whether the job is running.
    pub is_running: bool,
    /// Whether the job has read everything.
    pub is_complete: bool,
    /// Blobs and manifests read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Number of corrupt objects. They are quarantined and fetched again on the next request.
    pub damaged: u64,
    /// Digests of the first hundred corrupt objects.
    pub damaged_digests: Vec<Digest>,
}

#[derive(Default)]
pub(super) struct VerifyJob {
    state: Arc<Mutex<Verification>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Starts a verify job. Returns `false` if one is already running.
    pub fn start_verification(&self) -> Result<bool, StoreError> {
        self.verify_job.begin(&self.scrub)
    }

    /// Progress of the last verify job, or `None` if there was none since the start.
    pub fn verification(&self) -> Option<Verification> {
        let started = self.verify_job.thread.lock().is_some();
        started.then(|| self.verify_job.state.lock().clone())
    }

    /// Quarantines the index and fills a new one from the files while requests are served. Grants are lost, so
    /// clients are authorized again by the upstream.
    pub fn rebuild_index(&self) {
        self.index.rebuild();
    }
}

impl VerifyJob {
    fn begin(&self, scrub: &Arc<Scrub>) -> Result<bool, StoreError> {
        let mut thread = self.thread.lock();
        if thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Ok(false);
        }
        *self.state.lock() = Verification {
            is_running: true,
            ..Verification::default()
        };
        let (scrub, state) = (Arc::clone(scrub), Arc::clone(&self.state));
        let started = std::thread::Builder::new()
            .name("store-verify".to_owned())
            .spawn(move || {
                let is_complete = scrub.read_all(|digest, bytes, is_intact| {
                    let mut state = state.lock();
                    state.objects += 1;
                    state.bytes += bytes;
                    if !is_intact {
                        state.damaged += 1;
                        if state.damaged_digests.len() < DAMAGED_LISTED_MAX {
                            state.damaged_digests.push(*digest);
                        }
                    }
                });
                let mut state = state.lock();
                (state.is_running, state.is_complete) = (false, is_complete);
                let (objects, damaged) = (state.objects, state.damaged);
                tracing::info!(objects, damaged, is_complete, "verify job finished");
            });
        let started =
            started.map_err(|error| StoreError::io("start the verify thread for", "blobs", &error))?;
        *thread = Some(started);
        Ok(true)
    }

    /// Takes the thread so that it can be joined.
    pub(super) fn take(&mut self) -> Option<JoinHandle<()>> {
        self.thread.get_mut().take()
    }
}
