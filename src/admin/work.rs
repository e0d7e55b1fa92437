//! Pulls at the operator's wish: an image brought into the cache before anybody asks, by the same road as a client's.
//!
//! The tag, then of an index the manifests of the platforms wanted, then every config and layer. What is held is not
//! fetched again. The work goes on when whoever asked for it has gone; its progress can be looked at by its number.

mod bring;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use http::HeaderValue;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::named::Named;
use super::words::rfc3339;
use crate::clock::Clock;
use crate::download::Downloads;
use crate::oci::{Accept, Digest, Operation, RangeRequest};
use crate::proxy::{Pull, Request};
use crate::queue::Peer;
use crate::trace_context::Trace;

use self::bring::bring;

/// Pulls remembered; finished ones go first.
const PULLS_MAX: usize = 100;

/// Pulls at a time; further ones wait.
const AT_A_TIME: usize = 4;

/// Every pull at the operator's wish.
#[derive(Clone)]
pub(super) struct Works {
    kept: Arc<Mutex<Kept>>,
    places: Arc<Semaphore>,
}

#[derive(Default)]
struct Kept {
    last_id: u64,
    works: VecDeque<Arc<Work>>,
}

impl Default for Works {
    fn default() -> Self {
        Self {
            kept: Arc::default(),
            places: Arc::new(Semaphore::new(AT_A_TIME)),
        }
    }
}

/// One pull.
struct Work {
    id: u64,
    image: String,
    began_at: SystemTime,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    state: State,
    digest: Option<Digest>,
    reason: Option<&'static str>,
    error: Option<String>,
    layers: Vec<Layer>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    #[default]
    Waiting,
    Fetching,
    Done,
    Failed,
}

struct Layer {
    digest: Digest,
    size: Option<u64>,
    platform: Option<String>,
    role: &'static str,
    state: LayerState,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LayerState {
    Waiting,
    Fetching,
    /// Held before this pull.
    Held,
    Fetched,
    Failed,
}

/// A pull as it is told.
#[derive(Serialize)]
pub(super) struct PullView {
    pub(super) id: u64,
    pub(super) image: String,
    pub(super) state: State,
    pub(super) began_at: String,
    pub(super) digest: Option<String>,
    /// Why the manifest came from where it came.
    pub(super) reason: Option<&'static str>,
    pub(super) error: Option<String>,
    pub(super) layers: Vec<LayerView>,
}

/// One of its configs and layers.
#[derive(Serialize)]
pub(super) struct LayerView {
    pub(super) digest: String,
    pub(super) role: &'static str,
    pub(super) platform: Option<String>,
    pub(super) size: Option<u64>,
    pub(super) received: u64,
    pub(super) state: LayerState,
}

/// Which platforms of an index are wanted.
#[derive(Clone)]
pub(super) enum Platforms {
    All,
    /// As `os/architecture` or `os/architecture/variant`.
    These(Vec<String>),
}

impl Platforms {
    /// That of this machine.
    pub(super) fn own() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self::These(vec![format!("linux/{architecture}")])
    }

    pub(super) fn want(&self, platform: &str) -> bool {
        match self {
            Self::All => true,
            Self::These(wanted) => wanted.iter().any(|wanted| {
                platform == wanted
                    || platform
                        .strip_prefix(wanted.as_str())
                        .is_some_and(|rest| rest.starts_with('/'))
            }),
        }
    }
}

/// What is to be pulled.
pub(super) struct Wish {
    pub(super) named: Named,
    pub(super) platforms: Platforms,
    /// With which credential; as a client's, it is kept by nobody.
    pub(super) authorization: Option<HeaderValue>,
}

impl Works {
    /// Begins a pull; its number. `None` if too many are under way already.
    pub(super) fn begin(&self, pull: &Arc<Pull>, wish: Wish, clock: Clock) -> Option<u64> {
        let work = {
            let mut kept = self.kept();
            if kept.works.len() >= PULLS_MAX {
                let over = |work: &Arc<Work>| matches!(work.progress().state, State::Done | State::Failed);
                let place = kept.works.iter().position(over)?;
                kept.works.remove(place);
            }
            kept.last_id += 1;
            let work = Arc::new(Work {
                id: kept.last_id,
                image: wish.named.to_string(),
                began_at: clock.now(),
                progress: Mutex::default(),
            });
            kept.works.push_back(Arc::clone(&work));
            work
        };
        let (pull, places, id) = (Arc::clone(pull), Arc::clone(&self.places), work.id);
        tokio::spawn(async move {
            // Never closed.
            let _place = places.acquire().await.ok();
            work.progress().state = State::Fetching;
            let brought = bring(&pull, &work, wish, clock).await;
            let mut progress = work.progress();
            match brought {
                Ok(()) => progress.state = State::Done,
                Err(error) => {
                    tracing::warn!(image = work.image, error, "a pull at the operator's wish failed");
                    progress.state = State::Failed;
                    progress.error = Some(error);
                }
            }
        });
        Some(id)
    }

    /// All that are remembered, the newest first.
    pub(super) fn list(&self, downloads: &Downloads) -> Vec<PullView> {
        let works: Vec<Arc<Work>> = self.kept().works.iter().rev().cloned().collect();
        works.iter().map(|work| work.view(downloads)).collect()
    }

    /// The pull of this number.
    pub(super) fn find(&self, id: u64, downloads: &Downloads) -> Option<PullView> {
        let work = self.kept().works.iter().find(|work| work.id == id).cloned();
        work.map(|work| work.view(downloads))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// Each change under this lock is one assignment.
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, digest: &Digest, state: LayerState) {
        let mut progress = self.progress();
        for layer in progress.layers.iter_mut().filter(|layer| layer.digest == *digest) {
            layer.state = state;
        }
    }

    fn view(&self, downloads: &Downloads) -> PullView {
        let transfers = downloads.transfers();
        let progress = self.progress();
        let received = |layer: &Layer| match layer.state {
            LayerState::Held | LayerState::Fetched => layer.size.unwrap_or_default(),
            LayerState::Waiting | LayerState::Failed | LayerState::Fetching => {
                let running = transfers.iter().find(|transfer| transfer.digest == layer.digest);
                running.map_or(0, |transfer| transfer.received)
            }
        };
        PullView {
            id: self.id,
            image: self.image.clone(),
            state: progress.state,
            began_at: rfc3339(self.began_at),
            digest: progress.digest.map(|digest| digest.to_string()),
            reason: progress.reason,
            error: progress.error.clone(),
            layers: progress
                .layers
                .iter()
                .map(|layer| LayerView {
                    digest: layer.digest.to_string(),
                    role: layer.role,
                    platform: layer.platform.clone(),
                    size: layer.size,
                    received: received(layer),
                    state: layer.state,
                })
                .collect(),
        }
    }
}

/// As a client's.
pub(super) fn request(wish: &Wish, operation: Operation, clock: Clock) -> Request {
    Request {
        site: Arc::clone(&wish.named.site),
        operation,
        head: false,
        accept: Accept::manifests(),
        authorization: wish.authorization.clone(),
        now: clock.now(),
        writes: wish.named.site.writes(&wish.named.repository),
        for_push: false,
        trace: Trace::begun(),
        peer: Peer::Local,
        range: RangeRequest::None,
        needs_length: false,
    }
}
