//! Authorization: a cache hit never bypasses the registry's access control.

use crate::proxy::{Ask, Proxy, Reply, Setup, blob_path, manifest_path};
use crate::registry::{Image, Upstream, sha256};

/// Alice may read `acme/app`. Bob has an account without access.
async fn private() -> (Upstream, Image) {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push(
        "acme/app",
        "1",
        Image::with_layers(&["private bytes", "more of them"]),
    );
    (upstream, image)
}

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

fn bob(ask: Ask) -> Ask {
    ask.basic("bob", "b-secret")
}

fn nobody(ask: Ask) -> Ask {
    ask
}

/// Every request that returns content of the image.
fn every_way(proxy: &Proxy, image: &Image) -> Vec<Ask> {
    let layer = blob_path("acme/app", &image.layer(0).digest);
    vec![
        proxy.get(&manifest_path("acme/app", "1")),
        proxy.head(&manifest_path("acme/app", "1")),
        proxy.get(&manifest_path("acme/app", &image.digest)),
        proxy.head(&manifest_path("acme/app", &image.digest)),
        proxy.get(&layer),
        proxy.head(&layer),
        proxy.get(&layer).header("range", "bytes=0-3"),
        proxy
            .get(&layer)
            .header("if-none-match", &format!("\"{}\"", image.layer(0).digest)),
        proxy.get(&blob_path("acme/app", &image.config().digest)),
        proxy.get("/v2/acme/app/tags/list"),
        proxy.get(&format!("/v2/acme/app/referrers/{}", image.digest)),
    ]
}

fn gives_nothing_away(reply: &Reply, allowed: &[u16]) {
    assert!(allowed.contains(&reply.status), "{reply:#?}");
    reply.is_refused(reply.status);
    assert!(
        !String::from_utf8_lossy(&reply.body).contains("private bytes"),
        "{reply:#?}"
    );
}

#[tokio::test]
async fn row_18_client_without_grant_is_denied() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;

    for dress in [bob, nobody] {
        for ask in every_way(&proxy, &image) {
            gives_nothing_away(&dress(ask).await, &[401, 403]);
        }
    }
    proxy
        .pull_with("acme/app", "1", &image, alice)
        .await
        .is_unchanged();
}

#[tokio::test]
async fn row_18_client_without_grant_is_denied_in_outage() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.refuses();

    for dress in [bob, nobody] {
        for ask in every_way(&proxy, &image) {
            gives_nothing_away(&dress(ask).await, &[401, 403, 502, 503, 504]);
        }
    }
    proxy.pull_with("acme/app", "1", &image, alice).await.is_stale();
}

#[tokio::test]
async fn who_had_the_right_keeps_it_through_an_outage_and_a_restart() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.refuses();
    let proxy = proxy.restart().await;

    proxy.pull_with("acme/app", "1", &image, alice).await.is_stale();
    for ask in every_way(&proxy, &image) {
        gives_nothing_away(&bob(ask).await, &[401, 403, 502, 503, 504]);
    }
}

#[tokio::test]
async fn a_wrong_password_is_another_client() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.refuses();

    let reply = proxy.manifest("acme/app", "1").basic("alice", "guess").await;
    gives_nothing_away(&reply, &[401, 403, 502, 503, 504]);
}

#[tokio::test]
async fn revoked_grant_ends_at_next_revalidation() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.revokes("alice");

    gives_nothing_away(&alice(proxy.manifest("acme/app", "1")).await, &[401, 403]);
    for ask in every_way(&proxy, &image) {
        gives_nothing_away(&alice(ask).await, &[401, 403]);
    }
    // An outage does not restore the grant.
    upstream.refuses();
    gives_nothing_away(
        &alice(proxy.manifest("acme/app", "1")).await,
        &[401, 403, 502, 503, 504],
    );
    let proxy = proxy.restart().await;
    gives_nothing_away(
        &alice(proxy.manifest("acme/app", "1")).await,
        &[401, 403, 502, 503, 504],
    );
}

#[tokio::test]
async fn revoked_grant_stays_revoked_after_crash() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    // Stopped orderly, so that her grant is persisted.
    let proxy = proxy.restart().await;
    upstream.revokes("alice");
    gives_nothing_away(&alice(proxy.manifest("acme/app", "1")).await, &[401, 403]);

    let killed = proxy.crash();
    upstream.refuses();
    let proxy = killed.await;
    for ask in every_way(&proxy, &image) {
        gives_nothing_away(&alice(ask).await, &[401, 403, 502, 503, 504]);
    }
}

#[tokio::test]
async fn a_repository_that_was_closed_is_closed_here_too() {
    let upstream = Upstream::start().await;
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes", "x"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("acme/app", "1", &image).await;
    upstream.forbids("acme/app");

    gives_nothing_away(&proxy.manifest("acme/app", "1").await, &[403]);
    for ask in every_way(&proxy, &image) {
        gives_nothing_away(&ask.await, &[403]);
    }
    upstream.refuses();
    gives_nothing_away(&proxy.manifest("acme/app", "1").await, &[401, 403, 502, 503, 504]);
}

#[tokio::test]
async fn a_public_repository_is_for_everybody_also_offline() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "*");
    upstream.makes_public("library/demo");
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["open"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.refuses();

    proxy.pull("library/demo", "latest", &image).await.is_stale();
    proxy
        .pull_with("library/demo", "latest", &image, alice)
        .await
        .is_stale();
    proxy
        .restart()
        .await
        .pull("library/demo", "latest", &image)
        .await
        .is_stale();
}

#[tokio::test]
async fn a_client_that_brings_its_own_token_is_judged_by_it() {
    let (upstream, image) = private().await;
    let (hers, his) = (upstream.token_for("alice"), upstream.token_for("bob"));
    let proxy = Proxy::over(&upstream).await;

    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.bearer(&hers))
        .await;
    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.bearer(&hers))
        .await
        .is_unchanged();
    for ask in every_way(&proxy, &image) {
        gives_nothing_away(&ask.bearer(&his).await, &[401, 403]);
    }
}

#[tokio::test]
async fn row_06_upstream_challenge_reaches_client_unchanged() {
    let (upstream, _) = private().await;
    let proxy = Proxy::over(&upstream).await;

    let direct = upstream
        .ask("GET", "/v2/acme/app/manifests/1")
        .bearer("wrong")
        .unchecked()
        .await;
    let through = proxy.manifest("acme/app", "1").bearer("wrong").await;
    assert_eq!((direct.status, through.status), (401, 401));
    assert_eq!(
        through.header("www-authenticate"),
        direct.header("www-authenticate")
    );
    assert_eq!(through.code(), "UNAUTHORIZED");
}

#[tokio::test]
async fn anonymous_client_is_challenged_in_outage() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    // Most clients send a credential only after a challenge.
    let asked = proxy.manifest("acme/app", "1").await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.refuses();

    let proxy = proxy.restart().await;
    let held = proxy.manifest("acme/app", "1").await;
    held.is_refused(401);
    assert_eq!(held.header("www-authenticate"), asked.header("www-authenticate"));
    assert!(held.cache_status().contains("auth-required"), "{held:#?}");
    // The same for content that is not cached, each with its own scope.
    for (repository, tag) in [("acme/app", "missing"), ("acme/other", "1")] {
        let other = proxy.manifest(repository, tag).await;
        other.is_refused(401);
        let same = |reply: &Reply| {
            let challenge = reply.header("www-authenticate").unwrap().to_owned();
            let body = String::from_utf8_lossy(&reply.body).into_owned();
            [challenge, body].map(|text| {
                text.replace(&format!("{repository}:{tag}"), "acme/app:1")
                    .replace(repository, "acme/app")
            })
        };
        assert_eq!(same(&other), same(&held));
    }
    let layer = proxy.blob("acme/app", &image.layer(0).digest).await;
    layer.is_refused(401);
    // With a credential the client is served, or told the cause.
    proxy.pull_with("acme/app", "1", &image, alice).await.is_stale();
    bob(proxy.manifest("acme/app", "1")).await.is_unreachable();
}

#[tokio::test]
async fn policy_never_still_challenges_for_credential() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("acme/app", "1").await.is_refused(401);
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let setup = proxy.setup().clone().default_keys("policy = \"never\"");
    let proxy = proxy.restart_as(setup).await;
    upstream.clear_log();

    proxy.manifest("acme/app", "1").await.is_refused(401);
    proxy.manifest("acme/app", "missing").await.is_refused(401);
    proxy.pull_with("acme/app", "1", &image, alice).await;
    bob(proxy.manifest("acme/app", "1")).await.is_refused(404);
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn what_is_public_is_not_asked_a_credential_for_in_an_outage() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("library/demo");
    let image = upstream.push("library/demo", "1", Image::with_layers(&["open"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("acme/app", "1").await.is_refused(401);
    proxy.pull("library/demo", "1", &image).await;
    upstream.refuses();

    proxy.pull("library/demo", "1", &image).await.is_stale();
    proxy.manifest("library/demo", "missing").await.is_unreachable();
}

#[tokio::test]
async fn a_basic_upstream_asks_for_basic() {
    let upstream = Upstream::start().await;
    upstream.requires_basic("alice", "a-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let proxy = Proxy::over(&upstream).await;

    let reply = proxy.manifest("acme/app", "1").await;
    assert_eq!(
        reply.header("www-authenticate"),
        Some("Basic realm=\"scripted upstream\""),
        "{reply:#?}"
    );
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.refuses();
    gives_nothing_away(
        &bob(proxy.manifest("acme/app", "1")).await,
        &[401, 403, 502, 503, 504],
    );
    proxy.pull_with("acme/app", "1", &image, alice).await.is_stale();
}

type Path = fn(&str, &str) -> String;

#[tokio::test]
async fn cached_and_unknown_look_alike_without_a_grant() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let unknown = sha256(b"nobody has this");
    let paths: [(Path, &String); 2] = [
        (manifest_path, &image.digest),
        (blob_path, &image.layer(0).digest),
    ];

    for silent in [false, true] {
        if silent {
            upstream.refuses();
        }
        for (path, held_digest) in paths {
            let held = bob(proxy.get(&path("acme/app", held_digest))).await;
            let other = bob(proxy.get(&path("acme/app", &unknown))).await;
            let text =
                |reply: &Reply, digest: &str| String::from_utf8_lossy(&reply.body).replace(digest, "…");
            assert_eq!(held.status, other.status);
            assert_eq!(text(&held, held_digest), text(&other, &unknown));
            assert_eq!(held.header("cache-status"), other.header("cache-status"));
        }
    }
}

#[tokio::test]
async fn row_19_private_layer_is_not_readable_via_other_repository() {
    let (upstream, secret) = private().await;
    upstream.makes_public("evil/app");
    // A manifest may name a blob that its repository does not have.
    upstream.push_untagged(
        "evil/app",
        Image {
            blobs: Vec::new(),
            ..secret.clone()
        },
    );
    upstream.push(
        "evil/app",
        "1",
        Image {
            blobs: Vec::new(),
            ..secret.clone()
        },
    );
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &secret, alice).await;
    let layer = blob_path("evil/app", &secret.layer(0).digest);

    proxy.manifest("evil/app", "1").await;
    gives_nothing_away(&proxy.get(&layer).await, &[401, 403, 404]);
    gives_nothing_away(
        &proxy.get(&layer).header("range", "bytes=0-3").await,
        &[401, 403, 404],
    );
    gives_nothing_away(&proxy.head(&layer).await, &[401, 403, 404]);
    upstream.refuses();
    gives_nothing_away(&proxy.get(&layer).await, &[401, 403, 404, 502, 503, 504]);
}

#[tokio::test]
async fn download_is_not_joined_with_another_credential() {
    let (upstream, _) = private().await;
    // Larger than the withheld tail: no byte of a small blob is sent before it is verified.
    let image = upstream.push("acme/app", "2", Image::of_noise(1, 500_000));
    let proxy = Proxy::over(&upstream).await;
    alice(proxy.manifest("acme/app", "2")).await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 200_000);
    let mut hers = alice(proxy.blob("acme/app", &layer.digest)).stream().await;
    gate.reached().await;

    gives_nothing_away(&bob(proxy.blob("acme/app", &layer.digest)).await, &[401, 403]);
    gives_nothing_away(&proxy.blob("acme/app", &layer.digest).await, &[401, 403]);
    gate.release();
    assert_eq!(hers.rest().await.unwrap(), layer.bytes);
}

#[tokio::test]
async fn shared_auth_serves_all_clients_with_cache_credential() {
    let upstream = Upstream::start().await;
    upstream.requires_basic("service", "s-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let setup = Setup::over(&upstream);
    let password = setup.file("password", "s-secret\n");
    let keys = format!("auth = \"shared\"\nusername = \"service\"\npassword_file = {password:?}");
    let proxy = setup.upstream_keys("docker.io", &keys).start().await;

    proxy.pull("acme/app", "1", &image).await;
    // The operator must fix a rejected cache credential, and not the client.
    upstream.forbids("acme/app");
    let reply = proxy.pull("acme/app", "1", &image).await;
    assert!(
        reply
            .is_hit()
            .cache_status()
            .contains("cache-credential-rejected"),
        "{reply:#?}"
    );
}

#[tokio::test]
async fn no_credential_in_log_or_on_disk() {
    let (upstream, image) = private().await;
    let token = upstream.token_for("alice");
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.bearer(&token))
        .await;
    alice(proxy.manifest("acme/app", "missing")).await;

    let data = proxy.setup().data();
    let mut proxy = proxy;
    proxy.terminate();
    proxy.exit().await;
    let log = proxy.program().stdout() + &proxy.program().stderr();
    for secret in ["a-secret", "YWxpY2U6YS1zZWNyZXQ", token.as_str(), "token-alice"] {
        assert!(!log.contains(secret), "{secret} is in the log");
        for file in crate::proxy::files_below(&data) {
            let content = std::fs::read(&file).unwrap();
            assert!(
                !content
                    .windows(secret.len())
                    .any(|bytes| bytes == secret.as_bytes()),
                "{secret} in {file:?}"
            );
        }
    }
}

#[tokio::test]
async fn any_other_refusal_is_passed_on_and_never_hidden_by_a_copy() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["x"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    for status in [423, 451] {
        upstream.answers_status(status);
        proxy.manifest("library/demo", "latest").await.is_refused(status);
    }
}
