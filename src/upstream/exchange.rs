//! One question to one address of an upstream, with whatever authorisation it takes.
//!
//! The order of things: the credential or the token that worked last time goes out with the first request; a 401 with
//! a Bearer challenge is answered once with a new token; a second 401 is the registry's word. A client's own Bearer
//! token is sent as it is and never exchanged.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::{ACCEPT, AUTHORIZATION, RANGE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};

use super::answer::{Answer, Said};
use super::client::{Follow, Http, Reply, Request};
use super::health::Ended;
use super::origin::Origin;
use super::own::{Own, OwnCredential};
use super::proof::{self, Sender};
use super::redirected::{Elsewhere, Other, Shown};
use super::retry_after::{is_limit_by_body, stated_wait};
use super::state::Pending;
use super::token::{Holder, HolderKind, Key, Login, Remembered, TokenFailure, Tokens};
use super::{Caller, Credential};
use crate::oci::accept::Accept;
use crate::oci::cause::Cause;
use crate::oci::challenge::Challenge;
use crate::oci::error::Problem;
use crate::oci::name::Repository;
use crate::oci::operation::Operation;
use crate::trace_context::Trace;

/// Body of an error answer that is read for its text.
const ERROR_BODY_BYTES_MAX: usize = 64 * 1024;
/// How long an error's text is waited for.
const ERROR_BODY_WITHIN: Duration = Duration::from_secs(5);

/// What it takes to ask: shared by all questions to one upstream.
pub(super) struct Exchange {
    pub(super) http: Http,
    pub(super) tokens: Tokens,
    pub(super) own: Option<Arc<Own>>,
    /// Whose tokens those of the own credential are that was used last: to look it up may take long.
    pub(super) own_holder: Mutex<Option<Holder>>,
    /// From a request to its answer's headers, redirects included.
    pub(super) headers_within: Duration,
}

/// A question.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) operation: &'a Operation,
    pub(super) accept: &'a Accept,
    pub(super) range: Option<HeaderValue>,
    pub(super) trace: &'a Trace,
    pub(super) pending: &'a Pending<'a>,
}

/// Anything but a 2xx.
pub(super) struct Refusal {
    pub(super) answer: Answer,
    /// The registry redirected the request, and it is another origin that refuses.
    pub(super) abroad: bool,
    /// The response looks like that of a registry, not of something in front of it.
    pub(super) of_registry: bool,
    /// The response is of another origin, to which the registry redirected.
    pub(super) elsewhere: Option<Elsewhere>,
    /// The token sent may merely be too old.
    expired: bool,
    pub(super) challenges: Vec<Challenge>,
}

impl Refusal {
    /// RFC 6750 §3.1: the token is expired or revoked, which says nothing about the right to read.
    fn says_token_is_invalid(&self) -> bool {
        self.challenges.iter().any(
            |challenge| matches!(challenge, Challenge::Bearer { error: Some(error), .. } if error == "invalid_token"),
        )
    }
}

impl From<Answer> for Refusal {
    fn from(answer: Answer) -> Self {
        Refusal {
            answer,
            abroad: false,
            of_registry: true,
            elsewhere: None,
            expired: false,
            challenges: Vec::new(),
        }
    }
}

/// What a caller's credential means for the exchange.
struct Standing<'a> {
    /// Sent when no token is at hand.
    header: Option<HeaderValue>,
    /// How to get a token; `None` if the caller brought one.
    exchange: Option<(Holder, LoginKind<'a>)>,
}

#[derive(Clone, Copy)]
pub(super) enum LoginKind<'a> {
    Anonymous,
    Basic(&'a HeaderValue),
    Own(&'a OwnCredential),
}

impl<'a> LoginKind<'a> {
    pub(super) fn login(self) -> Login<'a> {
        match self {
            LoginKind::Anonymous => Login::Anonymous,
            LoginKind::Basic(header) => Login::Basic(header),
            LoginKind::Own(own) => Login::Own(own),
        }
    }
}

impl Exchange {
    /// Asks. If the proxy's own credential is refused and there is a newer one by now, asks once more with that. What is
    /// below is boxed: the compiler limits how deep futures may be nested.
    pub(super) async fn ask(
        &self,
        origin: &Origin,
        caller: &Caller,
        ask: &Ask<'_>,
    ) -> Result<Reply, Box<Refusal>> {
        let (Credential::Own, Some(own)) = (&caller.credential, &self.own) else {
            return Box::pin(self.ask_as(origin, caller, None, ask)).await;
        };
        let repository = ask.operation.repository().map(|name| origin.name_of(name));
        let repository = repository.as_ref();
        let unavailable = |_| silent(Cause::OwnCredential);
        ask.pending.held(true);
        let credential = own.current(repository).await;
        ask.pending.held(false);
        let credential = credential.map_err(unavailable)?;
        if let Some(credential) = &credential {
            let mut last = self.own_holder.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some(own_holder(credential));
        }
        let first = Box::pin(self.ask_as(origin, caller, credential.as_deref(), ask)).await;
        if let (Err(refusal), Some(used)) = (&first, &credential)
            && refusal.answer.said == Said::Forbidden
            && let Some(renewed) = own.renewed(repository, used).await
        {
            return Box::pin(self.ask_as(origin, caller, Some(&renewed), ask)).await;
        }
        first
    }

    /// Asks, and once more after a short wait if the registry stumbled (5xx without a `Retry-After`).
    async fn ask_as(
        &self,
        origin: &Origin,
        caller: &Caller,
        own: Option<&OwnCredential>,
        ask: &Ask<'_>,
    ) -> Result<Reply, Box<Refusal>> {
        let first = self.authorised(origin, caller, own, ask).await;
        match &first {
            Err(refusal) if stumbled(&refusal.answer) => {
                tokio::time::sleep(jitter()).await;
                self.authorised(origin, caller, own, ask).await
            }
            Ok(_) | Err(_) => first,
        }
    }

    async fn authorised(
        &self,
        origin: &Origin,
        caller: &Caller,
        own: Option<&OwnCredential>,
        ask: &Ask<'_>,
    ) -> Result<Reply, Box<Refusal>> {
        let uri = origin
            .join(&ask.operation.path_and_query())
            .ok_or_else(|| silent(Cause::Malformed))?;
        let standing = standing(caller, own);
        let Some((holder, login)) = standing.exchange else {
            let token = standing.header.as_ref();
            return self.across((origin, &uri), ask, token, Shown::Token(token)).await;
        };
        let shown = Shown::Login(holder, login);
        let repository = ask.operation.repository();
        let remembered = repository.and_then(|name| self.tokens.remembered(origin, name, holder));
        let (remembered, token) = match remembered {
            Some(known) => self.renewed(origin, known, login, ask).await?,
            None => (None, None),
        };
        let refusal = match self
            .across(
                (origin, &uri),
                ask,
                token.as_ref().or(standing.header.as_ref()),
                shown,
            )
            .await
        {
            Ok(reply) => return Ok(reply),
            Err(refusal) => refusal,
        };
        if refusal.elsewhere.is_some() {
            return Err(refusal);
        }
        let unauthorised = refusal.answer.status == Some(StatusCode::UNAUTHORIZED) && !refusal.abroad;
        if matches!(ask.operation, Operation::Ping) || !(unauthorised || (refusal.expired && token.is_some()))
        {
            return Err(refusal);
        }
        let Some(key) = self
            .key(origin, &refusal, ask, holder)
            .or(remembered.as_ref().map(|known| known.key.clone()))
        else {
            return Err(refusal);
        };
        let challenge = match remembered {
            Some(known) => known.challenge,
            None => refusal.answer.challenge.clone().into(),
        };
        let fresh = match self.token(&key, login, token.as_ref(), ask).await {
            Ok(fresh) => fresh,
            Err(TokenFailure::Denied(_)) => return Err(denied(refusal, &challenge)),
            // The token had not run out, and the registry had an answer to it.
            Err(_) if token.is_some() && unauthorised && !refusal.says_token_is_invalid() => {
                return Err(denied(refusal, &challenge));
            }
            Err(failure) => return Err(no_token(&failure)),
        };
        let second = self.across((origin, &uri), ask, Some(&fresh), shown).await;
        match second {
            Err(refusal)
                if refusal.answer.status == Some(StatusCode::UNAUTHORIZED) && refusal.elsewhere.is_none() =>
            {
                self.tokens.forget(origin, repository, &key);
                Err(denied(refusal, &challenge))
            }
            accepted => {
                if let Some(repository) = repository {
                    self.tokens
                        .remember(origin, repository, Remembered { key, challenge });
                }
                accepted
            }
        }
    }

    /// The token that worked last time, or its successor.
    async fn renewed(
        &self,
        origin: &Origin,
        known: Remembered,
        login: LoginKind<'_>,
        ask: &Ask<'_>,
    ) -> Result<(Option<Remembered>, Option<HeaderValue>), Box<Refusal>> {
        match self.token(&known.key, login, None, ask).await {
            Ok(header) => Ok((Some(known), Some(header))),
            Err(TokenFailure::Denied(_)) => {
                self.tokens.forget(origin, ask.operation.repository(), &known.key);
                Ok((None, None))
            }
            Err(failure) => Err(no_token(&failure)),
        }
    }

    /// A token for `key`, fetched if need be.
    pub(super) async fn token(
        &self,
        key: &Key,
        login: LoginKind<'_>,
        rejected: Option<&HeaderValue>,
        ask: &Ask<'_>,
    ) -> Result<HeaderValue, TokenFailure> {
        if let Some(kept) = self.tokens.kept(key, rejected) {
            return Ok(kept);
        }
        ask.pending.token_wanted();
        let got = self
            .tokens
            .get(&self.http, key, login.login(), (rejected, ask.trace))
            .await;
        ask.pending.token_ended(match &got {
            Ok(_) | Err(TokenFailure::Denied(_)) => Ended::Response,
            // Also where nothing was sent within a pause: it is over the sooner.
            Err(TokenFailure::Limited(_)) => Ended::Unknown,
            Err(TokenFailure::Failed(_)) => Ended::ServerError(Cause::TokenService),
            Err(failure @ (TokenFailure::Silent(_) | TokenFailure::PlainRealm)) => {
                Ended::NoResponse(failure.into())
            }
        });
        got
    }

    /// Whether a request of this caller's would need a new token, should the registry want one.
    pub(super) fn needs_token(&self, urls: &[Origin], caller: &Caller, operation: &Operation) -> bool {
        let brings_one = match &caller.credential {
            Credential::Client(header) => !is_basic(header),
            Credential::Own | Credential::Anonymous => false,
        };
        let own = || *self.own_holder.lock().unwrap_or_else(PoisonError::into_inner);
        let holder = match &caller.credential {
            Credential::Client(_) => holder(caller, HolderKind::Client),
            Credential::Own => own().unwrap_or_else(|| holder(caller, HolderKind::Anonymous)),
            Credential::Anonymous => holder(caller, HolderKind::Anonymous),
        };
        let has_one = |origin: &Origin, name: &Repository| {
            let known = self.tokens.remembered(origin, name, holder);
            known.is_some_and(|known| self.tokens.kept(&known.key, None).is_some())
        };
        let is_held = || {
            let name = operation.repository();
            name.is_some_and(|name| urls.iter().any(|origin| has_one(origin, name)))
        };
        !brings_one && !is_held()
    }

    pub(super) fn key(
        &self,
        origin: &Origin,
        refusal: &Refusal,
        ask: &Ask<'_>,
        holder: Holder,
    ) -> Option<Key> {
        refusal.challenges.iter().find_map(|challenge| {
            let Challenge::Bearer { realm, service, scopes, .. } = challenge else { return None };
            let key = Key::of(
                &self.tokens,
                origin,
                (realm, service.as_deref(), scopes),
                ask.operation.repository(),
                holder,
            );
            if key.is_none() {
                tracing::warn!(
                    %origin,
                    realm,
                    "the registry wants a token from a host that is not trusted for it; name it in `token_hosts` if it is right"
                );
            }
            key
        })
    }

    /// One request, and one more from the registry's own URL if the storage it sent us to refused: signed URLs expire.
    pub(super) async fn resolved(
        &self,
        uri: &Uri,
        ask: &Ask<'_>,
        authorization: Option<&HeaderValue>,
        elsewhere: Option<&Other>,
    ) -> Result<Reply, Box<Refusal>> {
        match self.once(uri, ask, authorization, elsewhere).await {
            // A challenge is answered, not asked for again.
            Err(refusal) if refusal.abroad && ask.method == Method::GET && refusal.challenges.is_empty() => {
                self.once(uri, ask, authorization, elsewhere).await
            }
            result => result,
        }
    }

    async fn once(
        &self,
        uri: &Uri,
        ask: &Ask<'_>,
        authorization: Option<&HeaderValue>,
        elsewhere: Option<&Other>,
    ) -> Result<Reply, Box<Refusal>> {
        let mut headers = HeaderMap::new();
        for line in ask.accept.lines() {
            headers.append(ACCEPT, line.clone());
        }
        headers.extend(ask.range.clone().map(|range| (RANGE, range)));
        headers.extend(authorization.cloned().map(|value| (AUTHORIZATION, value)));
        ask.trace.write(&mut headers);
        let request = Request {
            method: ask.method.clone(),
            uri: uri.clone(),
            headers,
            body: bytes::Bytes::new(),
            follow: Follow::Anywhere,
            elsewhere: elsewhere.cloned(),
            within: self.headers_within,
        };
        let sent = self.http.send(request).await;
        let reply = sent.map_err(|unavailable| Box::new(Answer::unavailable(unavailable).into()))?;
        if reply.status.is_success() {
            return Ok(reply);
        }
        Err(refusal(ask, reply).await)
    }
}

/// `own`: the proxy's own credential for what is asked, where there is one.
fn standing<'a>(caller: &'a Caller, own: Option<&'a OwnCredential>) -> Standing<'a> {
    match (&caller.credential, own) {
        (Credential::Own, Some(own)) => Standing {
            header: (!own.is_identity_token()).then(|| own.basic()),
            exchange: Some((own_holder(own), LoginKind::Own(own))),
        },
        (Credential::Anonymous, _) | (Credential::Own, None) => Standing {
            header: None,
            exchange: Some((holder(caller, HolderKind::Anonymous), LoginKind::Anonymous)),
        },
        (Credential::Client(header), _) => {
            let mut sent = header.clone();
            sent.set_sensitive(true);
            Standing {
                header: Some(sent),
                exchange: is_basic(header)
                    .then(|| (holder(caller, HolderKind::Client), LoginKind::Basic(header))),
            }
        }
    }
}

fn holder(caller: &Caller, kind: HolderKind) -> Holder {
    Holder {
        kind,
        principal: caller.principal,
    }
}

fn own_holder(own: &OwnCredential) -> Holder {
    Holder {
        kind: HolderKind::Own,
        principal: own.holder(),
    }
}

fn is_basic(header: &HeaderValue) -> bool {
    let scheme = header.as_bytes().get(..6);
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic "))
}

/// Whether this is a registry's response, an error or not: the connection came about. A captive portal's page is not it.
pub(super) fn is_registry(reply: &Reply) -> bool {
    is_alive(reply) || reply.status.is_server_error()
}

/// Whether a registry or its token service responds again. A captive portal's page is not it.
pub(super) fn is_alive(reply: &Reply) -> bool {
    let sender = Sender::of(reply.abroad);
    match Answer::read(&Operation::Ping, reply.status, &reply.headers, sender).said {
        Said::Silent(cause) => cause == Cause::RateLimited,
        _ => !reply.abroad,
    }
}

/// What a status other than 2xx means, with the text of its body.
async fn refusal(ask: &Ask<'_>, reply: Reply) -> Box<Refusal> {
    let (status, abroad) = (reply.status, reply.abroad);
    let elsewhere = reply
        .at
        .as_ref()
        .and_then(Origin::of_uri)
        .map(|origin| Elsewhere {
            origin,
            challenge: reply.headers.get_all(WWW_AUTHENTICATE).iter().cloned().collect(),
        });
    let mut answer = Answer::read(ask.operation, status, &reply.headers, Sender::of(abroad));
    let challenges = if status == StatusCode::UNAUTHORIZED {
        Challenge::read(&reply.headers)
    } else {
        Vec::new()
    };
    let of_registry = proof::is_registrys(&reply.headers);
    let mut expired = status == StatusCode::BAD_REQUEST;
    let headers = reply.headers.clone();
    answer.stated_wait = stated_wait(&headers, b"");
    if ask.method == Method::GET
        && let Ok(body) = reply.collect(ERROR_BODY_BYTES_MAX, ERROR_BODY_WITHIN).await
    {
        (answer.code, answer.message) = Problem::read(&body).unzip();
        answer.stated_wait = stated_wait(&headers, &body);
        answer.said = said(answer.said, &headers, &answer);
        expired |= status == StatusCode::FORBIDDEN
            && body.windows(7).any(|part| part.eq_ignore_ascii_case(b"expired"));
    }
    // Storage behind a registry knows nothing of callers and little of blobs, and a login page knows nothing of either:
    // the refusal is a failure and no denial. Only another registry says of a manifest that it is not there.
    let is_registrys_404 =
        of_registry && answer.said == Said::Absent && !matches!(ask.operation, Operation::Blob { .. });
    let is_elsewheres = abroad
        && status.is_client_error()
        && status != StatusCode::RANGE_NOT_SATISFIABLE
        && answer.said != Said::Silent(Cause::RateLimited)
        && !is_registrys_404;
    if is_elsewheres {
        answer.said = Said::Silent(Cause::Status(status.as_u16()));
        answer.challenge = Vec::new();
        expired = false;
    }
    Box::new(Refusal {
        answer,
        abroad: is_elsewheres,
        of_registry,
        elsewhere,
        expired,
        challenges,
    })
}

/// What the response comes down to now that its error code is known: a limit, or a denial after all.
fn said(by_headers: Said, headers: &HeaderMap, answer: &Answer) -> Said {
    let (code, message) = (answer.code.as_deref(), answer.message.as_deref());
    let Some(status) = answer.status else {
        return by_headers;
    };
    let limited = is_limit_by_body(status, headers, code, message);
    match by_headers {
        _ if limited => Said::Silent(Cause::RateLimited),
        Said::Silent(Cause::RateLimited) => Said::Forbidden,
        other => other,
    }
}

fn silent(cause: Cause) -> Box<Refusal> {
    Box::new(Answer::silent(cause).into())
}

pub(super) fn no_token(failure: &TokenFailure) -> Box<Refusal> {
    Box::new(Refusal::from(match failure {
        TokenFailure::Limited(pause) => Answer::paused(pause.clone()),
        TokenFailure::Denied(_) | TokenFailure::PlainRealm => Answer::silent(failure.into()),
        TokenFailure::Silent(reason) | TokenFailure::Failed(reason) => Answer {
            detail: Some(format!("the token service: {reason}").into()),
            ..Answer::silent(failure.into())
        },
    }))
}

/// A denial with the challenge as it was before any token was sent. One with `error="…"` in it makes containerd give
/// up without trying the credentials it has.
pub(super) fn denied(mut refusal: Box<Refusal>, challenge: &[HeaderValue]) -> Box<Refusal> {
    if refusal.answer.said == Said::Silent(Cause::RateLimited) {
        return refusal;
    }
    refusal.answer.said = Said::Forbidden;
    if !challenge.is_empty() {
        refusal.answer.challenge = challenge.to_vec();
    }
    refusal
}

/// 501 is no stumble but "never", and who names a time wants to be left alone until then.
fn stumbled(answer: &Answer) -> bool {
    let server = matches!(answer.said, Said::Silent(Cause::Status(500 | 502..=599)));
    server && answer.retry_after.is_none()
}

/// 50 to 150 ms, so that many caches do not come back together.
fn jitter() -> Duration {
    Duration::from_millis(50 + RandomState::new().hash_one(()) % 101)
}
