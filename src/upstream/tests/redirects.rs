//! Where a registry may send us, and with what.

use std::net::IpAddr;

use super::super::ip_scope::IpScope;
use super::registry::{Registry, answer, manifest};
use crate::oci::failure::RedirectFailure;
use http::{Method, Uri};

use std::sync::Mutex;

use super::*;

#[tokio::test]
async fn the_authorization_is_dropped_when_the_origin_is_left_and_not_regained() {
    let storage = Registry::start(|seen| {
        let back = seen.header("x-back").unwrap_or_default().to_owned();
        assert!(back.is_empty());
        match seen.path() {
            "/back" => answer(302).header("location", seen.uri.query().unwrap()),
            _ => answer(200).body("bytes"),
        }
    })
    .await;
    let away = storage.url();
    let registry = Registry::start(move |seen| match seen.path() {
        "/here" => answer(200).body("bytes"),
        path if path.ends_with(&digest("direct").to_string()) => {
            answer(307).header("location", &format!("{away}/x?sig=1"))
        }
        path if path.ends_with(&digest("relative").to_string()) => answer(301).header("location", "/here"),
        _ => {
            let here = format!("http://{}/here", seen.header("host").unwrap());
            answer(307).header("location", &format!("{away}/back?{here}"))
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
        "kept on the same origin; not regained after a detour"
    );
    assert!(storage.seen().iter().all(|seen| seen.authorization().is_none()));
    assert_eq!(storage.seen()[0].uri.query(), Some("sig=1"));
}

#[tokio::test]
async fn a_head_follows_too() {
    let registry = Registry::start(|seen| match seen.path() {
        "/moved" => manifest(),
        _ => answer(308).header("location", "/moved"),
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
        registry.asked(),
        ["HEAD /v2/library/a/manifests/latest", "HEAD /moved"]
    );
}

#[tokio::test]
async fn redirects_that_lead_nowhere_end() {
    for location in [
        Some("/again"),
        Some("ftp://a/"),
        Some("http://user@127.0.0.1/"),
        None,
    ] {
        let registry = Registry::start(move |_| match location {
            Some(location) => answer(302).header("location", location),
            None => answer(302),
        })
        .await;
        let answer = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
        assert!(
            matches!(
                answer.kind,
                ResponseKind::Unavailable(UpstreamFailure::Redirects(_))
            ),
            "{location:?}"
        );
        assert!(registry.seen().len() <= 11);
    }
}

#[tokio::test]
async fn storage_that_refuses_is_asked_for_anew_and_is_no_denial() {
    let storage = Registry::start(|seen| {
        if seen.nth == 0 {
            answer(403)
        } else {
            answer(200).body("bytes")
        }
    })
    .await;
    let away = storage.url();
    let registry = Registry::start(move |_| answer(307).header("location", &away)).await;
    let upstream = upstream(&[&registry]);
    let fetched = upstream
        .get(&anonymous(), &blob("bytes"), &accept(), None)
        .await
        .unwrap();
    assert_eq!(fetched.status, 200);
    assert_eq!(
        registry.seen().len(),
        2,
        "the signed URL is made anew by the registry"
    );

    let storage = Registry::start(|_| answer(403)).await;
    let away = storage.url();
    let registry = Registry::start(move |_| answer(307).header("location", &away)).await;
    let refused = super::upstream(&[&registry])
        .get(&anonymous(), &blob("bytes"), &accept(), None)
        .await;
    assert_eq!(
        refused.unwrap_err().kind,
        ResponseKind::Unavailable(UpstreamFailure::Status(403))
    );
}

#[tokio::test]
async fn r01_a_refusal_of_the_redirects_target_is_no_yes_and_no_denial() {
    for endpoint in [blob("bytes"), tag(), endpoint("/v2/library/a/tags/list")] {
        for status in [400, 401, 403, 404, 405] {
            let elsewhere = Registry::start(move |_| answer(status)).await;
            let away = elsewhere.url();
            let registry = Registry::start(move |_| answer(302).header("location", &away)).await;
            let answer = upstream(&[&registry])
                .head(&anonymous(), &endpoint, &accept())
                .await;
            assert_eq!(
                answer.kind,
                ResponseKind::Unavailable(UpstreamFailure::Status(status)),
                "{endpoint:?}"
            );
            assert!(answer.challenge.is_empty());
        }
    }
}

#[tokio::test]
async fn storage_that_refuses_head_is_asked_for_one_byte() {
    let storage = Registry::start(|seen| match seen.method {
        Method::HEAD => answer(403),
        _ => answer(206).header("content-range", "bytes 0-0/1234").body("x"),
    })
    .await;
    let away = storage.url();
    let registry = Registry::start(move |_| answer(307).header("location", &away)).await;
    let upstream = upstream(&[&registry]);
    for _ in 0..2 {
        let answer = upstream.head(&anonymous(), &blob("bytes"), &accept()).await;
        let said = ResponseKind::UnprovenDigest(digest("bytes"));
        assert_eq!((answer.kind, answer.length), (said, Some(1234)));
    }
    assert_eq!(registry.seen().len(), 3, "and that is remembered");
}

#[tokio::test]
async fn r01_what_another_origin_answers_proves_nothing_without_bytes() {
    let elsewhere = Registry::start(|seen| match seen.path() {
        "/manifests/latest" => manifest(),
        _ => answer(200)
            .header("docker-content-digest", &digest("bytes").to_string())
            .body("bytes"),
    })
    .await;
    let away = elsewhere.url();
    let registry = Registry::start(move |seen| {
        let path = seen.path().trim_start_matches("/v2/library/a");
        answer(307).header("location", &format!("{away}{path}"))
    })
    .await;
    let upstream = upstream(&[&registry]);
    let said = upstream.head(&anonymous(), &blob("bytes"), &accept()).await.kind;
    assert_eq!(said, ResponseKind::UnprovenDigest(digest("bytes")));
    let said = upstream.head(&anonymous(), &tag(), &accept()).await.kind;
    assert_eq!(said, ResponseKind::UnprovenDigest(digest(MANIFEST)));
}

#[tokio::test]
async fn an_address_nearer_than_allowed_is_not_dialled() {
    let registry = Registry::start(|_| manifest()).await;
    let port = registry.url().rsplit_once(':').unwrap().1.to_owned();
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"] {
        let uri = format!("http://{host}:{port}/").parse().unwrap();
        let dialled = tcp::TcpDialer
            .dial(&uri, &IpScope::Private.into(), Duration::from_secs(3))
            .await;
        assert_eq!(
            dialled.err().map(|error| error.cause),
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

/// Stands at a public address, and leads to the places of this table; notes what is dialled.
struct Public {
    dialled: Mutex<Vec<String>>,
    at: &'static [(&'static str, &'static str)],
    pipes: Arc<dyn Dialer>,
}

impl Dialer for Public {
    fn dial(&self, to: &Uri, limit: &AddressLimit, patience: Duration) -> DialFuture {
        let host = to.host().unwrap().to_owned();
        let at = self.at.iter().find(|(name, _)| *name == host);
        let at: IpAddr = at.map_or("8.8.8.8", |(_, at)| at).parse().unwrap();
        if !limit.allows(at) {
            return Box::pin(async move { Err(DialError::scope_denied(at)) });
        }
        self.dialled.lock().unwrap().push(host);
        let dialling = self.pipes.dial(to, limit, patience);
        Box::pin(async move {
            Ok(DialedStream {
                peer: Some(at),
                ..dialling.await?
            })
        })
    }
}

/// A registry at a public address that redirects everything to this place, with these rules.
async fn redirected(to: &'static str, redirects: &[RedirectRule]) -> (UpstreamResponse, Vec<String>) {
    let registry = Registry::start(move |seen| {
        if seen.uri.path().starts_with("/v2/") {
            answer(307).header("location", to)
        } else {
            manifest()
        }
    })
    .await;
    let dial = Arc::new(Public {
        dialled: Mutex::default(),
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
    let answer = upstream.head(&anonymous(), &tag(), &accept()).await;
    let dialled = dial.dialled.lock().unwrap().clone();
    (answer, dialled)
}

#[tokio::test]
async fn r13_a_private_address_only_where_redirects_names_it() {
    let named = [RedirectRule {
        plain: false,
        to: RedirectTarget::Host(HostPattern::read("storage.corp").unwrap(), None),
    }];
    let (answer, dialled) = redirected("http://storage.corp/x", &named).await;
    assert_eq!(answer.kind, ResponseKind::UnprovenDigest(digest(MANIFEST)));
    assert_eq!(dialled, ["registry.example", "storage.corp"]);
    for (to, entry) in [
        ("http://storage.corp/x", "storage.corp"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254"),
    ] {
        let (answer, dialled) = redirected(to, &[]).await;
        assert_eq!(
            answer.kind,
            ResponseKind::Unavailable(UpstreamFailure::Redirects(RedirectFailure::NarrowerScope)),
            "{to}"
        );
        assert_eq!(dialled, ["registry.example"]);
        let detail = answer.detail.unwrap();
        assert!(detail.contains(&format!("redirects = [\"{entry}\"]")), "{detail}");
    }
    // The name that is allowed opens no other.
    let (answer, _) = redirected("http://169.254.169.254/latest/meta-data", &named).await;
    assert_eq!(
        answer.kind,
        ResponseKind::Unavailable(UpstreamFailure::Redirects(RedirectFailure::NarrowerScope))
    );
}
