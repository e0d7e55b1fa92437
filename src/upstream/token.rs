//! The Bearer handshake: from a challenge to a token, and the tokens kept. protocol: distribution-spec "token
//! authentication", distribution's `docs/spec/auth/token.md`.
//!
//! A token belongs to one holder (kind of credential and principal) and is never given to another: the holder is part
//! of every key, of the cache as of the single flight. A token proves nothing; only the registry's answer does.

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

/// Tokens kept, over all holders.
const TOKENS_MAX: usize = 4096;
/// Body of a token service's answer.
pub(super) const TOKEN_BODY_BYTES_MAX: usize = 64 * 1024;
/// A token is replaced so long before it expires.
const REFRESH_BEFORE: Duration = Duration::from_secs(10);

/// Whose token it is. Own, anonymous and client credentials never share, whatever the principal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TokenOwner {
    pub(super) kind: TokenOwnerKind,
    pub(super) principal: [u8; 32],
}

/// Which credential a token was fetched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum TokenOwnerKind {
    Anonymous,
    Client,
    Configured,
}

/// What a token is for.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct TokenKey {
    realm: Realm,
    service: Option<String>,
    /// Sorted, each once.
    scopes: Vec<String>,
    owner: TokenOwner,
}

/// What is sent to the token service.
pub(super) enum TokenCredential<'a> {
    Anonymous,
    /// A client's `Authorization: Basic`, as it came.
    Basic(&'a HeaderValue),
    Configured(&'a UpstreamCredential),
}

/// Why there is no token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TokenFailure {
    /// 401 or 403: the credential is wrong.
    Denied(StatusCode),
    /// It limits the rate of requests.
    RateLimited(Pause),
    /// No response, in words for the operator.
    NoResponse(Arc<str>),
    /// A response that is of no use, in words for the operator.
    Unusable(Arc<str>),
    /// The registry names its token service by http, where no credential is sent, and by https it does not answer.
    PlainRealm,
}

/// What a token service answered instead of a token.
enum FetchError {
    Denied(StatusCode),
    /// And how long it says to wait.
    RateLimited(Option<Duration>),
    /// No response, in words for the operator.
    NoResponse(Arc<str>),
    /// A response that is of no use, in words for the operator.
    Unusable(Arc<str>),
}

fn unavailable(reason: &str) -> FetchError {
    FetchError::Unusable(reason.into())
}

struct Token {
    /// `Bearer …`. Wiped when dropped; the header made of it for a request is not ours for long.
    text: Zeroizing<String>,
    usable_until: Instant,
}

impl Token {
    /// Marked sensitive.
    fn header(&self) -> HeaderValue {
        // It was a legal header value when it was read.
        let mut header = HeaderValue::from_str(&self.text).unwrap_or_else(|_| HeaderValue::from_static(""));
        header.set_sensitive(true);
        header
    }

    fn is(&self, header: Option<&HeaderValue>) -> bool {
        header.is_some_and(|header| header.as_bytes() == self.text.as_bytes())
    }
}

/// One key's token, and the flight that fetches it.
struct TokenSlot {
    /// Counts fetches that ended, so that who waited for one knows that its failure is theirs too.
    fetches: AtomicU64,
    state: tokio::sync::Mutex<Result<Option<Token>, TokenFailure>>,
}

/// What worked for a repository the last time, so that the next request goes out authorised at once.
#[derive(Clone)]
pub(super) struct LastToken {
    pub(super) key: TokenKey,
    /// The registry's challenge before any token was sent.
    pub(super) challenge: Arc<[HeaderValue]>,
}

/// The token services that a probe may ask.
#[derive(Default)]
struct Realms {
    /// The one that was asked last, while it has not answered.
    pending: Option<Uri>,
    /// The one that gave no usable answer, if the last word of any was that.
    failed: Option<Uri>,
}

/// The tokens kept for one upstream. A token goes only to the address for which it was got: another one may be another
/// registry by now.
pub(super) struct TokenCache {
    slots: Cache<TokenKey, Arc<TokenSlot>>,
    last_tokens: Cache<(Origin, Repository, TokenOwner), LastToken>,
    /// At which other registry, to which this one redirects, which token worked.
    other_registries: Cache<(Origin, Repository, TokenOwner), (Origin, TokenKey)>,
    realms: std::sync::Mutex<Realms>,
    /// The pauses of token services, by host and holder.
    windows: Windows<(Option<Authority>, TokenOwner)>,
}

impl Default for TokenCache {
    fn default() -> TokenCache {
        TokenCache {
            slots: Cache::new(TOKENS_MAX),
            last_tokens: Cache::new(TOKENS_MAX),
            other_registries: Cache::new(TOKENS_MAX),
            realms: std::sync::Mutex::default(),
            windows: Windows::default(),
        }
    }
}

impl TokenCache {
    /// A realm is asked.
    fn realm_requested(&self, realm: Uri) {
        if let Ok(mut realms) = self.realms.lock() {
            realms.pending = Some(realm);
        }
    }

    /// A realm was asked, and gave no usable answer or one.
    pub(super) fn record_realm(&self, realm: Option<Uri>, has_failed: bool) {
        if let Ok(mut realms) = self.realms.lock() {
            *realms = Realms {
                pending: None,
                failed: realm.filter(|_| has_failed),
            };
        }
    }
}

/// The tokens of one upstream, as its settings let them be got.
pub(super) struct Tokens {
    cache: Arc<TokenCache>,
    /// Configured hosts a realm may be on.
    hosts: Vec<String>,
    timeout: Duration,
}

impl TokenKey {
    /// The key of a challenge; `None` if the realm must not be asked (see [`realm_allowed`]). A challenge without a
    /// scope gets the one every registry means (Artifact Registry gives no anonymous token without).
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

    /// A token for `key`: the one kept, unless it is about to expire or was just `rejected`; else a new one, fetched
    /// once however many wait for it. Who waited for a fetch that failed shares its failure.
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
                Err(TokenFailure::PlainRealm)
            }
            Err(FetchError::NoResponse(reason)) => Err(TokenFailure::NoResponse(reason)),
            Err(FetchError::Unusable(reason)) => Err(TokenFailure::Unusable(reason)),
        };
        self.record_realm(
            Some(key.realm.uri.clone()),
            matches!(
                fetched,
                Err(TokenFailure::NoResponse(_) | TokenFailure::Unusable(_) | TokenFailure::PlainRealm)
            ),
        );
        let header = fetched.as_ref().map(Token::header).map_err(Clone::clone);
        *state = fetched.map(Some);
        slot.fetches.fetch_add(1, Ordering::Release);
        header
    }

    /// The token kept for `key`, if it is usable and nobody fetches another one.
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

    /// What worked for this repository and holder at this address, if its realm may still be asked.
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

    /// Whether `other`, to which the registry at `origin` redirects, is one that the operator named: its response is the
    /// registry's own, also where it wants no token.
    pub(super) fn is_named(&self, origin: &Origin, other: &Origin) -> bool {
        let Some(uri) = other.join("/") else { return false };
        (origin.is_plain() || !other.is_plain()) && is_one_of(&self.hosts, &uri)
    }

    /// Whether `other`, to which the registry at `origin` redirects, may have a token: the same host, or one that the
    /// operator named; never in clear text for a registry that is asked by https.
    pub(super) fn trusts(&self, origin: &Origin, other: &Origin) -> bool {
        let (Some(own), Some(uri)) = (origin.join("/"), other.join("/")) else {
            return false;
        };
        (origin.is_plain() || !other.is_plain()) && (same_host(&own, &uri) || is_one_of(&self.hosts, &uri))
    }

    /// A token of `key` is for `other`, to which the registry redirects this.
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

    /// The same, if the other registry is still trusted with it.
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

    /// A token of `key` was accepted for this repository.
    pub(super) fn set_last_token(&self, origin: &Origin, repository: &Repository, remembered: LastToken) {
        let key = (origin.clone(), repository.clone(), remembered.key.owner);
        self.cache.last_tokens.insert(key, remembered);
    }

    /// A token of `key` was not accepted, though it was new.
    pub(super) fn forget(&self, origin: &Origin, repository: Option<&Repository>, key: &TokenKey) {
        self.cache.slots.remove(key);
        if let Some(repository) = repository {
            let key = (origin.clone(), repository.clone(), key.owner);
            self.cache.last_tokens.remove(&key);
        }
    }

    /// A realm was asked, and gave no usable answer or one.
    pub(super) fn record_realm(&self, realm: Option<Uri>, has_failed: bool) {
        self.cache.record_realm(realm, has_failed);
    }

    /// The realm that gave no usable answer when it was asked last.
    pub(super) fn failed_realm(&self) -> Option<Uri> {
        self.cache.realms.lock().ok()?.failed.clone()
    }

    /// A realm of which no answer is the last that is known.
    pub(super) fn realm_to_probe(&self) -> Option<Uri> {
        let realms = self.cache.realms.lock().ok()?;
        realms.pending.as_ref().or(realms.failed.as_ref()).cloned()
    }

    async fn fetch(
        &self,
        http: &HttpClient,
        key: &TokenKey,
        credential: TokenCredential<'_>,
        trace: &TraceContext,
    ) -> Result<Token, FetchError> {
        let mut headers = HeaderMap::new();
        trace.inject(&mut headers);
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
            .ok_or_else(|| unavailable("its address cannot be asked"))?;
        let reply = self.send(http, Method::GET, uri, headers, Bytes::new()).await?;
        match (reply.status, credential) {
            (StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED, TokenCredential::Configured(own)) => {
                self.post(http, key, own, trace).await
            }
            _ => self.read(reply).await,
        }
    }

    /// The POST form of OAuth 2.0, for services that have no GET and for identity tokens.
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
        trace.inject(&mut headers);
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
        };
        http.send(request).await.map_err(|error| {
            let HttpFailure { cause, detail, .. } = error;
            tracing::debug!(%cause, detail = detail.as_deref(), "the token service gave no answer");
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
                status => unavailable(&format!("it answered {status}")),
            });
        }
        let body = body.map_err(|cause| unavailable(&format!("it {cause}")))?;
        let (text, life) = parse(&body).ok_or_else(|| unavailable("its answer holds no token"))?;
        Ok(Token {
            text,
            usable_until: Instant::now() + life.saturating_sub(REFRESH_BEFORE),
        })
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens")
            .field("kept", &self.cache.slots.len())
            .finish_non_exhaustive()
    }
}

/// The cause that goes with a failure to get a token.
impl From<&TokenFailure> for UpstreamFailure {
    fn from(failure: &TokenFailure) -> Self {
        match failure {
            TokenFailure::RateLimited(_) => UpstreamFailure::RateLimited,
            TokenFailure::Denied(_) | TokenFailure::NoResponse(_) | TokenFailure::Unusable(_) => {
                UpstreamFailure::TokenService
            }
            TokenFailure::PlainRealm => UpstreamFailure::PlaintextRealm,
        }
    }
}

#[cfg(test)]
mod tests;
