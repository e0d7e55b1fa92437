//! The last decisions, in memory: what the operator looks at when a client got something unexpected.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::broadcast;

use super::{Answered, Ended, Kind, Outcome, milliseconds};
use crate::oci::{Cause, Digest};
use crate::trace_context::TraceId;

/// Decisions remembered; the oldest go first.
const DECISIONS_MAX: usize = 2_000;

/// Decisions that a slow watcher may fall behind before it misses some.
const BEHIND_MAX: usize = 256;

/// One decision, as it was told.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Counts up from 1; a gap is a decision that was forgotten.
    pub id: u64,
    /// When the request arrived.
    pub at: SystemTime,
    /// The upstream's name; `-` where none was reached.
    pub upstream: Box<str>,
    /// Through which door the client came.
    pub door: &'static str,
    /// `repository:tag` or `repository@digest`; the path where neither was understood.
    pub image: Box<str>,
    /// What kind of thing was asked for.
    pub kind: Kind,
    /// How the answer came about, or that it was not received whole.
    pub result: Outcome,
    /// The reason's name.
    pub reason: &'static str,
    /// Why the upstream gave no usable answer, where that matters.
    pub cause: Option<Cause>,
    /// What the client was given.
    pub digest: Option<Digest>,
    /// The status sent.
    pub status: u16,
    /// Milliseconds from the request's head to the end of the answer.
    pub ms: f64,
    /// Milliseconds from the request's head to the answer's head.
    pub first_byte_ms: f64,
    /// How the answer ended.
    pub ended: Ended,
    /// Bytes of the body that were handed to the connection.
    pub bytes: u64,
    /// Who asked.
    pub client: Option<IpAddr>,
    /// With which program, as it calls itself.
    pub agent: Box<str>,
    /// Names the request across programs.
    pub trace: TraceId,
}

impl Decision {
    pub(super) fn of(answered: &Answered<'_>) -> Self {
        Self {
            id: 0,
            at: answered.at,
            upstream: answered.upstream.into(),
            door: answered.door,
            image: answered.image.into(),
            kind: answered.kind,
            result: answered.result(),
            reason: answered.reason,
            cause: answered.cause,
            digest: answered.digest,
            status: answered.status,
            ms: milliseconds(answered.took),
            first_byte_ms: milliseconds(answered.first_byte),
            ended: answered.ended,
            bytes: answered.bytes,
            client: answered.client,
            agent: answered.agent.into(),
            trace: answered.trace.id(),
        }
    }
}

/// The last decisions, and a way to hear of new ones.
#[derive(Clone)]
pub(super) struct Journal {
    kept: Arc<Mutex<Kept>>,
    news: broadcast::Sender<Arc<Decision>>,
}

#[derive(Default)]
struct Kept {
    last_id: u64,
    decisions: VecDeque<Arc<Decision>>,
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            kept: Arc::default(),
            news: broadcast::channel(BEHIND_MAX).0,
        }
    }
}

impl Journal {
    /// Keeps a decision, and numbers it.
    pub(super) fn keep(&self, mut decision: Decision) {
        let mut kept = self.kept();
        kept.last_id += 1;
        decision.id = kept.last_id;
        let decision = Arc::new(decision);
        if kept.decisions.len() >= DECISIONS_MAX {
            kept.decisions.pop_front();
        }
        kept.decisions.push_back(Arc::clone(&decision));
        // Told under the lock, so that those who watch hear them in order. Nobody watching is no fault.
        let _ = self.news.send(decision);
    }

    /// The decisions kept, the newest first.
    pub(super) fn newest_first(&self) -> Vec<Arc<Decision>> {
        self.kept().decisions.iter().rev().cloned().collect()
    }

    pub(super) fn watch(&self) -> broadcast::Receiver<Arc<Decision>> {
        self.news.subscribe()
    }

    /// A push or a pop is done or not done: nothing is left half done by a panic elsewhere.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn decision(image: &str) -> Decision {
        Decision {
            id: 0,
            at: SystemTime::UNIX_EPOCH,
            upstream: "docker.io".into(),
            door: "mirror",
            image: image.into(),
            kind: Kind::Tag,
            result: Outcome::Hit,
            reason: "unchanged",
            cause: None,
            digest: None,
            status: 200,
            ms: 1.0,
            first_byte_ms: 1.0,
            ended: Ended::Complete,
            bytes: 0,
            client: None,
            agent: "".into(),
            trace: TraceId::of_number(7),
        }
    }

    #[test]
    fn the_oldest_go_first_and_numbers_count_on() {
        let journal = Journal::default();
        for number in 0..=DECISIONS_MAX {
            journal.keep(decision(&number.to_string()));
        }
        let kept = journal.newest_first();
        assert_eq!(kept.len(), DECISIONS_MAX);
        assert_eq!(kept.first().unwrap().id, DECISIONS_MAX as u64 + 1);
        assert_eq!(&*kept.last().unwrap().image, "1");
    }

    #[test]
    fn who_watches_hears_what_comes_after() {
        let journal = Journal::default();
        journal.keep(decision("before"));
        let mut news = journal.watch();
        journal.keep(decision("after"));
        assert_eq!(&*news.try_recv().unwrap().image, "after");
        assert!(news.try_recv().is_err());
    }
}
