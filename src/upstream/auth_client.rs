//! Authenticated requests to one URL of an upstream (token authentication of the distribution specification).
//!
//! The first request carries the credential or token that last worked. A 401 with a Bearer challenge is retried once
//! with a new token; a second 401 is final. A client's own Bearer token is forwarded unchanged and never exchanged.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, AUTHORIZATION, RANGE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use parking_lot::Mutex;

use super::credentials::{CredentialProvider, UpstreamCredential};
use super::health::RequestOutcome;
use super::http_client::{Follow, HttpClient, HttpRequest, HttpResponse};
use super::origin::Origin;
use super::proof::{self, Sender};
use super::redirect_auth::{OriginAuthorization, OtherRegistry, RedirectCredential};
use super::response::{ResponseKind, UpstreamResponse};
use super::retry_after::{is_limit_by_body, stated_wait};
use super::state::InFlightRequest;
use super::token::{LastToken, TokenCredential, TokenFailure, TokenKey, TokenOwner, TokenOwnerKind, Tokens};
use super::{Caller, Credential};
use crate::oci::accept::Accept;
use crate::oci::challenge::Challenge;
use crate::oci::endpoint::Endpoint;
use crate::oci::error::ErrorBody;
use crate::oci::failure::UpstreamFailure;
use crate::oci::name::Repository;
use crate::trace_context::TraceContext;

/// Bytes of an error body that are read for its code and message.
const ERROR_BODY_BYTES_MAX: usize = 64 * 1024;
/// Timeout for reading an error body.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// Authentication state shared by all requests to one upstream.
pub(super) struct AuthClient {
    pub(super) http: HttpClient,
    pub(super) tokens: Tokens,
    pub(super) credentials: Option<Arc<CredentialProvider>>,
    /// Token owner of the configured credential that was used last. Cached because a credential lookup may be slow.
    pub(super) configured_owner: Mutex<Option<TokenOwner>>,
    /// From sending a request to the response headers, redirects included.
    pub(super) headers_timeout: Duration,
}

/// A request to send.
pub(super) struct RequestSpec<'a> {
    pub(super) method: Method,
    pub(super) endpoint: &'a Endpoint,
    pub(super) accept: &'a Accept,
    pub(super) range: Option<HeaderValue>,
    /// Whether the body is read at a client's pace.
    pub(super) is_client_paced: bool,
    pub(super) trace: &'a TraceContext,
    pub(super) pending: &'a InFlightRequest<'a>,
}

/// Any response other than 2xx, or none.
pub(super) struct ErrorResponse {
    pub(super) response: UpstreamResponse,
    /// Another origin sent this error, after a redirect.
    pub(super) from_other_origin: bool,
    /// The response has a registry's headers, so it does not come from a proxy or portal in front of it.
    pub(super) is_from_registry: bool,
    /// Another origin, to which the registry redirected, sent this response.
    pub(super) other_registry: Option<OtherRegistry>,
    /// The token may only be expired.
    may_be_expired: bool,
    pub(super) challenges: Vec<Challenge>,
}

impl ErrorResponse {
    /// RFC 6750 §3.1: the token is expired or revoked, which is no denial of access.
    fn says_invalid_token(&self) -> bool {
        self.challenges.iter().any(
            |challenge| matches!(challenge, Challenge::Bearer { error: Some(error), .. } if error == "invalid_token"),
        )
    }
}

impl From<UpstreamResponse> for ErrorResponse {
    fn from(response: UpstreamResponse) -> Self {
        ErrorResponse {
            response,
            from_other_origin: false,
            is_from_registry: true,
            other_registry: None,
            may_be_expired: false,
            challenges: Vec::new(),
        }
    }
}

/// How a caller authenticates.
struct CallerAuth<'a> {
    /// Sent if no token is cached.
    header: Option<HeaderValue>,
    /// How to obtain a token. `None` if the caller sent its own.
    token_source: Option<(TokenOwner, CallerCredential<'a>)>,
}

#[derive(Clone, Copy)]
pub(super) enum CallerCredential<'a> {
    Anonymous,
    Basic(&'a HeaderValue),
    Configured(&'a UpstreamCredential),
}

impl<'a> CallerCredential<'a> {
    pub(super) fn login(self) -> TokenCredential<'a> {
        match self {
            CallerCredential::Anonymous => TokenCredential::Anonymous,
            CallerCredential::Basic(header) => TokenCredential::Basic(header),
            CallerCredential::Configured(own) => TokenCredential::Configured(own),
        }
    }
}

impl AuthClient {
    /// Sends the request. If the upstream rejects the configured credential and a newer one is available, sends it
    /// once more with that. The inner futures are boxed because the compiler limits how deeply futures nest.
    pub(super) async fn send(
        &self,
        origin: &Origin,
        caller: &Caller,
        spec: &RequestSpec<'_>,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        let (Credential::Configured, Some(own)) = (&caller.credential, &self.credentials) else {
            return Box::pin(self.send_with_retry(origin, caller, None, spec)).await;
        };
        let repository = spec.endpoint.repository().map(|name| origin.name_of(name));
        let repository = repository.as_ref();
        let no_credential = |_| unavailable(UpstreamFailure::CacheCredential);
        spec.pending.set_paused(true);
        let credential = own.current(repository).await;
        spec.pending.set_paused(false);
        let credential = credential.map_err(no_credential)?;
        if let Some(credential) = &credential {
            let mut last = self.configured_owner.lock();
            *last = Some(configured_owner(credential));
        }
        let first = Box::pin(self.send_with_retry(origin, caller, credential.as_deref(), spec)).await;
        if let (Err(error), Some(used)) = (&first, &credential)
            && error.response.kind == ResponseKind::Denied
            && let Some(renewed) = own.renewed(repository, used).await
        {
            return Box::pin(self.send_with_retry(origin, caller, Some(&renewed), spec)).await;
        }
        first
    }

    /// Sends the request, and once more after a short delay if the error is transient (5xx without `Retry-After`).
    async fn send_with_retry(
        &self,
        origin: &Origin,
        caller: &Caller,
        own: Option<&UpstreamCredential>,
        spec: &RequestSpec<'_>,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        let first = self.send_authorized(origin, caller, own, spec).await;
        match &first {
            Err(error) if is_transient(&error.response) => {
                tokio::time::sleep(jitter()).await;
                self.send_authorized(origin, caller, own, spec).await
            }
            Ok(_) | Err(_) => first,
        }
    }

    async fn send_authorized(
        &self,
        origin: &Origin,
        caller: &Caller,
        own: Option<&UpstreamCredential>,
        spec: &RequestSpec<'_>,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        let uri = origin
            .join(&spec.endpoint.path_and_query())
            .ok_or_else(|| unavailable(UpstreamFailure::Malformed))?;
        let caller_auth = caller_auth(caller, own);
        let Some((owner, login)) = caller_auth.token_source else {
            let token = caller_auth.header.as_ref();
            return self
                .send_across_redirect((origin, &uri), spec, token, RedirectCredential::Token(token))
                .await;
        };
        let credential = RedirectCredential::Exchange(owner, login);
        let repository = spec.endpoint.repository();
        let remembered = repository.and_then(|name| self.tokens.last_token(origin, name, owner));
        let (remembered, token) = match remembered {
            Some(known) => self.renewed(origin, known, login, spec).await?,
            None => (None, None),
        };
        let error = match self
            .send_across_redirect(
                (origin, &uri),
                spec,
                token.as_ref().or(caller_auth.header.as_ref()),
                credential,
            )
            .await
        {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        if error.other_registry.is_some() {
            return Err(error);
        }
        let is_unauthorized =
            error.response.status == Some(StatusCode::UNAUTHORIZED) && !error.from_other_origin;
        if matches!(spec.endpoint, Endpoint::Ping)
            || !(is_unauthorized || (error.may_be_expired && token.is_some()))
        {
            return Err(error);
        }
        let Some(key) = self
            .key(origin, &error, spec, owner)
            .or(remembered.as_ref().map(|known| known.key.clone()))
        else {
            return Err(error);
        };
        let challenge = match remembered {
            Some(known) => known.challenge,
            None => error.response.challenge.clone().into(),
        };
        let fresh = match self.token(&key, login, token.as_ref(), spec).await {
            Ok(fresh) => fresh,
            Err(TokenFailure::Denied(_)) => return Err(denied(error, &challenge)),
            // The token had not expired, and the registry rejected it.
            Err(_) if token.is_some() && is_unauthorized && !error.says_invalid_token() => {
                return Err(denied(error, &challenge));
            }
            Err(failure) => return Err(token_failure_response(&failure)),
        };
        let second = self
            .send_across_redirect((origin, &uri), spec, Some(&fresh), credential)
            .await;
        match second {
            Err(error)
                if error.response.status == Some(StatusCode::UNAUTHORIZED)
                    && error.other_registry.is_none() =>
            {
                self.tokens.forget(origin, repository, &key);
                Err(denied(error, &challenge))
            }
            accepted => {
                if let Some(repository) = repository {
                    self.tokens
                        .set_last_token(origin, repository, LastToken { key, challenge });
                }
                accepted
            }
        }
    }

    /// The last token that worked, refreshed if necessary.
    async fn renewed(
        &self,
        origin: &Origin,
        known: LastToken,
        login: CallerCredential<'_>,
        spec: &RequestSpec<'_>,
    ) -> Result<(Option<LastToken>, Option<HeaderValue>), Box<ErrorResponse>> {
        match self.token(&known.key, login, None, spec).await {
            Ok(header) => Ok((Some(known), Some(header))),
            Err(TokenFailure::Denied(_)) => {
                self.tokens.forget(origin, spec.endpoint.repository(), &known.key);
                Ok((None, None))
            }
            Err(failure) => Err(token_failure_response(&failure)),
        }
    }

    /// The cached token for `key`, or a new one.
    pub(super) async fn token(
        &self,
        key: &TokenKey,
        login: CallerCredential<'_>,
        rejected: Option<&HeaderValue>,
        spec: &RequestSpec<'_>,
    ) -> Result<HeaderValue, TokenFailure> {
        if let Some(kept) = self.tokens.cached(key, rejected) {
            return Ok(kept);
        }
        spec.pending.waiting_for_token();
        let got = self
            .tokens
            .get(&self.http, key, login.login(), (rejected, spec.trace))
            .await;
        spec.pending.token_finished(match &got {
            Ok(_) | Err(TokenFailure::Denied(_)) => RequestOutcome::Response,
            // Also if no request was sent because of a pause: another request can then be sent sooner.
            Err(TokenFailure::RateLimited(_)) => RequestOutcome::Unknown,
            Err(TokenFailure::Unusable(_)) => RequestOutcome::ServerError(UpstreamFailure::TokenService),
            Err(failure @ (TokenFailure::NoResponse(_) | TokenFailure::InsecureRealm)) => {
                RequestOutcome::NoResponse(failure.into())
            }
        });
        got
    }

    /// Whether a request of this caller needs a new token if the registry requires one.
    pub(super) fn needs_token(&self, urls: &[Origin], caller: &Caller, endpoint: &Endpoint) -> bool {
        let brings_one = match &caller.credential {
            Credential::Client(header) => !is_basic(header),
            Credential::Configured | Credential::Anonymous => false,
        };
        let own = || *self.configured_owner.lock();
        let owner = match &caller.credential {
            Credential::Client(_) => token_owner(caller, TokenOwnerKind::Client),
            Credential::Configured => own().unwrap_or_else(|| token_owner(caller, TokenOwnerKind::Anonymous)),
            Credential::Anonymous => token_owner(caller, TokenOwnerKind::Anonymous),
        };
        let has_one = |origin: &Origin, name: &Repository| {
            let known = self.tokens.last_token(origin, name, owner);
            known.is_some_and(|known| self.tokens.cached(&known.key, None).is_some())
        };
        let is_cached = || {
            let name = endpoint.repository();
            name.is_some_and(|name| urls.iter().any(|origin| has_one(origin, name)))
        };
        !brings_one && !is_cached()
    }

    pub(super) fn key(
        &self,
        origin: &Origin,
        error: &ErrorResponse,
        spec: &RequestSpec<'_>,
        owner: TokenOwner,
    ) -> Option<TokenKey> {
        error.challenges.iter().find_map(|challenge| {
            let Challenge::Bearer {
                realm,
                service,
                scopes,
                ..
            } = challenge
            else {
                return None;
            };
            let key = TokenKey::of(
                &self.tokens,
                origin,
                (realm, service.as_deref(), scopes),
                spec.endpoint.repository(),
                owner,
            );
            if key.is_none() {
                tracing::warn!(
                    %origin,
                    realm,
                    "token realm rejected: its host is not trusted (add it to `token_hosts` if it is correct)"
                );
            }
            key
        })
    }

    /// Sends the request. If the storage it was redirected to rejects it, sends it once more to the registry, because
    /// signed URLs expire.
    pub(super) async fn send_following_storage(
        &self,
        uri: &Uri,
        spec: &RequestSpec<'_>,
        authorization: Option<&HeaderValue>,
        elsewhere: Option<&OriginAuthorization>,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        match self.send_once(uri, spec, authorization, elsewhere).await {
            // A challenge needs a token, not a retry.
            Err(error)
                if error.from_other_origin && spec.method == Method::GET && error.challenges.is_empty() =>
            {
                self.send_once(uri, spec, authorization, elsewhere).await
            }
            result => result,
        }
    }

    async fn send_once(
        &self,
        uri: &Uri,
        spec: &RequestSpec<'_>,
        authorization: Option<&HeaderValue>,
        elsewhere: Option<&OriginAuthorization>,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        let mut headers = HeaderMap::new();
        for line in spec.accept.header_values() {
            headers.append(ACCEPT, line.clone());
        }
        headers.extend(spec.range.clone().map(|range| (RANGE, range)));
        headers.extend(authorization.cloned().map(|value| (AUTHORIZATION, value)));
        spec.trace.inject(&mut headers);
        let request = HttpRequest {
            method: spec.method.clone(),
            uri: uri.clone(),
            headers,
            body: bytes::Bytes::new(),
            follow: Follow::Anywhere,
            other_origin: elsewhere.cloned(),
            timeout: self.headers_timeout,
            is_client_paced: spec.is_client_paced,
        };
        let sent = self.http.send(request).await;
        let reply =
            sent.map_err(|unavailable| Box::new(UpstreamResponse::from_failure(unavailable).into()))?;
        if reply.status.is_success() {
            return Ok(reply);
        }
        Err(error_response(spec, reply).await)
    }
}

/// `own` is the configured credential for this repository, if any.
fn caller_auth<'a>(caller: &'a Caller, own: Option<&'a UpstreamCredential>) -> CallerAuth<'a> {
    match (&caller.credential, own) {
        (Credential::Configured, Some(own)) => CallerAuth {
            header: (!own.is_identity_token()).then(|| own.basic()),
            token_source: Some((configured_owner(own), CallerCredential::Configured(own))),
        },
        (Credential::Anonymous, _) | (Credential::Configured, None) => CallerAuth {
            header: None,
            token_source: Some((
                token_owner(caller, TokenOwnerKind::Anonymous),
                CallerCredential::Anonymous,
            )),
        },
        (Credential::Client(header), _) => {
            let mut sent = header.clone();
            sent.set_sensitive(true);
            CallerAuth {
                header: Some(sent),
                token_source: is_basic(header).then(|| {
                    (
                        token_owner(caller, TokenOwnerKind::Client),
                        CallerCredential::Basic(header),
                    )
                }),
            }
        }
    }
}

fn token_owner(caller: &Caller, kind: TokenOwnerKind) -> TokenOwner {
    TokenOwner {
        kind,
        principal: caller.principal,
    }
}

fn configured_owner(own: &UpstreamCredential) -> TokenOwner {
    TokenOwner {
        kind: TokenOwnerKind::Configured,
        principal: own.principal(),
    }
}

fn is_basic(header: &HeaderValue) -> bool {
    let scheme = header.as_bytes().get(..6);
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic "))
}

/// Whether a registry sent this response, an error included. A captive portal's page does not count.
pub(super) fn is_registry(reply: &HttpResponse) -> bool {
    is_alive(reply) || reply.status.is_server_error()
}

/// Whether a registry or a token service responds normally. A captive portal's page does not count.
pub(super) fn is_alive(reply: &HttpResponse) -> bool {
    let sender = Sender::of(reply.from_other_origin);
    match UpstreamResponse::read(&Endpoint::Ping, reply.status, &reply.headers, sender).kind {
        ResponseKind::Unavailable(cause) => cause == UpstreamFailure::RateLimited,
        _ => !reply.from_other_origin,
    }
}

/// Reads an error response and classifies it by status, headers and body.
async fn error_response(spec: &RequestSpec<'_>, reply: HttpResponse) -> Box<ErrorResponse> {
    let (status, from_other_origin) = (reply.status, reply.from_other_origin);
    let elsewhere = reply
        .final_url
        .as_ref()
        .and_then(Origin::of_uri)
        .map(|origin| OtherRegistry {
            origin,
            challenge: reply.headers.get_all(WWW_AUTHENTICATE).iter().cloned().collect(),
        });
    let mut response = UpstreamResponse::read(
        spec.endpoint,
        status,
        &reply.headers,
        Sender::of(from_other_origin),
    );
    let challenges = if status == StatusCode::UNAUTHORIZED {
        Challenge::read(&reply.headers)
    } else {
        Vec::new()
    };
    let is_from_registry = proof::has_registry_headers(&reply.headers);
    let mut expired = status == StatusCode::BAD_REQUEST;
    let headers = reply.headers.clone();
    response.stated_wait = stated_wait(&headers, b"");
    if spec.method == Method::GET
        && let Ok(body) = reply.collect(ERROR_BODY_BYTES_MAX, ERROR_BODY_TIMEOUT).await
    {
        (response.code, response.message) = ErrorBody::read(&body).unzip();
        response.stated_wait = stated_wait(&headers, &body);
        response.kind = kind_by_body(response.kind, &headers, &response);
        expired |= status == StatusCode::FORBIDDEN
            && body.windows(7).any(|part| part.eq_ignore_ascii_case(b"expired"));
    }
    // Storage behind a registry knows no callers and few blobs, and a login page knows neither. Their 4xx is a
    // failure, not a denial. Only another registry can report that a manifest does not exist.
    let is_registrys_404 = is_from_registry
        && response.kind == ResponseKind::NotFound
        && !matches!(spec.endpoint, Endpoint::Blob { .. });
    let is_redirect_target = from_other_origin
        && status.is_client_error()
        && status != StatusCode::RANGE_NOT_SATISFIABLE
        && response.kind != ResponseKind::Unavailable(UpstreamFailure::RateLimited)
        && !is_registrys_404;
    if is_redirect_target {
        response.kind = ResponseKind::Unavailable(UpstreamFailure::Status(status.as_u16()));
        response.challenge = Vec::new();
        expired = false;
    }
    Box::new(ErrorResponse {
        response,
        from_other_origin: is_redirect_target,
        is_from_registry,
        other_registry: elsewhere,
        may_be_expired: expired,
        challenges,
    })
}

/// Reclassifies an error response by its error code: a rate limit, or a denial.
fn kind_by_body(by_headers: ResponseKind, headers: &HeaderMap, response: &UpstreamResponse) -> ResponseKind {
    let (code, message) = (response.code.as_deref(), response.message.as_deref());
    let Some(status) = response.status else {
        return by_headers;
    };
    let limited = is_limit_by_body(status, headers, code, message);
    match by_headers {
        _ if limited => ResponseKind::Unavailable(UpstreamFailure::RateLimited),
        ResponseKind::Unavailable(UpstreamFailure::RateLimited) => ResponseKind::Denied,
        other => other,
    }
}

fn unavailable(cause: UpstreamFailure) -> Box<ErrorResponse> {
    Box::new(UpstreamResponse::unavailable(cause).into())
}

pub(super) fn token_failure_response(failure: &TokenFailure) -> Box<ErrorResponse> {
    Box::new(ErrorResponse::from(match failure {
        TokenFailure::RateLimited(pause) => UpstreamResponse::paused(pause.clone()),
        TokenFailure::Denied(_) | TokenFailure::InsecureRealm => {
            UpstreamResponse::unavailable(failure.into())
        }
        TokenFailure::NoResponse(reason) | TokenFailure::Unusable(reason) => UpstreamResponse {
            detail: Some(format!("the token service: {reason}").into()),
            ..UpstreamResponse::unavailable(failure.into())
        },
    }))
}

/// A denial with the challenge received before any token was sent. A challenge with `error="…"` makes containerd give
/// up without trying its other credentials.
pub(super) fn denied(mut error: Box<ErrorResponse>, challenge: &[HeaderValue]) -> Box<ErrorResponse> {
    if error.response.kind == ResponseKind::Unavailable(UpstreamFailure::RateLimited) {
        return error;
    }
    error.response.kind = ResponseKind::Denied;
    if !challenge.is_empty() {
        error.response.challenge = challenge.to_vec();
    }
    error
}

/// Not for 501, which is permanent, and not if `Retry-After` states a wait.
fn is_transient(response: &UpstreamResponse) -> bool {
    let server = matches!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::Status(500 | 502..=599))
    );
    server && response.retry_after.is_none()
}

/// 50 to 150 ms, so that many caches do not retry at the same moment.
fn jitter() -> Duration {
    Duration::from_millis(50 + RandomState::new().hash_one(()) % 101)
}
