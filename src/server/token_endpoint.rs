//! Token endpoint (`local_tokens`): requests to an upstream's token service, whose host resolves to the cache too.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Response};
use http_body::Body as HttpBody;
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
        let form = match read_form(body, &head.method).await {
            Ok(form) => form,
            Err(error) => {
                return (
                    response::request_error(&error, &head.method),
                    AccessLogFields::rejected(error.name()),
                );
            }
        };
        let asked = TokenRequest::read(&head.method, &head.headers, head.uri.query(), &form);
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

/// The form, received within [`FORM_TIMEOUT`]. Zeroized after its last use.
async fn read_form<B>(body: B, method: &Method) -> Result<Bytes, Rejection>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    let received = tokio::time::timeout(FORM_TIMEOUT, collect_form(body, method)).await;
    received.unwrap_or(Err(Rejection::BodyTimeout(FORM_TIMEOUT.as_secs())))
}

async fn collect_form<B>(mut body: B, method: &Method) -> Result<Bytes, Rejection>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    let mut form = Zeroizing::new(Vec::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Rejection::BodyIncomplete)?.into_data() else {
            continue;
        };
        if form.len() + data.len() > FORM_BYTES_MAX {
            return Err(Rejection::BodyTooLarge(method.clone()));
        }
        // Reserved at full size at once, so that growing leaves no copy of a secret behind.
        let room = FORM_BYTES_MAX - form.len();
        form.reserve_exact(room);
        form.extend_from_slice(&data);
    }
    Ok(Bytes::from_owner(form))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::io::{Error, ErrorKind};

    use futures_util::{StreamExt as _, stream};
    use http::StatusCode;
    use http_body::Frame;
    use http_body_util::StreamBody;

    use super::*;

    type Received = Result<Frame<Bytes>, Error>;

    async fn read(frames: Vec<Received>, is_complete: bool) -> Result<Bytes, (StatusCode, &'static str)> {
        let rest = if is_complete {
            stream::empty().left_stream()
        } else {
            stream::pending().right_stream()
        };
        let body = StreamBody::new(stream::iter(frames).chain(rest));
        let form = read_form(body, &Method::POST).await;
        form.map_err(|error| (error.status(), error.name()))
    }

    fn part(bytes: &'static [u8]) -> Frame<Bytes> {
        Frame::data(Bytes::from_static(bytes))
    }

    #[tokio::test(start_paused = true)]
    async fn slow_or_broken_form_is_reported_as_such() {
        let whole = read(vec![Ok(part(b"a=")), Ok(part(b"b"))], true).await;
        assert_eq!(whole, Ok(Bytes::from_static(b"a=b")));
        let slow = read(vec![Ok(part(b"a="))], false).await;
        assert_eq!(slow, Err((StatusCode::REQUEST_TIMEOUT, "body-timeout")));
        let broken = read(vec![Ok(part(b"a=")), Err(ErrorKind::UnexpectedEof.into())], true).await;
        assert_eq!(broken, Err((StatusCode::BAD_REQUEST, "body-incomplete")));
        let long = read(vec![Ok(part(&[b'a'; FORM_BYTES_MAX])), Ok(part(b"b"))], false).await;
        assert_eq!(long, Err((StatusCode::PAYLOAD_TOO_LARGE, "body-too-large")));
    }
}
