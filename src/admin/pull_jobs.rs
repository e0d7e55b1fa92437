//! Pull jobs: images pulled into the cache on request of the operator, through the same path as client pulls.
//!
//! A job fetches the tag, for an index the manifests of the selected platforms, then every config and layer. Cached
//! objects are not fetched again. A job continues when the requester disconnects; its progress is available by id.

mod run;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State as Service};
use http::{HeaderValue, StatusCode};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Semaphore;
use utoipa::ToSchema;

use super::Admin;
use super::extract::JsonBody;
use super::format::rfc3339;
use super::image_ref::{ImageRef, ImageRequest};
use super::names::Role;
use super::response::Problem;
use crate::clock::Clock;
use crate::download::Downloads;
use crate::oci::{Accept, Digest, Endpoint, RangeRequest};
use crate::proxy::{Request, UpstreamCaches};
use crate::queue::Peer;
use crate::server::ServingState;
use crate::trace_context::TraceContext;

use self::run::run;

/// Maximum number of stored jobs. Finished ones are dropped first.
const JOBS_MAX: usize = 100;

/// Maximum number of running jobs; others wait.
const RUNNING_MAX: usize = 4;

/// All pull jobs.
#[derive(Clone)]
pub(super) struct PullJobs {
    list: Arc<Mutex<JobList>>,
    permits: Arc<Semaphore>,
}

#[derive(Default)]
struct JobList {
    last_id: u64,
    jobs: VecDeque<Arc<PullJob>>,
}

impl Default for PullJobs {
    fn default() -> Self {
        Self {
            list: Arc::default(),
            permits: Arc::new(Semaphore::new(RUNNING_MAX)),
        }
    }
}

/// One pull job.
struct PullJob {
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

#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
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

#[derive(Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum LayerState {
    Waiting,
    Fetching,
    /// Cached before this job.
    Cached,
    Fetched,
    Failed,
}

/// A pull job as returned by the API.
#[derive(Serialize, ToSchema)]
#[schema(as = Pull)]
pub(super) struct PullView {
    pub(super) id: u64,
    pub(super) image: String,
    pub(super) state: State,
    #[schema(format = DateTime)]
    pub(super) began_at: String,
    pub(super) digest: Option<String>,
    /// Reason of the manifest decision.
    pub(super) reason: Option<&'static str>,
    pub(super) error: Option<String>,
    pub(super) layers: Vec<LayerView>,
}

/// A config or layer of the job.
#[derive(Serialize, ToSchema)]
pub(super) struct LayerView {
    pub(super) digest: String,
    #[schema(value_type = Role)]
    pub(super) role: &'static str,
    pub(super) platform: Option<String>,
    pub(super) size: Option<u64>,
    pub(super) received: u64,
    pub(super) state: LayerState,
}

/// Pull jobs.
#[derive(Serialize, ToSchema)]
pub(super) struct Pulls {
    pulls: Vec<PullView>,
}

/// Pulls requested by the operator, newest first.
#[utoipa::path(get, path = "/api/v1/pulls", responses((status = 200, body = Pulls)))]
pub(super) async fn pulls(Service(admin): Service<Admin>) -> Json<Pulls> {
    Json(Pulls {
        pulls: admin.pull_jobs.list(admin.registry.load().proxy.downloads()),
    })
}

/// One pull.
#[utoipa::path(
    get,
    path = "/api/v1/pulls/{id}",
    params(("id" = u64, Path)),
    responses(
        (status = 200, body = PullView),
        (status = 404, description = "Not found."),
    )
)]
pub(super) async fn pull(
    Service(admin): Service<Admin>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<PullView>, Problem> {
    let Path(id) = id.map_err(|_| Problem::not_found("the path has no number of a pull"))?;
    let id: u64 = id
        .parse()
        .map_err(|_| Problem::not_found(format!("there is no pull `{id}`")))?;
    let found = admin.pull_jobs.find(id, admin.registry.load().proxy.downloads());
    found
        .map(Json)
        .ok_or_else(|| Problem::not_found(format!("pull {id} is unknown or has expired")))
}

/// Pull an image into the cache in advance.
#[utoipa::path(
    post,
    path = "/api/v1/pulls",
    request_body = ImageRequest,
    responses(
        (status = 202, body = PullView),
        (status = 503, description = "Too many are already running."),
    )
)]
pub(super) async fn start_pull(
    Service(admin): Service<Admin>,
    JsonBody(request): JsonBody<ImageRequest>,
) -> Result<(StatusCode, Json<Option<PullView>>), Problem> {
    let authorization = request.authorization()?;
    let platforms = match request.platforms {
        None => Platforms::local(),
        Some(these) if these.iter().any(|one| one == "all") => Platforms::All,
        Some(these) => Platforms::Selected(these),
    };
    let id = admin.begin_pull(&request.image, platforms, authorization)?;
    let view = admin.pull_jobs.find(id, admin.registry.load().proxy.downloads());
    Ok((StatusCode::ACCEPTED, Json(view)))
}

impl Admin {
    /// Starts a pull job and returns its id.
    pub(super) fn begin_pull(
        &self,
        image: &str,
        platforms: Platforms,
        authorization: Option<HeaderValue>,
    ) -> Result<u64, Problem> {
        // Parsed here as well, so that an unknown name is an error of the request.
        let order = PullOrder {
            image: ImageRef::parse(image, &self.registry.load())?.to_string(),
            platforms,
            authorization,
        };
        let begun = self.pull_jobs.begin(&self.registry, order, self.clock);
        begun.ok_or_else(|| {
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many unfinished pulls; try again later",
            )
        })
    }
}

/// Platform selection for an index.
#[derive(Clone)]
pub(super) enum Platforms {
    All,
    /// As `os/architecture` or `os/architecture/variant`.
    Selected(Vec<String>),
}

impl Platforms {
    /// The platform of this machine.
    pub(super) fn local() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self::Selected(vec![format!("linux/{architecture}")])
    }

    pub(super) fn includes(&self, platform: &str) -> bool {
        match self {
            Self::All => true,
            Self::Selected(wanted) => wanted.iter().any(|wanted| {
                platform == wanted
                    || platform
                        .strip_prefix(wanted.as_str())
                        .is_some_and(|rest| rest.starts_with('/'))
            }),
        }
    }
}

/// A pull that an operator requested. It names the image by its full name, because the configuration may be reloaded while
/// the job waits.
struct PullOrder {
    image: String,
    platforms: Platforms,
    authorization: Option<HeaderValue>,
}

/// Parameters of a pull job.
pub(super) struct PullSpec {
    pub(super) named: ImageRef,
    pub(super) platforms: Platforms,
    /// Credential for the upstream. It is not stored.
    pub(super) authorization: Option<HeaderValue>,
}

impl PullOrder {
    fn spec(self, registry: &ServingState) -> Result<PullSpec, Problem> {
        Ok(PullSpec {
            named: ImageRef::parse(&self.image, registry)?,
            platforms: self.platforms,
            authorization: self.authorization,
        })
    }
}

impl PullJobs {
    /// Starts a job and returns its id; `None` if too many are unfinished.
    fn begin(&self, registry: &Arc<ArcSwap<ServingState>>, order: PullOrder, clock: Clock) -> Option<u64> {
        let job = {
            let mut list = self.list.lock();
            if list.jobs.len() >= JOBS_MAX {
                let over =
                    |job: &Arc<PullJob>| matches!(job.progress.lock().state, State::Done | State::Failed);
                let position = list.jobs.iter().position(over)?;
                list.jobs.remove(position);
            }
            list.last_id += 1;
            let job = Arc::new(PullJob {
                id: list.last_id,
                image: order.image.clone(),
                began_at: clock.now(),
                progress: Mutex::default(),
            });
            list.jobs.push_back(Arc::clone(&job));
            job
        };
        let (registry, permits, id) = (Arc::clone(registry), Arc::clone(&self.permits), job.id);
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _permit = permits.acquire().await.ok();
            job.progress.lock().state = State::Fetching;
            let registry = registry.load_full();
            let result = match order.spec(&registry) {
                Ok(spec) => run(&registry.proxy, &job, spec, clock).await,
                Err(problem) => Err(problem.detail),
            };
            let mut progress = job.progress.lock();
            match result {
                Ok(()) => progress.state = State::Done,
                Err(error) => {
                    tracing::warn!(image = job.image, error, "requested pull failed");
                    progress.state = State::Failed;
                    progress.error = Some(error);
                }
            }
        });
        Some(id)
    }

    /// All stored jobs, newest first.
    pub(super) fn list(&self, downloads: &Downloads) -> Vec<PullView> {
        let jobs: Vec<Arc<PullJob>> = self.list.lock().jobs.iter().rev().cloned().collect();
        jobs.iter().map(|job| job.view(downloads)).collect()
    }

    /// The job with this id.
    pub(super) fn find(&self, id: u64, downloads: &Downloads) -> Option<PullView> {
        let job = self.list.lock().jobs.iter().find(|job| job.id == id).cloned();
        job.map(|job| job.view(downloads))
    }
}

impl PullJob {
    fn mark(&self, digest: &Digest, state: LayerState) {
        let mut progress = self.progress.lock();
        for layer in progress.layers.iter_mut().filter(|layer| layer.digest == *digest) {
            layer.state = state;
        }
    }

    fn view(&self, downloads: &Downloads) -> PullView {
        let transfers = downloads.statuses();
        let progress = self.progress.lock();
        let received = |layer: &Layer| match layer.state {
            LayerState::Cached | LayerState::Fetched => layer.size.unwrap_or_default(),
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

/// A request as a client would send it.
pub(super) fn request(spec: &PullSpec, endpoint: Endpoint, clock: Clock) -> Request {
    Request {
        registry: Arc::clone(&spec.named.upstream_registry),
        endpoint,
        head: false,
        accept: Accept::manifests(),
        authorization: spec.authorization.clone(),
        host: None,
        now: clock.now(),
        since: tokio::time::Instant::now(),
        writes: spec.named.upstream_registry.writes(&spec.named.repository),
        for_push: false,
        trace: TraceContext::new_root(),
        peer: Peer::Local,
        range: RangeRequest::None,
        needs_length: false,
        upstream_caches: UpstreamCaches::default(),
    }
}
