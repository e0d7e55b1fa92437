//! Passthrough: content that is forwarded without being stored, because its digest cannot be verified or the disk
//! cannot store it.

use std::sync::Arc;

use tokio::time::Instant;

use super::pipeline::{ReadContext, denied};
use super::{ProxyResponse, Request};
pub use crate::download::VerifyingStream;
use crate::oci::{Endpoint, MediaType, Reference, UpstreamFailure};
use crate::policy::{ContentKind, Decision, DenyReason, decide};
use crate::queue::{Class, Demand};
use crate::upstream::{RangeSpec, ResponseKind, ResponseStream, UpstreamResponse};

/// A forwarded response. Its digest algorithm is unsupported, its digest does not match its bytes, or it is too large
/// to store.
pub struct Passthrough {
    /// Requested digest as written.
    pub digest: Option<String>,
    /// Media type as sent.
    pub media_type: Option<MediaType>,
    /// Stated size of the body in bytes.
    pub size: Option<u64>,
    /// Body; `None` for `HEAD`.
    pub body: Option<Box<ResponseStream>>,
}

impl ReadContext<'_> {
    /// Fetches content that cannot be verified. It is never stored, so each request goes upstream.
    pub(super) async fn fetch_uncached(&self, size_max: u64) -> ProxyResponse {
        if let Decision::Deny(refusal) = decide(&self.state(ContentKind::Blob, None, true)) {
            return denied(refusal, None, false);
        }
        let sent_at = Instant::now();
        let Request {
            registry,
            endpoint,
            accept,
            ..
        } = self.request;
        let (proxy, caller) = (self.proxy, &self.caller);
        let digest = match endpoint {
            Endpoint::Manifest {
                reference: Reference::Digest(digest),
                ..
            }
            | Endpoint::Blob { digest, .. } => Some(digest.to_string()),
            _ => None,
        };
        if self.request.head {
            let response = registry.upstream().head(caller, endpoint, accept).await;
            return if response.kind.is_success() || response.failure() == Some(UpstreamFailure::Unverifiable)
            {
                let (media_type, size) = (response.media_type, response.length);
                ProxyResponse::Passthrough(Passthrough {
                    digest: digest.or(response.header_digest.map(|named| named.to_string())),
                    media_type,
                    size,
                    body: None,
                })
            } else {
                self.deny_uncached(response, sent_at).await
            };
        }
        let permit = match endpoint {
            Endpoint::Blob { .. } => {
                let demand = Demand {
                    class: Class::Bulk,
                    ..caller.demand(endpoint)
                };
                match proxy.downloads.admit(registry.name(), demand).await {
                    Ok(permit) => Some(permit),
                    Err(full) => {
                        let response = UpstreamResponse::not_admitted(full);
                        return denied(
                            DenyReason::UpstreamUnavailable(response.cause()),
                            Some(Arc::new(response)),
                            false,
                        );
                    }
                }
            }
            _ => None,
        };
        let part = RangeSpec {
            is_client_paced: true,
            ..RangeSpec::default()
        };
        let fetched = registry.upstream().get_part(caller, endpoint, accept, part).await;
        let fetched = fetched.map(|fetched| match permit {
            Some(permit) => fetched.holding(permit),
            None => fetched,
        });
        match fetched {
            Ok(fetched) if fetched.length.is_some_and(|length| length > size_max) => denied(
                DenyReason::UpstreamUnavailable(UpstreamFailure::TooLarge),
                None,
                false,
            ),
            Ok(fetched) if is_page(&fetched) && matches!(endpoint, Endpoint::Manifest { .. }) => denied(
                DenyReason::UpstreamUnavailable(UpstreamFailure::NotRegistry),
                None,
                false,
            ),
            Ok(fetched) => ProxyResponse::Passthrough(Passthrough {
                digest: digest.or(fetched.digest.map(|digest| digest.to_string())),
                media_type: fetched.media_type.clone(),
                size: fetched.length,
                body: Some(Box::new(fetched)),
            }),
            Err(response) => self.deny_uncached(response, sent_at).await,
        }
    }

    /// Records a denial, which revokes the caller's grant as for verifiable content.
    async fn deny_uncached(&self, response: UpstreamResponse, sent_at: Instant) -> ProxyResponse {
        self.proxy
            .record_response(&self.upstream_request(), &response, sent_at)
            .await;
        let refusal = match response.kind {
            ResponseKind::NotFound => DenyReason::NotFound,
            ResponseKind::Denied => DenyReason::Forbidden,
            _ => DenyReason::UpstreamUnavailable(response.cause()),
        };
        denied(refusal, Some(Arc::new(response)), false)
    }
}

fn is_page(fetched: &ResponseStream) -> bool {
    fetched.media_type.as_ref().is_some_and(MediaType::is_page)
}
