//! `local_tokens`: pulls of clients that fetch a token first, while the token service is unavailable.

use crate::proxy::{Ask, Proxy, Reply, Setup, blob_path, manifest_path};
use crate::registry::{Image, Upstream};

/// Alice may read `acme/app`. Bob has an account without access. Their tokens come through the cache.
async fn private() -> (Upstream, Image, Proxy) {
    let upstream = Upstream::start_tls().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    upstream.makes_public("open/app");
    upstream.push("open/app", "1", Image::with_layers(&["open"]));
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes", "more"]));
    let keys = format!("local_tokens = \"{}/token\"", upstream.url());
    let proxy = Setup::over(&upstream)
        .upstream_keys("docker.io", &keys)
        .start()
        .await;
    (upstream, image, proxy)
}

/// A request as a client sends it to the token service.
fn asks(proxy: &Proxy, upstream: &Upstream, repository: &str) -> Ask {
    proxy
        .get(&format!(
            "/token?service=scripted&scope=repository:{repository}:pull"
        ))
        .header("host", &upstream.address().to_string())
        .unchecked()
}

/// A token for the credential that `dress` adds.
async fn token(proxy: &Proxy, upstream: &Upstream, repository: &str, dress: fn(Ask) -> Ask) -> String {
    let reply = dress(asks(proxy, upstream, repository)).await;
    assert_eq!(reply.status, 200, "{reply:#?}");
    reply.json()["token"].as_str().unwrap().to_owned()
}

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

fn bob(ask: Ask) -> Ask {
    ask.basic("bob", "b-secret")
}

fn is_ours(token: &str) -> bool {
    token.starts_with("ifnewer-local-")
}

/// A pull as Docker does it, with a token first.
async fn pulls(proxy: &Proxy, upstream: &Upstream, image: &Image, dress: fn(Ask) -> Ask) -> Reply {
    let token = token(proxy, upstream, "acme/app", dress).await;
    proxy
        .pull_with("acme/app", "1", image, |ask| ask.bearer(&token))
        .await
}

async fn gets_nothing(proxy: &Proxy, image: &Image, token: &str) {
    for path in [
        manifest_path("acme/app", "1"),
        manifest_path("acme/app", &image.digest),
        blob_path("acme/app", &image.layer(0).digest),
        "/v2/acme/app/tags/list".to_owned(),
    ] {
        let reply = proxy.get(&path).bearer(token).await;
        assert!(
            matches!(reply.status, 401 | 403 | 429 | 502..=504),
            "{path}: {reply:#?}"
        );
        reply.is_refused(reply.status);
        assert!(!String::from_utf8_lossy(&reply.body).contains("private bytes"));
    }
}

#[tokio::test]
async fn local_token_serves_only_clients_with_grant_in_outage() {
    let (upstream, image, proxy) = private().await;
    pulls(&proxy, &upstream, &image, alice).await.is_fetched();
    let hers = token(&proxy, &upstream, "acme/app", alice).await;
    assert!(!is_ours(&hers), "while the service answers, it is its token");
    let his = token(&proxy, &upstream, "acme/app", bob).await;
    gets_nothing(&proxy, &image, &his).await;
    upstream.refuses();

    let proxy = {
        pulls(&proxy, &upstream, &image, alice).await.is_stale();
        proxy.restart().await
    };
    pulls(&proxy, &upstream, &image, alice).await.is_stale();
    let strangers: [fn(Ask) -> Ask; 4] = [
        bob,
        |ask| ask,
        |ask| ask.basic("alice", "guessed"),
        |ask| ask.header("authorization", "Bearer x"),
    ];
    for dress in strangers {
        let token = token(&proxy, &upstream, "acme/app", dress).await;
        assert!(is_ours(&token), "{token}");
        gets_nothing(&proxy, &image, &token).await;
    }
    // Her token is limited to its scope, and one from before the restart is invalid.
    let elsewhere = token(&proxy, &upstream, "acme/other", alice).await;
    gets_nothing(&proxy, &image, &elsewhere).await;
    gets_nothing(&proxy, &image, "ifnewer-local-guessed").await;
}

#[tokio::test]
async fn o03_a_token_of_ours_is_good_over_a_reload_in_an_outage() {
    let (upstream, image, proxy) = private().await;
    pulls(&proxy, &upstream, &image, alice).await;
    upstream.refuses();
    let (hers, his) = (
        token(&proxy, &upstream, "acme/app", alice).await,
        token(&proxy, &upstream, "acme/app", bob).await,
    );
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.bearer(&hers))
        .await
        .is_stale();
    gets_nothing(&proxy, &image, &his).await;
}

#[tokio::test]
async fn what_is_public_is_for_every_token_of_ours() {
    let (upstream, _, proxy) = private().await;
    let open = upstream.push("open/app", "2", Image::with_layers(&["for all"]));
    proxy.pull("open/app", "2", &open).await;
    upstream.refuses();
    let dresses: [fn(Ask) -> Ask; 3] = [bob, |ask| ask, |ask| ask.basic("eve", "unknown")];
    for dress in dresses {
        let token = token(&proxy, &upstream, "open/app", dress).await;
        proxy
            .pull_with("open/app", "2", &open, |ask| ask.bearer(&token))
            .await
            .is_stale();
    }
}

#[tokio::test]
async fn local_token_is_not_forwarded_and_ends_with_the_outage() {
    let (upstream, image, proxy) = private().await;
    pulls(&proxy, &upstream, &image, alice).await;
    upstream.refuses();
    let local = token(&proxy, &upstream, "acme/app", alice).await;
    assert!(is_ours(&local));
    upstream.recovers();
    upstream.clear_log();

    let asked = |proxy: &Proxy| proxy.manifest("acme/app", "1").bearer(&local);
    let reply = proxy
        .until("the upstream to be heard again", asked, |reply| {
            reply.status == 401
        })
        .await;
    assert!(
        reply
            .header("www-authenticate")
            .is_some_and(|line| line.contains("/token") && line.contains("repository:acme/app:pull")),
        "{reply:#?}"
    );
    let host = upstream.address().to_string();
    for ask in [
        proxy.get("/v2/"),
        proxy.ask("PUT", "/v2/acme/app/manifests/9").body(b"{}"),
        proxy.ask("POST", "/v2/acme/app/blobs/uploads/"),
        proxy.blob("acme/app", &image.layer(0).digest),
    ] {
        let reply = ask.header("host", &host).bearer(&local).unchecked().await;
        assert_eq!(reply.status, 401, "{reply:#?}");
    }
    pulls(&proxy, &upstream, &image, alice).await.is_unchanged();
    for seen in upstream.requests() {
        let shown = seen.header("authorization").unwrap_or_default();
        assert!(!shown.contains("ifnewer-local-"), "{seen:#?}");
    }
}

#[tokio::test]
async fn revoked_grant_stays_revoked_for_local_token_after_crash() {
    let (upstream, image, proxy) = private().await;
    pulls(&proxy, &upstream, &image, alice).await;
    let proxy = proxy.restart().await;
    upstream.revokes("alice");
    let denied = token(&proxy, &upstream, "acme/app", alice).await;
    proxy
        .manifest("acme/app", "1")
        .bearer(&denied)
        .await
        .is_refused(401);

    let killed = proxy.crash();
    upstream.refuses();
    let proxy = killed.await;
    let local = token(&proxy, &upstream, "acme/app", alice).await;
    gets_nothing(&proxy, &image, &local).await;
}

#[tokio::test]
async fn credential_denied_by_token_service_revokes_local_token() {
    let (upstream, image, proxy) = private().await;
    pulls(&proxy, &upstream, &image, alice).await;
    let proxy = proxy.restart().await;
    upstream.lets("alice", "a-new-secret", "acme/app");
    let reply = alice(asks(&proxy, &upstream, "acme/app")).await;
    assert_eq!(reply.status, 401, "{reply:#?}");

    let killed = proxy.crash();
    upstream.refuses();
    let proxy = killed.await;
    let local = token(&proxy, &upstream, "acme/app", alice).await;
    gets_nothing(&proxy, &image, &local).await;
}

#[tokio::test]
async fn late_token_service_grant_does_not_undo_denial() {
    let (upstream, image, proxy) = private().await;
    pulls(&proxy, &upstream, &image, alice).await;
    // The old password is denied. Then the response to the earlier token request arrives late, with a grant.
    let gate = upstream.holds_answers(|seen| seen.header("x-late").is_some());
    let late = tokio::spawn(
        alice(asks(&proxy, &upstream, "acme/app"))
            .header("x-late", "1")
            .into_reply(),
    );
    gate.reached().await;
    upstream.lets("alice", "a-new-secret", "acme/app");
    assert_eq!(alice(asks(&proxy, &upstream, "acme/app")).await.status, 401);
    upstream.lets("alice", "a-secret", "acme/app");
    gate.release();
    assert_eq!(late.await.unwrap().status, 200);

    upstream.refuses();
    let local = token(&proxy, &upstream, "acme/app", alice).await;
    gets_nothing(&proxy, &image, &local).await;
}

#[tokio::test]
async fn a_token_service_that_is_down_alone_is_an_outage_too() {
    for status in [503, 429] {
        let (upstream, image, proxy) = private().await;
        pulls(&proxy, &upstream, &image, alice).await;
        // By now the cache has its own token, which the registry accepts without granting access.
        proxy.pull("open/app", "1", &Image::with_layers(&["open"])).await;
        upstream.answers_tokens_with(status);
        pulls(&proxy, &upstream, &image, alice).await.is_stale();
        let his = token(&proxy, &upstream, "acme/app", bob).await;
        gets_nothing(&proxy, &image, &his).await;
    }
}

#[tokio::test]
async fn without_it_the_token_service_is_not_ours_to_stand_for() {
    let (upstream, image, proxy) = private().await;
    pulls(&proxy, &upstream, &image, alice).await;
    upstream.refuses();
    let local = token(&proxy, &upstream, "acme/app", alice).await;
    let setup = Setup::over(&upstream);
    let setup = proxy.setup().clone().with_upstreams_of(&setup);
    let proxy = proxy.restart_as(setup).await;
    let reply = alice(asks(&proxy, &upstream, "acme/app")).await;
    assert!(reply.status >= 400, "{reply:#?}");
    gets_nothing(&proxy, &image, &local).await;
}

#[tokio::test]
async fn token_request_is_forwarded_unchanged_and_limited() {
    let (upstream, _, proxy) = private().await;
    let host = upstream.address().to_string();
    let form = b"grant_type=password&username=alice&password=a-secret&service=scripted";
    let ask = |body: &[u8]| {
        proxy
            .ask("POST", "/token?x=%2F")
            .header("host", &host)
            .header("content-type", "application/x-www-form-urlencoded")
            .body(body)
            .unchecked()
    };
    assert_eq!(ask(form).await.status, 200);
    let seen = upstream.token_requests().pop().unwrap();
    assert_eq!(
        (seen.method.as_str(), seen.query.as_deref()),
        ("POST", Some("x=%2F"))
    );
    assert_eq!(
        seen.header("content-type"),
        Some("application/x-www-form-urlencoded")
    );
    assert_eq!(
        seen.header("content-length"),
        Some(form.len().to_string().as_str())
    );

    upstream.clear_log();
    assert_eq!(ask(&vec![b'x'; 65 * 1024]).await.status, 413);
    assert_eq!(upstream.requests().len(), 0);
}
