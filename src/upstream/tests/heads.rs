//! HEAD requests and their fallbacks.

use super::registry::{Registry, manifest, response};
use super::*;

#[tokio::test]
async fn compliant_registry_gets_one_head() {
    let registry = Registry::start(|_| {
        manifest()
            .header("ratelimit-limit", "100;w=21600")
            .header("ratelimit-remaining", "99;w=21600")
    })
    .await;
    let upstream = upstream(&[&registry]);
    let response = upstream.head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
    assert_eq!(response.length, Some(MANIFEST.len() as u64));
    assert_eq!(
        response
            .media_type
            .as_ref()
            .map(crate::oci::manifest::MediaType::as_str),
        Some(OCI_MANIFEST)
    );
    assert_eq!(response.rate_limit.remaining, Some(99));
    assert_eq!(upstream.status().quotas[0].limit.limit, Some(100));
    assert!(response.body.is_none());
    let seen = &registry.seen()[0];
    assert_eq!(
        seen.headers.get_all("accept").iter().count(),
        2,
        "all challenge lines are forwarded"
    );
    assert_eq!(seen.header("accept-encoding"), Some("identity"));
    assert!(seen.header("user-agent").unwrap().starts_with("ifnewer/"));
    assert_eq!(seen.header("cookie"), None);
}

#[tokio::test]
async fn rejected_head_falls_back_to_get_and_is_cached() {
    for status in [405, 501] {
        let registry = Registry::start(move |seen| {
            if seen.method == Method::HEAD {
                response(status)
            } else {
                manifest()
            }
        })
        .await;
        let upstream = upstream(&[&registry]);
        for _ in 0..2 {
            let response = upstream.head(&anonymous(), &tag(), &accept()).await;
            assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
            let (bytes, media_type) = response.body.unwrap();
            assert_eq!(
                (bytes.as_ref(), media_type.as_str()),
                (MANIFEST.as_bytes(), OCI_MANIFEST)
            );
        }
        let methods: Vec<_> = registry.seen().iter().map(|seen| seen.method.clone()).collect();
        assert_eq!(methods, [Method::HEAD, Method::GET, Method::GET]);
        assert_eq!(upstream.status().quirks, [Quirk::HeadRefused]);
    }
}

#[tokio::test]
async fn missing_digest_is_computed_from_the_body() {
    for header in [
        None,
        Some("sha256:abc"),
        Some("sha3:0000"),
        Some("SHA256:"),
        Some(""),
    ] {
        let registry = Registry::start(move |_| {
            let play = response(200).header("content-type", OCI_MANIFEST).body(MANIFEST);
            header.map_or_else(
                || response(200).body(MANIFEST),
                |header| play.header("docker-content-digest", header),
            )
        })
        .await;
        let upstream = upstream(&[&registry]);
        let response = upstream.head(&anonymous(), &tag(), &accept()).await;
        assert_eq!(
            response.kind,
            ResponseKind::Digest(digest(MANIFEST)),
            "{header:?}"
        );
        assert!(
            response.body.is_some(),
            "the type is in the manifest if not in the header"
        );
        assert_eq!(upstream.status().quirks, [Quirk::NoDigest]);
    }
}

#[tokio::test]
async fn conflicting_digest_headers_are_ignored() {
    let registry =
        Registry::start(|_| manifest().header("docker-content-digest", &digest("other").to_string())).await;
    let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
    assert_eq!(registry.seen().len(), 2, "the body was hashed");
}

#[tokio::test]
async fn html_page_is_no_manifest_and_no_quirk() {
    for (media_type, body) in [
        ("text/html", "<html>log in</html>"),
        (
            "application/json",
            r#"{"errors":[{"code":"UNKNOWN","message":"with status 200"}]}"#,
        ),
        ("application/json", "[]"),
        (OCI_MANIFEST, "<html>log in</html>"),
    ] {
        let registry =
            Registry::start(move |_| response(200).header("content-type", media_type).body(body)).await;
        let upstream = upstream(&[&registry]);
        let response = upstream.head(&anonymous(), &tag(), &accept()).await;
        let cause = if media_type == "text/html" {
            UpstreamFailure::NotRegistry
        } else {
            UpstreamFailure::Malformed
        };
        assert_eq!(response.kind, ResponseKind::Unavailable(cause), "{body}");
        assert!(upstream.status().quirks.is_empty());
    }
}

#[tokio::test]
async fn manifest_sent_as_text_has_its_own_media_type() {
    let registry =
        Registry::start(|_| response(200).header("content-type", "text/plain").body(MANIFEST)).await;
    let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(
        response
            .media_type
            .as_ref()
            .map(crate::oci::manifest::MediaType::as_str),
        Some(OCI_MANIFEST)
    );
}

#[tokio::test]
async fn manifest_by_digest_without_header_is_hashed() {
    let registry = Registry::start(|_| response(200).body(MANIFEST)).await;
    let by_digest = endpoint(&format!("/v2/library/a/manifests/{}", digest(MANIFEST)));
    let response = upstream(&[&registry])
        .head(&anonymous(), &by_digest, &accept())
        .await;
    assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
    assert_eq!(registry.seen().len(), 2);
}

#[tokio::test]
async fn manifest_by_digest_with_wrong_bytes_is_rejected() {
    let registry = Registry::start(|seen| {
        if seen.method == Method::HEAD {
            response(405)
        } else {
            manifest()
        }
    })
    .await;
    let by_digest = endpoint(&format!("/v2/library/a/manifests/{}", digest("other")));
    let response = upstream(&[&registry])
        .head(&anonymous(), &by_digest, &accept())
        .await;
    assert_eq!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::DigestMismatch)
    );
}

#[tokio::test]
async fn computed_digest_overrides_header() {
    let registry = Registry::start(|seen| match seen.method {
        Method::HEAD => response(405),
        _ => response(200)
            .header("content-type", OCI_MANIFEST)
            .header("docker-content-digest", &digest("other").to_string())
            .body(MANIFEST),
    })
    .await;
    let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
}

#[tokio::test]
async fn r05_manifest_404_is_verified_by_one_get() {
    let registry =
        Registry::start(|_| response(404).header("docker-distribution-api-version", "registry/2.0")).await;
    let upstream = upstream(&[&registry]);
    for _ in 0..3 {
        assert_eq!(
            upstream.head(&anonymous(), &tag(), &accept()).await.kind,
            ResponseKind::NotFound
        );
    }
    let methods: Vec<_> = registry.seen().iter().map(|seen| seen.method.clone()).collect();
    assert_eq!(methods, [Method::HEAD, Method::GET, Method::HEAD, Method::HEAD]);
    let said = upstream.head_for_push(&anonymous(), &tag(), &accept()).await.kind;
    assert_eq!(
        (said, registry.seen().len()),
        (ResponseKind::NotFound, 5),
        "a push gets the HEAD's result"
    );
}

#[tokio::test]
async fn r05_wrong_manifest_head_is_detected_once() {
    for status in [400, 403, 404, 500] {
        let registry = Registry::start(move |seen| {
            if seen.method == Method::HEAD {
                response(status).header("content-type", "application/json")
            } else {
                manifest()
            }
        })
        .await;
        let upstream = upstream(&[&registry]);
        for name in ["latest", "latest", "other"] {
            let tag = endpoint(&format!("/v2/library/a/manifests/{name}"));
            assert_eq!(
                upstream.head(&anonymous(), &tag, &accept()).await.kind,
                ResponseKind::Digest(digest(MANIFEST))
            );
        }
        let quirk = if status == 403 {
            Quirk::HeadForbidden
        } else {
            Quirk::HeadUntrue
        };
        assert_eq!(upstream.status().quirks, [quirk]);
    }
}

#[tokio::test]
async fn r02_denied_head_yields_to_success_or_rate_limit() {
    let limit = r#"{"errors":[{"code":"TOOMANYREQUESTS"}]}"#;
    for (head, get, body, said) in [
        (403, 429, limit, ResponseKind::Denied),
        (403, 503, "", ResponseKind::Denied),
        (403, 500, "", ResponseKind::Denied),
        (403, 423, "", ResponseKind::Denied),
        (403, 403, "", ResponseKind::Denied),
        (
            403,
            403,
            limit,
            ResponseKind::Unavailable(UpstreamFailure::RateLimited),
        ),
        (403, 404, "", ResponseKind::NotFound),
        (
            404,
            429,
            limit,
            ResponseKind::Unavailable(UpstreamFailure::RateLimited),
        ),
    ] {
        let registry = Registry::start(move |seen| {
            let is_head = seen.method == Method::HEAD;
            let reply = response(if is_head { head } else { get }).header("content-type", "application/json");
            if is_head {
                reply
            } else {
                reply.header("retry-after", "30").body(body)
            }
        })
        .await;
        for what in [tag(), blob("layer")] {
            // Each has its own rate limits: a pause of one would keep the next from being sent.
            let upstream = upstream(&[&registry]);
            let response = upstream.head(&anonymous(), &what, &accept()).await;
            assert_eq!(response.kind, said, "{head} {get} {body} {what:?}");
        }
    }
}

#[tokio::test]
async fn r04_head_403_with_quirk_is_no_denial() {
    let registry = Registry::start(|seen| match (&seen.method, seen.path()) {
        (&Method::HEAD, _) => response(403).header("content-type", "application/json"),
        (_, path) if path.ends_with("/latest") => manifest(),
        _ => response(503).header("retry-after", "30"),
    })
    .await;
    let upstream = upstream(&[&registry]);
    let yes = upstream.head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(yes.kind, ResponseKind::Digest(digest(MANIFEST)));
    let other = endpoint("/v2/library/a/manifests/other");
    let limited = upstream.head(&anonymous(), &other, &accept()).await;
    assert_eq!(
        limited.kind,
        ResponseKind::Unavailable(UpstreamFailure::Status(503))
    );
}

#[tokio::test]
async fn html_404_is_not_a_deletion() {
    let page = |_: &registry::Seen| response(404).header("content-type", "text/html").body("<html>");
    let registry = Registry::start(page).await;
    let said = upstream(&[&registry])
        .head(&anonymous(), &tag(), &accept())
        .await
        .kind;
    assert_eq!(said, ResponseKind::Unavailable(UpstreamFailure::NotRegistry));
}

#[tokio::test]
async fn r04_rejected_blob_head_is_verified_by_one_byte() {
    for status in [400, 401, 403, 404, 405, 500, 501] {
        let registry = Registry::start(move |seen| match (&seen.method, seen.header("range")) {
            (&Method::GET, Some("bytes=0-0")) => {
                response(206).header("content-range", "bytes 0-0/1234").body("x")
            }
            _ => response(status),
        })
        .await;
        let upstream = upstream(&[&registry]);
        for _ in 0..2 {
            let response = upstream.head(&anonymous(), &blob("layer"), &accept()).await;
            assert_eq!(
                (response.kind, response.length),
                (ResponseKind::UnprovenDigest(digest("layer")), Some(1234))
            );
        }
        // A 500 is retried once.
        let heads = registry
            .seen()
            .iter()
            .filter(|seen| seen.method == Method::HEAD)
            .count();
        assert_eq!(
            (heads, registry.seen().len() - heads),
            (1 + usize::from(status == 500), 2),
            "{status}"
        );
        let quirk = if status == 404 {
            Quirk::BlobHeadUntrue
        } else {
            Quirk::BlobHeadRefused
        };
        assert_eq!(upstream.status().quirks, [quirk]);
    }
}

#[tokio::test]
async fn denied_blob_is_denied() {
    let registry = Registry::start(|_| response(401).header("www-authenticate", "Basic realm=x")).await;
    let upstream = upstream(&[&registry]);
    for _ in 0..2 {
        let response = upstream.head(&anonymous(), &blob("layer"), &accept()).await;
        assert_eq!(
            (response.kind, response.challenge.len()),
            (ResponseKind::Denied, 1)
        );
    }
    assert_eq!(registry.seen().len(), 3, "verified by one GET");
}

#[tokio::test]
async fn every_status_is_classified() {
    for (status, said) in [
        (400, ResponseKind::Other(http::StatusCode::BAD_REQUEST)),
        (401, ResponseKind::Denied),
        (403, ResponseKind::Denied),
        (404, ResponseKind::NotFound),
        (407, ResponseKind::Unavailable(UpstreamFailure::Status(407))),
        (410, ResponseKind::NotFound),
        (429, ResponseKind::Unavailable(UpstreamFailure::RateLimited)),
        (
            451,
            ResponseKind::Other(http::StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS),
        ),
        (500, ResponseKind::Unavailable(UpstreamFailure::Status(500))),
        (503, ResponseKind::Unavailable(UpstreamFailure::Status(503))),
        (304, ResponseKind::Unavailable(UpstreamFailure::Malformed)),
    ] {
        let registry = Registry::start(move |_| {
            response(status)
                .header("content-type", "application/json")
                .header("retry-after", "1")
        })
        .await;
        let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
        assert_eq!(response.kind, said, "{status}");
    }
}

#[tokio::test]
async fn error_message_is_kept() {
    let registry = Registry::start(|_| {
        response(404).body(r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown to us"}]}"#)
    })
    .await;
    let refused = upstream(&[&registry])
        .get(&anonymous(), &tag(), &accept(), None)
        .await
        .unwrap_err();
    assert_eq!(
        (refused.kind, refused.message.as_deref()),
        (ResponseKind::NotFound, Some("manifest unknown to us"))
    );
}
