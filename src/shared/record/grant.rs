//! Grant records: whether the upstream let a principal read a repository, and when.
//!
//! The principal in a record is a keyed hash of a credential, which every cache with the same keys derives alike. It is
//! in the name of the object only, so that no holder of the bucket alone can guess a password.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::key::Class;
use super::queue::{RecordId, Update};
use super::recent::LimitedReads;
use super::records::{RecordRead, Records};
use super::state::{Merge, PublicState};
use super::{PUBLIC_RENEWAL, RecordPlace};
use crate::oci::Repository;
use crate::shared::SharedStorage;
use crate::shared::rate::Rate;

/// Grant records that one cache creates per second, after a burst.
const CREATIONS_PER_SECOND: u32 = 10;
const CREATIONS_BURST: u32 = 200;

/// A client in grant records, by its credential.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RecordPrincipal(Arc<str>);

/// Shows no hash of a credential.
impl fmt::Debug for RecordPrincipal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecordPrincipal(…)")
    }
}

/// Whether the upstream let a principal read a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantState {
    /// When the request was sent, or the denial arrived, in seconds.
    pub at: u64,
    /// The upstream served it.
    pub is_granted: bool,
}

impl From<GrantState> for PublicState {
    fn from(state: GrantState) -> Self {
        Self {
            at: state.at,
            is_public: state.is_granted,
        }
    }
}

impl From<PublicState> for GrantState {
    fn from(state: PublicState) -> Self {
        Self {
            at: state.at,
            is_granted: state.is_public,
        }
    }
}

/// By the rules of public records: both say when something was opened or denied.
impl Merge for GrantState {
    fn merge(self, other: Self, now: u64) -> Self {
        PublicState::from(self).merge(other.into(), now).into()
    }

    fn shift(self, by: impl Fn(u64) -> u64) -> Self {
        PublicState::from(self).shift(by).into()
    }

    fn covers(&self, other: &Self, slack: u64) -> bool {
        PublicState::from(*self).covers(&(*other).into(), slack)
    }

    fn is_new(&self) -> bool {
        // Anyone can send wrong passwords.
        self.is_granted
    }
}

/// Reads and creations of grant records.
pub(super) struct GrantReads {
    reads: LimitedReads<GrantState>,
    /// Records that this cache creates: an upstream may accept any credential.
    creations: Mutex<Rate>,
}

impl GrantReads {
    pub(super) fn new() -> Self {
        Self {
            reads: LimitedReads::new(),
            creations: Mutex::new(Rate::of(CREATIONS_PER_SECOND, CREATIONS_BURST, Instant::now())),
        }
    }
}

impl Records {
    /// Whether a grant may get a record now. A later confirmation creates it otherwise.
    pub(super) fn may_create_grant(&self) -> bool {
        self.grants.creations.lock().take(Instant::now())
    }

    pub(super) fn has_grants(&self) -> bool {
        self.settings.grants
    }
}

fn grant_id(upstream: &Arc<str>, repository: Option<&Repository>, principal: &RecordPrincipal) -> RecordId {
    RecordId {
        class: Class::Grant,
        upstream: Arc::clone(upstream),
        repository: repository.cloned(),
        item: Arc::clone(&principal.0),
    }
}

impl SharedStorage {
    fn has_grants(&self, is_used: impl FnOnce(&crate::shared::Active) -> bool) -> bool {
        let active = self.active.load();
        active.as_ref().is_some_and(|active| {
            active.records.as_ref().is_some_and(Records::has_grants) && is_used(active.as_ref())
        })
    }

    /// Whether grant records can be read now.
    pub fn has_grant_records(&self) -> bool {
        self.has_grants(|_| true) && self.is_readable()
    }

    /// Whether grant records are written.
    pub fn writes_grants(&self) -> bool {
        self.has_grants(|active| active.settings.write)
    }

    /// The principal of a credential, of which `identity` has the kind and the secret. `None` without grant records.
    pub fn principal(&self, identity: &[u8]) -> Option<RecordPrincipal> {
        let active = self.active.load();
        let records = active.as_ref()?.records.as_ref()?;
        let keys = &records.settings.keys;
        records
            .has_grants()
            .then(|| RecordPrincipal(keys.principal(identity).into()))
    }

    /// Records that the upstream let this principal read a repository, by a request sent at `since`. Without a
    /// repository: that its token service issued a token to the account.
    pub fn note_grant(
        &self,
        (upstream, repository): (&Arc<str>, Option<&Repository>),
        principal: &RecordPrincipal,
        since: Instant,
    ) {
        if self.writes_grants() {
            let id = grant_id(upstream, repository, principal);
            self.note(&id, since, PUBLIC_RENEWAL, |at| {
                Update::Grant(GrantState { at, is_granted: true })
            });
        }
    }

    /// Records that the upstream denied this principal, at `now`. Returns when the bucket has it, or after a second when
    /// the list of waiting denials has it. `is_known`: this cache had granted it access.
    pub async fn revoke_grant(
        &self,
        (upstream, repository): (&Arc<str>, Option<&Repository>),
        principal: &RecordPrincipal,
        (now, is_known): (Instant, bool),
    ) {
        if self.writes_grants() {
            self.deny(grant_id(upstream, repository, principal), now, is_known)
                .await;
        }
    }

    /// Records that a repository which this cache knew as public is not, at `now`. Returns as [`Self::revoke_grant`] does.
    pub async fn revoke_public(&self, place: &RecordPlace, now: Instant) {
        self.deny(place.id(Class::Public, ""), now, true).await;
    }

    /// Whether another cache has recorded that this principal may read a repository. `is_known`: this cache has granted it
    /// access.
    pub async fn grant_record(
        &self,
        (upstream, repository): (&Arc<str>, Option<&Repository>),
        principal: &RecordPrincipal,
        is_known: bool,
    ) -> RecordRead<GrantState> {
        let unread = RecordRead::Unread { is_capped: false };
        let Some(active) = self.readable() else {
            return unread;
        };
        let Some(records) = active.records.as_ref().filter(|records| records.has_grants()) else {
            return unread;
        };
        let id = grant_id(upstream, repository, principal);
        let reading = records.grants.reads.get((&id, is_known), active.read_record(&id));
        let read = active.counted(reading.await);
        let denial = |at| GrantState {
            at,
            is_granted: false,
        };
        records.with_waiting_denial(&id, read, denial).await
    }
}
