//! Tests of the upstream client against a scripted registry: over loopback sockets, or over in-memory pipes with a
//! paused clock.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

mod bodies;
mod failures;
mod heads;
mod redirects;
pub(super) mod registry;
mod reload;
mod tokens;

use http::{HeaderMap, HeaderValue, Method};

use super::*;
use crate::oci::digest::{Algorithm, Digest};
use crate::queue::{Class, Peer};
use registry::Registry;

/// A small, valid OCI manifest.
pub(super) const MANIFEST: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size":2},"layers":[]}"#;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

pub(super) fn digest(bytes: impl AsRef<[u8]>) -> Digest {
    Digest::of(Algorithm::Sha256, bytes.as_ref())
}

pub(super) fn settings(urls: &[&Registry]) -> Settings {
    let urls = urls
        .iter()
        .map(|registry| registry.url().parse().unwrap())
        .collect();
    Settings {
        proxy: ProxyChoice::None,
        ..Settings::new("reg.example", urls)
    }
}

/// An upstream with these registries as its URLs, in this order, over sockets.
pub(super) fn upstream(urls: &[&Registry]) -> Upstream {
    Upstream::new(settings(urls), &Transport::system()).unwrap()
}

/// The same over pipes, for tests with a paused clock.
pub(super) fn piped(registry: &Registry) -> Upstream {
    Upstream::new(settings(&[registry]), &Transport::with_dialer(registry.dial())).unwrap()
}

pub(super) fn anonymous() -> Caller {
    Caller {
        principal: [0; 32],
        credential: Credential::Anonymous,
        peer: Peer::Local,
        class: Class::Interactive,
        waiters: None,
        trace: TraceContext::new_root(),
        wait_deadline: None,
    }
}

pub(super) fn client(authorization: &str) -> Caller {
    let header = HeaderValue::from_str(authorization).unwrap();
    let Digest::Sha256(principal) = digest(authorization) else {
        panic!("sha256 is sha256")
    };
    Caller {
        principal,
        credential: Credential::Client(header),
        peer: Peer::Local,
        class: Class::Interactive,
        waiters: None,
        trace: TraceContext::new_root(),
        wait_deadline: None,
    }
}

pub(super) fn endpoint(path: &str) -> Endpoint {
    Endpoint::parse(&Method::GET, path, None).unwrap()
}

pub(super) fn tag() -> Endpoint {
    endpoint("/v2/library/a/manifests/latest")
}

pub(super) fn blob(bytes: &str) -> Endpoint {
    endpoint(&format!("/v2/library/a/blobs/{}", digest(bytes)))
}

pub(super) fn accept() -> Accept {
    let mut headers = HeaderMap::new();
    headers.append(http::header::ACCEPT, HeaderValue::from_static(OCI_MANIFEST));
    headers.append(
        http::header::ACCEPT,
        HeaderValue::from_static("application/vnd.oci.image.index.v1+json"),
    );
    Accept::read(&headers).unwrap()
}

#[test]
fn debug_output_contains_no_credential() {
    let settings = Settings {
        credential: Some(UpstreamCredential::new("robot", "canary").into()),
        ..Settings::new("a", vec!["https://a.example".parse().unwrap()])
    };
    let shown = format!("{:?} {:?}", settings.credential, client("Basic canary"));
    let upstream = Upstream::new(settings, &Transport::system()).unwrap();
    let shown = format!("{shown} {upstream:?} {:?}", upstream.status());
    assert!(!shown.contains("canary") && !shown.contains("robot"), "{shown}");
}

#[test]
fn upstream_without_url_is_rejected() {
    assert_eq!(
        Upstream::new(Settings::new("a", Vec::new()), &Transport::system()).err(),
        Some(SettingsError::NoUrl)
    );
}
