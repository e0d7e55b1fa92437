//! Access log: one record per request, written when the response has ended.
//!
//! The entry belongs to the request until the response head exists, then to the response body. It is written exactly
//! once: after the last byte of the body, on a body error, or on drop, because the client left.

use std::fmt::{Display, Write as _};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::header::USER_AGENT;
use http::request::Parts;
use http::{Method, Response, StatusCode, Uri};
use tokio::time::Instant;

use super::connections::InFlight;
use super::routing::{ConnectionInfo, RouteKind};
use super::{Body, response};
use crate::oci::{Digest, Endpoint, Reference, UpstreamFailure};
use crate::policy::DenyReason;
use crate::proxy::{Denied, ProxyResponse, ServeReason, UpstreamRegistry};
use crate::store::tags::NEVER_CONFIRMED;
use crate::telemetry::{self, AccessRecord, Agent, BodyEnd, ResourceKind, Telemetry};
use crate::trace_context::TraceContext;

/// Status recorded if the client left before the response head, as in nginx.
const CLIENT_LEFT: u16 = 499;

/// The record of one request, until it is written.
pub(super) struct AccessLogEntry(Option<Box<EntryState>>);

struct EntryState {
    telemetry: Telemetry,
    at: SystemTime,
    began: Instant,
    first_byte: Option<Duration>,
    /// The upstream. `None` if the request was rejected before routing.
    upstream_registry: Option<Arc<UpstreamRegistry>>,
    route: Option<RouteKind>,
    kind: ResourceKind,
    /// Its path is the subject until that is set.
    uri: Uri,
    image: Option<Arc<str>>,
    fields: AccessLogFields,
    status: u16,
    bytes: u64,
    client: Option<IpAddr>,
    agent: Agent,
    trace: TraceContext,
    /// Counts the connection as busy until the record is written.
    _request: InFlight,
}

impl AccessLogEntry {
    /// Starts the record of a request, with its path as the subject.
    pub(super) fn new(
        telemetry: &Telemetry,
        head: &Parts,
        peer: &ConnectionInfo,
        (at, began, trace): (SystemTime, Instant, &TraceContext),
    ) -> Self {
        Self(Some(Box::new(EntryState {
            telemetry: telemetry.clone(),
            at,
            began,
            first_byte: None,
            upstream_registry: None,
            route: None,
            kind: ResourceKind::Other,
            uri: head.uri.clone(),
            image: None,
            fields: AccessLogFields::rejected("client-left"),
            status: CLIENT_LEFT,
            bytes: 0,
            client: peer.address,
            agent: peer.agent.of(head.headers.get(USER_AGENT)),
            trace: trace.clone(),
            _request: peer.connection.request(),
        })))
    }

    /// Sets the upstream, if there is one, and the route.
    pub(super) fn set_route(&mut self, upstream_registry: Option<&Arc<UpstreamRegistry>>, route: RouteKind) {
        if let Some(record) = &mut self.0 {
            (record.upstream_registry, record.route) = (upstream_registry.cloned(), Some(route));
        }
    }

    /// Sets the kind of the requested resource, and its name unless that is the path.
    pub(super) fn set_subject(&mut self, kind: ResourceKind, image: Option<String>) {
        if let Some(record) = &mut self.0 {
            // The path would keep the whole request header until the response has ended.
            let path = std::mem::take(&mut record.uri);
            let image = image.unwrap_or_else(|| printable_path(&path));
            (record.kind, record.image) = (kind, Some(image.into()));
        }
    }

    /// Moves the entry into the response body. Writes it at once if the response has no body.
    pub(super) fn attach_to(
        mut self,
        fields: AccessLogFields,
        method: &Method,
        mut response: Response<Body>,
    ) -> Response<Body> {
        let Some(record) = &mut self.0 else {
            return response;
        };
        record.first_byte = Some(record.began.elapsed());
        record.fields = fields;
        record.status = response.status().as_u16();
        record.note_client();
        let has_none = *method == Method::HEAD
            || matches!(
                response.status(),
                StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
            )
            || http_body::Body::is_end_stream(response.body());
        if has_none {
            self.end(BodyEnd::Complete, None);
        } else {
            response.body_mut().attach_log(self);
        }
        response
    }

    /// Adds body bytes handed to the connection.
    pub(super) fn add_bytes(&mut self, bytes: usize) {
        if let Some(record) = &mut self.0 {
            record.bytes += bytes as u64;
        }
    }

    /// Writes the record, unless it is written already.
    pub(super) fn end(&mut self, ended: BodyEnd, error: Option<&dyn Display>) {
        if let Some(record) = self.0.take() {
            record.write(ended, error);
        }
    }
}

impl Drop for AccessLogEntry {
    fn drop(&mut self) {
        self.end(BodyEnd::Aborted, None);
    }
}

impl EntryState {
    /// Counts the client when its response begins, because the response may take long.
    fn note_client(&self) {
        if let Some(client) = self.client {
            let pulled = self.image.as_ref().filter(|_| self.kind == ResourceKind::Tag);
            self.telemetry.record_client(client, &self.agent, self.at, pulled);
        }
    }

    fn write(&self, ended: BodyEnd, error: Option<&dyn Display>) {
        let took = self.began.elapsed();
        let confirmed_at = self.fields.confirmed_at;
        let error = error.map(ToString::to_string);
        let upstream = self.upstream_registry.as_ref();
        let upstream = upstream.map_or_else(|| "-".into(), |upstream| upstream.shared_name());
        let image = self.image.clone();
        let image = image.unwrap_or_else(|| printable_path(&self.uri).into());
        self.telemetry.record_access(&AccessRecord {
            at: self.at,
            upstream: &upstream,
            route: self.route.map_or("-", RouteKind::name),
            kind: self.kind,
            image: &image,
            result: self.fields.result,
            reason: self.fields.reason,
            cause: self.fields.cause,
            digest: self.fields.digest,
            age: confirmed_at.and_then(|at| self.at.duration_since(at).ok()),
            status: self.status,
            first_byte: self.first_byte.unwrap_or(took),
            took,
            ended,
            bytes: self.bytes,
            error: error.as_deref(),
            client: self.client,
            agent: &self.agent,
            trace: &self.trace,
        });
    }
}

/// Fields of a response for the access log, the metrics and the decision log.
pub(super) struct AccessLogFields {
    pub(super) result: telemetry::CacheResult,
    pub(super) reason: &'static str,
    pub(super) cause: Option<UpstreamFailure>,
    pub(super) digest: Option<Digest>,
    /// When the upstream last confirmed the tag that was served.
    pub(super) confirmed_at: Option<SystemTime>,
}

impl AccessLogFields {
    pub(super) fn of(outcome: &ProxyResponse) -> Self {
        let (result, reason) = response::classify(outcome);
        let info = match outcome {
            ProxyResponse::Manifest(_, info)
            | ProxyResponse::Blob { info, .. }
            | ProxyResponse::Listing(_, info)
            | ProxyResponse::StreamedList(_, info) => Some(info),
            _ => None,
        };
        let cause = match outcome {
            ProxyResponse::Denied(refused) => match refused.reason {
                DenyReason::UpstreamUnavailable(cause)
                | DenyReason::StaleLimitExceeded(cause)
                | DenyReason::Incomplete(cause) => Some(cause),
                DenyReason::NotCached
                | DenyReason::NotAuthorized
                | DenyReason::Forbidden
                | DenyReason::AuthRequired
                | DenyReason::NotFound
                | DenyReason::TooYoung(_)
                | DenyReason::Blocked(_) => None,
            },
            _ => info.and_then(|info| match info.reason {
                ServeReason::Cached(served) => served.cause(),
                _ => None,
            }),
        };
        let digest = match outcome {
            ProxyResponse::Manifest(manifest, _) => Some(manifest.digest),
            ProxyResponse::ManifestHead { digest, .. }
            | ProxyResponse::Blob { digest, .. }
            | ProxyResponse::Denied(Denied {
                reason: DenyReason::Blocked(digest),
                ..
            }) => Some(*digest),
            _ => None,
        };
        Self {
            result,
            reason,
            cause,
            digest,
            confirmed_at: info
                .and_then(|info| info.confirmed_at)
                .filter(|at| *at != NEVER_CONFIRMED),
        }
    }

    /// For a request forwarded to the registry.
    pub(super) fn forwarded() -> Self {
        Self {
            result: telemetry::CacheResult::Forwarded,
            ..Self::rejected("forwarded")
        }
    }

    /// For an accepted `CONNECT`.
    pub(super) fn connected(result: telemetry::CacheResult, reason: &'static str) -> Self {
        Self {
            result,
            ..Self::rejected(reason)
        }
    }

    /// For a local token, issued because the token service failed for this reason.
    pub(super) fn local_token(cause: UpstreamFailure) -> Self {
        Self {
            result: telemetry::CacheResult::Local,
            cause: Some(cause),
            ..Self::rejected("local-token")
        }
    }

    /// For a request that could not be forwarded.
    pub(super) fn forward_failed(cause: UpstreamFailure) -> Self {
        Self {
            cause: Some(cause),
            ..Self::rejected(cause.name())
        }
    }

    /// For a rejected request.
    pub(super) fn rejected(reason: &'static str) -> Self {
        Self {
            result: telemetry::CacheResult::Denied,
            reason,
            cause: None,
            digest: None,
            confirmed_at: None,
        }
    }
}

/// Kind and name of the requested resource.
pub(super) fn subject(endpoint: &Endpoint) -> (ResourceKind, Option<String>) {
    let kind = match endpoint {
        Endpoint::Ping => return (ResourceKind::Ping, Some("/v2/".to_owned())),
        Endpoint::Manifest {
            reference: Reference::Tag(_),
            ..
        } => ResourceKind::Tag,
        Endpoint::Manifest { .. } => ResourceKind::Manifest,
        Endpoint::Blob { .. } => ResourceKind::Blob,
        Endpoint::Tags { .. } | Endpoint::Referrers { .. } => ResourceKind::Listing,
    };
    (kind, Some(endpoint.image()))
}

/// Longest logged path.
const PATH_BYTES_MAX: usize = 512;

/// The path of a request without an image. Bytes that are not printable ASCII are percent-encoded (RFC 3986 §2.1), so
/// that the log cannot control a terminal.
fn printable_path(uri: &Uri) -> String {
    let path = uri.path();
    if path.len() <= PATH_BYTES_MAX && path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return path.to_owned();
    }
    let bytes = path.bytes().take(PATH_BYTES_MAX);
    bytes.fold(String::new(), |mut text, byte| {
        if byte.is_ascii_graphic() {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}
