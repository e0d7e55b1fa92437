//! Questions to an upstream's token service, whose host is ours as the upstream's is (`local_tokens`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Response};
use http_body_util::{BodyExt as _, Full};
use zeroize::Zeroizing;

use super::gate::{Passage, Turned};
use super::received::Received;
use super::told::Told;
use super::{Body, Front, Place, reply};
use crate::oci::TokenRequest;
use crate::proxy::{ProxyService, TokenOutcome};
use crate::upstream::forward::ForwardRequest;
use crate::upstream::origin::Origin;

/// A form with a password or a refresh token.
const FORM_BYTES_MAX: usize = 64 * 1024;
const FORM_WITHIN: Duration = Duration::from_secs(10);

impl Front {
    /// Answers a question to the token service at `realm`, by that or in its place.
    pub(super) async fn log_in(
        &self,
        proxy: &Arc<ProxyService>,
        passage: Passage,
        realm: &Origin,
        place: &Place<'_>,
        body: Received,
    ) -> (Response<Body>, Told) {
        let head = place.head;
        let Ok(Some(form)) = tokio::time::timeout(FORM_WITHIN, whole(body)).await else {
            let turned = Turned::Body(head.method.clone());
            return (reply::turned(&turned, &head.method), Told::turned(turned.name()));
        };
        let asked = TokenRequest::read(head.headers.get(AUTHORIZATION), head.uri.query(), &form);
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut headers = head.headers.clone();
        place.trace.inject(&mut headers);
        let passing = ForwardRequest {
            method: head.method.clone(),
            path_and_query: path.to_owned(),
            headers,
            body: Full::new(form).map_err(|never| match never {}).boxed_unsync(),
            base: passage.base,
        };
        match proxy
            .request_token(&passage.upstream_registry, realm, asked, passing)
            .await
        {
            Ok(TokenOutcome::Upstream(answered)) => {
                let mut response = Response::new(Body::whole(answered.body));
                *response.status_mut() = answered.status;
                *response.headers_mut() = answered.headers;
                (response, Told::passed())
            }
            Ok(TokenOutcome::Local(cause, token)) => {
                let mut response = Response::new(Body::whole(token));
                let json = HeaderValue::from_static("application/json");
                response.headers_mut().insert(CONTENT_TYPE, json);
                (response, Told::local_token(cause))
            }
            Err(cause) => {
                let response = reply::not_passed(passage.upstream_registry.name(), cause, false);
                (response, Told::not_passed(cause))
            }
        }
    }
}

/// The form; `None` where it is too long or breaks off. Wiped with its last use.
async fn whole(mut body: Received) -> Option<Bytes> {
    let mut form = Zeroizing::new(Vec::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.ok()?.into_data() else {
            continue;
        };
        if form.len() + data.len() > FORM_BYTES_MAX {
            return None;
        }
        // At once as large as it may become, so that no copy of a part is left behind.
        let room = FORM_BYTES_MAX - form.len();
        form.reserve_exact(room);
        form.extend_from_slice(&data);
    }
    Some(Bytes::from_owner(form))
}
