//! Grant records in the request path: rights of clients that other caches have seen, and denials that end them.
//!
//! A grant record counts as an expired grant: it opens something only while the upstream is unavailable. It is read at
//! each use and never stored, so a denial that another cache records ends it within a second. In an outage, such a denial
//! also ends a grant of this cache that is older.

use std::time::{Duration, SystemTime};

use http::HeaderValue;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::oci::{Repository, TokenRequest};
use crate::policy::Authorization;
use crate::proxy::grants::may_be_older;
use crate::proxy::manifest_fetch::UpstreamRequest;
use crate::proxy::pipeline::ReadContext;
use crate::proxy::{ProxyService, UpstreamRegistry};
use crate::shared::{Dated, GrantState, RecordPrincipal, RecordRead};
use crate::upstream::origin::Origin;

/// A client in grant records.
#[derive(Clone)]
pub(in crate::proxy) struct RecordedClient {
    principal: RecordPrincipal,
    /// The account of a token, which the token service of the upstream must have accepted too.
    is_account: bool,
}

/// What the records say about a client, with its age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RecordedGrant {
    Granted(Duration),
    Denied(Duration),
    /// Nothing, or they could not be read.
    Unknown,
}

impl RecordedGrant {
    fn of(read: RecordRead<GrantState>) -> Self {
        let Some(found): Option<Dated<GrantState>> = read.found() else {
            return Self::Unknown;
        };
        let age = found.age(found.state.at);
        if found.state.is_granted {
            Self::Granted(age)
        } else {
            Self::Denied(age)
        }
    }

    /// Both must grant; the latest denial counts.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Granted(one), Self::Granted(two)) => Self::Granted(one.max(two)),
            (Self::Denied(one), Self::Denied(two)) => Self::Denied(one.min(two)),
            (Self::Denied(age), _) | (_, Self::Denied(age)) => Self::Denied(age),
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
        }
    }
}

impl UpstreamRegistry {
    /// Whether this cache authorizes each client of the upstream by the upstream's response to it.
    fn has_grant_records(&self) -> bool {
        !self.is_shared() && self.has_public_records()
    }
}

/// Writes of grant records.
impl ProxyService {
    /// The account of a login at a token service in records.
    pub(in crate::proxy) fn recorded_account(&self, realm: &Origin, login: &[u8]) -> Option<RecordPrincipal> {
        let realm = realm.to_string();
        let identity = Zeroizing::new([b"account\0", realm.as_bytes(), b"\0", login].concat());
        self.shared.principal(&identity)
    }

    /// The client in records. `None` without grant records, and for clients whose credential lasts for minutes only.
    pub(in crate::proxy) fn recorded_client(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        authorization: Option<&HeaderValue>,
    ) -> Option<RecordedClient> {
        let shown = authorization.filter(|_| registry.has_grant_records())?;
        if let Some(principal) = self.account_in_records(registry, repository, shown) {
            return Some(RecordedClient {
                principal,
                is_account: true,
            });
        }
        // Equal for each spelling of the header.
        let login = TokenRequest::read(Some(shown), None, &[]).credential?;
        let identity = Zeroizing::new([b"basic\0", login.as_slice()].concat());
        Some(RecordedClient {
            principal: self.shared.principal(&identity)?,
            is_account: false,
        })
    }

    /// Notes that the upstream let this client read the repository.
    pub(in crate::proxy) fn note_grant(&self, upstream_request: &UpstreamRequest, sent_at: Instant) {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        if !self.shared.writes_grants() {
            return;
        }
        let shown = upstream_request.client_credential();
        if let Some(client) = self.recorded_client(registry, repository, shown) {
            let place = (registry.identity_in_records(), Some(repository));
            self.shared.note_grant(place, &client.principal, sent_at);
        }
    }

    /// Records that the upstream denied this client, before the response to it. `was_granted`: by a grant of this cache.
    pub(in crate::proxy) async fn revoke_recorded(
        &self,
        upstream_request: &UpstreamRequest,
        (now, was_granted): (Instant, bool),
    ) {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        let shown = upstream_request.client_credential();
        if let Some(client) = self.recorded_client(registry, repository, shown) {
            let place = (registry.identity_in_records(), Some(repository));
            self.shared
                .revoke_grant(place, &client.principal, (now, was_granted))
                .await;
        }
    }

    /// Notes that the token service issued a token to this account.
    pub(in crate::proxy) fn note_login(
        &self,
        registry: &UpstreamRegistry,
        account: Option<&RecordPrincipal>,
        sent_at: Instant,
    ) {
        if let Some(account) = account.filter(|_| registry.has_grant_records()) {
            let place = (registry.identity_in_records(), None);
            self.shared.note_grant(place, account, sent_at);
        }
    }

    /// Records that the token service denied this account.
    pub(in crate::proxy) async fn revoke_recorded_login(
        &self,
        registry: &UpstreamRegistry,
        account: Option<&RecordPrincipal>,
        (now, was_granted): (Instant, bool),
    ) {
        if let Some(account) = account.filter(|_| registry.has_grant_records()) {
            let place = (registry.identity_in_records(), None);
            self.shared.revoke_grant(place, account, (now, was_granted)).await;
        }
    }
}

/// Reads of grant records.
impl ReadContext<'_> {
    /// What the records of other caches say about this client.
    async fn recorded_grant(&self, is_known: bool) -> RecordedGrant {
        if !self.may_use_records() || !self.proxy.shared.has_grant_records() {
            return RecordedGrant::Unknown;
        }
        let (registry, shown) = (&self.request.registry, self.request.authorization.as_ref());
        let client = self.proxy.recorded_client(registry, self.repository, shown);
        let Some(client) = client else {
            return RecordedGrant::Unknown;
        };
        let read = |repository| {
            let place = (registry.identity_in_records(), repository);
            self.proxy.shared.grant_record(place, &client.principal, is_known)
        };
        let here = read(Some(self.repository));
        if !client.is_account {
            return RecordedGrant::of(here.await);
        }
        let (here, login) = tokio::join!(here, read(None));
        RecordedGrant::of(here).and(RecordedGrant::of(login))
    }

    /// Whether the record of another cache permits a client without a grant of this cache to read the repository.
    pub(in crate::proxy) async fn is_granted_by_record(&self) -> bool {
        let found = self.recorded_grant(false).await;
        matches!(found, RecordedGrant::Granted(age) if age < self.rule.grant_ttl_offline)
    }

    /// This read with the right that the record of another cache gives, if the client has none at this cache.
    pub(in crate::proxy) async fn with_recorded_grant(self) -> Self {
        if self.authorization_of_client() != Authorization::Unknown {
            return self;
        }
        match self.recorded_grant(false).await {
            RecordedGrant::Granted(age) => {
                let at = self.request.now.checked_sub(age);
                self.granted_by_record(at.unwrap_or(SystemTime::UNIX_EPOCH))
            }
            RecordedGrant::Denied(_) | RecordedGrant::Unknown => self,
        }
    }

    /// A read with the right that the record of another cache gives in an outage, if the client has none at this cache.
    pub(in crate::proxy) async fn by_recorded_grant(&self) -> Option<Self> {
        let has_none = self.authorization_of_client() == Authorization::Unknown;
        if !has_none || !self.is_granted_by_record().await {
            return None;
        }
        let read = ReadContext::new(self.proxy, self.request, self.repository).await;
        let read = read.with_recorded_grant().await;
        (read.authorization_of_client() != Authorization::Unknown).then_some(read)
    }

    /// Ends the grants of this client that are older than a denial which another cache recorded. Returns whether there is
    /// one, so that the request must be decided again.
    pub(in crate::proxy) async fn ends_revoked_grant(&self) -> bool {
        if self.authorization_of_client() == Authorization::Unknown {
            return false;
        }
        let RecordedGrant::Denied(age) = self.recorded_grant(true).await else {
            return false;
        };
        let now = self.proxy.clock.now();
        let is_ended = self
            .latest_grant()
            .is_none_or(|since| may_be_older(since, age, now));
        if is_ended {
            let (registry, shown) = (&self.request.registry, self.request.authorization.as_ref());
            let account = self.proxy.account(registry, self.repository, shown);
            for principal in [Some(self.caller.principal), account].into_iter().flatten() {
                self.proxy
                    .revoke(registry, Some(self.repository), principal)
                    .await;
            }
        }
        is_ended
    }
}
