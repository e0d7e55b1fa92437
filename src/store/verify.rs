//! Reads everything held at once, at the operator's wish: what is not what its name says is set aside, as the scrub does
//! it in its own time. Runs by itself, one at a time; how far it came can be asked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::scrub::Scrub;
use super::{Store, StoreError};
use crate::oci::Digest;

/// Damaged content named in the answer; more is only counted.
const DAMAGED_LISTED_MAX: usize = 100;

/// How far a verification came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Whether it goes on.
    pub is_running: bool,
    /// Whether it came to its end.
    pub is_complete: bool,
    /// Blobs and manifests read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How many of them were damaged; they are set aside, and fetched again when asked for.
    pub damaged: u64,
    /// Which: the first hundred.
    pub damaged_digests: Vec<Digest>,
}

#[derive(Default)]
pub(super) struct VerifyJob {
    state: Arc<Mutex<Verification>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Begins to read everything; says whether that is news, for there is one at a time.
    pub fn begin_verification(&self) -> Result<bool, StoreError> {
        self.verify_job.begin(&self.scrub)
    }

    /// How far the last verification came; `None` if there was none since the start.
    pub fn verification(&self) -> Option<Verification> {
        let begun = lock(&self.verify_job.thread).is_some();
        begun.then(|| lock(&self.verify_job.state).clone())
    }

    /// Sets the index aside and fills a new one from the files, while everything is served. Grants are asked for anew.
    pub fn rebuild_index(&self) {
        self.index.rebuild();
    }
}

impl VerifyJob {
    fn begin(&self, scrub: &Arc<Scrub>) -> Result<bool, StoreError> {
        let mut thread = lock(&self.thread);
        if thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Ok(false);
        }
        *lock(&self.state) = Verification {
            is_running: true,
            ..Verification::default()
        };
        let (scrub, state) = (Arc::clone(scrub), Arc::clone(&self.state));
        let begun = std::thread::Builder::new()
            .name("store-verify".to_owned())
            .spawn(move || {
                let is_complete = scrub.read_all(|digest, bytes, is_intact| {
                    let mut state = lock(&state);
                    state.objects += 1;
                    state.bytes += bytes;
                    if !is_intact {
                        state.damaged += 1;
                        if state.damaged_digests.len() < DAMAGED_LISTED_MAX {
                            state.damaged_digests.push(*digest);
                        }
                    }
                });
                let mut state = lock(&state);
                (state.is_running, state.is_complete) = (false, is_complete);
                let (objects, damaged) = (state.objects, state.damaged);
                tracing::info!(
                    objects,
                    damaged,
                    is_complete,
                    "everything held was read at the operator's wish"
                );
            });
        let begun = begun.map_err(|error| StoreError::io("start the thread to read", "blobs", &error))?;
        *thread = Some(begun);
        Ok(true)
    }

    /// Its thread, to be waited for at the end.
    pub(super) fn take(&mut self) -> Option<JoinHandle<()>> {
        self.thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// What is behind a lock is counters: whoever panicked left them as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
