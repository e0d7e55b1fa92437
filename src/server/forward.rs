//! Forwarding of writes and other requests to the registry. Both bodies are streamed.

use std::sync::Arc;

use http::header::AUTHORIZATION;
use http::{HeaderName, Response, StatusCode};
use http_body_util::BodyExt as _;

use super::request::{ForwardTarget, RequestBody};
use super::{Body, RegistryService, RequestInfo};
use crate::oci::UpstreamFailure;
use crate::proxy::invalidation::WriteOutcome;
use crate::proxy::{ProxyService, is_local_token};
use crate::upstream::forward::{ForwardRequest, ForwardResponse};

impl RegistryService {
    /// Forwards a request. `Err` if the registry did not respond.
    pub(super) async fn forward(
        &self,
        proxy: &Arc<ProxyService>,
        target: ForwardTarget,
        info: &RequestInfo<'_>,
        body: RequestBody,
    ) -> Result<Response<Body>, UpstreamFailure> {
        let head = info.head;
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut headers = head.headers.clone();
        // A local token is worthless at the registry. Without it, the registry answers with its challenge.
        if headers.get_all(AUTHORIZATION).iter().any(is_local_token) {
            headers.remove(AUTHORIZATION);
        }
        info.trace.inject(&mut headers);
        let passing = ForwardRequest {
            method: head.method.clone(),
            path_and_query: path.to_owned(),
            headers,
            body: body.map_err(Into::into).boxed_unsync(),
            base: target.base,
        };
        let handed = match target.change {
            Some(change) => Some(proxy.begin_write(&target.upstream_registry, change).await),
            None => None,
        };
        // The registry may need minutes to commit a large layer. The upload itself has its own timeout in `upstream`.
        let idle_paused = info.peer.idle_pause.pause();
        let upstream = target.upstream_registry.upstream();
        let passed = match &target.token_service {
            Some(realm) => upstream.forward_to_realm(realm, passing).await,
            None => upstream.forward(passing).await,
        };
        drop(idle_paused);
        if let Some(handed) = handed {
            proxy.finish_write(handed, write_outcome(passed.as_ref())).await;
        }
        passed.map(|passed| self.forwarded_response(passed))
    }

    fn forwarded_response(&self, passed: ForwardResponse) -> Response<Body> {
        let (status, length) = (passed.status, passed.length);
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status;
        response.headers_mut().clone_from(&passed.headers);
        let has_body =
            !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) && length != Some(0);
        if has_body {
            *response.body_mut() = Body::forwarded(passed, length, &self.telemetry);
        }
        // It names other addresses of the upstream (RFC 7838), where the client would bypass the cache.
        response.headers_mut().remove(HeaderName::from_static("alt-svc"));
        response
    }
}

/// Outcome of a forwarded write.
fn write_outcome(passed: Result<&ForwardResponse, &UpstreamFailure>) -> WriteOutcome {
    match passed {
        Ok(passed) if is_registry_refusal(passed.status) => WriteOutcome::Rejected,
        Ok(passed) if passed.status.is_success() => WriteOutcome::Succeeded,
        // No connection was made, so nothing was sent.
        Err(
            UpstreamFailure::ConnectionRefused
            | UpstreamFailure::Unreachable
            | UpstreamFailure::Dns
            | UpstreamFailure::ConnectTimeout,
        ) => WriteOutcome::Rejected,
        Ok(_) | Err(_) => WriteOutcome::Unknown,
    }
}

/// Whether the registry itself rejected the write. A proxy in between also sends 407, 408, 429 and 499, for a request
/// that the registry may have executed.
fn is_registry_refusal(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403..=406 | 409..=417 | 422 | 423)
}
