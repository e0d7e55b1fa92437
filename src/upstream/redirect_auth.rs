//! Authentication at another registry to which this one redirects (lscr.io to ghcr.io, or another port of the same
//! host).
//!
//! The other registry gets a token for its own challenge. It must have the same host or be listed in `token_hosts`;
//! its response then counts as the registry's own. A token that the cache obtained from one registry is never sent to the
//! other. A client's own credential or token is used for both.

use http::{HeaderValue, StatusCode, Uri};

use super::auth_client::{
    AuthClient, CallerCredential, ErrorResponse, RequestSpec, denied, token_failure_response,
};
use super::http_client::HttpResponse;
use super::origin::Origin;
use super::response::ResponseKind;
use super::token::{TokenFailure, TokenOwner};

/// How to authenticate at the other registry.
#[derive(Clone, Copy)]
pub(super) enum RedirectCredential<'a> {
    /// With a token obtained for this credential.
    Exchange(TokenOwner, CallerCredential<'a>),
    /// With the client's own token, unchanged.
    Token(Option<&'a HeaderValue>),
}

/// The origin and challenge of a response from another registry.
pub(super) struct OtherRegistry {
    pub(super) origin: Origin,
    /// Its `WWW-Authenticate` lines.
    pub(super) challenge: Vec<HeaderValue>,
}

/// The `Authorization` header for one other origin.
pub(super) type OriginAuthorization = (Uri, HeaderValue);

impl AuthClient {
    /// Sends the request. If the registry redirects to another one that requires its own token, sends it once more
    /// with that token.
    pub(super) async fn send_across_redirect(
        &self,
        (origin, uri): (&Origin, &Uri),
        spec: &RequestSpec<'_>,
        authorization: Option<&HeaderValue>,
        credential: RedirectCredential<'_>,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        let known = self.other_registry_token(origin, spec, credential).await;
        let first = self
            .send_following_storage(uri, spec, authorization, known.as_ref())
            .await;
        let mut error = match first {
            Err(error) if error.response.status == Some(StatusCode::UNAUTHORIZED) => error,
            Ok(reply) => {
                let named = reply.final_url.as_ref().and_then(Origin::of_uri);
                let named = named.filter(|at| self.tokens.is_named(origin, at));
                let trusted = known.as_ref().and_then(|(place, _)| Origin::of_uri(place));
                return Ok(match named.or(trusted) {
                    Some(trusted) => accept_as_own(reply, &trusted),
                    None => reply,
                });
            }
            Err(error) => return Err(error),
        };
        let Some(other) = error.other_registry.take() else {
            return Err(error);
        };
        let is_trusted = self.tokens.trusts(origin, &other.origin);
        if !is_trusted && !error.challenges.is_empty() {
            tracing::warn!(
                %origin,
                other = %other.origin,
                "redirect to an untrusted registry that requires a token (add it to `token_hosts` if it is correct)"
            );
        }
        let token = match credential {
            _ if !is_trusted => None,
            RedirectCredential::Token(token) => token.cloned(),
            RedirectCredential::Exchange(owner, login) => {
                match self.key(&other.origin, &error, spec, owner) {
                    None => None,
                    Some(key) => {
                        let rejected = known.as_ref().map(|(_, token)| token);
                        match self.token(&key, login, rejected, spec).await {
                            Ok(token) => {
                                self.tokens.remember_other_registry(
                                    origin,
                                    spec.endpoint,
                                    &other.origin,
                                    key,
                                );
                                Some(token)
                            }
                            Err(TokenFailure::Denied(_)) => return Err(denied_by(error, other)),
                            Err(failure) => return Err(token_failure_response(&failure)),
                        }
                    }
                }
            }
        };
        let (Some(token), Some(place)) = (token, other.origin.join("/")) else {
            error.other_registry = Some(other);
            return Err(error);
        };
        match self
            .send_following_storage(uri, spec, authorization, Some(&(place, token)))
            .await
        {
            Err(error) if is_denial(&error, &other) => Err(denied_by(error, other)),
            second => second.map(|reply| accept_as_own(reply, &other.origin)),
        }
    }

    /// The last token that worked at the other registry, refreshed if necessary.
    async fn other_registry_token(
        &self,
        origin: &Origin,
        spec: &RequestSpec<'_>,
        credential: RedirectCredential<'_>,
    ) -> Option<OriginAuthorization> {
        let RedirectCredential::Exchange(owner, login) = credential else {
            return None;
        };
        let (other, key) = self.tokens.other_registry(origin, spec.endpoint, owner)?;
        let got = self.token(&key, login, None, spec).await;
        Some((other.join("/")?, got.ok()?))
    }
}

/// Treats a response of the other registry to its own token as the registry's own.
fn accept_as_own(reply: HttpResponse, other: &Origin) -> HttpResponse {
    let is_other = reply
        .final_url
        .as_ref()
        .and_then(Origin::of_uri)
        .is_some_and(|at| at == *other);
    HttpResponse {
        from_other_origin: reply.from_other_origin && !is_other,
        ..reply
    }
}

/// Whether the other registry, and not storage behind it, rejected its own token.
fn is_denial(error: &ErrorResponse, other: &OtherRegistry) -> bool {
    let status = error.response.status;
    let is_other = error
        .other_registry
        .as_ref()
        .is_none_or(|at| at.origin == other.origin);
    is_other && matches!(status, Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN))
}

/// A denial by the other registry, with the challenge received before any token was sent.
fn denied_by(error: Box<ErrorResponse>, other: OtherRegistry) -> Box<ErrorResponse> {
    let mut error = denied(error, &other.challenge);
    error.response.kind = ResponseKind::Denied;
    error.from_other_origin = false;
    error.other_registry = Some(other);
    error
}
