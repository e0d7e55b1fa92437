//! Queue of updates of records, one entry per record: an update that waits is merged with the next one.
//!
//! Nothing waits for an update, except a response to a write or a denial, for a moment. If the queue is full, the oldest
//! entry is dropped: another confirmation brings it again.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::grant::GrantState;
use super::key::Class;
use super::state::{ContentState, Merge, PublicState, TagState};
use crate::oci::Repository;

/// Entries in the queue.
const QUEUED_MAX: usize = 4096;

/// Records of which is remembered what the bucket has.
const WRITTEN_MAX: usize = 16_384;

/// A record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::shared) struct RecordId {
    pub(in crate::shared) class: Class,
    /// Identity of the upstream.
    pub(in crate::shared) upstream: Arc<str>,
    /// `None` for the token service of the upstream.
    pub(in crate::shared) repository: Option<Repository>,
    /// Tag, digest or principal; empty for the repository as a whole.
    pub(in crate::shared) item: Arc<str>,
}

impl RecordId {
    pub(in crate::shared) fn place(&self) -> [&str; 2] {
        let repository = self.repository.as_ref();
        [&self.upstream, repository.map_or("", Repository::as_str)]
    }
}

/// What a record is to say. Times are those of this cache.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::shared) enum Update {
    Tag(TagState),
    Content(ContentState),
    Public(PublicState),
    Grant(GrantState),
}

impl Update {
    /// Whether it ends what others would serve: a client may wait for it, and it is not given up.
    pub(in crate::shared) fn is_urgent(&self) -> bool {
        match self {
            Self::Tag(state) => state.variants.is_empty(),
            Self::Content(state) => !state.is_present(),
            Self::Public(state) => !state.is_public,
            Self::Grant(state) => !state.is_granted,
        }
    }

    fn merge(self, other: Self) -> Self {
        match (self, other) {
            (Self::Tag(one), Self::Tag(two)) => Self::Tag(one.merge(two, u64::MAX)),
            (Self::Content(one), Self::Content(two)) => Self::Content(one.merge(two, u64::MAX)),
            (Self::Public(one), Self::Public(two)) => Self::Public(one.merge(two, u64::MAX)),
            (Self::Grant(one), Self::Grant(two)) => Self::Grant(one.merge(two, u64::MAX)),
            // Records of different classes have different ids.
            (_, other) => other,
        }
    }

    fn covers(&self, other: &Self, slack: u64) -> bool {
        match (self, other) {
            (Self::Tag(one), Self::Tag(two)) => one.covers(two, slack),
            (Self::Content(one), Self::Content(two)) => one.covers(two, slack),
            (Self::Public(one), Self::Public(two)) => one.covers(two, slack),
            (Self::Grant(one), Self::Grant(two)) => one.covers(two, slack),
            _ => false,
        }
    }
}

/// The denial that an update records, if it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::shared) struct Denial {
    /// Number in the list of denials that wait for the bucket. 0: it is not in the list.
    pub(in crate::shared) number: u64,
    /// This cache had granted what it ends. Then it is recorded even if there is no record, because an update of another
    /// cache may be on its way.
    pub(in crate::shared) is_known: bool,
}

impl Denial {
    fn and(self, other: Self) -> Self {
        Self {
            number: self.number.max(other.number),
            is_known: self.is_known || other.is_known,
        }
    }
}

/// The queue.
pub(in crate::shared) struct Updates {
    state: Mutex<State>,
    /// An entry was added, or the queue was closed.
    added: Notify,
    /// An entry was processed, or the queue was closed.
    ended: Notify,
    /// The last update of each record that the bucket is known to have, and since when.
    written: Cache<RecordId, (Update, Instant)>,
}

#[derive(Default)]
struct State {
    order: VecDeque<RecordId>,
    waiting: HashMap<RecordId, Waiting>,
    running: Option<(RecordId, Update, Denial)>,
    is_closed: bool,
}

impl State {
    fn has(&self, id: &RecordId) -> bool {
        let is_running = self.running.as_ref().is_some_and(|(running, ..)| running == id);
        is_running || self.waiting.contains_key(id)
    }
}

struct Waiting {
    update: Update,
    denial: Denial,
    attempts: u32,
    /// The next attempt is not made before this time.
    due: Option<Instant>,
}

impl Waiting {
    fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| due <= now)
    }
}

/// What became of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::shared) enum Pushed {
    /// It waits, or the bucket is known to say as much.
    Queued,
    /// It waits, and the oldest entry was dropped for it.
    Dropped,
    /// The queue was closed.
    Closed,
}

/// Content of the queue when it was closed.
pub(in crate::shared) struct Closed {
    /// Denials and deletions.
    pub(in crate::shared) urgent: Vec<(RecordId, Update, Denial)>,
    /// Records whose other updates were dropped.
    pub(in crate::shared) dropped: Vec<RecordId>,
}

impl Default for Updates {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            added: Notify::new(),
            ended: Notify::new(),
            written: Cache::new(WRITTEN_MAX),
        }
    }
}

impl Updates {
    /// Adds an update, unless the bucket is known to say as much, up to `slack` seconds.
    pub(in crate::shared) fn push(&self, id: RecordId, update: Update, slack: u64) -> Pushed {
        let is_known = |(written, since): (Update, Instant)| {
            // The bucket deletes old objects.
            let is_lately = slack == 0 || since.elapsed().as_secs() < slack;
            is_lately && written.covers(&update, slack)
        };
        if self.written.get(&id).is_some_and(is_known) {
            return Pushed::Queued;
        }
        self.enqueue(id, (update, Denial::default()), (0, None))
    }

    /// Adds a denial, also if the bucket is known to have it: its end removes it from the list.
    pub(in crate::shared) fn push_denial(&self, id: RecordId, update: Update, denial: Denial) -> Pushed {
        self.enqueue(id, (update, denial), (0, None))
    }

    /// Adds an update again, after an attempt that failed. The next one is made at `due`.
    pub(in crate::shared) fn push_again(
        &self,
        id: RecordId,
        update: (Update, Denial),
        attempts: u32,
        due: Option<Instant>,
    ) -> Pushed {
        self.enqueue(id, update, (attempts, due))
    }

    /// The denial that the running update records.
    pub(in crate::shared) fn running_denial(&self) -> Denial {
        let state = self.state.lock();
        state
            .running
            .as_ref()
            .map(|(_, _, denial)| *denial)
            .unwrap_or_default()
    }

    fn enqueue(
        &self,
        id: RecordId,
        (update, denial): (Update, Denial),
        (attempts, due): (u32, Option<Instant>),
    ) -> Pushed {
        let mut state = self.state.lock();
        if state.is_closed {
            return Pushed::Closed;
        }
        if let Some(waiting) = state.waiting.get_mut(&id) {
            waiting.update = waiting.update.clone().merge(update);
            waiting.denial = waiting.denial.and(denial);
            return Pushed::Queued;
        }
        let dropped = if state.order.len() >= QUEUED_MAX {
            // Behind the urgent ones, the oldest is not the first.
            let is_urgent = |id: &RecordId| {
                state
                    .waiting
                    .get(id)
                    .is_some_and(|waiting| waiting.update.is_urgent())
            };
            let oldest = state.order.iter().position(|id| !is_urgent(id)).unwrap_or(0);
            state.order.remove(oldest)
        } else {
            None
        };
        if let Some(dropped) = &dropped {
            state.waiting.remove(dropped);
        }
        if update.is_urgent() {
            state.order.push_front(id.clone());
        } else {
            state.order.push_back(id.clone());
        }
        let waiting = Waiting {
            update,
            denial,
            attempts,
            due,
        };
        state.waiting.insert(id, waiting);
        drop(state);
        self.added.notify_one();
        if dropped.is_some() {
            Pushed::Dropped
        } else {
            Pushed::Queued
        }
    }

    /// Takes the next entry, with the number of attempts that failed. `None`: the queue is closed.
    pub(in crate::shared) async fn next(&self) -> Option<(RecordId, Update, u32)> {
        loop {
            let mut added = std::pin::pin!(self.added.notified());
            added.as_mut().enable();
            let next_due = {
                let mut state = self.state.lock();
                let now = Instant::now();
                let is_due = |id: &RecordId| state.waiting.get(id).is_none_or(|waiting| waiting.is_due(now));
                let first = state.order.iter().position(is_due);
                if let Some(id) = first.and_then(|first| state.order.remove(first))
                    && let Some(waiting) = state.waiting.remove(&id)
                {
                    let Waiting {
                        update,
                        denial,
                        attempts,
                        ..
                    } = waiting;
                    state.running = Some((id.clone(), update.clone(), denial));
                    return Some((id, update, attempts));
                }
                if state.is_closed {
                    return None;
                }
                state.waiting.values().filter_map(|waiting| waiting.due).min()
            };
            match next_due {
                Some(due) => {
                    let _due = timeout_at(due, added).await;
                }
                None => added.await,
            }
        }
    }

    /// Ends the entry that was taken. `written`: what the bucket is known to have now.
    pub(in crate::shared) fn end(&self, id: RecordId, written: Option<Update>) {
        match written {
            Some(update) => self.written.insert(id, (update, Instant::now())),
            None => drop(self.written.remove(&id)),
        }
        self.state.lock().running = None;
        self.ended.notify_waiters();
    }

    /// Waits until nothing waits for this record.
    pub(in crate::shared) async fn settled(&self, id: &RecordId) {
        self.until(|state| !state.has(id)).await;
    }

    /// Whether an update of this record is waiting or running.
    pub(in crate::shared) fn has(&self, id: &RecordId) -> bool {
        self.state.lock().has(id)
    }

    #[cfg(all(test, feature = "shared"))]
    pub(in crate::shared) fn is_running(&self) -> bool {
        self.state.lock().running.is_some()
    }

    /// Waits until nothing is waiting or running, or until `is_stopped`.
    pub(in crate::shared) async fn drained(&self, is_stopped: impl Fn() -> bool) {
        self.until(|state| is_stopped() || state.order.is_empty() && state.running.is_none())
            .await;
    }

    async fn until(&self, is_reached: impl Fn(&State) -> bool) {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            {
                let state = self.state.lock();
                if state.is_closed || is_reached(&state) {
                    return;
                }
            }
            ended.await;
        }
    }

    /// Empties the queue and lets its task end. The update that runs may end too, so it is returned if it is urgent.
    pub(in crate::shared) fn close(&self) -> Closed {
        let mut state = self.state.lock();
        state.is_closed = true;
        let waiting = std::mem::take(&mut state.waiting).into_iter();
        let waiting = waiting.map(|(id, waiting)| (id, waiting.update, waiting.denial));
        let (mut urgent, others): (Vec<_>, Vec<_>) = waiting.partition(|(_, update, _)| update.is_urgent());
        urgent.extend(state.running.clone().filter(|(_, update, _)| update.is_urgent()));
        state.order.clear();
        drop(state);
        self.added.notify_waiters();
        self.ended.notify_waiters();
        Closed {
            urgent,
            dropped: others.into_iter().map(|(id, ..)| id).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn id(number: usize) -> RecordId {
        RecordId {
            class: Class::Public,
            upstream: "https://registry".into(),
            repository: format!("team/demo{number}").parse().ok(),
            item: "".into(),
        }
    }

    fn public(at: u64) -> Update {
        Update::Public(PublicState { at, is_public: true })
    }

    #[tokio::test]
    async fn waiting_updates_of_a_record_are_one() {
        let updates = Updates::default();
        for at in [5, 7, 6] {
            updates.push(id(1), public(at), 60);
        }
        assert_eq!(updates.next().await, Some((id(1), public(7), 0)));
        updates.end(id(1), Some(public(7)));
        updates.push(id(1), public(67), 60);
        assert!(
            updates.state.lock().order.is_empty(),
            "the bucket has it, up to 60 s"
        );
        updates.push(id(1), public(68), 60);
        assert_eq!(updates.next().await, Some((id(1), public(68), 0)));
        updates.end(id(1), None);
        updates.push(id(1), public(68), 60);
        assert!(
            updates.next().await.is_some(),
            "it is not known what the bucket has"
        );
    }

    #[tokio::test]
    async fn full_queue_of_updates_drops_the_oldest() {
        let updates = Updates::default();
        for number in 0..QUEUED_MAX {
            assert_eq!(updates.push(id(number), public(1), 0), Pushed::Queued);
        }
        assert_eq!(updates.push(id(QUEUED_MAX), public(1), 0), Pushed::Dropped);
        assert_eq!(updates.next().await.unwrap().0, id(1));
        assert_eq!(updates.close().dropped.len(), QUEUED_MAX - 1);
        assert_eq!(updates.next().await, None);
        assert_eq!(updates.push(id(1), public(2), 0), Pushed::Closed);
    }

    fn denied(at: u64) -> Update {
        Update::Public(PublicState { at, is_public: false })
    }

    #[tokio::test(start_paused = true)]
    async fn denial_that_failed_lets_others_pass_and_returns() {
        let updates = Updates::default();
        updates.push(id(1), denied(1), 0);
        let (first, update, _) = updates.next().await.unwrap();
        let due = Instant::now() + std::time::Duration::from_secs(8);
        updates.push_again(first.clone(), (update, Denial::default()), 1, Some(due));
        updates.end(first, None);
        updates.push(id(2), public(1), 0);
        assert_eq!(updates.next().await.unwrap().0, id(2));
        updates.end(id(2), None);
        assert_eq!(updates.next().await, Some((id(1), denied(1), 1)));
        assert_eq!(Instant::now(), due);
    }

    #[tokio::test]
    async fn closed_queue_hands_over_denials() {
        let updates = Updates::default();
        for (number, update) in [(1, denied(1)), (2, denied(2)), (3, public(3))] {
            updates.push(id(number), update, 0);
        }
        let running = updates.next().await.unwrap().0;
        let closed = updates.close();
        assert_eq!(closed.dropped, [id(3)]);
        assert_eq!(closed.urgent.len(), 2, "{running:?} runs");
    }

    #[tokio::test]
    async fn settled_waits_for_its_own_record() {
        let updates = Updates::default();
        updates.settled(&id(1)).await;
        updates.push(id(1), public(1), 0);
        updates.push(id(2), public(1), 0);
        let taken = updates.next().await.unwrap().0;
        let ended = async { updates.end(taken.clone(), None) };
        tokio::join!(updates.settled(&taken), ended);
        let (other, closed) = (id(2), async { updates.close() });
        tokio::join!(updates.settled(&other), closed);
    }
}
