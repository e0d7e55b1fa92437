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

/// Longest time for which a record that was read is remembered, with the precision of its times.
const READ_AGE: Duration = Duration::from_secs(2);

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
    /// They were not read, because of the limit of requests.
    Capped,
}

/// What the records say about a client in a repository, and about its login at the token service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RecordedRights {
    repository: RecordedGrant,
    /// `None` without an account.
    login: Option<RecordedGrant>,
}

/// Rights of this cache that end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::proxy) struct EndedRights {
    /// The grants in the repository, of the client and its account.
    repository: bool,
    /// The login of the account.
    login: bool,
    /// The records were not read, because of the limit of requests. No right ends, and none counts for this request.
    is_capped: bool,
}

impl EndedRights {
    /// Whether one ended, or none counts.
    pub(in crate::proxy) fn any(self) -> bool {
        self.repository || self.login || self.is_capped
    }

    /// Whether no grant counts for this request, because the records were not read.
    pub(in crate::proxy) fn is_capped(self) -> bool {
        self.is_capped
    }
}

impl RecordedGrant {
    fn of(read: RecordRead<GrantState>) -> Self {
        let found: Dated<GrantState> = match read {
            RecordRead::Found(found) => found,
            RecordRead::Unread { is_capped: true } => return Self::Capped,
            RecordRead::Absent | RecordRead::Unread { is_capped: false } => return Self::Unknown,
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
            (Self::Capped, _) | (_, Self::Capped) => Self::Capped,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
        }
    }

    /// The same where the upstream denied the client at this cache so long ago. The bucket may lack that denial.
    fn after_denial(self, denied: Option<Duration>) -> Self {
        match (self, denied) {
            (Self::Granted(age), Some(denied)) if denied <= age.saturating_add(READ_AGE) => {
                Self::Denied(denied)
            }
            _ => self,
        }
    }
}

impl RecordedRights {
    const UNKNOWN: Self = Self {
        repository: RecordedGrant::Unknown,
        login: None,
    };

    fn all(self) -> RecordedGrant {
        match self.login {
            Some(login) => self.repository.and(login),
            None => self.repository,
        }
    }

    /// The rights of this cache that these denials end. A denial of the login ends what is older of the account, whatever
    /// the client has pulled since with an earlier token.
    fn ends(
        self,
        latest_grant: Option<SystemTime>,
        login: Option<SystemTime>,
        now: SystemTime,
    ) -> EndedRights {
        let is_older = |since: Option<SystemTime>, denial| match denial {
            RecordedGrant::Denied(age) => since.is_none_or(|since| may_be_older(since, age, now)),
            _ => false,
        };
        let login_denial = self.login.unwrap_or(RecordedGrant::Unknown);
        EndedRights {
            repository: is_older(latest_grant, self.repository) || is_older(latest_grant, login_denial),
            login: login.is_some() && is_older(login, login_denial),
            is_capped: [Some(self.repository), self.login].contains(&Some(RecordedGrant::Capped)),
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
        let login = TokenRequest::basic(shown)?;
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
    /// What the records of other caches say about this client. A later denial at this cache counts too.
    async fn recorded_rights(&self, is_known: bool) -> RecordedRights {
        if !self.may_use_records() || !self.proxy.shared.has_grant_records() {
            return RecordedRights::UNKNOWN;
        }
        let (registry, shown) = (&self.request.registry, self.request.authorization.as_ref());
        let client = self.proxy.recorded_client(registry, self.repository, shown);
        let Some(client) = client else {
            return RecordedRights::UNKNOWN;
        };
        let read = |repository| {
            let place = (registry.identity_in_records(), repository);
            self.proxy.shared.grant_record(place, &client.principal, is_known)
        };
        let here = read(Some(self.repository));
        let (here, login) = if client.is_account {
            let (here, login) = tokio::join!(here, read(None));
            (here, Some(login))
        } else {
            (here.await, None)
        };
        let denied = |repository| {
            let principals = self.own_principals().into_iter().flatten();
            let denied =
                principals.filter_map(|principal| self.proxy.denied_for(registry, repository, principal));
            denied.min()
        };
        RecordedRights {
            repository: RecordedGrant::of(here).after_denial(denied(Some(self.repository))),
            login: login.map(|login| RecordedGrant::of(login).after_denial(denied(None))),
        }
    }

    async fn recorded_grant(&self) -> RecordedGrant {
        self.recorded_rights(false).await.all()
    }

    /// The client and its account. A local token is none: it stands for its account only.
    fn own_principals(&self) -> [Option<[u8; 32]>; 2] {
        let own =
            (self.caller.principal != self.proxy.principals.anonymous()).then_some(self.caller.principal);
        [own, self.own_account()]
    }

    fn own_account(&self) -> Option<[u8; 32]> {
        let (registry, shown) = (&self.request.registry, self.request.authorization.as_ref());
        self.proxy.account(registry, self.repository, shown)
    }

    /// Whether the record of another cache permits a client without a grant of this cache to read the repository.
    pub(in crate::proxy) async fn is_granted_by_record(&self) -> bool {
        let found = self.recorded_grant().await;
        matches!(found, RecordedGrant::Granted(age) if age < self.rule.grant_ttl_offline)
    }

    /// This read with the right that the record of another cache gives, if the client has none at this cache.
    pub(in crate::proxy) async fn with_recorded_grant(self) -> Self {
        if self.authorization_of_client() != Authorization::Unknown {
            return self;
        }
        match self.recorded_grant().await {
            RecordedGrant::Granted(age) => {
                let at = self.request.now.checked_sub(age);
                self.granted_by_record(at.unwrap_or(SystemTime::UNIX_EPOCH))
            }
            RecordedGrant::Denied(_) | RecordedGrant::Unknown | RecordedGrant::Capped => self,
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

    /// Ends the rights of this client that are older than a denial which another cache recorded. If there is one, the
    /// request must be decided again.
    pub(in crate::proxy) async fn ends_revoked_grant(&self) -> EndedRights {
        if self.authorization_of_client() == Authorization::Unknown {
            return EndedRights::default();
        }
        let rights = self.recorded_rights(true).await;
        let now = self.proxy.clock.now();
        let ended = rights.ends(self.latest_grant(), self.login_time(), now);
        let registry = &self.request.registry;
        if ended.repository {
            for principal in self.own_principals().into_iter().flatten() {
                self.proxy
                    .revoke(registry, Some(self.repository), principal)
                    .await;
            }
        }
        if let Some(account) = self.own_account().filter(|_| ended.login) {
            self.proxy.revoke(registry, None, account).await;
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// The client pulled with its old token 90 s after the token service denied its account.
    #[test]
    fn denied_login_ends_in_spite_of_a_later_pull() {
        let rights = RecordedRights {
            repository: RecordedGrant::Granted(secs(10)),
            login: Some(RecordedGrant::Denied(secs(100))),
        };
        let ended = rights.ends(Some(at(990)), Some(at(800)), at(1000));
        assert!(ended.login && !ended.repository && ended.any(), "{ended:?}");
        let again = rights.ends(Some(at(990)), Some(at(980)), at(1000));
        assert!(!again.any(), "logged in again: {again:?}");
        let older = rights.ends(Some(at(890)), Some(at(800)), at(1000));
        assert!(older.login && older.repository, "{older:?}");
    }

    #[test]
    fn recorded_denial_ends_no_later_grant() {
        let rights = RecordedRights {
            repository: RecordedGrant::Denied(secs(100)),
            login: None,
        };
        for (since, is_ended) in [(800, true), (905, true), (906, false), (990, false)] {
            let ended = rights.ends(Some(at(since)), None, at(1000));
            assert_eq!(ended.repository, is_ended, "{since}");
            assert_eq!(ended.any(), is_ended, "{since}");
        }
    }

    #[test]
    fn unread_record_at_the_limit_permits_nothing() {
        let rights = RecordedRights {
            repository: RecordedGrant::of(RecordRead::Unread { is_capped: true }),
            login: None,
        };
        let ended = rights.ends(Some(at(990)), None, at(1000));
        assert!(ended.any() && !ended.repository, "{ended:?}");
        let silent = RecordedRights {
            repository: RecordedGrant::of(RecordRead::Unread { is_capped: false }),
            login: None,
        };
        assert!(!silent.ends(Some(at(990)), None, at(1000)).any());
        // An earlier denial in the repository does not tell whether the login was denied later.
        let rights = RecordedRights {
            repository: RecordedGrant::Denied(Duration::from_secs(500)),
            login: Some(RecordedGrant::Capped),
        };
        let ended = rights.ends(Some(at(990)), None, at(1000));
        assert!(ended.is_capped() && !ended.repository, "{ended:?}");
    }

    #[test]
    fn own_denial_overrides_an_earlier_record() {
        let recorded = RecordedGrant::Granted(secs(60));
        assert_eq!(recorded.after_denial(None), recorded);
        assert_eq!(
            recorded.after_denial(Some(secs(59))),
            RecordedGrant::Denied(secs(59))
        );
        assert_eq!(
            recorded.after_denial(Some(secs(70))),
            recorded,
            "granted again since"
        );
    }
}
