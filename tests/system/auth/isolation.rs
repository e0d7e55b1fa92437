//! Isolation of clients: two users, a token service, and private and public repositories under concurrent load. No
//! content without a grant, and no credential in a wrong place.

use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tokio::task::JoinSet;

use crate::proxy::{Ask, Proxy, Setup, blob_path, files_below, manifest_path};
use crate::registry::{Image, Upstream};

const ROUNDS: usize = 1000;

/// Concurrent rounds.
const LANES: usize = 8;

type Dress = fn(Ask) -> Ask;

const ALICE: Dress = |ask| ask.basic("alice", "a-secret");
const BOB: Dress = |ask| ask.basic("bob", "b-secret");
const NOBODY: Dress = |ask| ask;

/// A repository, its image, and the users with access.
struct Place {
    repository: &'static str,
    image: Image,
    readers: &'static [usize],
}

#[tokio::test]
async fn thousand_concurrent_rounds_leak_no_private_content() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("alice", "a-secret", "both/app");
    upstream.lets("bob", "b-secret", "bob/own");
    upstream.lets("bob", "b-secret", "both/app");
    upstream.makes_public("open/app");
    let place = |repository: &'static str, readers| Place {
        image: upstream.push(
            repository,
            "1",
            Image::with_layers(&[format!("{repository}: content"), "the same everywhere".to_owned()]),
        ),
        repository,
        readers,
    };
    let places = Arc::new([
        place("acme/app", &[0]),
        place("bob/own", &[1]),
        place("both/app", &[0, 1]),
        place("open/app", &[0, 1, 2]),
    ]);
    let proxy = Arc::new(Proxy::over(&upstream).await);
    let mut lanes = JoinSet::new();
    for lane in 0..LANES {
        let (proxy, places) = (Arc::clone(&proxy), Arc::clone(&places));
        lanes.spawn(async move {
            let mut counts = (0, 0);
            for round in (lane..ROUNDS).step_by(LANES) {
                let (served, refused) = one_round(&proxy, &places, round).await;
                counts = (counts.0 + served, counts.1 + refused);
            }
            counts
        });
    }
    let counts = lanes.join_all().await;
    let (served, refused) = counts
        .into_iter()
        .fold((0, 0), |sum, own| (sum.0 + own.0, sum.1 + own.1));
    assert_eq!(served + refused, 3 * ROUNDS);
    assert!(
        served > ROUNDS && refused > ROUNDS,
        "{served} served, {refused} refused"
    );
}

/// All three clients send the same request at once. Returns how many were served and how many denied.
async fn one_round(proxy: &Proxy, places: &[Place; 4], round: usize) -> (usize, usize) {
    let place = &places[round % 4];
    let (manifest, layer) = (
        manifest_path(
            place.repository,
            if round.is_multiple_of(3) {
                &place.image.digest
            } else {
                "1"
            },
        ),
        blob_path(place.repository, &place.image.layer(0).digest),
    );
    let ask = |dress: Dress| {
        dress(match (round / 4) % 5 {
            0 => proxy.get(&manifest),
            1 => proxy.head(&manifest),
            2 => proxy.get(&layer),
            3 => proxy.get(&layer).header("range", "bytes=0-3"),
            _ => proxy.head(&layer),
        })
    };
    let replies = tokio::join!(ask(ALICE), ask(BOB), ask(NOBODY));
    let mut counts = (0, 0);
    for (who, reply) in [replies.0, replies.1, replies.2].into_iter().enumerate() {
        if place.readers.contains(&who) {
            assert!(
                matches!(reply.status, 200 | 206),
                "{who} in {}: {reply:#?}",
                place.repository
            );
            counts.0 += 1;
        } else {
            assert!(
                matches!(reply.status, 401 | 403),
                "{who} in {}: {reply:#?}",
                place.repository
            );
            assert!(reply.header("docker-content-digest").is_none(), "{reply:#?}");
            assert!(
                !String::from_utf8_lossy(&reply.body).contains("content"),
                "{reply:#?}"
            );
            counts.1 += 1;
        }
    }
    counts
}

#[tokio::test]
async fn no_credential_in_logs_metrics_responses_or_files() {
    let upstream = Upstream::start_tls().await;
    upstream.requires_token();
    upstream.lets("alice", "canary-of-alice", "acme/app");
    upstream.lets("service", "canary-of-service", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let direct = upstream.token_for("alice");
    let local_tokens = format!("local_tokens = \"{}/token\"", upstream.url());
    let setup = Setup::over(&upstream)
        .upstream_keys("docker.io", &local_tokens)
        .also("shared.test", &upstream)
        .tail("[log]\nlevel = \"trace,ifnewer=trace\"");
    let password = setup.file("password", "canary-of-service\n");
    let keys = format!("auth = \"shared\"\nusername = \"service\"\npassword_file = {password:?}");
    let mut proxy = setup.upstream_keys("shared.test", &keys).start().await;

    let alice = |ask: Ask| ask.basic("alice", "canary-of-alice");
    let host = upstream.address().to_string();
    let token_for_alice = || {
        let path = "/token?scope=repository:acme/app:pull";
        alice(proxy.get(path)).header("host", &host).unchecked()
    };
    let by_us = token_for_alice().await.json()["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let form = "grant_type=refresh_token&refresh_token=canary-of-a-form";
    let posted = proxy
        .ask("POST", "/token")
        .header("host", &host)
        .body(form.as_bytes());
    posted.unchecked().await;
    let mut told = Vec::new();
    // TLS, so that HTTP/2 is used, whose crate logs much.
    proxy.pull_with("acme/app", "1", &image, alice).await;
    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.bearer(&direct))
        .await;
    proxy.pull("shared.test/acme/app", "1", &image).await;
    for ask in [
        alice(proxy.manifest("acme/app", "missing")),
        alice(proxy.manifest("bob/own", "1")),
        proxy.manifest("acme/app", "1").basic("alice", "canary-guessed"),
    ] {
        let reply = ask.unchecked().await;
        told.push(format!(
            "{:?} {}",
            reply.headers,
            String::from_utf8_lossy(&reply.body)
        ));
    }
    upstream.refuses();
    let reply = alice(proxy.manifest("acme/app", "2")).unchecked().await;
    told.push(format!("{reply:?}"));
    let local = token_for_alice().await.json()["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let reply = proxy.manifest("acme/app", "1").bearer(&local).await;
    told.push(format!("{reply:?}"));
    for path in [
        "/metrics",
        "/readyz",
        "/api/v1/images",
        "/api/v1/why?image=docker.io/acme/app:1",
    ] {
        told.push(String::from_utf8_lossy(&proxy.admin(path).await.body).into_owned());
    }

    proxy.program().reload();
    proxy.has_turned(3).await;
    let data = proxy.setup().data();
    proxy.terminate();
    proxy.exit().await;
    let told = told.join("\n");
    let log = proxy.program().stdout() + &proxy.program().stderr();
    assert!(log.contains("DEBUG"), "the log was to be as talkative as can be");
    let mut secrets: Vec<String> = vec![direct, by_us, local];
    secrets.extend(["token-alice", "token-service", "canary-of-a-form"].map(str::to_owned));
    for (user, password) in [
        ("alice", "canary-of-alice"),
        ("service", "canary-of-service"),
        ("alice", "canary-guessed"),
    ] {
        secrets.push(password.to_owned());
        secrets.push(BASE64_STANDARD.encode(format!("{user}:{password}")));
    }
    for secret in &secrets {
        for (what, text) in [("the log", &log), ("an answer", &told)] {
            let line = text.lines().find(|line| line.contains(secret.as_str()));
            assert!(line.is_none(), "{secret} is in {what}: {line:?}");
        }
        for file in files_below(&data) {
            let content = std::fs::read(&file).unwrap();
            let mut parts = content.windows(secret.len());
            assert!(
                !parts.any(|bytes| bytes == secret.as_bytes()),
                "{secret} is in {file:?}"
            );
        }
    }
}
