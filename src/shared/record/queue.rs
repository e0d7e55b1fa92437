//! Queue of updates of records, one entry per record: an update that waits is merged with the next one.
//!
//! Nothing waits for an update, except a response to a write or a denial, for a moment. If the queue is full, the oldest
//! entry is dropped: another confirmation brings it again. Denials of unknown credentials, which anyone can cause, have a
//! limited place and rate.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::grant::GrantState;
use super::key::Class;
use super::state::{ContentState, Merge, PublicState, TagState};
use crate::oci::Repository;
use crate::shared::rate::Rate;

/// Entries in the queue.
const QUEUED_MAX: usize = 4096;

/// Denials of credentials that this cache has not authorized. Anyone can cause them.
const UNKNOWN_MAX: usize = 1024;

/// Such denials that are written per second, and at once.
const UNKNOWN_PER_SECOND: u32 = 20;

/// With so many such denials in the queue, no response waits for another one.
const UNKNOWN_FEW: usize = 8;

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

/// Order of updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rank {
    /// Denials of what this cache had granted, and deletions.
    Urgent,
    Other,
    /// Denials of other credentials, in turn with the other updates, and at a limited rate.
    Unknown,
}

impl Rank {
    fn of(id: &RecordId, update: &Update, denial: Denial) -> Self {
        let is_of_client = matches!(id.class, Class::Grant | Class::Public);
        if !update.is_urgent() {
            Self::Other
        } else if is_of_client && !denial.is_known {
            Self::Unknown
        } else {
            Self::Urgent
        }
    }
}

struct State {
    urgent: VecDeque<RecordId>,
    others: VecDeque<RecordId>,
    unknown: VecDeque<RecordId>,
    unknown_rate: Rate,
    /// It is the turn of an unknown denial.
    is_unknown_next: bool,
    waiting: HashMap<RecordId, Waiting>,
    running: Option<(RecordId, Update, Denial)>,
    is_closed: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            urgent: VecDeque::new(),
            others: VecDeque::new(),
            unknown: VecDeque::new(),
            unknown_rate: Rate::of(UNKNOWN_PER_SECOND, UNKNOWN_PER_SECOND, Instant::now()),
            is_unknown_next: false,
            waiting: HashMap::new(),
            running: None,
            is_closed: false,
        }
    }
}

impl State {
    fn has(&self, id: &RecordId) -> bool {
        let is_running = self.running.as_ref().is_some_and(|(running, ..)| running == id);
        is_running || self.waiting.contains_key(id)
    }

    fn of_rank(&mut self, rank: Rank) -> &mut VecDeque<RecordId> {
        match rank {
            Rank::Urgent => &mut self.urgent,
            Rank::Other => &mut self.others,
            Rank::Unknown => &mut self.unknown,
        }
    }

    /// Merges an update with the one of the same record that waits.
    fn merge(&mut self, id: &RecordId, update: Update, denial: Denial) {
        let Some(waiting) = self.waiting.get_mut(id) else {
            return;
        };
        let before = Rank::of(id, &waiting.update, waiting.denial);
        waiting.update = waiting.update.clone().merge(update);
        waiting.denial = waiting.denial.and(denial);
        let after = Rank::of(id, &waiting.update, waiting.denial);
        if before != after {
            self.of_rank(before).retain(|other| other != id);
            self.of_rank(after).push_back(id.clone());
        }
    }

    /// Makes room for an update: unknown denials are dropped first, then the oldest. `Err`: there is none for this one.
    fn make_room(&mut self, rank: Rank) -> Result<Option<RecordId>, ()> {
        let is_full = self.waiting.len() >= QUEUED_MAX;
        if rank == Rank::Unknown {
            return if is_full || self.unknown.len() >= UNKNOWN_MAX {
                Err(())
            } else {
                Ok(None)
            };
        }
        if !is_full {
            return Ok(None);
        }
        let unknown = self.unknown.pop_back();
        let dropped = unknown
            .or_else(|| self.others.pop_front())
            .or_else(|| self.urgent.pop_front());
        if let Some(dropped) = &dropped {
            self.waiting.remove(dropped);
        }
        Ok(dropped)
    }

    /// Removes the next entry that is due from its queue.
    fn take(&mut self, now: Instant) -> Option<RecordId> {
        let ranks = if self.is_unknown_next {
            [Rank::Urgent, Rank::Unknown, Rank::Other]
        } else {
            [Rank::Urgent, Rank::Other, Rank::Unknown]
        };
        for rank in ranks {
            let (queue, waiting) = match rank {
                Rank::Urgent => (&mut self.urgent, &self.waiting),
                Rank::Other => (&mut self.others, &self.waiting),
                Rank::Unknown => (&mut self.unknown, &self.waiting),
            };
            let is_due = |id: &RecordId| waiting.get(id).is_none_or(|waiting| waiting.is_due(now));
            let Some(first) = queue.iter().position(is_due) else {
                continue;
            };
            if rank == Rank::Unknown && !self.unknown_rate.take(now) {
                continue;
            }
            self.is_unknown_next = rank == Rank::Other;
            return queue.remove(first);
        }
        None
    }

    /// When the next entry may be due.
    fn next_due(&self, now: Instant) -> Option<Instant> {
        let soon = now + Duration::from_secs(1) / UNKNOWN_PER_SECOND;
        let due = self.waiting.values().map(|waiting| match waiting.due {
            Some(due) if due > now => due,
            // An unknown denial beyond the rate.
            _ => soon,
        });
        due.min()
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_none()
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
        if self.written.get(&id).is_some_and(is_known) || self.is_running(&id, &update, slack) {
            return Pushed::Queued;
        }
        self.enqueue(id, (update, Denial::default()), (0, None))
    }

    /// Whether the update that runs says as much. If that one fails, another confirmation brings this one again.
    fn is_running(&self, id: &RecordId, update: &Update, slack: u64) -> bool {
        let state = self.state.lock();
        let says_as_much =
            |(running, known, _): &(RecordId, Update, Denial)| running == id && known.covers(update, slack);
        !state.is_closed && state.running.as_ref().is_some_and(says_as_much)
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
        if state.waiting.contains_key(&id) {
            state.merge(&id, update, denial);
            drop(state);
            // It may be due now.
            self.added.notify_one();
            return Pushed::Queued;
        }
        let rank = Rank::of(&id, &update, denial);
        let Ok(dropped) = state.make_room(rank) else {
            return Pushed::Dropped;
        };
        state.of_rank(rank).push_back(id.clone());
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
                if let Some(id) = state.take(now)
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
                state.next_due(now)
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

    /// Whether few denials wait that anyone can cause, so that a response may wait for another one.
    pub(in crate::shared) fn has_few_unknown(&self) -> bool {
        self.state.lock().unknown.len() <= UNKNOWN_FEW
    }

    /// Whether an update of this record is waiting or running.
    pub(in crate::shared) fn has(&self, id: &RecordId) -> bool {
        self.state.lock().has(id)
    }

    #[cfg(all(test, feature = "shared"))]
    pub(in crate::shared) fn has_running(&self) -> bool {
        self.state.lock().running.is_some()
    }

    /// Waits until nothing is waiting or running, or until `is_stopped`.
    pub(in crate::shared) async fn drained(&self, is_stopped: impl Fn() -> bool) {
        self.until(|state| is_stopped() || state.is_empty()).await;
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
        for rank in [Rank::Urgent, Rank::Other, Rank::Unknown] {
            state.of_rank(rank).clear();
        }
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
        assert!(updates.state.lock().is_empty(), "the bucket has it, up to 60 s");
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
    async fn update_that_a_running_one_covers_is_not_queued() {
        let updates = Updates::default();
        updates.push(id(1), public(5), 60);
        let (running, update, _) = updates.next().await.unwrap();
        updates.push(id(1), public(60), 60);
        assert!(updates.state.lock().waiting.is_empty());
        updates.push(id(1), denied(60), 0);
        assert!(updates.has(&id(1)));
        updates.end(running, Some(update));
        assert_eq!(updates.next().await, Some((id(1), denied(60), 0)));
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
        let due = Instant::now() + Duration::from_secs(8);
        updates.push_again(first.clone(), (update, Denial::default()), 1, Some(due));
        updates.end(first, None);
        updates.push(id(2), public(1), 0);
        assert_eq!(updates.next().await.unwrap().0, id(2));
        updates.end(id(2), None);
        assert_eq!(updates.next().await, Some((id(1), denied(1), 1)));
        assert_eq!(Instant::now(), due);
    }

    fn known() -> Denial {
        Denial {
            number: 1,
            is_known: true,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn guessed_passwords_delay_no_other_update() {
        let updates = Updates::default();
        for number in 0..UNKNOWN_MAX {
            let pushed = updates.push_denial(id(number), denied(1), Denial::default());
            assert_eq!(pushed, Pushed::Queued);
        }
        let further = updates.push_denial(id(UNKNOWN_MAX), denied(1), Denial::default());
        assert_eq!(further, Pushed::Dropped);
        assert!(!updates.has_few_unknown());
        for number in 5000..5010 {
            updates.push(id(number), public(1), 0);
        }
        updates.push_denial(id(6001), denied(1), known());
        updates.push_denial(id(6002), denied(1), known());
        // One of the first becomes known.
        updates.push_denial(id(700), denied(2), known());
        let began = Instant::now();
        let mut order = Vec::new();
        for _ in 0..5 {
            let taken = updates.next().await.unwrap().0;
            updates.end(taken.clone(), None);
            order.push(taken);
        }
        assert_eq!(order, [id(6001), id(6002), id(700), id(5000), id(0)]);
        for _ in 0..118 {
            let taken = updates.next().await.unwrap().0;
            updates.end(taken, None);
        }
        let took = began.elapsed();
        assert!((4..6).contains(&took.as_secs()), "20 a second: {took:?}");
    }

    #[tokio::test]
    async fn closed_queue_hands_over_denials() {
        let updates = Updates::default();
        for number in [1, 2] {
            updates.push_denial(id(number), denied(1), known());
        }
        updates.push(id(3), public(3), 0);
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
