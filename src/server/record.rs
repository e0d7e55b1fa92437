//! Access records: of each request one, written when its answer has ended.
//!
//! A record that is open belongs to the request, and from the answer's head on to the answer's body. It is written
//! exactly once: at the body's last byte, at its error, or where it is dropped before, because the client left.

use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::header::USER_AGENT;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use tokio::time::Instant;

use super::connections::InFlight;
use super::door::{Door, Peer};
use super::told::Told;
use super::{Body, told};
use crate::proxy::UpstreamRegistry;
use crate::telemetry::{AccessRecord, BodyEnd, ResourceKind, Telemetry, agent};
use crate::trace_context::TraceContext;

/// What is recorded for a client that left before its answer had a head, as nginx does.
const CLIENT_LEFT: u16 = 499;

/// The record of one request, not yet written.
pub(super) struct Open(Option<Box<Record>>);

struct Record {
    telemetry: Telemetry,
    at: SystemTime,
    began: Instant,
    first_byte: Option<Duration>,
    /// To which upstream, by which door; `None` where the request was turned away before.
    upstream_registry: Option<Arc<UpstreamRegistry>>,
    door: Option<Door>,
    kind: ResourceKind,
    image: String,
    told: Told,
    status: u16,
    bytes: u64,
    client: Option<IpAddr>,
    agent: Box<str>,
    trace: TraceContext,
    /// The connection is busy until the record is written.
    _request: InFlight,
}

impl Open {
    /// The record of a request that has just come in, and of which its path is known.
    pub(super) fn new(
        telemetry: &Telemetry,
        head: &Parts,
        peer: &Peer,
        (at, began, trace): (SystemTime, Instant, &TraceContext),
    ) -> Self {
        Self(Some(Box::new(Record {
            telemetry: telemetry.clone(),
            at,
            began,
            first_byte: None,
            upstream_registry: None,
            door: None,
            kind: ResourceKind::Other,
            image: told::path(&head.uri),
            told: Told::turned("client-left"),
            status: CLIENT_LEFT,
            bytes: 0,
            client: peer.address,
            agent: agent(head.headers.get(USER_AGENT)),
            trace: trace.clone(),
            _request: peer.connection.request(),
        })))
    }

    /// To which upstream the request leads, if to any, and by which door.
    pub(super) fn leads_to(&mut self, upstream_registry: Option<&Arc<UpstreamRegistry>>, door: Door) {
        if let Some(record) = &mut self.0 {
            (record.upstream_registry, record.door) = (upstream_registry.cloned(), Some(door));
        }
    }

    /// What is asked for.
    pub(super) fn asks_for(&mut self, (kind, image): (ResourceKind, String)) {
        if let Some(record) = &mut self.0 {
            (record.kind, record.image) = (kind, image);
        }
    }

    /// The answer's head is there: from now on the record goes with its body. One without a body has ended.
    pub(super) fn answered(
        mut self,
        told: Told,
        method: &Method,
        mut response: Response<Body>,
    ) -> Response<Body> {
        let Some(record) = &mut self.0 else {
            return response;
        };
        record.first_byte = Some(record.began.elapsed());
        record.told = told;
        record.status = response.status().as_u16();
        record.saw();
        let has_none = *method == Method::HEAD
            || matches!(
                response.status(),
                StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
            )
            || http_body::Body::is_end_stream(response.body());
        if has_none {
            self.end(BodyEnd::Complete, None);
        } else {
            response.body_mut().record(self);
        }
        response
    }

    /// So many bytes of the body go to the connection.
    pub(super) fn sent(&mut self, bytes: usize) {
        if let Some(record) = &mut self.0 {
            record.bytes += bytes as u64;
        }
    }

    /// Writes the record, unless it was written before.
    pub(super) fn end(&mut self, ended: BodyEnd, error: Option<&dyn Display>) {
        if let Some(record) = self.0.take() {
            record.write(ended, error);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.end(BodyEnd::Aborted, None);
    }
}

impl Record {
    /// Notes the client: it is seen when its answer begins, though the answer may take long.
    fn saw(&self) {
        if let Some(client) = self.client {
            let pulled = (self.kind == ResourceKind::Tag).then_some(&*self.image);
            self.telemetry.record_client(client, &self.agent, self.at, pulled);
        }
    }

    fn write(&self, ended: BodyEnd, error: Option<&dyn Display>) {
        let took = self.began.elapsed();
        let confirmed_at = self.told.confirmed_at;
        let error = error.map(ToString::to_string);
        self.telemetry.record_access(&AccessRecord {
            at: self.at,
            upstream: self
                .upstream_registry
                .as_ref()
                .map_or("-", |upstream_registry| upstream_registry.name()),
            route: self.door.map_or("-", Door::name),
            kind: self.kind,
            image: &self.image,
            result: self.told.result,
            reason: self.told.reason,
            cause: self.told.cause,
            digest: self.told.digest,
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
