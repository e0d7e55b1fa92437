//! Grants and denials from upstream responses: a success grants, a 401 or 403 revokes, any other response changes
//! nothing.
//!
//! Only a proven success for a manifest or a blob counts (`upstream/proof.rs`). Many registries return lists to
//! clients that may not pull, and answer a referrers request with an empty list for everyone.
//!
//! Responses can arrive out of order. A success for a request that was sent before a denial arrived must not restore
//! the grant.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::concurrency::{KeyedGuard, KeyedLocks, detached};
use super::manifest_fetch::UpstreamRequest;
use super::{ProxyService, UpstreamRegistry};
use crate::age;
use crate::oci::{Endpoint, Repository};
use crate::policy::authz::{GrantEvidence, public_by_record};
use crate::shared::RecordPrincipal;
use crate::store::{AsyncStore, Store};
use crate::upstream::{Credential, ResponseKind, UpstreamResponse};

/// Age at which a stored grant or public mark is written again. A busy tag must not cost a write per pull.
const RENEW_AFTER: Duration = Duration::from_secs(60);

/// Minimum interval between anonymous probes of a public repository after denied credentials. A wrong password is
/// denied too.
const REPROBE_INTERVAL: Duration = Duration::from_secs(60);

/// Minimum interval between anonymous probes of a repository that clients read with tokens.
const PROBE_INTERVAL: Duration = Duration::from_secs(3600);

/// An age by the storage's clock is longer than the true one by less than this.
const RECORD_PRECISION: Duration = Duration::from_secs(5);

/// Denials remembered to detect superseded responses.
const DENIALS_MAX: usize = 16_384;

type RepositoryKey = (Arc<str>, Repository);
/// Upstream, repository and principal. Without a repository: the grant of the token service.
type GrantKey = (Arc<str>, Option<Repository>, [u8; 32]);

/// Recent denials by the upstream, with their time.
pub(super) struct RecentDenials {
    denied_at: Cache<GrantKey, Instant>,
    reprobed_at: Cache<RepositoryKey, Instant>,
    probed_at: Cache<RepositoryKey, Instant>,
    /// Makes the check of `denied_at` and the resulting grant update atomic in memory.
    grants: Mutex<()>,
    /// Does for public marks what `grants` does for grants, by repository. The mark is written to disk under the lock.
    public_locks: KeyedLocks<RepositoryKey>,
}

impl Default for RecentDenials {
    fn default() -> Self {
        Self {
            denied_at: Cache::new(DENIALS_MAX),
            reprobed_at: Cache::new(DENIALS_MAX),
            probed_at: Cache::new(DENIALS_MAX),
            grants: Mutex::default(),
            public_locks: KeyedLocks::default(),
        }
    }
}

impl ProxyService {
    /// Evidence for a principal, and for its account, in a repository.
    pub(super) async fn grants_of(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        principal: [u8; 32],
        account: Option<[u8; 32]>,
    ) -> GrantEvidence {
        let here = Some(repository);
        let known = |repository, principal: &[u8; 32]| {
            self.store
                .grant_in_memory(store_key(registry, repository, principal))
        };
        let in_memory = || {
            Some(GrantEvidence {
                shared: registry.is_shared(),
                granted_at: known(here, &principal)?,
                token_issued_at: account.map_or(Some(None), |account| known(None, &account))?,
                account_granted_at: account.map_or(Some(None), |account| known(here, &account))?,
                anonymous_granted_at: self
                    .store
                    .in_memory(|view| view.public_since(registry.name(), repository))?,
                recorded_at: None,
                is_in_repository: false,
            })
        };
        match in_memory() {
            Some(evidence) => evidence,
            // Boxed: needed once per principal.
            None => Box::pin(self.read_grants(registry, repository, principal, account)).await,
        }
    }

    async fn read_grants(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        principal: [u8; 32],
        account: Option<[u8; 32]>,
    ) -> GrantEvidence {
        let of_account = async {
            let Some(account) = account else {
                return (None, None);
            };
            tokio::join!(
                self.store.grant(store_key(registry, None, &account)),
                self.store.grant(store_key(registry, Some(repository), &account)),
            )
        };
        let (granted_at, (token_issued_at, account_granted_at), anonymous_granted_at) = tokio::join!(
            self.store
                .grant(store_key(registry, Some(repository), &principal)),
            of_account,
            self.public_since(registry, repository),
        );
        GrantEvidence {
            shared: registry.is_shared(),
            granted_at,
            token_issued_at,
            account_granted_at,
            anonymous_granted_at,
            recorded_at: None,
            is_in_repository: false,
        }
    }

    /// When the repository was last proven readable without a credential, if that still holds.
    pub(super) async fn public_since(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
    ) -> Option<SystemTime> {
        self.read_cache(registry, repository, |cached| {
            cached
                .view
                .public_since(cached.registry.name(), cached.repository)
        })
        .await
    }

    /// Records the grant or denial of a response, even if the client has left. `sent_at` is the time at which the
    /// request was sent.
    pub(super) async fn record_response(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        response: &UpstreamResponse,
        sent_at: Instant,
    ) {
        match response.kind {
            ResponseKind::Digest(_) => self.record_grant(upstream_request, sent_at).await,
            ResponseKind::Denied => {
                let (proxy, upstream_request, response) =
                    (Arc::clone(self), upstream_request.clone(), response.clone());
                detached(async move { proxy.record_denial(&upstream_request, &response).await }).await;
            }
            ResponseKind::UnprovenDigest(_)
            | ResponseKind::NoDigest
            | ResponseKind::NotFound
            | ResponseKind::Unavailable(_)
            | ResponseKind::Other(_) => {}
        }
    }

    /// Records a grant for this caller, proven by the registry's own response headers or by verified bytes, never by
    /// a status code alone. Recorded even if the client has left.
    pub(super) async fn record_grant(self: &Arc<Self>, upstream_request: &UpstreamRequest, sent_at: Instant) {
        if !matches!(
            upstream_request.endpoint,
            Endpoint::Manifest { .. } | Endpoint::Blob { .. }
        ) {
            return;
        }
        let (proxy, upstream_request) = (Arc::clone(self), upstream_request.clone());
        detached(async move { proxy.write_grants(&upstream_request, sent_at).await }).await;
    }

    async fn write_grants(self: &Arc<Self>, upstream_request: &UpstreamRequest, sent_at: Instant) {
        let UpstreamRequest {
            registry,
            repository,
            caller,
            ..
        } = upstream_request;
        let now = self.clock.now();
        let at = upstream_request.arrived_at.min(now);
        let public_since = self.public_since(registry, repository).await;
        if is_anonymous(upstream_request) {
            if renews(public_since, at, now) {
                let guard = self
                    .denials
                    .public_locks
                    .lock(repository_key(registry, repository))
                    .await;
                if !self.is_superseded(&self.anonymous_grant_key(registry, repository), sent_at) {
                    self.set_public(registry, repository, Some(at), guard).await;
                    self.note_public(registry, repository, true, sent_at);
                }
            }
        } else {
            let account = self.account(registry, repository, upstream_request.client_credential());
            for principal in [Some(caller.principal), account].into_iter().flatten() {
                self.write_grant(registry, Some(repository), principal, (at, sent_at))
                    .await;
            }
            // A public repository needs no other right, and its upstream may ignore guessed credentials.
            if public_since.is_none() {
                self.note_grant(upstream_request, sent_at);
            }
        }
        if is_bearer(upstream_request) && !registry.is_shared() && public_since.is_none() {
            self.probe_anonymous(upstream_request, &self.denials.probed_at, PROBE_INTERVAL);
        }
    }

    /// Stores a grant. `at` and `sent_at` are the time of the request, by wall clock and monotonic clock.
    async fn write_grant(
        &self,
        registry: &Arc<UpstreamRegistry>,
        repository: Option<&Repository>,
        principal: [u8; 32],
        (at, sent_at): (SystemTime, Instant),
    ) {
        let now = self.clock.now();
        // Not later than a clock that was set back since.
        let at = at.min(now);
        let granted = store_key(registry, repository, &principal);
        if renews(self.store.grant(granted).await, at, now) {
            let _guard = self.denials.grants.lock();
            if !self.is_superseded(&grant_key(registry, repository, principal), sent_at) {
                self.store.put_grant(granted, at);
            }
        }
    }

    async fn record_denial(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        response: &UpstreamResponse,
    ) {
        let UpstreamRequest {
            registry,
            repository,
            caller,
            ..
        } = upstream_request;
        if is_anonymous(upstream_request) {
            self.store_challenge_template(registry, repository, response)
                .await;
            let guard = self
                .denials
                .public_locks
                .lock(repository_key(registry, repository))
                .await;
            let key = self.anonymous_grant_key(registry, repository);
            let now = Instant::now();
            self.denials.denied_at.insert(key, now);
            let was_public = self.public_since(registry, repository).await.is_some();
            if was_public {
                self.set_public(registry, repository, None, guard).await;
            } else {
                // Other denials do not wait for the bucket.
                drop(guard);
            }
            if was_public {
                // Before the client gets the denial, as on the disk.
                self.revoke_public(registry, repository, now).await;
            } else {
                self.note_public(registry, repository, false, now);
            }
            return;
        }
        let account = self.account(registry, repository, upstream_request.client_credential());
        let now = Instant::now();
        let was_granted = self
            .had_grant(registry, Some(repository), account.unwrap_or(caller.principal))
            .await;
        let own = self.revoke(registry, Some(repository), caller.principal);
        let accounts = async {
            if let Some(account) = account {
                self.revoke(registry, Some(repository), account).await;
            }
        };
        tokio::join!(own, accounts);
        self.revoke_recorded(upstream_request, (now, was_granted)).await;
        if !registry.is_shared() && self.public_since(registry, repository).await.is_some() {
            self.probe_anonymous(upstream_request, &self.denials.reprobed_at, REPROBE_INTERVAL);
        }
    }

    /// Sends the same request without a credential in the background, at most once per `after`.
    ///
    /// After a denial: a closed repository first denies requests with a credential, and its public mark would survive
    /// if no anonymous request were sent. After a success with a token: clients without a login also fetch a new
    /// token for each pull, so no grant outlives it, and the public mark must be established.
    fn probe_anonymous(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        last_probe: &Cache<RepositoryKey, Instant>,
        after: Duration,
    ) {
        let key = (
            Arc::from(upstream_request.registry.name()),
            upstream_request.repository.clone(),
        );
        let now = Instant::now();
        let lately = |at: Instant| now.saturating_duration_since(at) < after;
        if last_probe.get(&key).is_some_and(lately) {
            return;
        }
        last_probe.insert(key, now);
        let caller = self.principals.anonymous_caller(&upstream_request.caller.trace);
        let upstream_request = UpstreamRequest {
            caller,
            ..upstream_request.clone()
        };
        // The request runs detached, and its response is recorded.
        let (proxy, flight) = (Arc::clone(self), self.coalesced_head(&upstream_request));
        tokio::spawn(async move {
            let response = flight.wait().await;
            let is_unproven =
                response.is_some_and(|response| matches!(response.kind, ResponseKind::UnprovenDigest(_)));
            if is_unproven && matches!(upstream_request.endpoint, Endpoint::Manifest { .. }) {
                // Only the bytes can prove the success.
                let _ = proxy.fetch_manifest(upstream_request).await;
            }
        });
    }

    /// Records that the token service issued a token to this account. `sent_at` is the time of the request, by wall
    /// clock and monotonic clock.
    pub(super) async fn record_login(
        &self,
        registry: &Arc<UpstreamRegistry>,
        account: [u8; 32],
        sent_at: (SystemTime, Instant),
    ) {
        self.write_grant(registry, None, account, sent_at).await;
    }

    /// Records that the token service denied this account. The account's grants depend on it.
    pub(super) async fn record_login_denied(
        &self,
        registry: &Arc<UpstreamRegistry>,
        (account, recorded): (&[u8; 32], Option<&RecordPrincipal>),
    ) {
        let now = Instant::now();
        let was_granted = self.had_grant(registry, None, *account).await;
        self.revoke(registry, None, *account).await;
        self.revoke_recorded_login(registry, recorded, (now, was_granted))
            .await;
    }

    /// Whether this cache has a grant that a denial ends at other caches too.
    async fn had_grant(
        &self,
        registry: &Arc<UpstreamRegistry>,
        repository: Option<&Repository>,
        principal: [u8; 32],
    ) -> bool {
        let is_recorded = self.shared.writes_grants();
        is_recorded
            && self
                .store
                .grant(store_key(registry, repository, &principal))
                .await
                .is_some()
    }

    /// Revokes a grant. Written to disk before the client receives its denial.
    pub(super) async fn revoke(
        &self,
        registry: &Arc<UpstreamRegistry>,
        repository: Option<&Repository>,
        principal: [u8; 32],
    ) {
        let dropping = {
            let _guard = self.denials.grants.lock();
            self.denials
                .denied_at
                .insert(grant_key(registry, repository, principal), Instant::now());
            self.store
                .revoke_grant(store_key(registry, repository, &principal))
        };
        if !dropping.await {
            tracing::error!(
                upstream = registry.name(),
                "grant revoked in memory but not persisted"
            );
        }
    }

    /// Whether the upstream denied this caller in this repository since `at`.
    pub(super) fn denied_since(&self, upstream_request: &UpstreamRequest, at: Instant) -> bool {
        self.denied_at(upstream_request)
            .is_some_and(|denied| denied >= at)
    }

    /// When the upstream last denied this caller in this repository.
    pub(super) fn denied_at(&self, upstream_request: &UpstreamRequest) -> Option<Instant> {
        let (registry, repository) = (&upstream_request.registry, &upstream_request.repository);
        let key = if is_anonymous(upstream_request) {
            self.anonymous_grant_key(registry, repository)
        } else {
            grant_key(registry, Some(repository), upstream_request.caller.principal)
        };
        self.denials.denied_at.get(&key)
    }

    /// How long ago the upstream last denied this principal, or its token service without a repository.
    pub(super) fn denied_for(
        &self,
        registry: &UpstreamRegistry,
        repository: Option<&Repository>,
        principal: [u8; 32],
    ) -> Option<Duration> {
        let denied = self
            .denials
            .denied_at
            .get(&grant_key(registry, repository, principal))?;
        Some(denied.elapsed())
    }

    /// Key of anonymous access. Also used for requests that the cache sends in its own name (`shared`), because a
    /// reload may come between such a request and a client's.
    fn anonymous_grant_key(&self, registry: &UpstreamRegistry, repository: &Repository) -> GrantKey {
        grant_key(registry, Some(repository), self.principals.anonymous())
    }

    /// Whether a denial arrived after the request was sent.
    fn is_superseded(&self, key: &GrantKey, sent_at: Instant) -> bool {
        let last = self.denials.denied_at.get(key);
        last.is_some_and(|revalidation| revalidation >= sent_at)
    }

    /// Marks the repository as public by the record of another cache, unless the upstream denied this here since the
    /// record, which had age `age` at `now`.
    pub(super) async fn import_public_mark(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        age: Duration,
        now: Instant,
    ) {
        let guard = self
            .denials
            .public_locks
            .lock(repository_key(registry, repository))
            .await;
        let denied = self
            .denials
            .denied_at
            .get(&self.anonymous_grant_key(registry, repository));
        let is_superseded = denied.is_some_and(|denied| now.saturating_duration_since(denied) <= age);
        if is_superseded || self.public_since(registry, repository).await.is_some() {
            return;
        }
        self.set_public(registry, repository, Some(public_by_record()), guard)
            .await;
    }

    /// Ends a public mark because another cache recorded, `age` ago, that the repository is not public.
    pub(super) async fn end_public_mark(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        age: Duration,
    ) {
        let guard = self
            .denials
            .public_locks
            .lock(repository_key(registry, repository))
            .await;
        let now = self.clock.now();
        let since = self.public_since(registry, repository).await;
        if since.is_some_and(|since| may_be_older(since, age, now)) {
            self.set_public(registry, repository, None, guard).await;
        }
    }

    async fn set_public(
        &self,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        since: Option<SystemTime>,
        guard: KeyedGuard<RepositoryKey>,
    ) {
        let (registry, repository) = (Arc::clone(registry), repository.clone());
        let noted = write_holding_lock(&self.store, guard, move |store| {
            store.set_public(registry.name(), &repository, since)
        });
        let noted = noted.await;
        super::log_store_error(noted, "store public mark");
    }
}

/// Writes while holding the lock. The lock is released after the write, even if the caller was dropped.
async fn write_holding_lock<T: Send + 'static>(
    store: &AsyncStore,
    guard: KeyedGuard<RepositoryKey>,
    op: impl FnOnce(&Store) -> T + Send + 'static,
) -> T {
    let write = store.write(move |store| {
        let done = op(store);
        drop(guard);
        done
    });
    write.await
}

fn repository_key(registry: &UpstreamRegistry, repository: &Repository) -> RepositoryKey {
    (registry.shared_name(), repository.clone())
}

fn store_key<'a>(
    registry: &'a UpstreamRegistry,
    repository: Option<&'a Repository>,
    principal: &'a [u8; 32],
) -> crate::store::grants::GrantId<'a> {
    crate::store::grants::GrantId {
        upstream: registry.name(),
        repository,
        principal,
    }
}

fn grant_key(registry: &UpstreamRegistry, repository: Option<&Repository>, principal: [u8; 32]) -> GrantKey {
    (registry.shared_name(), repository.cloned(), principal)
}

/// Whether a success for a request sent at `sent_at` is worth a write: the stored time is older than it and not
/// recent. A time in the future, from before the clock was set back, is replaced too.
fn renews(noted: Option<SystemTime>, sent_at: SystemTime, now: SystemTime) -> bool {
    noted.is_none_or(|noted| noted > now || (noted < sent_at && !age::is_within(noted, RENEW_AFTER, now)))
}

/// Whether the credential is a bearer token (RFC 6750), which a token service issues for minutes. Other credentials
/// are the same at the next pull.
fn is_bearer(upstream_request: &UpstreamRequest) -> bool {
    let scheme = upstream_request
        .client_credential()
        .and_then(|shown| shown.as_bytes().split(|byte| *byte == b' ').next());
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"Bearer"))
}

/// Whether a mark of this time may be older than a record of age `age`. The age of a time in the future, from before the
/// clock was set back, is not known.
pub(super) fn may_be_older(since: SystemTime, age: Duration, now: SystemTime) -> bool {
    now.duration_since(since)
        .map_or(true, |marked| marked.saturating_add(RECORD_PRECISION) >= age)
}

fn is_anonymous(upstream_request: &UpstreamRequest) -> bool {
    matches!(upstream_request.caller.credential, Credential::Anonymous)
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

    #[test]
    fn mark_ahead_of_the_clock_ends_by_a_denial() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let age = Duration::from_secs(30);
        for (since, ends) in [
            (10, true),
            (70, true),
            (75, true),
            (76, false),
            (101, true),
            (5000, true),
        ] {
            assert_eq!(may_be_older(at(since), age, at(100)), ends, "{since}");
        }
    }

    #[tokio::test]
    async fn t08_denial_waits_for_grant_write_of_dropped_request() {
        let store = AsyncStore::new(Arc::new(spawn_blocking(store).await.unwrap()));
        let key: RepositoryKey = ("docker.io".into(), "library/alpine".parse().unwrap());
        let mut context = Context::from_waker(Waker::noop());
        let locks = KeyedLocks::default();
        let (release, is_released) = channel::<()>();
        let guard = locks.lock(key.clone()).await;
        {
            let yes = pin!(write_holding_lock(&store, guard, move |_| is_released
                .recv()
                .unwrap()));
            assert!(yes.poll(&mut context).is_pending());
        }
        let mut no = pin!(locks.lock(key));
        assert!(no.as_mut().poll(&mut context).is_pending());
        release.send(()).unwrap();
        no.await;
        spawn_blocking(move || drop(store)).await.unwrap();
    }
}
