//! What is told of an answer: the facts of a log line, of a count and of the journal, taken from the outcome before it
//! becomes a response.

use std::fmt::Write as _;
use std::time::SystemTime;

use http::Uri;

use crate::oci::{Digest, Endpoint, Reference, UpstreamFailure};
use crate::policy::DenyReason;
use crate::proxy::{ProxyResponse, ServeReason};
use crate::store::tags::NEVER_CONFIRMED;
use crate::telemetry;

use super::reply;

/// What is told of an outcome.
pub(super) struct Told {
    pub(super) result: telemetry::CacheResult,
    pub(super) reason: &'static str,
    pub(super) cause: Option<UpstreamFailure>,
    pub(super) digest: Option<Digest>,
    /// When the upstream last confirmed the tag that was served.
    pub(super) confirmed_at: Option<SystemTime>,
}

impl Told {
    pub(super) fn of(outcome: &ProxyResponse) -> Self {
        let (result, reason) = reply::told(outcome);
        let info = match outcome {
            ProxyResponse::Manifest(_, info)
            | ProxyResponse::Blob { info, .. }
            | ProxyResponse::Listing(_, info)
            | ProxyResponse::StreamedList(_, info) => Some(info),
            _ => None,
        };
        let cause = match outcome {
            ProxyResponse::Denied(refused) => match refused.reason {
                DenyReason::UpstreamUnavailable(cause)
                | DenyReason::StaleLimitExceeded(cause)
                | DenyReason::Incomplete(cause) => Some(cause),
                DenyReason::NotCached
                | DenyReason::NotAuthorized
                | DenyReason::Forbidden
                | DenyReason::AuthRequired
                | DenyReason::NotFound => None,
            },
            _ => info.and_then(|info| match info.reason {
                ServeReason::Cached(served) => served.cause(),
                _ => None,
            }),
        };
        let digest = match outcome {
            ProxyResponse::Manifest(manifest, _) => Some(manifest.digest),
            ProxyResponse::ManifestHead { digest, .. } | ProxyResponse::Blob { digest, .. } => Some(*digest),
            _ => None,
        };
        Self {
            result,
            reason,
            cause,
            digest,
            confirmed_at: info
                .and_then(|info| info.confirmed_at)
                .filter(|at| *at != NEVER_CONFIRMED),
        }
    }

    /// Of a request that was handed on.
    pub(super) fn passed() -> Self {
        Self {
            result: telemetry::CacheResult::Passed,
            ..Self::turned("forwarded")
        }
    }

    /// Of a `CONNECT` that was granted.
    pub(super) fn connected(result: telemetry::CacheResult, reason: &'static str) -> Self {
        Self {
            result,
            ..Self::turned(reason)
        }
    }

    /// Of a token of ours, where the token service was silent for this reason.
    pub(super) fn local_token(cause: UpstreamFailure) -> Self {
        Self {
            result: telemetry::CacheResult::Local,
            cause: Some(cause),
            ..Self::turned("local-token")
        }
    }

    /// Of a request that could not be handed on.
    pub(super) fn not_passed(cause: UpstreamFailure) -> Self {
        Self {
            cause: Some(cause),
            ..Self::turned(cause.name())
        }
    }

    /// Of a request that was turned away, and why.
    pub(super) fn turned(reason: &'static str) -> Self {
        Self {
            result: telemetry::CacheResult::Refused,
            reason,
            cause: None,
            digest: None,
            confirmed_at: None,
        }
    }
}

/// What kind of thing was asked for, and its name: `repository:tag`, `repository@digest`.
pub(super) fn subject(endpoint: &Endpoint) -> (telemetry::ResourceKind, String) {
    match endpoint {
        Endpoint::Ping => (telemetry::ResourceKind::Ping, "/v2/".to_owned()),
        Endpoint::Manifest {
            repository,
            reference: Reference::Tag(tag),
        } => (telemetry::ResourceKind::Tag, format!("{repository}:{tag}")),
        Endpoint::Manifest {
            repository,
            reference: Reference::Digest(digest),
        } => (
            telemetry::ResourceKind::Manifest,
            format!("{repository}@{digest}"),
        ),
        Endpoint::Blob { repository, digest } => {
            (telemetry::ResourceKind::Blob, format!("{repository}@{digest}"))
        }
        Endpoint::Tags { repository, .. } | Endpoint::Referrers { repository, .. } => {
            (telemetry::ResourceKind::Listing, repository.to_string())
        }
    }
}

/// How much of a path is told.
const PATH_BYTES_MAX: usize = 512;

/// The path of a request that names no image, or none that is understood. What is not printable ASCII is written as
/// RFC 3986 §2.1 has it, so that it steers no terminal on which the log is read.
pub(super) fn path(uri: &Uri) -> String {
    let bytes = uri.path().bytes().take(PATH_BYTES_MAX);
    bytes.fold(String::new(), |mut text, byte| {
        if byte.is_ascii_graphic() {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}
