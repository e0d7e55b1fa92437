//! Redirects: where they may lead, and with which credentials.

use std::net::IpAddr;

use super::super::ip_scope::IpScope;
use super::registry::{Registry, manifest, response};
use crate::oci::failure::RedirectFailure;
use http::{Method, Uri};
use parking_lot::Mutex;

use super::*;

#[tokio::test]
async fn authorization_is_dropped_across_origins_for_good() {
    let storage = Registry::start(|seen| {
        let back = seen.header("x-back").unwrap_or_default().to_owned();
        assert!(back.is_empty());
        match seen.path() {
            "/back" => response(302).header("location", seen.uri.query().unwrap()),
            _ => response(200).body("bytes"),
        }
    })
    .await;
    let away = storage.url();
    let registry = Registry::start(move |seen| match seen.path() {
        "/here" => response(200).body("bytes"),
        path if path.ends_with(&digest("direct").to_string()) => {
            response(307).header("location", &format!("{away}/x?sig=1"))
        }
        path if path.ends_with(&digest("relative").to_string()) => response(301).header("location", "/here"),
        _ => {
            let here = format!("http://{}/here", seen.header("host").unwrap());
            response(307).header("location", &format!("{away}/back?{here}"))
        }
    })
    .await;
    let upstream = upstream(&[&registry]);
    let caller = client("Bearer secret");
    for bytes in ["direct", "relative", "back"] {
        let fetched = upstream
            .get(&caller, &blob(bytes), &accept(), None)
            .await
            .unwrap();
        assert_eq!(fetched.collect(10).await.unwrap(), "bytes");
    }
    let shown: Vec<_> = registry
        .seen()
        .iter()
        .map(|seen| seen.authorization().is_some())
        .collect();
    assert_eq!(
        shown,
        [true, true, true, true, false],
        "kept on the same origin, not regained after a redirect elsewhere"
    );
    assert!(storage.seen().iter().all(|seen| seen.authorization().is_none()));
    assert_eq!(storage.seen()[0].uri.query(), Some("sig=1"));
}

#[tokio::test]
async fn head_follows_redirects() {
    let registry = Registry::start(|seen| match seen.path() {
        "/moved" => manifest(),
        _ => response(308).header("location", "/moved"),
    })
    .await;
    assert_eq!(
        upstream(&[&registry])
            .head(&anonymous(), &tag(), &accept())
            .await
            .kind,
        ResponseKind::Digest(digest(MANIFEST))
    );
    assert_eq!(
        registry.requests(),
        ["HEAD /v2/library/a/manifests/latest", "HEAD /moved"]
    );
}

#[tokio::test]
async fn invalid_redirects_end() {
    for location in [
        Some("/again"),
        Some("ftp://a/"),
        Some("http://user@127.0.0.1/"),
        None,
    ] {
        let registry = Registry::start(move |_| match location {
            Some(location) => response(302).header("location", location),
            None => response(302),
        })
        .await;
        let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
        assert!(
            matches!(
                response.kind,
                ResponseKind::Unavailable(UpstreamFailure::Redirects(_))
            ),
            "{location:?}"
        );
        assert!(registry.seen().len() <= 11);
    }
}

#[tokio::test]
async fn rejecting_storage_is_retried_and_is_no_denial() {
    let storage = Registry::start(|seen| {
        if seen.nth == 0 {
            response(403)
        } else {
            response(200).body("bytes")
        }
    })
    .await;
    let away = storage.url();
    let registry = Registry::start(move |_| response(307).header("location", &away)).await;
    let upstream = upstream(&[&registry]);
    let fetched = upstream
        .get(&anonymous(), &blob("bytes"), &accept(), None)
        .await
        .unwrap();
    assert_eq!(fetched.status, 200);
    assert_eq!(registry.seen().len(), 2, "the registry signs a new URL");

    let storage = Registry::start(|_| response(403)).await;
    let away = storage.url();
    let registry = Registry::start(move |_| response(307).header("location", &away)).await;
    let refused = super::upstream(&[&registry])
        .get(&anonymous(), &blob("bytes"), &accept(), None)
        .await;
    assert_eq!(
        refused.unwrap_err().kind,
        ResponseKind::Unavailable(UpstreamFailure::Status(403))
    );
}

#[tokio::test]
async fn r01_error_of_redirect_target_is_a_failure() {
    for endpoint in [blob("bytes"), tag(), endpoint("/v2/library/a/tags/list")] {
        for status in [400, 401, 403, 404, 405] {
            let elsewhere = Registry::start(move |_| response(status)).await;
            let away = elsewhere.url();
            let registry = Registry::start(move |_| response(302).header("location", &away)).await;
            let response = upstream(&[&registry])
                .head(&anonymous(), &endpoint, &accept())
                .await;
            assert_eq!(
                response.kind,
                ResponseKind::Unavailable(UpstreamFailure::Status(status)),
                "{endpoint:?}"
            );
            assert!(response.challenge.is_empty());
        }
    }
}

#[tokio::test]
async fn storage_rejecting_head_gets_one_byte_get() {
    let storage = Registry::start(|seen| match seen.method {
        Method::HEAD => response(403),
        _ => response(206).header("content-range", "bytes 0-0/1234").body("x"),
    })
    .await;
    let away = storage.url();
    let registry = Registry::start(move |_| response(307).header("location", &away)).await;
    let upstream = upstream(&[&registry]);
    for _ in 0..2 {
        let response = upstream.head(&anonymous(), &blob("bytes"), &accept()).await;
        let said = ResponseKind::UnprovenDigest(digest("bytes"));
        assert_eq!((response.kind, response.length), (said, Some(1234)));
    }
    assert_eq!(registry.seen().len(), 3, "and the quirk is cached");
}

#[tokio::test]
async fn r01_other_origin_proves_nothing_without_bytes() {
    let elsewhere = Registry::start(|seen| match seen.path() {
        "/manifests/latest" => manifest(),
        _ => response(200)
            .header("docker-content-digest", &digest("bytes").to_string())
            .body("bytes"),
    })
    .await;
    let away = elsewhere.url();
    let registry = Registry::start(move |seen| {
        let path = seen.path().trim_start_matches("/v2/library/a");
        response(307).header("location", &format!("{away}{path}"))
    })
    .await;
    let upstream = upstream(&[&registry]);
    let said = upstream.head(&anonymous(), &blob("bytes"), &accept()).await.kind;
    assert_eq!(said, ResponseKind::UnprovenDigest(digest("bytes")));
    let said = upstream.head(&anonymous(), &tag(), &accept()).await.kind;
    assert_eq!(said, ResponseKind::UnprovenDigest(digest(MANIFEST)));
}

#[tokio::test]
async fn address_in_narrower_scope_is_not_dialed() {
    let registry = Registry::start(|_| manifest()).await;
    let port = registry.url().rsplit_once(':').unwrap().1.to_owned();
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"] {
        let uri = format!("http://{host}:{port}/").parse().unwrap();
        let dialed = tcp::TcpDialer
            .dial(&uri, &IpScope::Private.into(), Duration::from_secs(3))
            .await;
        assert_eq!(
            dialed.err().map(|error| error.cause),
            Some(UpstreamFailure::Redirects(RedirectFailure::NarrowerScope)),
            "{host}"
        );
    }
    let uri = registry.url().parse().unwrap();
    assert!(
        tcp::TcpDialer
            .dial(&uri, &IpScope::Loopback.into(), Duration::from_secs(3))
            .await
            .is_ok()
    );
}

/// A registry at a public address that redirects to the targets of this table, and records the dialed addresses.
struct PublicDialer {
    dialed: Mutex<Vec<String>>,
    at: &'static [(&'static str, &'static str)],
    pipes: Arc<dyn Dialer>,
}

impl Dialer for PublicDialer {
    fn dial(&self, to: &Uri, limit: &AddressLimit, timeout: Duration) -> DialFuture {
        let host = to.host().unwrap().to_owned();
        let at = self.at.iter().find(|(name, _)| *name == host);
        let at: IpAddr = at.map_or("8.8.8.8", |(_, at)| at).parse().unwrap();
        if !limit.allows(at) {
            return Box::pin(async move { Err(DialError::scope_denied(at)) });
        }
        self.dialed.lock().push(host);
        let dialing = self.pipes.dial(to, limit, timeout);
        Box::pin(async move {
            Ok(DialedStream {
                peer: Some(at),
                ..dialing.await?
            })
        })
    }
}

/// A registry at a public address that redirects everything to this target, with these rules.
async fn redirected(to: &'static str, redirects: &[RedirectRule]) -> (UpstreamResponse, Vec<String>) {
    let registry = Registry::start(move |seen| {
        if seen.uri.path().starts_with("/v2/") {
            response(307).header("location", to)
        } else {
            manifest()
        }
    })
    .await;
    let dial = Arc::new(PublicDialer {
        dialed: Mutex::default(),
        at: &[
            ("storage.corp", "10.1.2.3"),
            ("169.254.169.254", "169.254.169.254"),
        ],
        pipes: registry.dial(),
    });
    let settings = Settings {
        redirects: redirects.to_vec(),
        proxy: ProxyChoice::None,
        ..Settings::new("a", vec!["http://registry.example".parse().unwrap()])
    };
    let upstream = Upstream::new(
        settings,
        &Transport::with_dialer(Arc::clone(&dial) as Arc<dyn Dialer>),
    )
    .unwrap();
    let response = upstream.head(&anonymous(), &tag(), &accept()).await;
    let dialed = dial.dialed.lock().clone();
    (response, dialed)
}

#[tokio::test]
async fn r13_private_address_only_if_redirects_allows_it() {
    let named = [RedirectRule {
        plain: false,
        to: RedirectTarget::Host(HostPattern::read("storage.corp").unwrap(), None),
    }];
    let (response, dialed) = redirected("http://storage.corp/x", &named).await;
    assert_eq!(response.kind, ResponseKind::UnprovenDigest(digest(MANIFEST)));
    assert_eq!(dialed, ["registry.example", "storage.corp"]);
    for (to, entry) in [
        ("http://storage.corp/x", "storage.corp"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254"),
    ] {
        let (response, dialed) = redirected(to, &[]).await;
        assert_eq!(
            response.kind,
            ResponseKind::Unavailable(UpstreamFailure::Redirects(RedirectFailure::NarrowerScope)),
            "{to}"
        );
        assert_eq!(dialed, ["registry.example"]);
        let detail = response.detail.unwrap();
        assert!(detail.contains(&format!("redirects = [\"{entry}\"]")), "{detail}");
    }
    // An allowed host name allows no other target.
    let (response, _) = redirected("http://169.254.169.254/latest/meta-data", &named).await;
    assert_eq!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::Redirects(RedirectFailure::NarrowerScope))
    );
}
