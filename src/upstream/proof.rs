//! Proof of a digest: whether a 2xx response shows that the registry has the content. No I/O.
//!
//! Login pages, captive portals and firewalls in front of a registry may answer 2xx (RFC 9110 §15.3), so the status
//! alone proves nothing. A proof is a response of the registry's own origin with its headers. These are
//! `Docker-Content-Digest`, equal to the requested digest, and for a manifest a manifest's media type. Any other
//! possible success is [`ResponseKind::UnprovenDigest`], which creates no grant by itself.
//!
//! Bytes that match a digest prove only these bytes. They prove access to the repository only if the caller did not
//! choose them. That holds for a manifest with content that the registry's own origin sent, and for content already
//! known in the repository. The callers check this.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};

use super::response::{ResponseKind, header_digest};
use crate::oci::digest::AnyDigest;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::DOCKER_DISTRIBUTION_API_VERSION;
use crate::oci::manifest::{Manifest, MediaType};
use crate::oci::name::Reference;

/// The origin that sent a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    /// The registry's own origin.
    Registry,
    /// Another origin, to which the registry redirected.
    OtherOrigin,
}

impl Sender {
    pub(super) fn of(from_other_origin: bool) -> Sender {
        if from_other_origin {
            Sender::OtherOrigin
        } else {
            Sender::Registry
        }
    }
}

/// Classifies a 2xx response to `endpoint`.
pub(super) fn read(
    endpoint: &Endpoint,
    status: StatusCode,
    headers: &HeaderMap,
    sender: Sender,
) -> ResponseKind {
    // Ranges are requested of blobs only.
    let is_part = status == StatusCode::PARTIAL_CONTENT && matches!(endpoint, Endpoint::Blob { .. });
    if !(status == StatusCode::OK || is_part) || is_page(headers) {
        return ResponseKind::Unavailable(UpstreamFailure::NotRegistry);
    }
    match endpoint {
        Endpoint::Manifest { reference, .. } => manifest(reference, headers, sender),
        Endpoint::Blob { digest, .. } => blob(digest, headers, sender),
        Endpoint::Ping | Endpoint::Tags { .. } | Endpoint::Referrers { .. } => ResponseKind::NoDigest,
    }
}

/// Whether a manifest proves access: the registry's own origin sent it, and it references content. A placeholder of
/// an intermediary references none.
pub(super) fn is_by_manifest(manifest: &Manifest, sender: Sender) -> bool {
    sender == Sender::Registry && !manifest.descriptors.is_empty()
}

fn manifest(reference: &Reference, headers: &HeaderMap, sender: Sender) -> ResponseKind {
    let requested = match reference {
        Reference::Tag(_) => None,
        Reference::Digest(AnyDigest::Supported(requested)) => Some(*requested),
        Reference::Digest(AnyDigest::Unsupported(_)) => return ResponseKind::NoDigest,
    };
    let media_type = media_type(headers);
    // The digest of a signed schema 1 manifest covers its payload, not its bytes, and only the bytes show whether it
    // is signed.
    if media_type.as_ref().is_some_and(MediaType::is_schema_1) {
        return ResponseKind::Unavailable(UpstreamFailure::Unverifiable);
    }
    let is_typed = media_type.is_some_and(|media_type| media_type.is_manifest());
    let named = header_digest(headers).filter(|named| requested.is_none_or(|requested| requested == *named));
    match (named.filter(|_| is_typed), sender) {
        (Some(named), Sender::Registry) => ResponseKind::Digest(named),
        (Some(named), Sender::OtherOrigin) => ResponseKind::UnprovenDigest(named),
        // Only the manifest itself can tell.
        (None, _) => ResponseKind::NoDigest,
    }
}

fn blob(requested: &AnyDigest, headers: &HeaderMap, sender: Sender) -> ResponseKind {
    let AnyDigest::Supported(requested) = requested else {
        return ResponseKind::NoDigest;
    };
    if sender == Sender::Registry && header_digest(headers) == Some(*requested) {
        ResponseKind::Digest(*requested)
    } else {
        ResponseKind::UnprovenDigest(*requested)
    }
}

/// `Content-Type` without parameters.
pub(super) fn media_type(headers: &HeaderMap) -> Option<MediaType> {
    let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    text.parse().ok().map(MediaType::without_parameters)
}

/// Whether the response is an HTML page.
pub(super) fn is_page(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|media_type| media_type.is_page())
}

/// Whether an error response has a registry's headers, so that it does not come from an intermediary.
pub(super) fn has_registry_headers(headers: &HeaderMap) -> bool {
    let json = headers
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().windows(4).any(|part| part == b"json"));
    json || headers.contains_key(DOCKER_DISTRIBUTION_API_VERSION)
}

/// Whether a 404 is an HTML page and not the registry's. A load balancer sends one if the registry behind it is down.
pub(super) fn is_not_found_page(status: StatusCode, headers: &HeaderMap) -> bool {
    matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE)
        && is_page(headers)
        && !has_registry_headers(headers)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use http::{HeaderName, HeaderValue, Method};

    use super::*;
    use crate::oci::digest::{Algorithm, Digest};

    const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

    fn operations() -> Vec<Endpoint> {
        let digest = digest("asked");
        [
            "/v2/".to_owned(),
            "/v2/a/manifests/1".to_owned(),
            format!("/v2/a/manifests/{digest}"),
            format!("/v2/a/blobs/{digest}"),
            "/v2/a/tags/list".to_owned(),
            format!("/v2/a/referrers/{digest}"),
        ]
        .iter()
        .map(|path| Endpoint::parse(&Method::GET, path, None).unwrap())
        .collect()
    }

    fn digest(text: &str) -> Digest {
        Digest::of(Algorithm::Sha256, text.as_bytes())
    }

    fn headers(media_type: &str, digest: Option<Digest>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if !media_type.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_str(media_type).unwrap());
        }
        if let Some(digest) = digest {
            let name = HeaderName::from_static("docker-content-digest");
            headers.insert(name, HeaderValue::from_str(&digest.to_string()).unwrap());
        }
        headers
    }

    /// Checks every operation, status, sender, media type and digest against the rules for a proven digest.
    #[test]
    fn r01_digest_is_proven_only_by_registry_headers() {
        let types = [
            "",
            "text/html; charset=utf-8",
            "text/plain",
            "application/json",
            MANIFEST_TYPE,
        ];
        let digests = [None, Some(digest("asked")), Some(digest("other"))];
        let mut proven = 0;
        for endpoint in operations() {
            for status in 200..300 {
                for sender in [Sender::Registry, Sender::OtherOrigin] {
                    for media_type in types {
                        for named in digests {
                            let status = StatusCode::from_u16(status).unwrap();
                            let kind = read(&endpoint, status, &headers(media_type, named), sender);
                            let case = format!("{endpoint:?} {status} {sender:?} {media_type} {named:?}");
                            let by_tag = matches!(
                                endpoint,
                                Endpoint::Manifest {
                                    reference: Reference::Tag(_),
                                    ..
                                }
                            );
                            if let ResponseKind::Digest(digest) = kind {
                                proven += 1;
                                assert_eq!(sender, Sender::Registry, "{case}");
                                assert_eq!(Some(digest), named, "{case}");
                                assert!(by_tag || named == digests[1], "{case}");
                            }
                            if !matches!(status.as_u16(), 200 | 206) || media_type.contains("html") {
                                assert!(!kind.is_success(), "{case}");
                            }
                            if matches!(endpoint, Endpoint::Manifest { .. }) && media_type != MANIFEST_TYPE {
                                assert!(
                                    !matches!(
                                        kind,
                                        ResponseKind::Digest(_) | ResponseKind::UnprovenDigest(_)
                                    ),
                                    "{case}"
                                );
                            }
                        }
                    }
                }
            }
        }
        // By tag both digests and by digest one, each with one media type; for a blob any type but HTML, with 200 and
        // 206.
        assert_eq!(proven, (2 + 1) + 2 * 4);
    }
}
