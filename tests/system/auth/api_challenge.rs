//! `GET /v2/` under an upstream's host: the registry's own challenge, byte for byte, also in an outage.

use crate::forwarding::host_routing::two_upstreams;
use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::Upstream;

fn ping(proxy: &Proxy) -> Ask {
    let ask = proxy.get("/v2/").tls(&proxy.ca_pem(), &[]);
    ask.server_name("ghcr.io").unchecked()
}

#[tokio::test]
async fn challenge_is_replayed_in_outage_and_after_restart() {
    let (_hub, other, proxy) = two_upstreams().await;
    other.requires_token();
    let direct = other.ask("GET", "/v2/").unchecked().await;
    let challenge = direct.header("www-authenticate").unwrap();
    let is_challenged = |reply: &crate::proxy::Reply| {
        assert_eq!(
            (reply.status, reply.header("www-authenticate")),
            (401, Some(challenge)),
            "{reply:#?}"
        );
        assert_eq!(reply.code(), "UNAUTHORIZED");
        assert_eq!(
            reply.header("docker-distribution-api-version"),
            Some("registry/2.0")
        );
    };
    is_challenged(&ping(&proxy).await);
    other.refuses();
    is_challenged(&ping(&proxy).await);
    let proxy = proxy.restart().await;
    is_challenged(&ping(&proxy).await);
    let through = proxy
        .get("/v2/")
        .tls(&proxy.ca_pem(), &["h2"])
        .through_connect("ghcr.io:443");
    is_challenged(&through.unchecked().await);
    // The mirror route does not send the registry's challenge.
    assert_eq!(proxy.get("/v2/").await.status, 200);
}

#[tokio::test]
async fn it_costs_the_registry_one_question_for_all() {
    let (_hub, other, proxy) = two_upstreams().await;
    other.requires_basic("ann", "secret");
    let asks: Vec<_> = (0..20).map(|_| tokio::spawn(ping(&proxy).into_reply())).collect();
    for ask in asks {
        let reply = ask.await.unwrap();
        assert_eq!(
            reply.header("www-authenticate"),
            Some("Basic realm=\"scripted upstream\"")
        );
    }
    assert_eq!(other.requests().len(), 1);
}

#[tokio::test]
async fn a_registry_that_wants_no_credential_is_said_to() {
    let (_hub, other, proxy) = two_upstreams().await;
    assert_eq!(ping(&proxy).await.status, 200);
    other.refuses();
    assert_eq!(ping(&proxy).await.status, 200);
}

#[tokio::test]
async fn without_one_known_a_silent_registry_is_said_to_be_silent() {
    let (_hub, other, proxy) = two_upstreams().await;
    other.refuses();
    let reply = ping(&proxy).await;
    assert!(matches!(reply.status, 502..=504), "{reply:#?}");
    assert!(reply.message().contains("ghcr.io"), "{reply:#?}");
}

#[tokio::test]
async fn a_login_is_judged_by_the_registry_alone() {
    let (_hub, other, proxy) = two_upstreams().await;
    other.requires_basic("ann", "secret");
    assert_eq!(ping(&proxy).await.status, 401);
    assert_eq!(ping(&proxy).basic("ann", "secret").await.status, 200);
    let wrong = ping(&proxy).basic("ann", "guess").await;
    assert_eq!(wrong.status, 401);
    assert_eq!(
        wrong.header("www-authenticate"),
        Some("Basic realm=\"scripted upstream\"")
    );
    other.refuses();
    let reply = ping(&proxy).basic("ann", "secret").await;
    assert!(
        matches!(reply.status, 502..=504),
        "no yes without the registry: {reply:#?}"
    );
}

#[tokio::test]
async fn shared_auth_ping_sends_no_challenge() {
    let other = Upstream::start().await;
    other.requires_basic("ann", "secret");
    let setup = Setup::empty().also("ghcr.io", &other);
    let file = setup.file("password", "secret");
    let keys = format!("auth = \"shared\"\nusername = \"ann\"\npassword_file = {file:?}");
    let proxy = setup.upstream_keys("ghcr.io", &keys).start().await;
    assert_eq!(ping(&proxy).await.status, 200);
    assert_eq!(
        ping(&proxy).basic("ann", "guess").await.status,
        401,
        "the proxy's own is not lent to a login"
    );
}

#[tokio::test]
async fn a_token_service_at_the_registrys_own_host_is_passed_to() {
    let (_hub, other, proxy) = two_upstreams().await;
    other.lets("ann", "secret", "team/demo");
    let ask = proxy.get("/token?service=scripted&scope=repository:team/demo:pull");
    let reply = ask
        .tls(&proxy.ca_pem(), &[])
        .through_connect("ghcr.io:443")
        .basic("ann", "secret")
        .unchecked()
        .await;
    assert_eq!(reply.status, 200, "{reply:#?}");
    assert!(reply.json()["token"].as_str().unwrap().starts_with("token-ann-"));
    let seen = &other.token_requests()[0];
    assert_eq!(
        seen.query.as_deref(),
        Some("service=scripted&scope=repository:team/demo:pull")
    );
}
