//! Requests for the registry alone: handed on, and their answers handed back, neither body ever whole in memory.

use http::header::AUTHORIZATION;
use http::{HeaderName, Response, StatusCode};
use http_body_util::BodyExt as _;

use super::gate::Passage;
use super::received::Received;
use super::{Body, Front, Place};
use crate::oci::UpstreamFailure;
use crate::proxy::invalidation::WriteOutcome;
use crate::proxy::{ProxyService, is_local_token};
use crate::upstream::forward::{ForwardRequest, ForwardResponse};

impl Front {
    /// Hands a request on. `Err` if the registry gave no answer.
    pub(super) async fn pass(
        &self,
        proxy: &ProxyService,
        passage: Passage,
        place: &Place<'_>,
        body: Received,
    ) -> Result<Response<Body>, UpstreamFailure> {
        let head = place.head;
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut headers = head.headers.clone();
        // A token of ours means nothing to a registry; without it, the registry says where to get one that does.
        if headers.get_all(AUTHORIZATION).iter().any(is_local_token) {
            headers.remove(AUTHORIZATION);
        }
        place.trace.inject(&mut headers);
        let passing = ForwardRequest {
            method: head.method.clone(),
            path_and_query: path.to_owned(),
            headers,
            body: body.map_err(Into::into).boxed_unsync(),
            base: passage.base,
        };
        let handed = match passage.change {
            Some(change) => Some(proxy.begin_write(&passage.upstream_registry, change).await),
            None => None,
        };
        // A registry may take minutes to put a large layer together; a body that rests is noticed where it is handed on.
        let pardoned = place.peer.pardon.hold();
        let upstream = passage.upstream_registry.upstream();
        let passed = match &passage.beside {
            Some(realm) => upstream.forward_to_realm(realm, passing).await,
            None => upstream.forward(passing).await,
        };
        drop(pardoned);
        if let Some(handed) = handed {
            proxy.finish_write(handed, outcome(passed.as_ref())).await;
        }
        passed.map(|passed| self.handed_back(passed))
    }

    fn handed_back(&self, passed: ForwardResponse) -> Response<Body> {
        let (status, length) = (passed.status, passed.length);
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status;
        response.headers_mut().clone_from(&passed.headers);
        let has_body =
            !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) && length != Some(0);
        if has_body {
            *response.body_mut() = Body::passed(passed, length, &self.telemetry);
        }
        // Ours to say, and said by hyper.
        response.headers_mut().remove(HeaderName::from_static("alt-svc"));
        response
    }
}

/// What became of a write that was handed on.
fn outcome(passed: Result<&ForwardResponse, &UpstreamFailure>) -> WriteOutcome {
    match passed {
        Ok(passed) if is_registrys_refusal(passed.status) => WriteOutcome::Rejected,
        Ok(passed) if passed.status.is_success() => WriteOutcome::Succeeded,
        // There was no connection, so nothing was sent.
        Err(
            UpstreamFailure::ConnectionRefused
            | UpstreamFailure::Unreachable
            | UpstreamFailure::Dns
            | UpstreamFailure::ConnectTimeout,
        ) => WriteOutcome::Rejected,
        Ok(_) | Err(_) => WriteOutcome::Unknown,
    }
}

/// Whether the registry itself refused the write. 407, 408, 429 and 499 are also what a proxy in between answers for a
/// request that the registry may have taken.
fn is_registrys_refusal(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403..=406 | 409..=417 | 422 | 423)
}
