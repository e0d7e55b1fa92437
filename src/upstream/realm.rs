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
use super::origin::Origin;
use super::pass::Passing;
use super::retry_after::{is_limit, is_limit_by_body};
use super::token::{TOKEN_BODY_BYTES_MAX, parse};
use crate::oci::cause::Cause;
use crate::oci::error::Problem;

/// What the token service answered.
pub struct TokenReply {
    /// As it sent it.
    pub status: StatusCode,
    /// All that concerns the client.
    pub headers: HeaderMap,
    /// Whole.
    pub body: Bytes,
    /// The token in it, if it is a 2xx with one.
    pub issued: Option<Issued>,
}

/// A token that was given to a client.
pub struct Issued {
    /// As the client will show it: `Bearer …`.
    pub authorization: Zeroizing<String>,
    /// How long it lives.
    pub life: Duration,
}

impl Upstream {
    /// Hands a question on to the token service at `realm`. `Err` for what is a silence: no answer, 429, 5xx.
    pub async fn ask_realm(&self, realm: &Origin, mut passing: Passing) -> Result<TokenReply, Cause> {
        if let Some(cause) = self.0.offline.cause() {
            return Err(cause);
        }
        passing.headers.remove(ACCEPT_ENCODING);
        let asked = timeout(self.0.timeouts.token, self.reply_of(realm, passing)).await;
        let reply = asked.unwrap_or(Err(Cause::Timeout));
        self.0.exchange.tokens.note_realm(realm.join(""), reply.is_err());
        reply
    }

    /// Whether the token service gave no answer when it was asked last, by a client or by us.
    pub fn has_silent_realm(&self) -> bool {
        self.0.exchange.tokens.silent_realm().is_some()
    }

    async fn reply_of(&self, realm: &Origin, passing: Passing) -> Result<TokenReply, Cause> {
        let mut passed = self.pass_beside(realm, passing).await?;
        match passed.status.as_u16() {
            _ if is_limit(passed.status, &passed.headers) => return Err(Cause::RateLimited),
            status @ 500.. => return Err(Cause::Status(status)),
            _ => {}
        }
        // Reserved whole, so that no copy of it is left behind by its growing.
        let mut body = Zeroizing::new(Vec::with_capacity(TOKEN_BODY_BYTES_MAX));
        while let Some(chunk) = passed.chunk().await {
            let chunk = chunk?;
            if body.len() + chunk.len() > TOKEN_BODY_BYTES_MAX {
                return Err(Cause::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        if !passed.status.is_success() {
            let (code, message) = Problem::read(&body).unzip();
            let (code, message) = (code.as_deref(), message.as_deref());
            if is_limit_by_body(passed.status, &passed.headers, code, message) {
                return Err(Cause::RateLimited);
            }
        }
        let issued = parse(&body).filter(|_| passed.status == StatusCode::OK);
        passed.headers.remove(CONTENT_LENGTH);
        Ok(TokenReply {
            status: passed.status,
            headers: passed.headers,
            body: Bytes::from_owner(body),
            issued: issued.map(|(authorization, life)| Issued { authorization, life }),
        })
    }
}
