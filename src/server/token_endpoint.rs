//! Token endpoint (`local_tokens`): requests to an upstream's token service, whose host resolves to the cache too.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Response};
use http_body_util::{BodyExt as _, Full};
use zeroize::Zeroizing;

use super::access_log::AccessLogFields;
use super::error::Rejection;
use super::request::{ForwardTarget, RequestBody};
use super::{Body, RegistryService, RequestInfo, response};
use crate::oci::TokenRequest;
use crate::proxy::{ProxyService, TokenOutcome};
use crate::upstream::forward::ForwardRequest;
use crate::upstream::origin::Origin;

/// Largest form, with a password or refresh token.
const FORM_BYTES_MAX: usize = 64 * 1024;
const FORM_TIMEOUT: Duration = Duration::from_secs(10);

impl RegistryService {
    /// Forwards a token request to the service at `realm`, or issues a local token if the service is unavailable.
    pub(super) async fn answer_token_request(
        &self,
        proxy: &Arc<ProxyService>,
        target: ForwardTarget,
        realm: &Origin,
        info: &RequestInfo<'_>,
        body: RequestBody,
    ) -> (Response<Body>, AccessLogFields) {
        let head = info.head;
        let Ok(Some(form)) = tokio::time::timeout(FORM_TIMEOUT, read_form(body)).await else {
            let error = Rejection::BodyTooLarge(head.method.clone());
            return (
                response::request_error(&error, &head.method),
                AccessLogFields::rejected(error.name()),
            );
        };
        let asked = TokenRequest::read(head.headers.get(AUTHORIZATION), head.uri.query(), &form);
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut headers = head.headers.clone();
        info.trace.inject(&mut headers);
        let passing = ForwardRequest {
            method: head.method.clone(),
            path_and_query: path.to_owned(),
            headers,
            body: Full::new(form).map_err(|never| match never {}).boxed_unsync(),
            base: target.base,
        };
        match proxy
            .request_token(&target.upstream_registry, realm, asked, passing)
            .await
        {
            Ok(TokenOutcome::Upstream(answered)) => {
                let mut response = Response::new(Body::from_bytes(answered.body));
                *response.status_mut() = answered.status;
                *response.headers_mut() = answered.headers;
                (response, AccessLogFields::forwarded())
            }
            Ok(TokenOutcome::Local(cause, token)) => {
                let mut response = Response::new(Body::from_bytes(token));
                let json = HeaderValue::from_static("application/json");
                response.headers_mut().insert(CONTENT_TYPE, json);
                (response, AccessLogFields::local_token(cause))
            }
            Err(cause) => {
                let response = response::forward_failed(target.upstream_registry.name(), cause, false);
                (response, AccessLogFields::forward_failed(cause))
            }
        }
    }
}

/// The form. `None` if it is too long or incomplete. Zeroized after its last use.
async fn read_form(mut body: RequestBody) -> Option<Bytes> {
    let mut form = Zeroizing::new(Vec::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.ok()?.into_data() else {
            continue;
        };
        if form.len() + data.len() > FORM_BYTES_MAX {
            return None;
        }
        // Reserved at full size at once, so that growing leaves no copy of a secret behind.
        let room = FORM_BYTES_MAX - form.len();
        form.reserve_exact(room);
        form.extend_from_slice(&data);
    }
    Some(Bytes::from_owner(form))
}
