//! Learned state over a reload: the same state with other settings.

use super::registry::{Registry, manifest, response, token};
use super::*;

/// An upstream as a reload creates it, with pipes to `registry`.
fn reloaded(state: &LearnedState, settings: Settings, registry: &Registry) -> Upstream {
    let upstream = Upstream::with_state(state, settings, &Transport::with_dialer(registry.dial())).unwrap();
    upstream.activate();
    upstream
}

fn at(urls: &[&str]) -> Settings {
    let urls = urls.iter().map(|url| url.parse().unwrap()).collect();
    Settings {
        proxy: ProxyChoice::None,
        ..Settings::new("reg.example", urls)
    }
}

fn own(password: &str) -> Settings {
    Settings {
        credential: Some(UpstreamCredential::new("robot", password).into()),
        ..at(&["http://a.example"])
    }
}

fn as_own() -> Caller {
    Caller {
        credential: Credential::Configured,
        ..anonymous()
    }
}

#[tokio::test(start_paused = true)]
async fn o03_retry_after_outlives_reload_keyed_by_url() {
    let registry = Registry::start(|_| response(429).header("retry-after", "300")).await;
    let state = LearnedState::default();
    let before = reloaded(&state, at(&["http://a.example"]), &registry);
    before.head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(registry.seen().len(), 1);

    let same = reloaded(&state, at(&["http://a.example"]), &registry);
    let limited = same.head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(
        limited.kind,
        ResponseKind::Unavailable(UpstreamFailure::RateLimited)
    );
    assert_eq!(registry.seen().len(), 1, "not requested within Retry-After");

    let both = reloaded(&state, at(&["http://b.example", "http://a.example"]), &registry);
    both.head(&anonymous(), &tag(), &accept()).await;
    let hosts: Vec<_> = registry
        .seen()
        .iter()
        .map(|seen| seen.headers["host"].to_str().unwrap().to_owned())
        .collect();
    assert_eq!(hosts, ["a.example", "b.example"]);
}

#[tokio::test(start_paused = true)]
async fn o03_new_credential_ignores_earlier_rate_limit() {
    let registry = Registry::start(|_| response(429).header("retry-after", "300")).await;
    let state = LearnedState::default();
    reloaded(&state, own("first"), &registry)
        .head(&as_own(), &tag(), &accept())
        .await;
    for (password, asked) in [("first", 1), ("second", 2), ("second", 2)] {
        reloaded(&state, own(password), &registry)
            .head(&as_own(), &tag(), &accept())
            .await;
        assert_eq!(registry.seen().len(), asked, "{password}");
    }
}

#[tokio::test(start_paused = true)]
async fn o03_open_breaker_and_its_probe_outlive_reload() {
    let registry = Registry::start(|_| manifest()).await;
    let state = LearnedState::default();
    let before = reloaded(&state, at(&["http://a.example"]), &registry);
    registry.refuses(true);
    for _ in 0..3 {
        before.head(&anonymous(), &tag(), &accept()).await;
    }
    assert_eq!(before.unavailable_now(), Some(UpstreamFailure::BreakerOpen));

    let after = reloaded(&state, at(&["http://a.example"]), &registry);
    drop(before);
    assert_eq!(after.unavailable_now(), Some(UpstreamFailure::BreakerOpen));
    assert!(after.status().last_failure.is_some());
    registry.refuses(false);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(after.unavailable_now(), None, "the probe continues");
}

#[tokio::test(start_paused = true)]
async fn o03_upstream_removed_and_added_again_is_probed_again() {
    let registry = Registry::start(|_| manifest()).await;
    let state = LearnedState::default();
    let before = reloaded(&state, at(&["http://a.example"]), &registry);
    registry.refuses(true);
    for _ in 0..3 {
        before.head(&anonymous(), &tag(), &accept()).await;
    }
    drop(before);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let after = reloaded(&state, at(&["http://a.example"]), &registry);
    assert_eq!(after.unavailable_now(), Some(UpstreamFailure::BreakerOpen));
    registry.refuses(false);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(after.unavailable_now(), None);
}

#[tokio::test(start_paused = true)]
async fn o03_new_url_starts_closed_despite_late_failures() {
    let registry = Registry::start(|_| manifest()).await;
    let state = LearnedState::default();
    let before = reloaded(&state, at(&["http://a.example"]), &registry);
    registry.refuses(true);
    for _ in 0..3 {
        before.head(&anonymous(), &tag(), &accept()).await;
    }
    let after = reloaded(&state, at(&["http://b.example"]), &registry);
    assert_eq!(after.unavailable_now(), None);
    for _ in 0..5 {
        before.head(&anonymous(), &tag(), &accept()).await;
    }
    assert_eq!(
        after.unavailable_now(),
        None,
        "failures of the old URL do not count for the new one"
    );
    assert!(after.status().last_failure.is_none());
}

#[tokio::test(start_paused = true)]
async fn o03_quirks_outlive_reload_keyed_by_url() {
    let registry = Registry::start(|seen| {
        if seen.method == Method::HEAD {
            response(405)
        } else {
            manifest()
        }
    })
    .await;
    let state = LearnedState::default();
    for (url, asked) in [
        ("http://a.example", &["HEAD", "GET"][..]),
        ("http://a.example", &["GET"]),
        ("http://b.example", &["HEAD", "GET"]),
    ] {
        let before = registry.seen().len();
        reloaded(&state, at(&[url]), &registry)
            .head(&anonymous(), &tag(), &accept())
            .await;
        let seen: Vec<_> = registry.seen()[before..]
            .iter()
            .map(|seen| seen.method.to_string())
            .collect();
        assert_eq!(seen, asked, "{url}");
    }
}

#[tokio::test(start_paused = true)]
async fn o03_tokens_outlive_reload_of_the_same_credential() {
    let registry = Registry::start(|seen| match (seen.path(), seen.authorization()) {
        ("/token", Some(own)) if own.starts_with("Basic ") => token(&format!("of-{}", &own[6..])),
        ("/token", _) => token("of-nobody"),
        (_, Some(sent)) if sent.starts_with("Bearer ") => manifest(),
        _ => response(401).header(
            "www-authenticate",
            r#"Bearer realm="http://a.example/token",service="s""#,
        ),
    })
    .await;
    let state = LearnedState::default();
    for (password, tokens) in [
        ("first", 1),
        ("first", 1),
        ("second", 2),
        ("second", 2),
        ("first", 3),
    ] {
        let said = reloaded(&state, own(password), &registry)
            .head(&as_own(), &tag(), &accept())
            .await
            .kind;
        assert_eq!(said, ResponseKind::Digest(digest(MANIFEST)));
        assert_eq!(registry.count("/token"), tokens, "{password}");
        let shown = registry
            .seen()
            .last()
            .unwrap()
            .authorization()
            .unwrap()
            .to_owned();
        let basic = credentials::basic("robot", password);
        assert_eq!(shown, format!("Bearer of-{}", &basic.to_str().unwrap()[6..]));
    }
}

#[tokio::test(start_paused = true)]
async fn o03_token_is_bound_to_url_and_trusted_realm() {
    let registry = Registry::start(|seen| match (seen.path(), seen.authorization()) {
        ("/token", _) => token("t"),
        (_, Some("Bearer t")) => manifest(),
        _ => response(401).header(
            "www-authenticate",
            r#"Bearer realm="http://tokens.test/token",service="s""#,
        ),
    })
    .await;
    let trusting = |url: &str, hosts: &[&str]| Settings {
        token_hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        ..at(&[url])
    };
    let state = LearnedState::default();
    let heads = |settings: Settings| {
        let upstream = reloaded(&state, settings, &registry);
        async move { upstream.head(&anonymous(), &tag(), &accept()).await.kind }
    };
    let here = || trusting("http://a.example", &["tokens.test"]);
    for _ in 0..2 {
        assert_eq!(heads(here()).await, ResponseKind::Digest(digest(MANIFEST)));
    }
    assert_eq!((registry.seen().len(), registry.count("/token")), (4, 1));

    heads(trusting("http://b.example", &["tokens.test"])).await;
    assert_eq!(
        registry.seen()[4].authorization(),
        None,
        "starts without learned state"
    );

    let asked = registry.count("/token");
    assert_eq!(
        heads(trusting("http://a.example", &[])).await,
        ResponseKind::Denied
    );
    assert_eq!(registry.count("/token"), asked);
    assert_eq!(registry.seen().last().unwrap().authorization(), None);
}
