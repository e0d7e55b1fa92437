//! Checks for every response of the registry port, so that a leak fails any running test.

use super::Reply;
use crate::registry::sha256;

/// Response headers that the cache may send.
const HEADERS: &[&str] = &[
    "accept-ranges",
    "age",
    "allow",
    "cache-control",
    "cache-status",
    "connection",
    "content-length",
    "content-range",
    "content-type",
    "date",
    "docker-content-digest",
    "docker-distribution-api-version",
    "etag",
    "ifnewer-cooling-until",
    "link",
    "oci-filters-applied",
    "oci-namespace",
    "proxy-authenticate",
    "retry-after",
    "transfer-encoding",
    "vary",
    "warning",
    "www-authenticate",
];

/// Error codes of the distribution specification, and the three older ones that clients know.
const CODES: &[&str] = &[
    "BLOB_UNKNOWN",
    "DIGEST_INVALID",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "UNAUTHORIZED",
    "DENIED",
    "UNSUPPORTED",
    "TOOMANYREQUESTS",
    "UNKNOWN",
    "UNAVAILABLE",
    "TAG_INVALID",
];

pub(super) fn reply(reply: &Reply) {
    for name in reply.headers.keys() {
        assert!(
            HEADERS.contains(&name.as_str()),
            "the header `{name}` may not leave: {reply:#?}"
        );
    }
    assert_eq!(
        reply.header("docker-distribution-api-version"),
        Some("registry/2.0"),
        "{reply:#?}"
    );
    if matches!(reply.method.as_str(), "HEAD") || reply.status == 304 {
        assert!(reply.body.is_empty(), "a body where none may be: {reply:#?}");
    } else if let (Some(length), true) = (reply.header("content-length"), reply.whole) {
        assert_eq!(length, reply.body.len().to_string(), "{reply:#?}");
    }
    match reply.status {
        200..=299 => success(reply),
        304 | 416 => {}
        300..=399 => panic!("a redirect is never handed to a client: {reply:#?}"),
        _ if reply.method == "HEAD" => {}
        _ => error(reply),
    }
}

/// The body matches its headers.
fn success(reply: &Reply) {
    let content = reply.path.contains("/manifests/") || reply.path.contains("/blobs/");
    if !content || !matches!(reply.method.as_str(), "GET" | "HEAD") {
        return;
    }
    assert!(reply.cache_status().starts_with("ifnewer; "), "{reply:#?}");
    let digest = reply
        .header("docker-content-digest")
        .unwrap_or_else(|| panic!("no digest: {reply:#?}"));
    assert!(reply.header("content-length").is_some(), "no length: {reply:#?}");
    if reply.status == 200 && reply.method == "GET" && reply.whole && digest.starts_with("sha256:") {
        assert_eq!(
            sha256(&reply.body),
            digest,
            "the wrong bytes, whole, under a right name"
        );
    }
}

/// Errors are OCI JSON and name the failure and the upstream.
fn error(reply: &Reply) {
    assert_eq!(
        reply.header("content-type"),
        Some("application/json"),
        "{reply:#?}"
    );
    let body = reply.json();
    let errors = body["errors"]
        .as_array()
        .unwrap_or_else(|| panic!("no errors: {reply:#?}"));
    assert!(!errors.is_empty(), "{reply:#?}");
    for error in errors {
        let code = error["code"].as_str().unwrap_or_default();
        assert!(
            CODES.contains(&code),
            "`{code}` is no code of the specification: {reply:#?}"
        );
        assert!(
            !error["message"].as_str().unwrap_or_default().is_empty(),
            "{reply:#?}"
        );
    }
    if matches!(reply.status, 401 | 403 | 404 | 429 | 502..=504) && reply.path.starts_with("/v2/") {
        let name = named(&reply.path);
        let text = String::from_utf8_lossy(&reply.body);
        assert!(text.contains(name), "an error that does not name {name}: {text}");
    }
}

/// The upstream of a path: by `?ns=`, by prefix, or the default one.
fn named(path: &str) -> &str {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let ns = query.split('&').find_map(|pair| pair.strip_prefix("ns="));
    let first = path
        .split('/')
        .nth(2)
        .filter(|first| first.contains('.') || first.contains(':'));
    ns.or(first).unwrap_or("docker.io")
}
