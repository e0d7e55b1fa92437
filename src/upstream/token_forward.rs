//! A client's own question to the token service, handed on whole, and what came of it seen on the way back.
//!
//! Nothing of it is changed but the coding of the answer, which has to be read here.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH};
use http::{HeaderMap, StatusCode};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::Upstream;
use super::forward::ForwardRequest;
use super::origin::Origin;
use super::retry_after::{is_limit, is_limit_by_body};
use super::token::{TOKEN_BODY_BYTES_MAX, parse};
use crate::oci::error::ErrorBody;
use crate::oci::failure::UpstreamFailure;

/// What the token service answered.
pub struct TokenResponse {
    /// As it sent it.
    pub status: StatusCode,
    /// All that concerns the client.
    pub headers: HeaderMap,
    /// Whole.
    pub body: Bytes,
    /// The token in it, if it is a 2xx with one.
    pub issued: Option<ForwardedToken>,
}

/// A token that was given to a client.
pub struct ForwardedToken {
    /// As the client will show it: `Bearer …`.
    pub authorization: Zeroizing<String>,
    /// How long it lives.
    pub life: Duration,
}

impl Upstream {
    /// Hands a question on to the token service at `realm`. `Err` for what is a silence: no answer, 429, 5xx.
    pub async fn forward_token_request(
        &self,
        realm: &Origin,
        mut request: ForwardRequest,
    ) -> Result<TokenResponse, UpstreamFailure> {
        if let Some(cause) = self.0.offline.cause() {
            return Err(cause);
        }
        request.headers.remove(ACCEPT_ENCODING);
        let forwarded = timeout(self.0.timeouts.token, self.token_response(realm, request)).await;
        let reply = forwarded.unwrap_or(Err(UpstreamFailure::Timeout));
        self.0
            .auth_client
            .tokens
            .record_realm(realm.join(""), reply.is_err());
        reply
    }

    /// Whether the token service gave no answer when it was asked last, by a client or by us.
    pub fn has_failed_realm(&self) -> bool {
        self.0.auth_client.tokens.failed_realm().is_some()
    }

    async fn token_response(
        &self,
        realm: &Origin,
        request: ForwardRequest,
    ) -> Result<TokenResponse, UpstreamFailure> {
        let mut response = self.forward_to_realm(realm, request).await?;
        match response.status.as_u16() {
            _ if is_limit(response.status, &response.headers) => return Err(UpstreamFailure::RateLimited),
            status @ 500.. => return Err(UpstreamFailure::Status(status)),
            _ => {}
        }
        // Reserved whole, so that no copy of it is left behind by its growing.
        let mut body = Zeroizing::new(Vec::with_capacity(TOKEN_BODY_BYTES_MAX));
        while let Some(chunk) = response.chunk().await {
            let chunk = chunk?;
            if body.len() + chunk.len() > TOKEN_BODY_BYTES_MAX {
                return Err(UpstreamFailure::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        if !response.status.is_success() {
            let (code, message) = ErrorBody::read(&body).unzip();
            let (code, message) = (code.as_deref(), message.as_deref());
            if is_limit_by_body(response.status, &response.headers, code, message) {
                return Err(UpstreamFailure::RateLimited);
            }
        }
        let issued = parse(&body).filter(|_| response.status == StatusCode::OK);
        response.headers.remove(CONTENT_LENGTH);
        Ok(TokenResponse {
            status: response.status,
            headers: response.headers,
            body: Bytes::from_owner(body),
            issued: issued.map(|(authorization, life)| ForwardedToken { authorization, life }),
        })
    }
}
