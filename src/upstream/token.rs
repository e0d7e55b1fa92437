//! Bearer token authentication: from a challenge to a token, and the token cache. protocol: distribution-spec "token
//! authentication", distribution's `docs/spec/auth/token.md`.
//!
//! A token belongs to one owner (kind of credential and principal) and is never used for another. The owner is part
//! of every key, both of the cache and of coalesced token requests. A token proves no access; only the registry's
//! response does.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use quick_cache::sync::Cache;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::credentials::UpstreamCredential;
use super::http_client::{Follow, HttpClient, HttpFailure, HttpRequest, HttpResponse};
use super::origin::{Origin, is_one_of, same_host};
use super::rate_limit::{Pause, Windows};
use super::retry_after::{is_limit_by_body, stated_wait};
use crate::oci::endpoint::Endpoint;
use crate::oci::error::ErrorBody;
use crate::oci::failure::UpstreamFailure;
use crate::oci::name::Repository;
use crate::trace_context::TraceContext;

mod protocol;

pub(super) use protocol::parse;
use protocol::{Realm, encoded, query, realm_allowed, with_query};

/// Tokens cached per upstream, over all owners.
const TOKENS_MAX: usize = 4096;
/// Maximum size of a token response.
pub(super) const TOKEN_BODY_BYTES_MAX: usize = 64 * 1024;
/// A token is replaced this long before it expires.
const REFRESH_BEFORE: Duration = Duration::from_secs(10);

/// Owner of a token. Configured, anonymous and client credentials never share tokens, whatever the principal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TokenOwner {
    pub(super) kind: TokenOwnerKind,
    pub(super) principal: [u8; 32],
}

/// The kind of credential that a token was obtained with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum TokenOwnerKind {
    Anonymous,
    Client,
    Configured,
}

/// What a token is valid for.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct TokenKey {
    realm: Realm,
    service: Option<String>,
    /// Sorted and unique.
    scopes: Vec<String>,
    owner: TokenOwner,
}

/// The credential sent to the token service.
pub(super) enum TokenCredential<'a> {
    Anonymous,
    /// A client's `Authorization: Basic`, unchanged.
    Basic(&'a HeaderValue),
    Configured(&'a UpstreamCredential),
}

/// Why no token could be obtained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TokenFailure {
    /// 401 or 403: the credential is wrong.
    Denied(StatusCode),
    /// The token service limits the rate of requests.
    RateLimited(Pause),
    /// No response, with a description for the operator.
    NoResponse(Arc<str>),
    /// An unusable response, with a description for the operator.
    Unusable(Arc<str>),
    /// The realm is an http URL, to which no credential is sent, and https at the same host failed.
    InsecureRealm,
}

/// Why a token request returned no token.
enum FetchError {
    Denied(StatusCode),
    /// With the stated wait.
    RateLimited(Option<Duration>),
    /// No response, with a description for the operator.
    NoResponse(Arc<str>),
    /// An unusable response, with a description for the operator.
    Unusable(Arc<str>),
}

fn unavailable(reason: &str) -> FetchError {
    FetchError::Unusable(reason.into())
}

struct Token {
    /// `Bearer …`. Zeroized on drop; the header made from it lives only as long as a request.
    text: Zeroizing<String>,
    usable_until: Instant,
}

impl Token {
    /// Marked as sensitive.
    fn header(&self) -> HeaderValue {
        // The text was a valid header value when it was parsed.
        let mut header = HeaderValue::from_str(&self.text).unwrap_or_else(|_| HeaderValue::from_static(""));
        header.set_sensitive(true);
        header
    }

    fn is(&self, header: Option<&HeaderValue>) -> bool {
        header.is_some_and(|header| header.as_bytes() == self.text.as_bytes())
    }
}

/// The token of one key, and the lock that coalesces requests for it.
struct TokenSlot {
    /// Number of finished token requests. A caller that waited for a request shares its failure if this number
    /// changed.
    fetches: AtomicU64,
    state: tokio::sync::Mutex<Result<Option<Token>, TokenFailure>>,
}

/// The key and challenge that last worked for a repository, so that the next request carries a token at once.
#[derive(Clone)]
pub(super) struct LastToken {
    pub(super) key: TokenKey,
    /// The registry's challenge before any token was sent.
    pub(super) challenge: Arc<[HeaderValue]>,
}

/// The token services that a probe may contact.
#[derive(Default)]
struct Realms {
    /// The service contacted last, while it has not responded.
    pending: Option<Uri>,
    /// The service that gave no usable response, if that is the last result.
    failed: Option<Uri>,
}

/// Token cache of one upstream. A token is sent only to the URL for which it was obtained, because another URL may be
/// another registry.
pub(super) struct TokenCache {
    slots: Cache<TokenKey, Arc<TokenSlot>>,
    last_tokens: Cache<(Origin, Repository, TokenOwner), LastToken>,
    /// The other registry to which this one redirects, and the key of the token that worked there.
    other_registries: Cache<(Origin, Repository, TokenOwner), (Origin, TokenKey)>,
    realms: parking_lot::Mutex<Realms>,
    /// Rate-limit pauses of token services, by host and owner.
    windows: Windows<(Option<Authority>, TokenOwner)>,
}

impl Default for TokenCache {
    fn default() -> TokenCache {
        TokenCache {
            slots: Cache::new(TOKENS_MAX),
            last_tokens: Cache::new(TOKENS_MAX),
            other_registries: Cache::new(TOKENS_MAX),
            realms: parking_lot::Mutex::default(),
            windows: Windows::default(),
        }
    }
}

impl TokenCache {
    /// Records that a request is sent to a realm.
    fn realm_requested(&self, realm: Uri) {
        self.realms.lock().pending = Some(realm);
    }

    /// Records whether the last request to a realm failed.
    pub(super) fn record_realm(&self, realm: Option<Uri>, has_failed: bool) {
        *self.realms.lock() = Realms {
            pending: None,
            failed: realm.filter(|_| has_failed),
        };
    }
}

/// Token authentication of one upstream under its settings.
pub(super) struct Tokens {
    cache: Arc<TokenCache>,
    /// Further hosts that a realm may have.
    hosts: Vec<String>,
    timeout: Duration,
}

impl TokenKey {
    /// The key for a challenge. `None` if the realm is not allowed (see [`realm_allowed`]). A challenge without a
    /// scope gets the default one, because Artifact Registry issues no anonymous token without.
    pub(super) fn of(
        tokens: &Tokens,
        origin: &Origin,
        (realm, service, scopes): (&str, Option<&str>, &[String]),
        repository: Option<&Repository>,
        owner: TokenOwner,
    ) -> Option<TokenKey> {
        let realm = realm_allowed(origin, realm, &tokens.hosts)?;
        let mut scopes: Vec<String> = scopes.iter().filter(|scope| !scope.is_empty()).cloned().collect();
        if scopes.is_empty() {
            scopes.extend(repository.map(|name| format!("repository:{}:pull", origin.name_of(name))));
        }
        scopes.sort();
        scopes.dedup();
        Some(TokenKey {
            realm,
            service: service.map(str::to_owned),
            scopes,
            owner,
        })
    }
}

impl Tokens {
    pub(super) fn new(cache: Arc<TokenCache>, hosts: Vec<String>, timeout: Duration) -> Tokens {
        Tokens {
            cache,
            hosts,
            timeout,
        }
    }

    /// A token for `key`: the cached one, unless it is about to expire or was just `rejected`, else a new one.
    /// Concurrent callers share one request and its failure.
    pub(super) async fn get(
        &self,
        http: &HttpClient,
        key: &TokenKey,
        credential: TokenCredential<'_>,
        (rejected, trace): (Option<&HeaderValue>, &TraceContext),
    ) -> Result<HeaderValue, TokenFailure> {
        let slot = self.slot(key);
        let seen = slot.fetches.load(Ordering::Acquire);
        let mut state = slot.state.lock().await;
        match &*state {
            Ok(Some(token)) if token.usable_until > Instant::now() && !token.is(rejected) => {
                return Ok(token.header());
            }
            Err(failure) if slot.fetches.load(Ordering::Acquire) != seen => return Err(failure.clone()),
            Ok(_) | Err(_) => {}
        }
        let window_key = (key.realm.uri.authority().cloned(), key.owner);
        let permit = self
            .cache
            .windows
            .admit(&window_key, Instant::now())
            .map_err(TokenFailure::RateLimited)?;
        self.cache.realm_requested(key.realm.uri.clone());
        let fetched = match self.fetch(http, key, credential, trace).await {
            Ok(token) => {
                permit.not_limited();
                Ok(token)
            }
            Err(FetchError::Denied(status)) => {
                permit.not_limited();
                Err(TokenFailure::Denied(status))
            }
            Err(FetchError::RateLimited(stated)) => {
                let pause =
                    self.cache
                        .windows
                        .limited(&window_key, permit, UpstreamFailure::RateLimited, stated);
                Err(TokenFailure::RateLimited(pause))
            }
            Err(FetchError::NoResponse(_) | FetchError::Unusable(_)) if key.realm.is_upgraded => {
                tracing::warn!(
                    asked = %key.realm.uri,
                    "the registry's token realm begins with http://; credentials are not sent in clear text, and https at \
                     that host gave no token; ask its operator to set the registry's external URL to https"
                );
                Err(TokenFailure::InsecureRealm)
            }
            Err(FetchError::NoResponse(reason)) => Err(TokenFailure::NoResponse(reason)),
            Err(FetchError::Unusable(reason)) => Err(TokenFailure::Unusable(reason)),
        };
        self.record_realm(
            Some(key.realm.uri.clone()),
            matches!(
                fetched,
                Err(TokenFailure::NoResponse(_) | TokenFailure::Unusable(_) | TokenFailure::InsecureRealm)
            ),
        );
        let header = fetched.as_ref().map(Token::header).map_err(Clone::clone);
        *state = fetched.map(Some);
        slot.fetches.fetch_add(1, Ordering::Release);
        header
    }

    /// The cached token for `key`, if it is usable and no request for a new one is in flight.
    pub(super) fn cached(&self, key: &TokenKey, rejected: Option<&HeaderValue>) -> Option<HeaderValue> {
        let slot = self.cache.slots.get(key)?;
        let state = slot.state.try_lock().ok()?;
        let token = state.as_ref().ok()?.as_ref()?;
        let is_usable = token.usable_until > Instant::now() && !token.is(rejected);
        is_usable.then(|| token.header())
    }

    fn slot(&self, key: &TokenKey) -> Arc<TokenSlot> {
        let new = || {
            Ok::<_, std::convert::Infallible>(Arc::new(TokenSlot {
                fetches: AtomicU64::new(0),
                state: tokio::sync::Mutex::new(Ok(None)),
            }))
        };
        match self.cache.slots.get_or_insert_with(key, new) {
            Ok(slot) => slot,
            Err(never) => match never {},
        }
    }

    /// What last worked for this repository and owner at this URL, if its realm is still allowed.
    pub(super) fn last_token(
        &self,
        origin: &Origin,
        repository: &Repository,
        owner: TokenOwner,
    ) -> Option<LastToken> {
        let key = (origin.clone(), repository.clone(), owner);
        let known = self.cache.last_tokens.get(&key)?;
        realm_allowed(origin, &known.key.realm.uri.to_string(), &self.hosts)?;
        Some(known)
    }

    /// Whether the operator listed `other`, to which `origin` redirects, in `token_hosts`. Its response then counts
    /// as the registry's own, even without a token.
    pub(super) fn is_named(&self, origin: &Origin, other: &Origin) -> bool {
        let Some(uri) = other.join("/") else { return false };
        (origin.is_plain() || !other.is_plain()) && is_one_of(&self.hosts, &uri)
    }

    /// Whether `other`, to which `origin` redirects, may receive a token: it has the same host or is listed in
    /// `token_hosts`. Never by plain HTTP for a registry with https.
    pub(super) fn trusts(&self, origin: &Origin, other: &Origin) -> bool {
        let (Some(own), Some(uri)) = (origin.join("/"), other.join("/")) else {
            return false;
        };
        (origin.is_plain() || !other.is_plain()) && (same_host(&own, &uri) || is_one_of(&self.hosts, &uri))
    }

    /// Records that tokens of `key` are for `other`, to which the registry redirects this operation.
    pub(super) fn remember_other_registry(
        &self,
        origin: &Origin,
        endpoint: &Endpoint,
        other: &Origin,
        key: TokenKey,
    ) {
        if let Some(repository) = endpoint.repository() {
            let window_key = (origin.clone(), repository.clone(), key.owner);
            self.cache
                .other_registries
                .insert(window_key, (other.clone(), key));
        }
    }

    /// The recorded other registry, if it is still trusted.
    pub(super) fn other_registry(
        &self,
        origin: &Origin,
        endpoint: &Endpoint,
        owner: TokenOwner,
    ) -> Option<(Origin, TokenKey)> {
        let window_key = (origin.clone(), endpoint.repository()?.clone(), owner);
        let (other, key) = self.cache.other_registries.get(&window_key)?;
        realm_allowed(&other, &key.realm.uri.to_string(), &self.hosts)?;
        self.trusts(origin, &other).then_some((other, key))
    }

    /// Records that the registry accepted a token of `key` for this repository.
    pub(super) fn set_last_token(&self, origin: &Origin, repository: &Repository, remembered: LastToken) {
        let key = (origin.clone(), repository.clone(), remembered.key.owner);
        self.cache.last_tokens.insert(key, remembered);
    }

    /// Drops a new token of `key` that the registry rejected.
    pub(super) fn forget(&self, origin: &Origin, repository: Option<&Repository>, key: &TokenKey) {
        self.cache.slots.remove(key);
        if let Some(repository) = repository {
            let key = (origin.clone(), repository.clone(), key.owner);
            self.cache.last_tokens.remove(&key);
        }
    }

    /// Records whether the last request to a realm failed.
    pub(super) fn record_realm(&self, realm: Option<Uri>, has_failed: bool) {
        self.cache.record_realm(realm, has_failed);
    }

    /// The realm whose last request failed.
    pub(super) fn failed_realm(&self) -> Option<Uri> {
        self.cache.realms.lock().failed.clone()
    }

    /// The realm to probe: one without a response yet, or one that failed.
    pub(super) fn realm_to_probe(&self) -> Option<Uri> {
        let realms = self.cache.realms.lock();
        realms.pending.as_ref().or(realms.failed.as_ref()).cloned()
    }

    /// Requests a token. The token service is not the upstream of the client's request, and several clients share the
    /// token, so the request does not name the caches that the client's request has passed.
    async fn fetch(
        &self,
        http: &HttpClient,
        key: &TokenKey,
        credential: TokenCredential<'_>,
        trace: &TraceContext,
    ) -> Result<Token, FetchError> {
        let mut headers = HeaderMap::new();
        trace.clone().without_caches().inject(&mut headers);
        match &credential {
            TokenCredential::Anonymous => {}
            TokenCredential::Basic(header) => {
                headers.insert(AUTHORIZATION, (*header).clone());
            }
            TokenCredential::Configured(own) if own.is_identity_token() => {
                return self.post(http, key, own, trace).await;
            }
            TokenCredential::Configured(own) => {
                headers.insert(AUTHORIZATION, own.basic());
            }
        }
        let uri = with_query(&key.realm.uri, &query(key.service.as_deref(), &key.scopes))
            .ok_or_else(|| unavailable("its URL is invalid"))?;
        let reply = self.send(http, Method::GET, uri, headers, Bytes::new()).await?;
        match (reply.status, credential) {
            (StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED, TokenCredential::Configured(own)) => {
                self.post(http, key, own, trace).await
            }
            _ => self.read(reply).await,
        }
    }

    /// The OAuth 2.0 POST form, for services without GET and for identity tokens.
    async fn post(
        &self,
        http: &HttpClient,
        key: &TokenKey,
        own: &UpstreamCredential,
        trace: &TraceContext,
    ) -> Result<Token, FetchError> {
        let mut form = vec![("client_id", "ifnewer"), ("scope", "")];
        let scopes = key.scopes.join(" ");
        if let Some((_, scope)) = form.last_mut() {
            *scope = scopes.as_str();
        }
        form.extend(key.service.as_deref().map(|service| ("service", service)));
        if own.is_identity_token() {
            form.extend([("grant_type", "refresh_token"), ("refresh_token", own.password())]);
        } else {
            form.extend([
                ("grant_type", "password"),
                ("username", own.username()),
                ("password", own.password()),
            ]);
        }
        let mut headers = HeaderMap::new();
        trace.clone().without_caches().inject(&mut headers);
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/x-www-form-urlencoded"),
        );
        let reply = self
            .send(
                http,
                Method::POST,
                key.realm.uri.clone(),
                headers,
                Bytes::from(encoded(&form)),
            )
            .await?;
        self.read(reply).await
    }

    async fn send(
        &self,
        http: &HttpClient,
        method: Method,
        uri: Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<HttpResponse, FetchError> {
        let request = HttpRequest {
            method,
            uri,
            headers,
            body,
            follow: Follow::SameOrigin,
            other_origin: None,
            timeout: self.timeout,
            is_client_paced: false,
        };
        http.send(request).await.map_err(|error| {
            let HttpFailure { cause, detail, .. } = error;
            tracing::debug!(%cause, detail = detail.as_deref(), "token request failed");
            FetchError::NoResponse(detail.unwrap_or_else(|| format!("it {cause}").into()))
        })
    }

    async fn read(&self, reply: HttpResponse) -> Result<Token, FetchError> {
        let (status, headers) = (reply.status, reply.headers.clone());
        let body = reply.collect(TOKEN_BODY_BYTES_MAX, self.timeout).await;
        if status != StatusCode::OK {
            let body = body.unwrap_or_default();
            let (code, message) = ErrorBody::read(&body).unzip();
            return Err(match status.as_u16() {
                _ if is_limit_by_body(status, &headers, code.as_deref(), message.as_deref()) => {
                    FetchError::RateLimited(stated_wait(&headers, &body))
                }
                401 | 403 => FetchError::Denied(status),
                status => unavailable(&format!("it returned status {status}")),
            });
        }
        let body = body.map_err(|cause| unavailable(&format!("it {cause}")))?;
        let (text, life) = parse(&body).ok_or_else(|| unavailable("its response contains no token"))?;
        Ok(Token {
            text,
            usable_until: Instant::now() + life.saturating_sub(REFRESH_BEFORE),
        })
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens")
            .field("cached", &self.cache.slots.len())
            .finish_non_exhaustive()
    }
}

/// The cause of a failure to obtain a token.
impl From<&TokenFailure> for UpstreamFailure {
    fn from(failure: &TokenFailure) -> Self {
        match failure {
            TokenFailure::RateLimited(_) => UpstreamFailure::RateLimited,
            TokenFailure::Denied(_) | TokenFailure::NoResponse(_) | TokenFailure::Unusable(_) => {
                UpstreamFailure::TokenService
            }
            TokenFailure::InsecureRealm => UpstreamFailure::InsecureRealm,
        }
    }
}

#[cfg(test)]
mod tests;
