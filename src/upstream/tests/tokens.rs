//! Bearer token authentication, as seen by a registry and its token service.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::super::token::{TokenCredential, TokenFailure, TokenKey, TokenOwner, TokenOwnerKind};
use super::registry::{Registry, Reply, Seen, manifest, response, token};
use super::*;

/// A registry that requires `Bearer good` and issues it to any caller.
fn bearer(seen: &Seen) -> Reply {
    match (seen.path(), seen.authorization()) {
        ("/token", _) => token("good"),
        (_, Some("Bearer good")) => manifest(),
        _ => seen.challenge(),
    }
}

#[tokio::test]
async fn anonymous_token_is_cached() {
    let registry = Registry::start(bearer).await;
    let upstream = upstream(&[&registry]);
    for _ in 0..3 {
        let response = upstream.head(&anonymous(), &tag(), &accept()).await;
        assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
    }
    let manifest = "HEAD /v2/library/a/manifests/latest";
    assert_eq!(
        registry.requests(),
        [manifest, "GET /token", manifest, manifest, manifest]
    );
    let asked = registry.seen();
    assert_eq!(
        asked[1].uri.query(),
        Some("service=reg&scope=repository:library/a:pull")
    );
    assert_eq!(asked[1].authorization(), None);
}

#[tokio::test]
async fn token_request_does_not_name_the_caches_before() {
    let registry = Registry::start(bearer).await;
    let upstream = upstream(&[&registry]);
    let mut headers = HeaderMap::new();
    headers.insert("cdn-loop", HeaderValue::from_static("edge.example"));
    let caller = Caller {
        trace: TraceContext::extract(&headers, false),
        ..anonymous()
    };
    upstream.head(&caller, &tag(), &accept()).await;
    let seen = registry.seen();
    assert!(seen.iter().any(|seen| seen.path() == "/token"));
    for seen in seen {
        let passed = seen.header("cdn-loop").unwrap();
        let is_named = passed.starts_with("edge.example, ifnewer-");
        assert!(is_named || passed.starts_with("ifnewer-"), "{passed}");
        assert_eq!(is_named, seen.path() != "/token", "{passed}");
    }
}

#[tokio::test(start_paused = true)]
async fn token_without_expires_in_lives_a_minute() {
    let registry = Registry::start(bearer).await;
    let upstream = piped(&registry);
    upstream.head(&anonymous(), &tag(), &accept()).await;
    tokio::time::advance(Duration::from_secs(49)).await;
    upstream.head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(registry.count("/token"), 1);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(
        upstream.head(&anonymous(), &tag(), &accept()).await.kind,
        ResponseKind::Digest(digest(MANIFEST))
    );
    assert_eq!(registry.count("/token"), 2);
    let unauthorised = registry
        .seen()
        .iter()
        .filter(|seen| seen.path() != "/token" && seen.authorization().is_none())
        .count();
    assert_eq!(unauthorised, 1, "a new token needs no new challenge");
}

#[tokio::test]
async fn second_401_is_final_with_the_first_challenge() {
    let registry = Registry::start(|seen| match (seen.path(), seen.authorization()) {
        ("/token", _) => token("weak"),
        (_, None) => seen.challenge().header("www-authenticate", r#"Basic realm="x""#),
        _ => response(401).header(
            "www-authenticate",
            r#"Bearer realm="http://x/",error="insufficient_scope""#,
        ),
    })
    .await;
    let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(response.kind, ResponseKind::Denied);
    assert_eq!(response.status, Some(http::StatusCode::UNAUTHORIZED));
    assert_eq!(response.challenge.len(), 2);
    assert!(
        response
            .challenge
            .iter()
            .all(|line| !line.to_str().unwrap().contains("error=")),
        "{response:?}"
    );
    assert_eq!(registry.seen().len(), 3);
}

#[tokio::test]
async fn revoked_token_is_replaced_once() {
    let registry = Registry::start(|seen| match (seen.path(), seen.authorization()) {
        ("/token", _) => token(&format!("t{}", seen.nth)),
        (_, Some("Bearer t1")) if seen.nth == 2 => manifest(),
        (_, Some("Bearer t4")) => manifest(),
        _ => seen.challenge(),
    })
    .await;
    let upstream = upstream(&[&registry]);
    for _ in 0..3 {
        assert_eq!(
            upstream.head(&anonymous(), &tag(), &accept()).await.kind,
            ResponseKind::Digest(digest(MANIFEST))
        );
    }
    let shown: Vec<_> = registry
        .seen()
        .iter()
        .map(|seen| seen.authorization().unwrap_or("none").to_owned())
        .collect();
    assert_eq!(
        shown,
        [
            "none",
            "none",
            "Bearer t1",
            "Bearer t1",
            "none",
            "Bearer t4",
            "Bearer t4"
        ]
    );
}

#[tokio::test]
async fn expired_403_with_cached_token_is_retried() {
    let registry = Registry::start(|seen| match (seen.path(), seen.authorization()) {
        ("/token", _) => token(if seen.nth == 1 { "old" } else { "new" }),
        (_, Some("Bearer old")) if seen.nth > 2 => response(403)
            .body(r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired."}]}"#),
        (_, Some(_)) => manifest(),
        _ => seen.challenge(),
    })
    .await;
    let upstream = upstream(&[&registry]);
    upstream.head(&anonymous(), &tag(), &accept()).await;
    let fetched = upstream.get(&anonymous(), &tag(), &accept(), None).await.unwrap();
    assert_eq!(fetched.digest, Some(digest(MANIFEST)));
    assert_eq!(registry.count("/token"), 2);
}

#[tokio::test]
async fn client_bearer_token_is_never_exchanged() {
    let registry = Registry::start(bearer).await;
    let upstream = upstream(&[&registry]);
    assert_eq!(
        upstream.head(&client("Bearer bad"), &tag(), &accept()).await.kind,
        ResponseKind::Denied
    );
    assert_eq!(
        upstream
            .head(&client("Bearer good"), &tag(), &accept())
            .await
            .kind,
        ResponseKind::Digest(digest(MANIFEST))
    );
    assert_eq!(registry.count("/token"), 0);
}

#[tokio::test]
async fn client_basic_goes_to_registry_then_realm() {
    let registry = Registry::start(bearer).await;
    let response = upstream(&[&registry])
        .head(&client("Basic dTpw"), &tag(), &accept())
        .await;
    assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
    let shown: Vec<_> = registry
        .seen()
        .iter()
        .map(|seen| seen.authorization().map(str::to_owned))
        .collect();
    assert_eq!(
        shown,
        [
            Some("Basic dTpw".into()),
            Some("Basic dTpw".into()),
            Some("Bearer good".into())
        ]
    );
}

#[tokio::test]
async fn configured_credential_only_for_its_callers() {
    let registry = Registry::start(bearer).await;
    let own = UpstreamCredential::new("robot", "secret");
    let settings = Settings {
        credential: Some(own.into()),
        ..settings(&[&registry])
    };
    let upstream = Upstream::new(settings, &Transport::system()).unwrap();
    upstream.head(&anonymous(), &tag(), &accept()).await;
    assert!(
        registry
            .seen()
            .iter()
            .all(|seen| seen.authorization().is_none_or(|sent| sent == "Bearer good"))
    );
    let caller = Caller {
        principal: [0; 32],
        credential: Credential::Configured,
        peer: Peer::Local,
        class: Class::Interactive,
        waiters: None,
        trace: TraceContext::new_root(),
        wait_deadline: None,
    };
    upstream.head(&caller, &tag(), &accept()).await;
    let basic = format!("Basic {}", BASE64_STANDARD.encode("robot:secret"));
    let shown: Vec<_> = registry
        .seen()
        .iter()
        .skip(3)
        .map(|seen| seen.authorization().map(str::to_owned))
        .collect();
    assert_eq!(
        shown,
        [Some(basic.clone()), Some(basic), Some("Bearer good".into())],
        "same principal, other holder"
    );
}

#[tokio::test]
async fn configured_credential_is_posted_without_get() {
    let registry = Registry::start(|seen| match seen.path() {
        "/token" if seen.method == Method::GET => response(405),
        _ => bearer(seen),
    })
    .await;
    let own = UpstreamCredential::new("robot", "a&b");
    let settings = Settings {
        credential: Some(own.into()),
        ..settings(&[&registry])
    };
    let caller = Caller {
        principal: [0; 32],
        credential: Credential::Configured,
        peer: Peer::Local,
        class: Class::Interactive,
        waiters: None,
        trace: TraceContext::new_root(),
        wait_deadline: None,
    };
    let response = Upstream::new(settings, &Transport::system())
        .unwrap()
        .head(&caller, &tag(), &accept())
        .await;
    assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
    let posted = registry
        .seen()
        .into_iter()
        .find(|seen| seen.method == Method::POST)
        .unwrap();
    assert_eq!(
        posted.body,
        "client_id=ifnewer&scope=repository:library/a:pull&service=reg&grant_type=password&username=robot&password=a%26b"
    );
}

#[tokio::test]
async fn untrusted_realm_is_never_contacted() {
    for realm in [
        "http://evil.example/token",
        "http://user@127.0.0.1/token",
        "ftp://127.0.0.1/",
        "/token",
        "",
    ] {
        let challenge = format!(r#"Bearer realm="{realm}",service="x""#);
        let registry = Registry::start({
            let challenge = challenge.clone();
            move |_| response(401).header("www-authenticate", &challenge)
        })
        .await;
        let response = upstream(&[&registry])
            .head(&client("Basic dTpw"), &tag(), &accept())
            .await;
        assert_eq!(response.kind, ResponseKind::Denied, "{realm}");
        assert_eq!(response.challenge, [challenge.as_str()], "forwarded unchanged");
        assert_eq!(registry.seen().len(), 1, "{realm}");
    }
}

#[tokio::test]
async fn token_service_redirect_is_not_followed() {
    // At once, and after two redirects within the origin.
    for last in ["/token", "/token/3"] {
        let elsewhere = Registry::start(|_| token("stolen")).await;
        let url = elsewhere.url();
        let registry = Registry::start(move |seen| match seen.path() {
            path if path == last => response(307).header("location", &url),
            "/token" => response(302).header("location", "/token/2"),
            "/token/2" => response(308).header("location", "/token/3"),
            _ => seen.challenge(),
        })
        .await;
        let response = upstream(&[&registry])
            .head(&client("Basic dTpw"), &tag(), &accept())
            .await;
        assert_eq!(
            response.kind,
            ResponseKind::Unavailable(UpstreamFailure::TokenService)
        );
        assert_eq!(registry.count(last), 1, "{last}");
        assert!(elsewhere.seen().is_empty());
    }
}

#[tokio::test]
async fn token_service_status_decides() {
    for (status, body, said) in [
        (401, "", ResponseKind::Denied),
        (403, "", ResponseKind::Denied),
        (429, "", ResponseKind::Unavailable(UpstreamFailure::RateLimited)),
        (500, "", ResponseKind::Unavailable(UpstreamFailure::TokenService)),
        (404, "", ResponseKind::Unavailable(UpstreamFailure::TokenService)),
        (
            200,
            "{}",
            ResponseKind::Unavailable(UpstreamFailure::TokenService),
        ),
        (
            200,
            "<html>",
            ResponseKind::Unavailable(UpstreamFailure::TokenService),
        ),
        (
            200,
            "{\"token\":\"a\\nb\"}",
            ResponseKind::Unavailable(UpstreamFailure::TokenService),
        ),
        (
            200,
            r#"{"access_token":"good","expires_in":"300"}"#,
            ResponseKind::Digest(digest(MANIFEST)),
        ),
    ] {
        let registry = Registry::start(move |seen| match seen.path() {
            "/token" => response(status).body(body),
            _ => bearer(seen),
        })
        .await;
        let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
        assert_eq!(response.kind, said, "{status} {body}");
        if said == ResponseKind::Denied {
            assert_eq!(response.challenge.len(), 1, "the registry's own challenge");
        }
    }
}

#[tokio::test]
async fn challenge_without_scope_gets_default_scope() {
    let registry = Registry::start(|seen| match (seen.path(), seen.authorization()) {
        (_, Some("Bearer good")) => manifest(),
        ("/token", _) => token("good"),
        _ => response(401).header(
            "www-authenticate",
            &format!(
                r#"Bearer realm="http://{}/token?a=b""#,
                seen.header("host").unwrap()
            ),
        ),
    })
    .await;
    upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(
        registry.seen()[1].uri.query(),
        Some("a=b&scope=repository:library/a:pull")
    );
}

#[tokio::test]
async fn ping_returns_the_challenge() {
    let registry = Registry::start(bearer).await;
    let response = upstream(&[&registry])
        .head(&anonymous(), &Endpoint::Ping, &accept())
        .await;
    assert_eq!(
        (response.kind, response.challenge.len()),
        (ResponseKind::Denied, 1)
    );
    assert_eq!(registry.requests(), ["GET /v2/"]);
}

/// Concurrent callers share a token request only within a principal. Each gets its own token, and a denied principal
/// none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_requests_coalesce_per_principal() {
    for _ in 0..20 {
        let registry = Registry::start(|seen| match (seen.path(), seen.authorization()) {
            ("/token", Some("Basic Ym9iOmI=")) => token("bob"),
            ("/token", Some("Basic ZXZlOmU=")) => token("eve"),
            (_, Some("Bearer bob")) => manifest(),
            (_, Some("Bearer eve")) => response(403),
            _ => seen.challenge(),
        })
        .await;
        let upstream = Arc::new(upstream(&[&registry]));
        let mut askers = tokio::task::JoinSet::new();
        for asker in 0..16 {
            let upstream = Arc::clone(&upstream);
            askers.spawn(async move {
                let (caller, said) = if asker % 2 == 0 {
                    (client("Basic Ym9iOmI="), ResponseKind::Digest(digest(MANIFEST)))
                } else {
                    (client("Basic ZXZlOmU="), ResponseKind::Denied)
                };
                assert_eq!(upstream.head(&caller, &tag(), &accept()).await.kind, said);
            });
        }
        while let Some(asked) = askers.join_next().await {
            asked.unwrap();
        }
        assert_eq!(registry.count("/token"), 2);
    }
}

#[tokio::test]
async fn waiting_caller_shares_token_failure() {
    let registry = Registry::start(|_| response(500)).await;
    let upstream = upstream(&[&registry]);
    let AuthClient { http, tokens, .. } = &upstream.0.auth_client;
    let holder = TokenOwner {
        kind: TokenOwnerKind::Anonymous,
        principal: [0; 32],
    };
    let realm = format!("{}/token", registry.url());
    let key = TokenKey::of(tokens, &upstream.0.urls[0], (&realm, None, &[]), None, holder).unwrap();
    // All three are polled before the first response arrives: one sends the request, two wait for it.
    let trace = TraceContext::new_root();
    let get = || tokens.get(http, &key, TokenCredential::Anonymous, (None, &trace));
    let (one, two, three) = tokio::join!(get(), get(), get());
    for failed in [one, two, three] {
        assert!(matches!(
            failed,
            Err(TokenFailure::Unusable(_) | TokenFailure::NoResponse(_))
        ));
    }
    assert_eq!(registry.seen().len(), 1);
    assert!(matches!(
        get().await,
        Err(TokenFailure::Unusable(_) | TokenFailure::NoResponse(_))
    ));
    assert_eq!(registry.seen().len(), 2, "later callers send a new request");
}
