//! Authorization at another registry, to which this one redirects: lscr.io to ghcr.io, or another port of one host.
//!
//! The other registry is asked with a token of its own challenge, and only where it is the same host or one that the
//! operator named in `token_hosts`: its response then counts as the registry's own. A token of one registry is never
//! shown to the other. What a client shows instead of a login it got for the name of the upstream, and the operator lets
//! the other registry have credentials for that name.

use http::{HeaderValue, StatusCode, Uri};

use super::answer::Said;
use super::client::Reply;
use super::exchange::{Ask, Exchange, LoginKind, Refusal, denied, no_token};
use super::origin::Origin;
use super::token::{Holder, TokenFailure};

/// What a request may be authorised with at the other registry.
#[derive(Clone, Copy)]
pub(super) enum Shown<'a> {
    /// A token for this.
    Login(Holder, LoginKind<'a>),
    /// The client's own, as it came.
    Token(Option<&'a HeaderValue>),
}

/// A response of another origin.
pub(super) struct Elsewhere {
    pub(super) origin: Origin,
    /// Its `WWW-Authenticate`.
    pub(super) challenge: Vec<HeaderValue>,
}

/// The `Authorization` for one other origin.
pub(super) type Other = (Uri, HeaderValue);

impl Exchange {
    /// Asks the registry, and where it redirects to another one that wants a token of its own, once more with that.
    pub(super) async fn across(
        &self,
        (origin, uri): (&Origin, &Uri),
        ask: &Ask<'_>,
        authorization: Option<&HeaderValue>,
        shown: Shown<'_>,
    ) -> Result<Reply, Box<Refusal>> {
        let known = self.known_elsewhere(origin, ask, shown).await;
        let first = self.resolved(uri, ask, authorization, known.as_ref()).await;
        let mut refusal = match first {
            Err(refusal) if refusal.answer.status == Some(StatusCode::UNAUTHORIZED) => refusal,
            Ok(reply) => {
                let named = reply.at.as_ref().and_then(Origin::of_uri);
                let named = named.filter(|at| self.tokens.names(origin, at));
                let trusted = known.as_ref().and_then(|(place, _)| Origin::of_uri(place));
                return Ok(match named.or(trusted) {
                    Some(trusted) => as_own(reply, &trusted),
                    None => reply,
                });
            }
            Err(refusal) => return Err(refusal),
        };
        let Some(other) = refusal.elsewhere.take() else {
            return Err(refusal);
        };
        let is_trusted = self.tokens.trusts(origin, &other.origin);
        if !is_trusted && !refusal.challenges.is_empty() {
            tracing::warn!(
                %origin,
                other = %other.origin,
                "the registry redirects to another one that wants a token of its own; name it in `token_hosts` if it is right"
            );
        }
        let token = match shown {
            _ if !is_trusted => None,
            Shown::Token(token) => token.cloned(),
            Shown::Login(holder, login) => match self.key(&other.origin, &refusal, ask, holder) {
                None => None,
                Some(key) => {
                    let rejected = known.as_ref().map(|(_, token)| token);
                    match self.token(&key, login, rejected, ask).await {
                        Ok(token) => {
                            self.tokens
                                .remember_elsewhere(origin, ask.operation, &other.origin, key);
                            Some(token)
                        }
                        Err(TokenFailure::Denied(_)) => return Err(denied_by(refusal, other)),
                        Err(failure) => return Err(no_token(&failure)),
                    }
                }
            },
        };
        let (Some(token), Some(place)) = (token, other.origin.join("/")) else {
            refusal.elsewhere = Some(other);
            return Err(refusal);
        };
        match self
            .resolved(uri, ask, authorization, Some(&(place, token)))
            .await
        {
            Err(refusal) if is_denial(&refusal, &other) => Err(denied_by(refusal, other)),
            second => second.map(|reply| as_own(reply, &other.origin)),
        }
    }

    /// The token that worked at the other registry the last time, or its successor.
    async fn known_elsewhere(&self, origin: &Origin, ask: &Ask<'_>, shown: Shown<'_>) -> Option<Other> {
        let Shown::Login(holder, login) = shown else {
            return None;
        };
        let (other, key) = self.tokens.known_elsewhere(origin, ask.operation, holder)?;
        let got = self.token(&key, login, None, ask).await;
        Some((other.join("/")?, got.ok()?))
    }
}

/// A response of the other registry, to a token of its own, is as good as the registry's own.
fn as_own(reply: Reply, other: &Origin) -> Reply {
    let is_other = reply
        .at
        .as_ref()
        .and_then(Origin::of_uri)
        .is_some_and(|at| at == *other);
    Reply {
        abroad: reply.abroad && !is_other,
        ..reply
    }
}

/// Whether it is the other registry that refuses, to a token of its own, and not storage behind it.
fn is_denial(refusal: &Refusal, other: &Elsewhere) -> bool {
    let status = refusal.answer.status;
    let is_other = refusal
        .elsewhere
        .as_ref()
        .is_none_or(|at| at.origin == other.origin);
    is_other && matches!(status, Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN))
}

/// The other registry denies this caller, with its challenge as it was before any token was sent.
fn denied_by(refusal: Box<Refusal>, other: Elsewhere) -> Box<Refusal> {
    let mut refusal = denied(refusal, &other.challenge);
    refusal.answer.said = Said::Forbidden;
    refusal.abroad = false;
    refusal.elsewhere = Some(other);
    refusal
}
