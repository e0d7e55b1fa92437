//! The decision log over the API: recent decisions, a live stream of new ones, and the clients seen.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use super::Admin;
use super::concurrency_limit::Permit;
use super::format::{describe_decision, rfc3339};
use super::response::{ApiResponse, Problem, event_stream};
use crate::oci::{Query, UpstreamFailure};
use crate::telemetry::{Client, DecisionRecord, ResourceKind};

/// Maximum number of decisions in one response.
const EVENTS_MAX: usize = 1_000;

/// Buffered lines of one event stream.
const LINES_MAX: usize = 64;

/// Heartbeat interval. It detects closed connections and keeps intermediaries from closing idle ones.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// One decision.
#[derive(Serialize)]
pub(super) struct Event {
    pub(super) id: u64,
    pub(super) time: String,
    pub(super) upstream: String,
    pub(super) route: &'static str,
    pub(super) image: String,
    pub(super) repository: String,
    /// The tag or digest; empty if the request could not be parsed.
    pub(super) reference: String,
    pub(super) kind: &'static str,
    pub(super) result: &'static str,
    pub(super) reason: &'static str,
    pub(super) cause: Option<&'static str>,
    /// The decision as a sentence.
    pub(super) sentence: String,
    pub(super) digest: Option<String>,
    pub(super) status: u16,
    pub(super) ms: f64,
    pub(super) first_byte_ms: f64,
    pub(super) ended: &'static str,
    pub(super) bytes: u64,
    pub(super) client: Option<String>,
    pub(super) user_agent: String,
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
}

/// Filter of decisions.
#[derive(Clone, Default)]
pub(super) struct Filter {
    image: String,
    upstream: Option<String>,
    result: Option<String>,
    reason: Option<String>,
    client: Option<String>,
    trace: Option<String>,
    since: u64,
    limit: usize,
    /// Omits successful requests by digest, which follow from a pull by tag.
    only_pulls: bool,
}

impl Filter {
    pub(super) fn read(query: &Query) -> Result<Self, Problem> {
        let text = |name: &str| query.get(name).filter(|text| !text.is_empty()).map(str::to_owned);
        let number = |name: &str| match query.get(name) {
            None | Some("") => Ok(None),
            Some(text) => text
                .parse::<u64>()
                .map(Some)
                .map_err(|_| Problem::bad_request(format!("`{name}` is a number, not `{text}`"))),
        };
        let limit = number("limit")?.and_then(|limit| usize::try_from(limit).ok());
        Ok(Self {
            image: text("image").unwrap_or_default().to_lowercase(),
            upstream: text("upstream"),
            result: text("result"),
            reason: text("reason"),
            client: text("client"),
            trace: text("trace_id"),
            since: number("after")?.unwrap_or_default(),
            limit: limit.unwrap_or(100).clamp(1, EVENTS_MAX),
            only_pulls: false,
        })
    }

    /// The newest pulls by tag, and failed or denied requests.
    pub(super) fn newest(limit: usize, image: &str) -> Self {
        Self {
            limit,
            image: image.to_lowercase(),
            only_pulls: true,
            ..Self::default()
        }
    }

    fn admits(&self, decision: &DecisionRecord) -> bool {
        let is =
            |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        let image = || {
            format!("{}/{}", decision.upstream, decision.image)
                .to_lowercase()
                .contains(&self.image)
        };
        decision.id > self.since
            && (!self.only_pulls
                || decision.kind == ResourceKind::Tag
                || decision.status >= 400
                || decision.ended.is_failure())
            && (self.image.is_empty() || image())
            && is(&self.upstream, &decision.upstream)
            && is(&self.result, decision.result.name())
            && is(&self.reason, decision.reason)
            && is(
                &self.client,
                &decision
                    .client
                    .map(|client| client.to_string())
                    .unwrap_or_default(),
            )
            && is(&self.trace, &decision.trace.to_string())
    }
}

impl Admin {
    /// The matching decisions, newest first.
    pub(super) fn decisions(&self, filter: &Filter) -> Vec<Event> {
        let decisions = self.telemetry.decisions();
        let wanted = decisions.iter().filter(|decision| filter.admits(decision));
        wanted
            .take(filter.limit)
            .map(|decision| Event::of(decision))
            .collect()
    }

    /// Streams decisions as server-sent events, starting with those after `after`.
    pub(super) fn watch(&self, filter: Filter, client: Option<IpAddr>) -> Result<ApiResponse, Problem> {
        let Some(permit) = self.watchers.try_acquire(client) else {
            return Err(Problem::busy(
                "too many event streams, in total or from this address; close a page, or poll /api/v1/events",
            ));
        };
        let (lines, replies) = mpsc::channel(LINES_MAX);
        // Subscribe before reading the log, so that no decision is missed in between.
        let news = self.telemetry.subscribe();
        let missed = match filter.since {
            0 => Vec::new(),
            _ => self.decisions(&Filter {
                limit: EVENTS_MAX,
                ..filter.clone()
            }),
        };
        tokio::spawn(send(permit, lines, news, missed, filter, self.ending.clone()));
        Ok(event_stream(replies))
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
    permit: Permit,
    lines: mpsc::Sender<Bytes>,
    mut news: tokio::sync::broadcast::Receiver<Arc<DecisionRecord>>,
    missed: Vec<Event>,
    filter: Filter,
    ending: tokio_util::sync::CancellationToken,
) {
    let _permit = permit;
    let mut last = filter.since;
    for event in missed.iter().rev() {
        last = last.max(event.id);
        if lines.send(line(event)).await.is_err() {
            return;
        }
    }
    if lines.send(Bytes::from_static(b": watching\n\n")).await.is_err() {
        return;
    }
    loop {
        let decision = tokio::select! {
            () = ending.cancelled() => return,
            () = lines.closed() => return,
            decision = tokio::time::timeout(HEARTBEAT, news.recv()) => decision,
        };
        let sent = match decision {
            Ok(Ok(decision)) if decision.id > last && filter.admits(&decision) => {
                lines.send(line(&Event::of(&decision))).await
            }
            Ok(Ok(_)) => Ok(()),
            // Decision numbers reveal the gap, and /api/v1/events?after= fills it.
            Ok(Err(RecvError::Lagged(_))) => {
                lines.send(Bytes::from_static(b"event: gap\ndata: {}\n\n")).await
            }
            Ok(Err(RecvError::Closed)) => return,
            Err(_) => lines.send(Bytes::from_static(b": still here\n\n")).await,
        };
        if sent.is_err() {
            return;
        }
    }
}

fn line(event: &Event) -> Bytes {
    let data = serde_json::to_string(event).unwrap_or_default();
    format!("id: {}\nevent: decision\ndata: {data}\n\n", event.id).into()
}

/// A client program on one machine.
#[derive(Serialize)]
pub(super) struct ClientView {
    pub(super) address: String,
    pub(super) kind: &'static str,
    pub(super) agent: String,
    pub(super) requests: u64,
    pub(super) pulls: u64,
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
