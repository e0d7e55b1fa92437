//! Records of the shared storage: reads of them, and what this cache notes in them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout};

use super::key::Class;
use super::queue::{Pushed, RecordId, Update, Updates};
use super::records::{CLOCK_DIFFERENCE_MAX, Dated, RecordPlace, RecordRead};
use super::state::{ContentState, PublicState, TagState};
use super::worker::{PUBLIC_RENEWAL, TAG_RENEWAL};
use crate::oci::{Digest, Tag};
use crate::shared::{Active, SharedStorage};

/// Longest wait of a response to a write or a denial for its record.
pub(in crate::shared) const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

impl SharedStorage {
    /// Whether records can be read now.
    pub fn has_records(&self) -> bool {
        self.readable().is_some_and(|active| active.records.is_some())
    }

    /// Whether records are written.
    pub fn writes_records(&self) -> bool {
        let active = self.active.load();
        active
            .as_ref()
            .is_some_and(|active| active.settings.write && active.records.is_some())
    }

    /// Whether the storage's clock shows the time `own` of this host now, within five minutes.
    pub fn agrees_with_clock(&self, own: SystemTime) -> bool {
        let active = self.active.load();
        let clock = active.as_ref().and_then(|active| active.settings.bucket.clock());
        let difference = clock.and_then(|clock| clock.difference(own, Instant::now()));
        let agrees = difference.is_some_and(|difference| difference <= CLOCK_DIFFERENCE_MAX);
        if agrees && let Some(records) = active.as_ref().and_then(|active| active.records.as_ref()) {
            *records.agreed.lock() = clock.and_then(|clock| clock.earliest(records.base));
        }
        agrees
    }

    /// What other caches have seen a tag to name. `None` also if the record cannot be read.
    pub async fn tag_record(&self, place: &RecordPlace, tag: &Tag) -> Option<Dated<TagState>> {
        self.readable()?
            .read_record(&place.id(Class::Tag, tag.as_str()))
            .await
            .found()
    }

    /// What other caches have seen of a manifest.
    pub async fn content_record(&self, place: &RecordPlace, digest: Digest) -> RecordRead<ContentState> {
        let id = place.id(Class::Content, &digest.to_string());
        match self.readable() {
            Some(active) => active.read_record(&id).await,
            None => RecordRead::Unread { is_capped: false },
        }
    }

    /// Whether other caches have seen a repository to be public. `is_known`: it is for this cache.
    pub async fn public_record(&self, place: &RecordPlace, is_known: bool) -> RecordRead<PublicState> {
        let unread = RecordRead::Unread { is_capped: false };
        let (Some(active), id) = (self.readable(), place.id(Class::Public, "")) else {
            return unread;
        };
        let Some(records) = &active.records else {
            return unread;
        };
        let reading = records.public.get((&id, is_known), active.read_record(&id));
        let read = active.counted(reading.await);
        let denial = |at| PublicState { at, is_public: false };
        records.with_waiting_denial(&id, read, denial).await
    }

    /// Records what a response to a request sent at `since` says about a tag. The times in `state` are set.
    pub fn note_tag(&self, place: &RecordPlace, tag: &Tag, state: TagState, since: Instant) {
        self.note(&place.id(Class::Tag, tag.as_str()), since, TAG_RENEWAL, |at| {
            Update::Tag(state.at(at))
        });
    }

    /// Records that the repository has a manifest, and these children of it. `confirmed`: when the request was sent to which
    /// the upstream confirmed that; `None` for a copy of this cache, which passes no deletion.
    pub fn note_content(
        &self,
        place: &RecordPlace,
        digest: Digest,
        children: impl IntoIterator<Item = Digest>,
        confirmed: Option<Instant>,
    ) {
        let Some(keep) = self.active.load().as_ref().map(|active| active.settings.keep) else {
            return;
        };
        let id = place.id(Class::Content, &digest.to_string());
        let since = confirmed.unwrap_or_else(Instant::now);
        self.note(&id, since, keep / 2, |at| {
            Update::Content(ContentState {
                at: confirmed.map_or(0, |_| at),
                deleted_at: 0,
                children: children.into_iter().collect(),
            })
        });
    }

    /// Records that a manifest was deleted.
    pub fn note_content_deleted(&self, place: &RecordPlace, digest: Digest, since: Instant) {
        let id = place.id(Class::Content, &digest.to_string());
        self.note(&id, since, Duration::ZERO, |at| {
            Update::Content(ContentState {
                at: 0,
                deleted_at: at,
                children: std::collections::BTreeSet::new(),
            })
        });
    }

    /// Records whether a request without a credential, sent at `since`, was served.
    pub fn note_public(&self, place: &RecordPlace, is_public: bool, since: Instant) {
        self.note(&place.id(Class::Public, ""), since, PUBLIC_RENEWAL, |at| {
            Update::Public(PublicState { at, is_public })
        });
    }

    /// Waits until the updates of a tag are in the bucket, at most a second.
    pub async fn tag_settled(&self, place: &RecordPlace, tag: &Tag) {
        self.settled(&place.id(Class::Tag, tag.as_str())).await;
    }

    pub(in crate::shared) async fn settled(&self, id: &RecordId) {
        let Some(active) = self.active.load_full() else {
            return;
        };
        // While the bucket accepts nothing, no response waits for it.
        if let Some(records) = &active.records
            && !active.is_stopped()
        {
            // Afterwards it goes on in the background.
            let _late = timeout(SETTLE_TIMEOUT, records.updates.settled(id)).await;
        }
    }

    pub(in crate::shared) fn note(
        &self,
        id: &RecordId,
        since: Instant,
        renewal: Duration,
        update: impl FnOnce(u64) -> Update,
    ) {
        self.queue_update((id, since), update, |updates, update| {
            updates.push(id.clone(), update, renewal.as_secs())
        });
    }

    /// Queues an update by an observation at `since`.
    pub(in crate::shared) fn queue_update(
        &self,
        (id, since): (&RecordId, Instant),
        update: impl FnOnce(u64) -> Update,
        push: impl Fn(&Updates, Update) -> Pushed,
    ) {
        let current = || self.active.load_full().filter(|active| active.settings.write);
        let time = |active: &Arc<Active>| active.records.as_ref()?.time(since);
        let Some(at) = current().as_ref().and_then(time) else {
            return;
        };
        let (class, update) = (id.class, update(at));
        // Twice, because a reload may close the queue in between.
        for _ in 0..2 {
            let Some(active) = current() else { return };
            let Some(records) = &active.records else { return };
            match push(&records.updates, update.clone()) {
                Pushed::Queued => return,
                Pushed::Dropped => {
                    active.telemetry.shared().record_record(class.name(), "dropped");
                    return;
                }
                Pushed::Closed => {}
            }
        }
    }
}
