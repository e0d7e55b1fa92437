//! Pulls at the operator's wish: an image brought into the cache before anybody asks, by the same road as a client's.
//!
//! The tag, then of an index the manifests of the platforms wanted, then every config and layer. What is held is not
//! fetched again. The work goes on when whoever asked for it has gone; its progress can be looked at by its number.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use http::HeaderValue;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::named::Named;
use super::words::rfc3339;
use crate::clock::Clock;
use crate::download::Downloads;
use crate::oci::manifest::{Kind, Role};
use crate::oci::{Accept, AnyDigest, Digest, Operation, Reference};
use crate::pull::{Content, Outcome, Pull, Request};
use crate::store::manifests::HeldManifest;

/// Pulls remembered; finished ones go first.
const PULLS_MAX: usize = 100;

/// Pulls at a time; further ones wait.
const AT_A_TIME: usize = 4;

/// Layers of one image at a time.
const LAYERS_AT_A_TIME: usize = 3;

/// How deep indexes may lie in each other.
const DEPTH_MAX: u32 = 2;

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

async fn bring(pull: &Arc<Pull>, work: &Arc<Work>, wish: Wish, clock: Clock) -> Result<(), String> {
    let wish = Arc::new(wish);
    let first = manifest(pull, &wish, wish.named.reference.clone(), clock).await;
    let (first, reason) = first?;
    {
        let mut progress = work.progress();
        progress.digest = Some(first.digest);
        progress.reason = Some(reason);
    }
    let mut manifests = VecDeque::from([(first, None::<String>, DEPTH_MAX)]);
    let mut is_none = true;
    while let Some((held, platform, depth)) = manifests.pop_front() {
        if held.manifest.kind == Kind::Index {
            for child in held
                .manifest
                .children
                .iter()
                .filter(|child| child.role == Role::Manifest)
            {
                let own = child.platform.as_ref().map(ToString::to_string);
                let is_wanted = own.as_deref().is_none_or(|own| wish.platforms.want(own));
                let Some(depth) = depth.checked_sub(1).filter(|_| is_wanted) else {
                    continue;
                };
                let reference = Reference::Digest(child.digest.clone());
                let (held, _) = manifest(pull, &wish, reference, clock).await?;
                manifests.push_back((held, own, depth));
            }
            continue;
        }
        is_none = false;
        list(work, &held, platform.as_deref());
        layers(pull, work, &wish, &held, clock).await?;
    }
    if is_none {
        return Err(format!("{} has no image for the platform wanted", wish.named));
    }
    Ok(())
}

fn list(work: &Work, held: &HeldManifest, platform: Option<&str>) {
    let mut progress = work.progress();
    for child in &held.manifest.children {
        let AnyDigest::Known(digest) = child.digest else {
            continue;
        };
        if child.role == Role::Manifest
            || child.foreign
            || progress.layers.iter().any(|layer| layer.digest == digest)
        {
            continue;
        }
        progress.layers.push(Layer {
            digest,
            size: child.size,
            platform: platform.map(str::to_owned),
            role: if child.role == Role::Config {
                "config"
            } else {
                "layer"
            },
            state: LayerState::Waiting,
        });
    }
}

async fn layers(
    pull: &Arc<Pull>,
    work: &Arc<Work>,
    wish: &Arc<Wish>,
    held: &HeldManifest,
    clock: Clock,
) -> Result<(), String> {
    let places = Arc::new(Semaphore::new(LAYERS_AT_A_TIME));
    let mut tasks = JoinSet::new();
    for child in &held.manifest.children {
        let AnyDigest::Known(digest) = child.digest else {
            continue;
        };
        if child.role == Role::Manifest || child.foreign {
            continue;
        }
        let (pull, work, wish, places) = (
            Arc::clone(pull),
            Arc::clone(work),
            Arc::clone(wish),
            Arc::clone(&places),
        );
        tasks.spawn(async move {
            let _place = places.acquire_owned().await.ok();
            let brought = layer(&pull, &work, &wish, digest, clock).await;
            if brought.is_err() {
                work.mark(&digest, LayerState::Failed);
            }
            brought
        });
    }
    let mut failed = Ok(());
    while let Some(brought) = tasks.join_next().await {
        let brought = brought
            .unwrap_or_else(|_| Err("the task that fetched a layer ended without an answer".to_owned()));
        failed = failed.and(brought);
    }
    failed
}

async fn layer(
    pull: &Arc<Pull>,
    work: &Work,
    wish: &Wish,
    digest: Digest,
    clock: Clock,
) -> Result<(), String> {
    work.mark(&digest, LayerState::Fetching);
    let operation = Operation::Blob {
        repository: wish.named.repository.clone(),
        digest: AnyDigest::Known(digest),
    };
    match pull.answer(request(wish, operation, clock)).await {
        Outcome::Blob { content, .. } => match content {
            Content::Head | Content::Memory(_) | Content::File(_) => {
                work.mark(&digest, LayerState::Held);
                Ok(())
            }
            Content::Download(mut reader) => match reader.settled().await {
                Ok(_) => {
                    work.mark(&digest, LayerState::Fetched);
                    Ok(())
                }
                Err(failure) => Err(format!("{digest}: {failure}")),
            },
            Content::Passing(_) => Err(format!("{digest}: the disk cannot take it")),
        },
        Outcome::Refused(refused) => Err(format!(
            "{digest}: {}",
            super::words::refused(refused.refusal, wish.named.site.name())
        )),
        _ => Err(format!("{digest} cannot be stored")),
    }
}

async fn manifest(
    pull: &Arc<Pull>,
    wish: &Wish,
    reference: Reference,
    clock: Clock,
) -> Result<(Arc<HeldManifest>, &'static str), String> {
    let operation = Operation::Manifest {
        repository: wish.named.repository.clone(),
        reference: reference.clone(),
    };
    match pull.answer(request(wish, operation, clock)).await {
        Outcome::Manifest(manifest, how) => Ok((manifest, how.reason.name())),
        Outcome::Refused(refused) => Err(super::words::refused(refused.refusal, wish.named.site.name())),
        _ => Err(format!("{reference} cannot be stored")),
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
    }
}
