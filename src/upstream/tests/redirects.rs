//! Where a registry may send us, and with what.

use super::super::zone::Zone;
use super::registry::{Registry, answer, manifest};
use http::Uri;

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
            .said,
        Said::Is(digest(MANIFEST))
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
        assert_eq!(answer.said, Said::Silent(Cause::Redirects), "{location:?}");
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
    assert_eq!(refused.unwrap_err().said, Said::Silent(Cause::Status(403)));
}

#[tokio::test]
async fn a_registry_vouches_for_a_blob_though_its_storage_refuses_head() {
    let storage = Registry::start(|_| answer(403)).await;
    let away = storage.url();
    let registry = Registry::start(move |_| answer(307).header("location", &away)).await;
    let answer = upstream(&[&registry])
        .head(&anonymous(), &blob("bytes"), &accept())
        .await;
    assert_eq!((answer.said, answer.length), (Said::Is(digest("bytes")), None));
}

#[tokio::test]
async fn an_address_nearer_than_allowed_is_not_dialled() {
    let registry = Registry::start(|_| manifest()).await;
    let port = registry.url().rsplit_once(':').unwrap().1.to_owned();
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"] {
        let uri = format!("http://{host}:{port}/").parse().unwrap();
        let dialled = tcp::Tcp.dial(&uri, Zone::Private, Duration::from_secs(3)).await;
        assert_eq!(
            dialled.err().map(|error| error.cause),
            Some(Cause::Redirects),
            "{host}"
        );
    }
    let uri = registry.url().parse().unwrap();
    assert!(
        tcp::Tcp
            .dial(&uri, Zone::Loopback, Duration::from_secs(3))
            .await
            .is_ok()
    );
}

/// Stands at a public address, sends everybody to the cloud's metadata service, and notes how near we were allowed.
#[derive(Default)]
struct Public {
    allowed: Mutex<Vec<(String, Zone)>>,
    pipes: Option<Arc<dyn Dial>>,
}

impl Dial for Public {
    fn dial(&self, to: &Uri, nearest: Zone, patience: Duration) -> Dialling {
        let host = to.host().unwrap().to_owned();
        self.allowed.lock().unwrap().push((host.clone(), nearest));
        if host == "169.254.169.254" {
            return Box::pin(async { Err(Cause::Redirects.into()) });
        }
        let dialling = self.pipes.as_ref().unwrap().dial(to, nearest, patience);
        Box::pin(async move {
            Ok(Dialled {
                peer: Some([8, 8, 8, 8].into()),
                ..dialling.await?
            })
        })
    }
}

#[tokio::test]
async fn a_public_registry_leads_to_public_addresses_only() {
    let registry =
        Registry::start(|_| answer(307).header("location", "http://169.254.169.254/latest/meta-data")).await;
    for (private_redirects, zone) in [(false, Zone::Public), (true, Zone::Private)] {
        let dial = Arc::new(Public {
            pipes: Some(registry.dial()),
            ..Public::default()
        });
        let settings = Settings {
            private_redirects,
            proxy: ProxyChoice::None,
            ..Settings::new("a", vec!["http://registry.example".parse().unwrap()])
        };
        let upstream = Upstream::new(
            settings,
            &Connector::with_dial(Arc::clone(&dial) as Arc<dyn Dial>),
        )
        .unwrap();
        let answer = upstream.head(&anonymous(), &tag(), &accept()).await;
        assert_eq!(answer.said, Said::Silent(Cause::Redirects));
        let allowed = dial.allowed.lock().unwrap().clone();
        assert_eq!(
            allowed,
            [
                ("registry.example".into(), Zone::Link),
                ("169.254.169.254".into(), zone)
            ]
        );
    }
}
