//! The decision log over the API: recent decisions, a live stream of new ones, and the clients seen.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::{Extension, Json};
use futures_util::stream::poll_fn;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::Admin;
use super::auth::Caller;
use super::concurrency_limit::Permit;
use super::extract::{Params, lowercase, number};
use super::format::{describe_decision, rfc3339};
use super::names::{Ended, Kind, Outcome};
use super::response::{Pace, Problem};
use crate::oci::UpstreamFailure;
use crate::telemetry::{Client, DecisionRecord, ResourceKind};

/// Maximum number of decisions in one response.
const EVENTS_MAX: usize = 1_000;

/// Buffered events of one stream.
const BUFFERED_MAX: usize = 64;

/// Heartbeat interval. It detects closed connections and keeps intermediaries from closing idle ones.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// One decision.
#[derive(Serialize, ToSchema)]
pub(super) struct Event {
    /// Consecutive numbers from 1. A gap means that older decisions were dropped.
    pub(super) id: u64,
    #[schema(format = DateTime)]
    pub(super) time: String,
    pub(super) upstream: String,
    /// How the client named the upstream: mirror, ns, prefix, host or connect.
    pub(super) route: &'static str,
    pub(super) image: String,
    pub(super) repository: String,
    /// Tag or digest; empty if neither was parsed.
    pub(super) reference: String,
    #[schema(value_type = Kind)]
    pub(super) kind: &'static str,
    /// Result of the decision; aborted or failed if the response is incomplete.
    #[schema(value_type = Outcome)]
    pub(super) result: &'static str,
    pub(super) reason: &'static str,
    pub(super) cause: Option<&'static str>,
    /// The decision as a sentence.
    pub(super) sentence: String,
    pub(super) digest: Option<String>,
    pub(super) status: u16,
    /// Time from the request header to the end of the response.
    pub(super) ms: f64,
    /// Time from the request header to the response header.
    pub(super) first_byte_ms: f64,
    /// How the response body ended; aborted: the client disconnected.
    #[schema(value_type = Ended)]
    pub(super) ended: &'static str,
    /// Bytes of the body that were written to the connection.
    pub(super) bytes: u64,
    pub(super) client: Option<String>,
    pub(super) user_agent: String,
    #[schema(pattern = "^[0-9a-f]{32}$")]
    pub(super) trace_id: String,
}

impl Event {
    pub(super) fn of(decision: &DecisionRecord) -> Self {
        let parts = decision
            .image
            .split_once('@')
            .or_else(|| decision.image.rsplit_once(':'));
        let (repository, reference) = match decision.kind {
            ResourceKind::Tag | ResourceKind::Manifest | ResourceKind::Blob => {
                parts.unwrap_or((&decision.image, ""))
            }
            _ => (&*decision.image, ""),
        };
        Self {
            id: decision.id,
            time: humantime::format_rfc3339_millis(decision.at).to_string(),
            repository: repository.to_owned(),
            reference: reference.to_owned(),
            upstream: decision.upstream.to_string(),
            route: decision.route,
            image: decision.image.to_string(),
            kind: decision.kind.name(),
            result: decision.result.name(),
            reason: decision.reason,
            cause: decision.cause.map(UpstreamFailure::name),
            sentence: describe_decision(decision),
            digest: decision.digest.map(|digest| digest.to_string()),
            status: decision.status,
            ms: decision.ms,
            first_byte_ms: decision.first_byte_ms,
            ended: decision.ended.name(),
            bytes: decision.bytes,
            client: decision.client.map(|client| client.to_string()),
            user_agent: decision.agent.to_string(),
            trace_id: decision.trace.to_string(),
        }
    }

    fn as_sse(&self) -> Result<sse::Event, axum::Error> {
        let event = sse::Event::default().id(self.id.to_string()).event("decision");
        event.json_data(self)
    }
}

/// Filter of decisions. An empty value admits all.
#[derive(Clone, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct Filter {
    /// Substring of the image name.
    #[serde(deserialize_with = "lowercase")]
    image: String,
    /// Only decisions about this upstream.
    upstream: String,
    /// Only decisions with this result, for example hit, stale, miss or denied.
    result: String,
    /// Only decisions with this reason.
    reason: String,
    /// Only requests of this client address.
    client: String,
    /// Only decisions with this trace id.
    trace_id: String,
    /// Only decisions with a larger id. A stream begins with those that were missed.
    #[serde(deserialize_with = "number")]
    #[param(value_type = u64, required = false)]
    after: Option<u64>,
    /// Maximum number of decisions; default 100. Streams have none.
    #[serde(deserialize_with = "number")]
    #[param(value_type = usize, required = false)]
    limit: Option<usize>,
    /// Omits successful requests by digest, which follow from a pull by tag.
    #[serde(skip)]
    #[param(ignore)]
    only_pulls: bool,
}

impl Filter {
    /// The newest pulls by tag, and failed or denied requests.
    pub(super) fn newest(limit: usize, image: &str) -> Self {
        Self {
            limit: Some(limit),
            image: image.to_lowercase(),
            only_pulls: true,
            ..Self::default()
        }
    }

    fn admits(&self, decision: &DecisionRecord) -> bool {
        let is = |wanted: &str, found: &dyn Fn() -> String| wanted.is_empty() || wanted == found();
        let image = || {
            format!("{}/{}", decision.upstream, decision.image)
                .to_lowercase()
                .contains(&self.image)
        };
        decision.id > self.after.unwrap_or_default()
            && (!self.only_pulls
                || decision.kind == ResourceKind::Tag
                || decision.status >= 400
                || decision.ended.is_failure())
            && (self.image.is_empty() || image())
            && is(&self.upstream, &|| decision.upstream.to_string())
            && is(&self.result, &|| decision.result.name().to_owned())
            && is(&self.reason, &|| decision.reason.to_owned())
            && is(&self.client, &|| {
                decision
                    .client
                    .map(|client| client.to_string())
                    .unwrap_or_default()
            })
            && is(&self.trace_id, &|| decision.trace.to_string())
    }
}

/// Recent decisions.
#[derive(Serialize, ToSchema)]
pub(super) struct Events {
    events: Vec<Event>,
}

/// Recent decisions, newest first.
#[utoipa::path(get, path = "/api/v1/events", params(Filter), responses((status = 200, body = Events)))]
pub(super) async fn events(State(admin): State<Admin>, Params(filter): Params<Filter>) -> Json<Events> {
    Json(Events {
        events: admin.decisions(&filter),
    })
}

/// Stream of decisions.
///
/// Server-sent events of the type `decision`, with an Event as data. With `after`, the stream begins with the missed
/// decisions. The event `gap` means that decisions were dropped, because the client reads too slowly.
#[utoipa::path(
    get,
    path = "/api/v1/events/stream",
    params(Filter),
    responses(
        (status = 200, body = String, content_type = "text/event-stream"),
        (status = 503, description = "Too many are already running."),
    )
)]
pub(super) async fn stream_events(
    State(admin): State<Admin>,
    Extension(caller): Extension<Caller>,
    Params(filter): Params<Filter>,
) -> Result<impl IntoResponse, Problem> {
    let Some(permit) = admin.watchers.try_acquire(caller.client) else {
        return Err(Problem::busy(
            "too many event streams, in total or from this address; close a page, or poll /api/v1/events",
        ));
    };
    let (sender, mut events) = mpsc::channel(BUFFERED_MAX);
    let news = admin.telemetry.subscribe();
    // On the main runtime, because the admin thread, which polls the body, serves health checks.
    tokio::spawn(send(admin, permit, (sender, news), filter));
    let events = Sse::new(poll_fn(move |context| events.poll_recv(context)));
    let heartbeat = KeepAlive::new().interval(HEARTBEAT).text("still here");
    Ok((Extension(Pace::Events), events.keep_alive(heartbeat)))
}

/// Clients that were seen.
#[derive(Serialize, ToSchema)]
pub(super) struct Clients {
    clients: Vec<ClientView>,
}

/// Clients seen, most recent first.
#[utoipa::path(get, path = "/api/v1/clients", responses((status = 200, body = Clients)))]
pub(super) async fn clients(State(admin): State<Admin>) -> Json<Clients> {
    Json(Clients {
        clients: admin.clients_seen(admin.clock.now()),
    })
}

impl Admin {
    /// The matching decisions, newest first.
    pub(super) fn decisions(&self, filter: &Filter) -> Vec<Event> {
        let decisions = self.telemetry.decisions();
        let wanted = decisions.iter().filter(|decision| filter.admits(decision));
        wanted
            .take(filter.limit.unwrap_or(100).clamp(1, EVENTS_MAX))
            .map(|decision| Event::of(decision))
            .collect()
    }

    /// Clients seen, most recent first.
    pub(super) fn clients_seen(&self, now: SystemTime) -> Vec<ClientView> {
        self.telemetry
            .clients()
            .iter()
            .map(|client| ClientView::of(client, now))
            .collect()
    }
}

async fn send(
    admin: Admin,
    permit: Permit,
    (events, mut news): (
        mpsc::Sender<Result<sse::Event, axum::Error>>,
        Receiver<Arc<DecisionRecord>>,
    ),
    filter: Filter,
) {
    let _permit = permit;
    // Subscribed before reading the log, so that no decision is missed in between.
    let missed = match filter.after {
        None | Some(0) => Vec::new(),
        Some(_) => admin.decisions(&Filter {
            limit: Some(EVENTS_MAX),
            ..filter.clone()
        }),
    };
    let mut last = filter.after.unwrap_or_default();
    for event in missed.iter().rev() {
        last = last.max(event.id);
        if events.send(event.as_sse()).await.is_err() {
            return;
        }
    }
    let watching = sse::Event::default().comment("watching");
    if events.send(Ok(watching)).await.is_err() {
        return;
    }
    loop {
        let decision = tokio::select! {
            () = admin.ending.cancelled() => return,
            () = events.closed() => return,
            decision = news.recv() => decision,
        };
        let sent = match decision {
            Ok(decision) if decision.id > last && filter.admits(&decision) => {
                events.send(Event::of(&decision).as_sse()).await
            }
            Ok(_) => Ok(()),
            // Decision numbers reveal the gap, and /api/v1/events?after= fills it.
            Err(RecvError::Lagged(_)) => {
                events
                    .send(Ok(sse::Event::default().event("gap").data("{}")))
                    .await
            }
            Err(RecvError::Closed) => return,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// A client program on one machine.
#[derive(Serialize, ToSchema)]
pub(super) struct ClientView {
    pub(super) address: String,
    pub(super) kind: &'static str,
    pub(super) agent: String,
    pub(super) requests: u64,
    pub(super) pulls: u64,
    #[schema(format = DateTime)]
    pub(super) last_at: String,
    pub(super) seconds_ago: u64,
    pub(super) last_image: Option<String>,
}

impl ClientView {
    fn of(client: &Client, now: SystemTime) -> Self {
        Self {
            address: client.address.to_string(),
            kind: client.kind,
            agent: client.agent.to_string(),
            requests: client.requests,
            pulls: client.pulls,
            last_at: rfc3339(client.last_at),
            seconds_ago: now.duration_since(client.last_at).unwrap_or_default().as_secs(),
            last_image: client.last_image.as_deref().map(str::to_owned),
        }
    }
}
