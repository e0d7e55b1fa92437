//! Records of one bucket: their settings, and what a read of one brings.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use super::grant::GrantReads;
use super::key::{Class, RecordKeys};
use super::notes::SETTLE_TIMEOUT;
use super::queue::{Denial, RecordId, Updates};
use super::recent::LimitedReads;
use super::state::{Merge, PublicState, TagState};
use super::tag_reads::TagReads;
use crate::bucket::ObjectKey;
use crate::oci::{Digest, Repository};
use crate::shared::revocations::Revocations;

/// Difference between the storage's clock and that of a host up to which times in records are compared with other times.
/// The clocks of hosts that synchronize them differ by less than a second.
pub(super) const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(5 * 60);

/// Settings of records.
#[derive(Clone)]
pub struct RecordSettings {
    /// The keys.
    pub keys: RecordKeys,
    /// Prefix of the bucket, which the seals cover.
    pub prefix: Arc<str>,
    /// Whether there are grant records.
    pub grants: bool,
}

/// Records of one bucket.
pub(in crate::shared) struct Records {
    pub(super) settings: RecordSettings,
    pub(in crate::shared) updates: Updates,
    /// The time 1 of this cache. A reload keeps it, and so the times of the updates that are taken over.
    pub(in crate::shared) base: Instant,
    /// Public records have a cap of their own: what denies must be read while other reads are at the cap.
    pub(super) public: LimitedReads<PublicState>,
    /// The storage's time of `base`, when its clock last agreed with that of this host.
    pub(super) agreed: Mutex<Option<u64>>,
    /// Tag records that were read before the upstream was asked.
    pub(super) tags: TagReads,
    pub(super) grants: GrantReads,
    /// Denials that the bucket lacks. `None` in tests of one bucket.
    pub(in crate::shared) revocations: Option<Arc<Revocations>>,
}

impl Records {
    pub(in crate::shared) fn new(settings: RecordSettings) -> Self {
        Self {
            settings,
            updates: Updates::default(),
            base: Instant::now(),
            public: LimitedReads::new(),
            agreed: Mutex::default(),
            tags: TagReads::default(),
            grants: GrantReads::new(),
            revocations: None,
        }
    }

    /// A time of this cache. `None`: before the settings were loaded.
    pub(in crate::shared) fn time(&self, at: Instant) -> Option<u64> {
        Some(at.checked_duration_since(self.base)?.as_secs() + 1)
    }

    /// Removes a denial from the list of those that wait, if no later one was added since.
    pub(super) fn finish(&self, id: &RecordId, denial: Denial) {
        if let Some(list) = self.revocations.as_ref().filter(|_| denial.number > 0) {
            list.finish(id, denial.number);
        }
    }

    /// A record that was read, with a denial that waits for the bucket. A denial of an earlier process may be among those that are
    /// not loaded.
    pub(super) async fn with_waiting_denial<S: Merge>(
        &self,
        id: &RecordId,
        read: RecordRead<S>,
        denial: impl FnOnce(u64) -> S,
    ) -> RecordRead<S> {
        let (RecordRead::Found(found), Some(list)) = (&read, &self.revocations) else {
            return read;
        };
        // A disk that hangs must not hold the clients of an outage.
        if !timeout(SETTLE_TIMEOUT, list.loaded()).await.unwrap_or(false) {
            return RecordRead::Unread { is_capped: false };
        }
        let Some(since) = list.waits_since(id) else {
            return read;
        };
        let at = found.now.saturating_sub(since.elapsed().as_secs());
        // Later than it was by as much as `now` may be remembered and rounded.
        let denial = denial(at.saturating_add(2));
        RecordRead::Found(Dated {
            state: found.state.clone().merge(denial, found.now),
            now: found.now,
        })
    }

    pub(super) fn path(&self, key: &ObjectKey) -> String {
        match &*self.settings.prefix {
            "" => key.to_string(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    pub(super) fn names(&self, id: &RecordId) -> Vec<ObjectKey> {
        self.settings.keys.names(id.class, id.place(), &id.item)
    }
}

/// The result of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordRead<S> {
    /// What the record says.
    Found(Dated<S>),
    /// There is no record, or the storage cannot keep records of this class.
    Absent,
    /// It is not known what the record says. `is_capped`: because of this cache's limit of requests.
    Unread {
        /// This cache has reached its limit of requests to the bucket.
        is_capped: bool,
    },
}

impl<S> RecordRead<S> {
    /// What the record says, if it was read.
    pub fn found(self) -> Option<Dated<S>> {
        match self {
            Self::Found(found) => Some(found),
            Self::Absent | Self::Unread { .. } => None,
        }
    }
}

/// A record that was read, and the time at the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dated<S> {
    /// Its content.
    pub state: S,
    pub(super) now: u64,
}

impl<S> Dated<S> {
    /// Age of a time in the record, rounded up.
    pub fn age(&self, at: u64) -> Duration {
        Duration::from_secs(self.now.saturating_sub(at))
    }

    /// The same after this time.
    pub(in crate::shared) fn later(self, by: Duration) -> Self {
        let by = by.as_secs() + u64::from(by.subsec_nanos() > 0);
        Self {
            now: self.now.saturating_add(by),
            ..self
        }
    }
}

impl Dated<TagState> {
    /// Time since the tag was first seen to name this digest, by any cache. `None`: none has stated it.
    pub fn seen_for(&self, digest: &Digest) -> Option<Duration> {
        let variants = self.state.variants.iter();
        let naming = variants.filter(|variant| variant.digest == *digest && variant.at > 0);
        let seen = naming.filter_map(|variant| {
            let before = Duration::from_secs(variant.seen_for?);
            Some(self.age(variant.at).saturating_add(before))
        });
        seen.max()
    }
}

/// A repository in records.
#[derive(Clone, Debug)]
pub struct RecordPlace {
    /// Identity of the upstream: the same for every cache, whatever it calls the upstream.
    pub upstream: Arc<str>,
    /// The repository.
    pub repository: Repository,
}

impl RecordPlace {
    pub(in crate::shared) fn id(&self, class: Class, item: &str) -> RecordId {
        RecordId {
            class,
            upstream: Arc::clone(&self.upstream),
            repository: Some(self.repository.clone()),
            item: item.into(),
        }
    }
}
