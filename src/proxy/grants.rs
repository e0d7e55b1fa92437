//! What the upstream's answers show of who may read: a yes is a grant, a no ends it, anything else says nothing.
//!
//! Only a yes to a manifest or a blob counts, and only one that is proven (`upstream/proof.rs`). Many registries show their lists to those who may not pull, and answer
//! a question about referrers with an empty list whoever asks.
//!
//! Answers overtake each other. A yes to a question that was put before a no was heard is the older word, however late
//! it comes, and brings no right back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::detached::detached;
use super::keyed_lock::{KeyedGuard, KeyedLocks};
use super::manifest_fetch::UpstreamRequest;
use super::{ProxyService, UpstreamRegistry};
use crate::age;
use crate::oci::{Endpoint, Repository};
use crate::policy::authz::GrantEvidence;
use crate::store::{AsyncStore, Store};
use crate::upstream::{Credential, ResponseKind, UpstreamResponse};

/// How much older than now a kept grant or public mark may be before it is written again: a busy tag must not mean a
/// write per pull.
const RENEW_AFTER: Duration = Duration::from_secs(60);

/// How often at most a public repository is doubted because somebody with a credential was refused there. A wrong
/// password is refused too.
const DOUBT_AFTER: Duration = Duration::from_secs(60);

/// How often at most a repository that is read by tokens is asked for as by everybody.
const TRY_AFTER: Duration = Duration::from_secs(3600);

/// Refusals remembered, for answers that were overtaken.
const REFUSED_MAX: usize = 16_384;

type RepositoryKey = (Arc<str>, Repository);
/// Without a repository: to get a token.
type GrantKey = (Arc<str>, Option<Repository>, [u8; 32]);

/// Whom the upstream refused where, and when it was heard.
pub(super) struct RecentDenials {
    last: Cache<GrantKey, Instant>,
    doubted: Cache<RepositoryKey, Instant>,
    tried: Cache<RepositoryKey, Instant>,
    /// A look at `last` and the note that follows from it are one step, in memory.
    grants: Mutex<()>,
    /// The same for public marks, by repository: a mark is written to the disk in this step.
    publics: KeyedLocks<RepositoryKey>,
}

impl Default for RecentDenials {
    fn default() -> Self {
        Self {
            last: Cache::new(REFUSED_MAX),
            doubted: Cache::new(REFUSED_MAX),
            tried: Cache::new(REFUSED_MAX),
            grants: Mutex::default(),
            publics: KeyedLocks::default(),
        }
    }
}

impl ProxyService {
    /// What is known of a principal's right in a repository, and of its account's.
    pub(super) async fn evidence(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        principal: [u8; 32],
        account: Option<[u8; 32]>,
    ) -> GrantEvidence {
        let here = Some(repository);
        let known =
            |repository, principal: &[u8; 32]| self.store.grant_in_memory(grant(site, repository, principal));
        let in_memory = || {
            Some(GrantEvidence {
                shared: site.is_shared(),
                granted_at: known(here, &principal)?,
                token_issued_at: account.map_or(Some(None), |account| known(None, &account))?,
                account_granted_at: account.map_or(Some(None), |account| known(here, &account))?,
                anonymous_granted_at: self
                    .store
                    .in_memory(|view| view.public_since(site.name(), repository))?,
                is_in_repository: false,
            })
        };
        match in_memory() {
            Some(evidence) => evidence,
            // On the heap: it is needed once for each principal.
            None => Box::pin(self.evidence_sought(site, repository, principal, account)).await,
        }
    }

    async fn evidence_sought(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        principal: [u8; 32],
        account: Option<[u8; 32]>,
    ) -> GrantEvidence {
        let of_account = async {
            let Some(account) = account else {
                return (None, None);
            };
            tokio::join!(
                self.store.grant(grant(site, None, &account)),
                self.store.grant(grant(site, Some(repository), &account)),
            )
        };
        let (granted_at, (token_issued_at, account_granted_at), anonymous_granted_at) = tokio::join!(
            self.store.grant(grant(site, Some(repository), &principal)),
            of_account,
            self.public_since(site, repository),
        );
        GrantEvidence {
            shared: site.is_shared(),
            granted_at,
            token_issued_at,
            account_granted_at,
            anonymous_granted_at,
            is_in_repository: false,
        }
    }

    /// When the repository was last proven readable by anyone, if that still holds.
    pub(super) async fn public_since(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
    ) -> Option<SystemTime> {
        self.look_up(site, repository, |cached| {
            cached.view.public_since(cached.site.name(), cached.repository)
        })
        .await
    }

    /// Keeps what an answer shows of the caller's right, also where the caller is gone by then. `asked_at` is when the
    /// question was put.
    pub(super) async fn learn(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        answer: &UpstreamResponse,
        asked_at: Instant,
    ) {
        match answer.kind {
            ResponseKind::Digest(_) => self.learn_yes(wanted, asked_at).await,
            ResponseKind::Denied => {
                let (pull, wanted, answer) = (Arc::clone(self), wanted.clone(), answer.clone());
                detached(async move { pull.learn_no(&wanted, &answer).await }).await;
            }
            ResponseKind::UnprovenDigest(_)
            | ResponseKind::NoDigest
            | ResponseKind::NotFound
            | ResponseKind::Unavailable(_)
            | ResponseKind::Other(_) => {}
        }
    }

    /// The upstream said yes to this caller in this repository: by the registry's own marks, or by bytes that were
    /// verified. Never because of a status alone. It is learned also where the caller is gone by then.
    pub(super) async fn learn_yes(self: &Arc<Self>, wanted: &UpstreamRequest, asked_at: Instant) {
        if !matches!(wanted.endpoint, Endpoint::Manifest { .. } | Endpoint::Blob { .. }) {
            return;
        }
        let (pull, wanted) = (Arc::clone(self), wanted.clone());
        detached(async move { pull.note_right(&wanted, asked_at).await }).await;
    }

    async fn note_right(self: &Arc<Self>, wanted: &UpstreamRequest, asked_at: Instant) {
        let UpstreamRequest {
            site,
            repository,
            caller,
            ..
        } = wanted;
        let now = self.clock.now();
        let at = wanted.asked_at.min(now);
        let public_since = self.public_since(site, repository).await;
        if is_anonymous(wanted) {
            if renews(public_since, at, now) {
                let turn = self.refused.publics.turn(place(site, repository)).await;
                if !self.overtaken(&self.right_of_all(site, repository), asked_at) {
                    self.set_public(site, repository, Some(at), turn).await;
                }
            }
        } else {
            let account = self.account(site, repository, wanted.shown());
            for principal in [Some(caller.principal), account].into_iter().flatten() {
                self.note_yes(site, Some(repository), principal, (at, asked_at))
                    .await;
            }
        }
        if is_token(wanted) && !site.is_shared() && public_since.is_none() {
            self.ask_as_everybody(wanted, &self.refused.tried, TRY_AFTER);
        }
    }

    /// Notes the yes to a question that was put at `asked_at`, by the clock and by the process's own time.
    async fn note_yes(
        &self,
        site: &Arc<UpstreamRegistry>,
        repository: Option<&Repository>,
        principal: [u8; 32],
        (at, asked_at): (SystemTime, Instant),
    ) {
        let now = self.clock.now();
        // Not ahead of a clock that was set back since.
        let at = at.min(now);
        let granted = grant(site, repository, &principal);
        if renews(self.store.grant(granted).await, at, now) {
            let _order = self.refused.order();
            if !self.overtaken(&right(site, repository, principal), asked_at) {
                self.store.put_grant(granted, at);
            }
        }
    }

    async fn learn_no(self: &Arc<Self>, wanted: &UpstreamRequest, answer: &UpstreamResponse) {
        let UpstreamRequest {
            site,
            repository,
            caller,
            ..
        } = wanted;
        if is_anonymous(wanted) {
            self.keep_challenge(site, repository, answer).await;
            let turn = self.refused.publics.turn(place(site, repository)).await;
            let right = self.right_of_all(site, repository);
            self.refused.last.insert(right, Instant::now());
            if self.public_since(site, repository).await.is_some() {
                self.set_public(site, repository, None, turn).await;
            }
            return;
        }
        let account = self.account(site, repository, wanted.shown());
        let own = self.drop_right(site, Some(repository), caller.principal);
        let accounts = async {
            if let Some(account) = account {
                self.drop_right(site, Some(repository), account).await;
            }
        };
        tokio::join!(own, accounts);
        if !site.is_shared() && self.public_since(site, repository).await.is_some() {
            self.ask_as_everybody(wanted, &self.refused.doubted, DOUBT_AFTER);
        }
    }

    /// Asks the same without a credential, in the background, unless it was done since `after`.
    ///
    /// After a refusal: a repository that was closed refuses those with a credential first, and what everyone could read
    /// there must not stay readable because nobody asks as everyone. After a yes to a token: clients get a new one for
    /// every pull, also those without a login, so no grant of theirs outlasts it; what is public must be known to be.
    fn ask_as_everybody(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        asked: &Cache<RepositoryKey, Instant>,
        after: Duration,
    ) {
        let place = (Arc::from(wanted.site.name()), wanted.repository.clone());
        let now = Instant::now();
        let lately = |at: Instant| now.saturating_duration_since(at) < after;
        if asked.get(&place).is_some_and(lately) {
            return;
        }
        asked.insert(place, now);
        let caller = self.principals.stranger(&wanted.caller.trace);
        let wanted = UpstreamRequest {
            caller,
            ..wanted.clone()
        };
        // The question goes on by itself, and its answer is learnt from.
        let (pull, asked) = (Arc::clone(self), self.question(&wanted));
        tokio::spawn(async move {
            let answer = asked.wait().await;
            let is_unproven =
                answer.is_some_and(|answer| matches!(answer.kind, ResponseKind::UnprovenDigest(_)));
            if is_unproven && matches!(wanted.endpoint, Endpoint::Manifest { .. }) {
                // Only the bytes can prove it.
                let _ = pull.fetch_manifest(wanted).await;
            }
        });
    }

    /// The token service gave this account a token, asked at this time, by the clock and by the process's own.
    pub(super) async fn learn_yes_login(
        &self,
        site: &Arc<UpstreamRegistry>,
        account: [u8; 32],
        asked_at: (SystemTime, Instant),
    ) {
        self.note_yes(site, None, account, asked_at).await;
    }

    /// The token service refused this account. Its grants are worth nothing without it.
    pub(super) async fn learn_no_login(&self, site: &Arc<UpstreamRegistry>, account: [u8; 32]) {
        self.drop_right(site, None, account).await;
    }

    /// On the disk before the client hears of its refusal.
    async fn drop_right(
        &self,
        site: &Arc<UpstreamRegistry>,
        repository: Option<&Repository>,
        principal: [u8; 32],
    ) {
        let dropping = {
            let _order = self.refused.order();
            self.refused
                .last
                .insert(right(site, repository, principal), Instant::now());
            self.store.revoke_grant(grant(site, repository, &principal))
        };
        if !dropping.await {
            tracing::error!(
                upstream = site.name(),
                "a right was taken back, and a crash soon after might bring it back"
            );
        }
    }

    /// Whether the upstream has refused this caller in this repository since `at`.
    pub(super) fn refused_since(&self, wanted: &UpstreamRequest, at: Instant) -> bool {
        self.denied_at(wanted).is_some_and(|denied| denied >= at)
    }

    /// When the upstream last denied this caller this repository.
    pub(super) fn denied_at(&self, wanted: &UpstreamRequest) -> Option<Instant> {
        let (site, repository) = (&wanted.site, &wanted.repository);
        let right = if is_anonymous(wanted) {
            self.right_of_all(site, repository)
        } else {
            right(site, Some(repository), wanted.caller.principal)
        };
        self.refused.last.get(&right)
    }

    /// The right of whoever has no credential. The cache asks without one also in its own name (`shared`), and a reload
    /// may come between that and a client's question.
    fn right_of_all(&self, site: &UpstreamRegistry, repository: &Repository) -> GrantKey {
        right(site, Some(repository), self.principals.anonymous())
    }

    /// Whether a no was heard since the question was put.
    fn overtaken(&self, right: &GrantKey, asked_at: Instant) -> bool {
        let last = self.refused.last.get(right);
        last.is_some_and(|revalidation| revalidation >= asked_at)
    }

    async fn set_public(
        &self,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        since: Option<SystemTime>,
        turn: KeyedGuard<RepositoryKey>,
    ) {
        let (site, repository) = (Arc::clone(site), repository.clone());
        let noted = write_in_turn(&self.store, turn, move |store| {
            store.set_public(site.name(), &repository, since)
        });
        let noted = noted.await;
        super::revalidate::report(noted, "keep whether a repository is public");
    }
}

impl RecentDenials {
    fn order(&self) -> MutexGuard<'_, ()> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A write that ends its turn: also where nobody waits for it, the next in turn comes after it.
async fn write_in_turn<T: Send + 'static>(
    store: &AsyncStore,
    turn: KeyedGuard<RepositoryKey>,
    deed: impl FnOnce(&Store) -> T + Send + 'static,
) -> T {
    let write = store.write(move |store| {
        let done = deed(store);
        drop(turn);
        done
    });
    write.await
}

fn place(site: &UpstreamRegistry, repository: &Repository) -> RepositoryKey {
    (site.name().into(), repository.clone())
}

fn grant<'a>(
    site: &'a UpstreamRegistry,
    repository: Option<&'a Repository>,
    principal: &'a [u8; 32],
) -> crate::store::grants::GrantId<'a> {
    crate::store::grants::GrantId {
        upstream: site.name(),
        repository,
        principal,
    }
}

fn right(site: &UpstreamRegistry, repository: Option<&Repository>, principal: [u8; 32]) -> GrantKey {
    (site.name().into(), repository.cloned(), principal)
}

/// Whether a yes to a question put at `asked_at` is worth a write: what is noted is older, and no longer lately. A moment
/// in the future, from before the clock was set back, is written anew too.
fn renews(noted: Option<SystemTime>, asked_at: SystemTime, now: SystemTime) -> bool {
    noted.is_none_or(|noted| noted > now || (noted < asked_at && !age::is_within(noted, RENEW_AFTER, now)))
}

/// RFC 6750: what a token service gives, for minutes. Other credentials are the same at the next pull.
fn is_token(wanted: &UpstreamRequest) -> bool {
    let scheme = wanted
        .shown()
        .and_then(|shown| shown.as_bytes().split(|byte| *byte == b' ').next());
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"Bearer"))
}

fn is_anonymous(wanted: &UpstreamRequest) -> bool {
    matches!(wanted.caller.credential, Credential::Anonymous)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::pin::pin;
    use std::sync::mpsc::channel;
    use std::task::{Context, Waker};

    use tokio::task::spawn_blocking;

    use super::*;
    use crate::store::Settings;
    use crate::store::fs::MemoryFs;

    fn store() -> Store {
        Store::open(
            &Settings::default(),
            Arc::new(MemoryFs::new()),
            SystemTime::UNIX_EPOCH,
        )
        .unwrap()
    }

    #[tokio::test]
    async fn t08_no_waits_for_the_write_of_a_yes_whose_client_left() {
        let store = AsyncStore::new(Arc::new(spawn_blocking(store).await.unwrap()));
        let place: RepositoryKey = ("docker.io".into(), "library/alpine".parse().unwrap());
        let mut context = Context::from_waker(Waker::noop());
        let turns = KeyedLocks::default();
        let (let_go, is_let_go) = channel::<()>();
        let turn = turns.turn(place.clone()).await;
        {
            let yes = pin!(write_in_turn(&store, turn, move |_| is_let_go.recv().unwrap()));
            assert!(yes.poll(&mut context).is_pending());
        }
        let mut no = pin!(turns.turn(place));
        assert!(no.as_mut().poll(&mut context).is_pending());
        let_go.send(()).unwrap();
        no.await;
        spawn_blocking(move || drop(store)).await.unwrap();
    }
}
