#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::*;

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn get(target: &str) -> Result<Endpoint, RequestError> {
    let (path, query) = target
        .split_once('?')
        .map_or((target, None), |(path, query)| (path, Some(query)));
    Endpoint::parse(&Method::GET, path, query)
}

#[test]
fn every_endpoint_parses_and_formats_for_the_upstream() {
    for (sent, asked) in [
        ("/v2", "/v2/"),
        ("/v2/", "/v2/"),
        ("/v2/a/manifests/latest", "/v2/a/manifests/latest"),
        ("/v2/a/manifests/latest?ns=docker.io", "/v2/a/manifests/latest"),
        ("/v2/a/b/manifests/blake3:00", "/v2/a/b/manifests/blake3:00"),
        ("/v2/a/manifests/blake3%3A00", "/v2/a/manifests/blake3:00"),
        ("/v2/a/blobs/blake3%3a00", "/v2/a/blobs/blake3:00"),
        ("/v2/a/tags/list", "/v2/a/tags/list"),
        (
            "/v2/a/tags/list?last=b&n=5000&ns=ghcr.io",
            "/v2/a/tags/list?last=b&n=5000",
        ),
        ("/v2/a/tags/list?n=0", "/v2/a/tags/list?n=0"),
        (
            "/v2/a/referrers/blake3:00?artifactType=application/x%2Bjson",
            "/v2/a/referrers/blake3:00?artifactType=application/x%2Bjson",
        ),
        // The last resource word decides.
        (
            "/v2/manifests/blobs/manifests/x",
            "/v2/manifests/blobs/manifests/x",
        ),
        ("/v2/a/tags/list/manifests/x", "/v2/a/tags/list/manifests/x"),
        ("/v2/a/manifests/b/tags/list", "/v2/a/manifests/b/tags/list"),
        (
            "/v2/a/blobs/manifests/referrers/blake3:00",
            "/v2/a/blobs/manifests/referrers/blake3:00",
        ),
    ] {
        assert_eq!(get(sent).unwrap().path_and_query(), asked, "{sent}");
    }
    let head = Endpoint::parse(&Method::HEAD, &format!("/v2/a/b/blobs/sha256:{HEX}"), None).unwrap();
    assert_eq!(head.repository().unwrap().as_str(), "a/b");
    assert!(matches!(
        head,
        Endpoint::Blob {
            digest: AnyDigest::Supported(_),
            ..
        }
    ));
}

#[test]
fn unknown_endpoint_is_rejected_with_code_and_status() {
    use ErrorCode::{DigestInvalid, NameInvalid, TagInvalid, Unsupported};
    for (target, code, status) in [
        ("", Unsupported, 404),
        ("/", Unsupported, 404),
        ("/v1/search", Unsupported, 404),
        ("/v2x", Unsupported, 404),
        ("/v2/_catalog", Unsupported, 404),
        ("/v2/a", Unsupported, 404),
        ("/v2/manifests/latest", Unsupported, 404),
        ("/v2/tags/list", Unsupported, 404),
        ("/v2/a/_oci/ext/discover", Unsupported, 404),
        ("/v2//manifests/latest", NameInvalid, 400),
        ("/v2/A/manifests/latest", NameInvalid, 400),
        ("/v2/a/../b/manifests/latest", NameInvalid, 400),
        ("/v2/a%2Fb/manifests/latest", NameInvalid, 400),
        ("/v2/a:5000/b/tags/list", NameInvalid, 400),
        ("/v2//tags/list", NameInvalid, 400),
        ("/v2/a/manifests/.INVALID_MANIFEST_NAME", TagInvalid, 404),
        ("/v2/a/manifests/", TagInvalid, 404),
        ("/v2/a/manifests/b/c", TagInvalid, 404),
        ("/v2/a/manifests/la%74est", TagInvalid, 404),
        ("/v2/a/manifests/sha256:short", DigestInvalid, 400),
        ("/v2/a/manifests/blake3%253A00", TagInvalid, 404),
        ("/v2/a/blobs/latest", DigestInvalid, 400),
        ("/v2/a/blobs/sha256:00/b", DigestInvalid, 400),
        ("/v2/a/referrers/sha256:zz", DigestInvalid, 400),
        ("/v2/a/tags/list?n=many", Unsupported, 400),
        ("/v2/a/tags/list?last=%zz", Unsupported, 400),
        ("/v2/a/blobs/uploads/", Unsupported, 405),
        ("/v2/a/blobs/uploads/0123", Unsupported, 405),
    ] {
        let malformed = get(target).expect_err(target);
        assert_eq!(
            (malformed.code(), malformed.status().as_u16()),
            (code, status),
            "{target}"
        );
        assert!(!malformed.to_string().is_empty());
    }
}

#[test]
fn tag_with_a_slash_is_rejected() {
    assert_eq!(
        get("/v2/a/manifests/b/c"),
        Err(RequestError::Tag(NameError::Character { at: 1 }))
    );
}

#[test]
fn write_differs_from_unsupported_method() {
    for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
        let write = RequestError::Write {
            method: method.clone(),
        };
        assert_eq!(Endpoint::parse(&method, "/v2/a/blobs/uploads/", None), Err(write));
        assert_eq!(
            Endpoint::parse(&method, "/metrics", None),
            Err(RequestError::Path)
        );
    }
    for method in [Method::OPTIONS, Method::TRACE, Method::CONNECT] {
        assert_eq!(Endpoint::parse(&method, "/v2/", None), Err(RequestError::Method));
    }
}

#[test]
fn with_repository_changes_nothing_else() {
    let asked = get("/v2/alpine/tags/list?n=3").unwrap();
    let full = asked.with_repository("library/alpine".parse().unwrap());
    assert_eq!(full.path_and_query(), "/v2/library/alpine/tags/list?n=3");
    assert_eq!(
        Endpoint::Ping.with_repository("a".parse().unwrap()),
        Endpoint::Ping
    );
}

proptest! {
    #[test]
    fn upstream_path_parses_as_the_same_endpoint(
        name in "[a-z]{1,3}(/(manifests|blobs|tags|list|referrers|x-y)){0,3}",
        tag in "[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}",
        bytes: [u8; 32],
        last in "\\PC{0,10}",
    ) {
        let repository: Repository = name.parse().unwrap();
        let digest: AnyDigest = super::super::Digest::Sha256(bytes).into();
        let query = Query::parse(Some(&format!("n=7&last={}", last.replace(['&', '%'], "")))).unwrap().0;
        for endpoint in [
            Endpoint::Manifest { repository: repository.clone(), reference: Reference::Tag(tag.parse().unwrap()) },
            Endpoint::Manifest { repository: repository.clone(), reference: Reference::Digest(digest.clone()) },
            Endpoint::Blob { repository: repository.clone(), digest: digest.clone() },
            Endpoint::Tags { repository: repository.clone(), query: query.clone() },
            Endpoint::Referrers { repository: repository.clone(), digest: digest.clone(), query: query.clone() },
        ] {
            prop_assert_eq!(get(&endpoint.path_and_query()), Ok(endpoint));
        }
    }

    #[test]
    fn no_path_panics(path in "\\PC{0,40}|/v2/[a-z/%:._-]{0,40}", query in "\\PC{0,40}") {
        let _any = Endpoint::parse(&Method::GET, &path, Some(&query));
    }
}
