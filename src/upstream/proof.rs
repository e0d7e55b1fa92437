//! The proof in a response with status 2xx: whether the registry says yes, and how certain that is. Pure.
//!
//! RFC 9110 §15.3 lets anything in front of a registry answer 2xx: a login page, a captive portal, a firewall. So the
//! status alone proves nothing. A proof is a response of the registry's own origin that carries its marks: the digest
//! (`Docker-Content-Digest`, equal to the one asked for where one was) and, for a manifest, a manifest's media type.
//! Whatever else may be a yes is [`ResponseKind::UnprovenDigest`]: it opens nothing by itself.
//!
//! Bytes that hash to a digest prove those bytes. They prove a right to the repository only where the one who asks did not
//! choose them: a manifest that the registry's own origin sends and that points to something, or content that was seen in
//! the repository before. The callers look at that.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};

use super::response::{ResponseKind, header_digest};
use crate::oci::digest::AnyDigest;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::DOCKER_DISTRIBUTION_API_VERSION;
use crate::oci::manifest::{Manifest, MediaType};
use crate::oci::name::Reference;

/// Which origin sent a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    /// The registry's own.
    Registry,
    /// Another one, to which the registry redirected the request.
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

/// What a 2xx says about `endpoint`.
pub(super) fn read(
    endpoint: &Endpoint,
    status: StatusCode,
    headers: &HeaderMap,
    sender: Sender,
) -> ResponseKind {
    // Only of a blob are parts asked for.
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

/// Whether these bytes of a manifest are the registry's yes: sent by its own origin, and pointing to something. A
/// placeholder of something in front of it points to nothing.
pub(super) fn is_by_manifest(manifest: &Manifest, sender: Sender) -> bool {
    sender == Sender::Registry && !manifest.descriptors.is_empty()
}

fn manifest(reference: &Reference, headers: &HeaderMap, sender: Sender) -> ResponseKind {
    let asked = match reference {
        Reference::Tag(_) => None,
        Reference::Digest(AnyDigest::Supported(asked)) => Some(*asked),
        Reference::Digest(AnyDigest::Unsupported(_)) => return ResponseKind::NoDigest,
    };
    let media_type = media_type(headers);
    // The digest of signed schema 1 is that of its payload and not of its bytes, which alone tell whether it is signed.
    if media_type.as_ref().is_some_and(MediaType::is_schema_1) {
        return ResponseKind::Unavailable(UpstreamFailure::Unverifiable);
    }
    let is_typed = media_type.is_some_and(|media_type| media_type.is_manifest());
    let named = header_digest(headers).filter(|named| asked.is_none_or(|asked| asked == *named));
    match (named.filter(|_| is_typed), sender) {
        (Some(named), Sender::Registry) => ResponseKind::Digest(named),
        (Some(named), Sender::OtherOrigin) => ResponseKind::UnprovenDigest(named),
        // Only the bytes can tell.
        (None, _) => ResponseKind::NoDigest,
    }
}

fn blob(asked: &AnyDigest, headers: &HeaderMap, sender: Sender) -> ResponseKind {
    let AnyDigest::Supported(asked) = asked else {
        return ResponseKind::NoDigest;
    };
    if sender == Sender::Registry && header_digest(headers) == Some(*asked) {
        ResponseKind::Digest(*asked)
    } else {
        ResponseKind::UnprovenDigest(*asked)
    }
}

/// `Content-Type`, without parameters.
pub(super) fn media_type(headers: &HeaderMap) -> Option<MediaType> {
    let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    text.parse().ok().map(MediaType::without_parameters)
}

/// Whether a response says that it is a web page.
pub(super) fn is_page(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|media_type| media_type.is_page())
}

/// Whether an error response looks like that of a registry, not of something in front of it.
pub(super) fn has_registry_headers(headers: &HeaderMap) -> bool {
    let json = headers
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().windows(4).any(|part| part == b"json"));
    json || headers.contains_key(DOCKER_DISTRIBUTION_API_VERSION)
}

/// Whether a 404 is that of a page and not the registry's. In front of a registry that is down, a balancer answers so.
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

    /// Every operation, status, sender, type and digest against the laws of a yes.
    #[test]
    fn r01_a_yes_is_proven_by_the_registrys_own_marks_or_none() {
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
                            let said = read(&endpoint, status, &headers(media_type, named), sender);
                            let case = format!("{endpoint:?} {status} {sender:?} {media_type} {named:?}");
                            let by_tag = matches!(
                                endpoint,
                                Endpoint::Manifest {
                                    reference: Reference::Tag(_),
                                    ..
                                }
                            );
                            if let ResponseKind::Digest(digest) = said {
                                proven += 1;
                                assert_eq!(sender, Sender::Registry, "{case}");
                                assert_eq!(Some(digest), named, "{case}");
                                assert!(by_tag || named == digests[1], "{case}");
                            }
                            if !matches!(status.as_u16(), 200 | 206) || media_type.contains("html") {
                                assert!(!said.is_success(), "{case}");
                            }
                            if matches!(endpoint, Endpoint::Manifest { .. }) && media_type != MANIFEST_TYPE {
                                assert!(
                                    !matches!(
                                        said,
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
        // By tag both digests, by digest one, each with one type; for a blob any type but a page, and a part as well.
        assert_eq!(proven, (2 + 1) + 2 * 4);
    }
}
