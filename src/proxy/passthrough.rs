//! Bytes that pass through without being stored: content that cannot be verified, and content that the disk cannot take.

use std::sync::Arc;

use tokio::time::Instant;

use super::manifest::refused;
use super::manifest_fetch::UpstreamRequest;
use super::{ProxyResponse, ProxyService, Request};
pub use crate::download::Verifying as VerifyingStream;
use crate::oci::{Endpoint, MediaType, Reference, Repository, UpstreamFailure};
use crate::policy::DenyReason;
use crate::queue::{Class, Demand};
use crate::upstream::{Caller, ResponseKind, ResponseStream, UpstreamResponse};

/// An answer passed on as it comes: its digest is of an algorithm that cannot be verified here or not that of its bytes,
/// or it is too large to be kept.
pub struct Passthrough {
    /// The digest asked for, as written.
    pub digest: Option<String>,
    /// The media type, as sent.
    pub media_type: Option<MediaType>,
    /// The size of the body in bytes, if it was said.
    pub size: Option<u64>,
    /// The body; `None` where only the head was asked for.
    pub body: Option<Box<ResponseStream>>,
}

/// Asks for content that cannot be verified. Nothing is kept, so the upstream's word is asked for each time.
pub(super) async fn unverifiable(
    pull: &Arc<ProxyService>,
    request: &Request,
    repository: &Repository,
    caller: &Caller,
    size_max: u64,
) -> ProxyResponse {
    let asked_at = Instant::now();
    let Request {
        site,
        endpoint,
        accept,
        ..
    } = request;
    let digest = match endpoint {
        Endpoint::Manifest {
            reference: Reference::Digest(digest),
            ..
        }
        | Endpoint::Blob { digest, .. } => Some(digest.to_string()),
        _ => None,
    };
    if request.head {
        let answer = site.upstream().head(caller, endpoint, accept).await;
        return if answer.kind.is_success() || answer.failure() == Some(UpstreamFailure::Unverifiable) {
            let (media_type, size) = (answer.media_type, answer.length);
            ProxyResponse::Passthrough(Passthrough {
                digest: digest.or(answer.header_digest.map(|named| named.to_string())),
                media_type,
                size,
                body: None,
            })
        } else {
            not_passed(
                pull,
                &UpstreamRequest::of(request, repository, caller),
                answer,
                asked_at,
            )
            .await
        };
    }
    let place = match endpoint {
        Endpoint::Blob { .. } => {
            let demand = Demand {
                class: Class::Bulk,
                ..caller.demand(endpoint)
            };
            match pull.downloads.admit(site.name(), demand).await {
                Ok(place) => Some(place),
                Err(full) => {
                    let answer = UpstreamResponse::not_admitted(full);
                    return refused(
                        DenyReason::UpstreamUnavailable(answer.cause()),
                        Some(Arc::new(answer)),
                        false,
                    );
                }
            }
        }
        _ => None,
    };
    let fetched = site.upstream().get(caller, endpoint, accept, None).await;
    let fetched = fetched.map(|fetched| match place {
        Some(place) => fetched.holding(place),
        None => fetched,
    });
    match fetched {
        Ok(fetched) if fetched.length.is_some_and(|length| length > size_max) => refused(
            DenyReason::UpstreamUnavailable(UpstreamFailure::TooLarge),
            None,
            false,
        ),
        Ok(fetched) if is_page(&fetched) && matches!(endpoint, Endpoint::Manifest { .. }) => refused(
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
        Err(answer) => {
            not_passed(
                pull,
                &UpstreamRequest::of(request, repository, caller),
                answer,
                asked_at,
            )
            .await
        }
    }
}

fn is_page(fetched: &ResponseStream) -> bool {
    fetched.media_type.as_ref().is_some_and(MediaType::is_page)
}

/// A denial ends the caller's grant, as that of content that can be verified does.
async fn not_passed(
    pull: &Arc<ProxyService>,
    wanted: &UpstreamRequest,
    answer: UpstreamResponse,
    asked_at: Instant,
) -> ProxyResponse {
    pull.learn(wanted, &answer, asked_at).await;
    let refusal = match answer.kind {
        ResponseKind::NotFound => DenyReason::NotFound,
        ResponseKind::Denied => DenyReason::Forbidden,
        _ => DenyReason::UpstreamUnavailable(answer.cause()),
    };
    refused(refusal, Some(Arc::new(answer)), false)
}
