//! Forwarding of clients' token requests to the token service, with the issued token extracted.
//!
//! The request is forwarded unchanged except for `Accept-Encoding`, because the response is parsed here.

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

/// Response of the token service.
pub struct TokenResponse {
    /// The status, unchanged.
    pub status: StatusCode,
    /// The end-to-end headers.
    pub headers: HeaderMap,
    /// The complete body.
    pub body: Bytes,
    /// The token in a 200 response.
    pub issued: Option<ForwardedToken>,
}

/// A token issued to a client.
pub struct ForwardedToken {
    /// The header that the client will send: `Bearer …`.
    pub authorization: Zeroizing<String>,
    /// Its lifetime.
    pub life: Duration,
}

impl Upstream {
    /// Forwards a token request to the token service at `realm`. `Err` for a failure: no response, 429 or 5xx.
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

    /// Whether the last request to the token service failed, by a client or by the cache.
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
        // Allocated at full size, so that growing leaves no copy of the token in memory.
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
