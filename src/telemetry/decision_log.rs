//! The last decisions, in memory: what the operator looks at when a client got something unexpected.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::broadcast;

use super::{AccessRecord, BodyEnd, CacheResult, ResourceKind, milliseconds};
use crate::oci::{Digest, UpstreamFailure};
use crate::trace_context::TraceId;

/// Decisions remembered; the oldest go first.
const DECISIONS_MAX: usize = 2_000;

/// Decisions that a slow watcher may fall behind before it misses some.
const SUBSCRIBER_LAG_MAX: usize = 256;

/// One decision, as it was told.
#[derive(Clone, Debug)]
pub struct DecisionRecord {
    /// Counts up from 1; a gap is a decision that was forgotten.
    pub id: u64,
    /// When the request arrived.
    pub at: SystemTime,
    /// The upstream's name; `-` where none was reached.
    pub upstream: Box<str>,
    /// Through which door the client came.
    pub route: &'static str,
    /// `repository:tag` or `repository@digest`; the path where neither was understood.
    pub image: Box<str>,
    /// What kind of thing was asked for.
    pub kind: ResourceKind,
    /// How the answer came about, or that it was not received whole.
    pub result: CacheResult,
    /// The reason's name.
    pub reason: &'static str,
    /// Why the upstream gave no usable answer, where that matters.
    pub cause: Option<UpstreamFailure>,
    /// What the client was given.
    pub digest: Option<Digest>,
    /// The status sent.
    pub status: u16,
    /// Milliseconds from the request's head to the end of the answer.
    pub ms: f64,
    /// Milliseconds from the request's head to the answer's head.
    pub first_byte_ms: f64,
    /// How the answer ended.
    pub ended: BodyEnd,
    /// Bytes of the body that were handed to the connection.
    pub bytes: u64,
    /// Who asked.
    pub client: Option<IpAddr>,
    /// With which program, as it calls itself.
    pub agent: Box<str>,
    /// Names the request across programs.
    pub trace: TraceId,
}

impl DecisionRecord {
    pub(super) fn of(record: &AccessRecord<'_>) -> Self {
        Self {
            id: 0,
            at: record.at,
            upstream: record.upstream.into(),
            route: record.route,
            image: record.image.into(),
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
            agent: record.agent.into(),
            trace: record.trace.id(),
        }
    }
}

/// The last decisions, and a way to hear of new ones.
#[derive(Clone)]
pub(super) struct DecisionLog {
    recorded: Arc<Mutex<Recorded>>,
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
            recorded: Arc::default(),
            sender: broadcast::channel(SUBSCRIBER_LAG_MAX).0,
        }
    }
}

impl DecisionLog {
    /// Keeps a decision, and numbers it.
    pub(super) fn push(&self, mut decision: DecisionRecord) {
        let mut recorded = self.recorded();
        recorded.last_id += 1;
        decision.id = recorded.last_id;
        let decision = Arc::new(decision);
        if recorded.decisions.len() >= DECISIONS_MAX {
            recorded.decisions.pop_front();
        }
        recorded.decisions.push_back(Arc::clone(&decision));
        // Told under the lock, so that those who watch hear them in order. Nobody watching is no fault.
        let _ = self.sender.send(decision);
    }

    /// The decisions kept, the newest first.
    pub(super) fn newest_first(&self) -> Vec<Arc<DecisionRecord>> {
        self.recorded().decisions.iter().rev().cloned().collect()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Arc<DecisionRecord>> {
        self.sender.subscribe()
    }

    /// A push or a pop is done or not done: nothing is left half done by a panic elsewhere.
    fn recorded(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn the_oldest_go_first_and_numbers_count_on() {
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
    fn who_watches_hears_what_comes_after() {
        let log = DecisionLog::default();
        log.push(decision("before"));
        let mut sender = log.subscribe();
        log.push(decision("after"));
        assert_eq!(&*sender.try_recv().unwrap().image, "after");
        assert!(sender.try_recv().is_err());
    }
}
