//! Decision log: the most recent decisions, in memory, for finding out why a client got a response.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::sync::broadcast;

use super::{AccessRecord, BodyEnd, CacheResult, ResourceKind, milliseconds};
use crate::oci::{Digest, UpstreamFailure};
use crate::trace_context::TraceId;

/// Maximum number of decisions; the oldest are dropped first.
const DECISIONS_MAX: usize = 2_000;

/// Decisions that a slow subscriber may lag behind before it misses some.
const SUBSCRIBER_LAG_MAX: usize = 256;

/// One recorded decision.
#[derive(Clone, Debug)]
pub struct DecisionRecord {
    /// Sequence number from 1; a gap means dropped decisions.
    pub id: u64,
    /// When the request arrived.
    pub at: SystemTime,
    /// The upstream's name; `-` if the request reached none.
    pub upstream: Arc<str>,
    /// How the request was routed.
    pub route: &'static str,
    /// `repository:tag`, `repository@digest`, or the path if it is neither.
    pub image: Arc<str>,
    /// The kind of resource requested.
    pub kind: ResourceKind,
    /// The cache result, or that the response was incomplete.
    pub result: CacheResult,
    /// The name of the reason.
    pub reason: &'static str,
    /// Why the upstream was unavailable, if it was.
    pub cause: Option<UpstreamFailure>,
    /// The digest served.
    pub digest: Option<Digest>,
    /// The response status.
    pub status: u16,
    /// Milliseconds from the request head to the end of the response body.
    pub ms: f64,
    /// Milliseconds from the request head to the response head.
    pub first_byte_ms: f64,
    /// How the body ended.
    pub ended: BodyEnd,
    /// Body bytes written to the connection.
    pub bytes: u64,
    /// The client's IP address.
    pub client: Option<IpAddr>,
    /// The client's `User-Agent`.
    pub agent: Arc<str>,
    /// The trace id of the request.
    pub trace: TraceId,
}

impl DecisionRecord {
    pub(super) fn of(record: &AccessRecord<'_>) -> Self {
        Self {
            id: 0,
            at: record.at,
            upstream: Arc::clone(record.upstream),
            route: record.route,
            image: Arc::clone(record.image),
            kind: record.kind,
            result: record.result(),
            reason: record.reason,
            cause: record.cause,
            digest: record.digest,
            status: record.status,
            ms: milliseconds(record.took),
            first_byte_ms: milliseconds(record.first_byte),
            ended: record.ended,
            bytes: record.bytes,
            client: record.client,
            agent: Arc::clone(&record.agent.text),
            trace: record.trace.id(),
        }
    }
}

/// The decision log with its subscribers.
pub(super) struct DecisionLog {
    recorded: Mutex<Recorded>,
    sender: broadcast::Sender<Arc<DecisionRecord>>,
}

#[derive(Default)]
struct Recorded {
    last_id: u64,
    decisions: VecDeque<Arc<DecisionRecord>>,
}

impl Default for DecisionLog {
    fn default() -> Self {
        Self {
            recorded: Mutex::default(),
            sender: broadcast::channel(SUBSCRIBER_LAG_MAX).0,
        }
    }
}

impl DecisionLog {
    /// Appends a decision and numbers it.
    pub(super) fn push(&self, mut decision: DecisionRecord) {
        let mut recorded = self.recorded.lock();
        recorded.last_id += 1;
        decision.id = recorded.last_id;
        let decision = Arc::new(decision);
        if recorded.decisions.len() >= DECISIONS_MAX {
            recorded.decisions.pop_front();
        }
        recorded.decisions.push_back(Arc::clone(&decision));
        // Sent under the lock, so that subscribers receive decisions in order. Sending without subscribers is not an
        // error.
        let _ = self.sender.send(decision);
    }

    /// The recorded decisions, newest first.
    pub(super) fn newest_first(&self) -> Vec<Arc<DecisionRecord>> {
        self.recorded.lock().decisions.iter().rev().cloned().collect()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Arc<DecisionRecord>> {
        self.sender.subscribe()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn decision(image: &str) -> DecisionRecord {
        DecisionRecord {
            id: 0,
            at: SystemTime::UNIX_EPOCH,
            upstream: "docker.io".into(),
            route: "mirror",
            image: image.into(),
            kind: ResourceKind::Tag,
            result: CacheResult::Hit,
            reason: "revalidated",
            cause: None,
            digest: None,
            status: 200,
            ms: 1.0,
            first_byte_ms: 1.0,
            ended: BodyEnd::Complete,
            bytes: 0,
            client: None,
            agent: "".into(),
            trace: TraceId::from_u128(7),
        }
    }

    #[test]
    fn oldest_decision_dropped_first_and_ids_count_on() {
        let log = DecisionLog::default();
        for number in 0..=DECISIONS_MAX {
            log.push(decision(&number.to_string()));
        }
        let recorded = log.newest_first();
        assert_eq!(recorded.len(), DECISIONS_MAX);
        assert_eq!(recorded.first().unwrap().id, DECISIONS_MAX as u64 + 1);
        assert_eq!(&*recorded.last().unwrap().image, "1");
    }

    #[test]
    fn subscriber_receives_later_decisions() {
        let log = DecisionLog::default();
        log.push(decision("before"));
        let mut sender = log.subscribe();
        log.push(decision("after"));
        assert_eq!(&*sender.try_recv().unwrap().image, "after");
        assert!(sender.try_recv().is_err());
    }
}
