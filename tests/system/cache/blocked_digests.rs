//! Blocked digests: never served or fetched, by tag or digest, also in an outage, offline and after a restart.

use crate::proxy::{Ask, Proxy, Reply, Setup, blob_path, manifest_path, raw};
use crate::registry::{Front, Image, OCI_INDEX, Upstream};
use serde_json::{Value, json};

const DEMO: &str = "library/demo";

async fn post(proxy: &Proxy, path: &str, body: &Value) -> Reply {
    let reply = Ask::new(proxy.admin_address(), "POST", path)
        .header("content-type", "application/json")
        .body(body.to_string().as_bytes())
        .unchecked()
        .await;
    assert_eq!(reply.status, 200, "{path}: {reply:#?}");
    reply
}

/// Blocks `image`: `IMAGE@DIGEST`, or a digest alone.
pub async fn block(proxy: &Proxy, image: &str) {
    let body = json!({ "image": image, "blocked": true, "by": "alice", "reason": "CVE-2026-1" });
    let reply = post(proxy, "/api/v1/blocks", &body).await;
    assert_eq!(reply.json()["still_blocked"], true, "{reply:#?}");
}

async fn unblock(proxy: &Proxy, image: &str) {
    let reply = post(
        proxy,
        "/api/v1/blocks",
        &json!({ "image": image, "blocked": false }),
    )
    .await;
    assert_eq!(reply.json()["still_blocked"], false, "{reply:#?}");
}

fn in_demo(digest: &str) -> String {
    format!("docker.io/{DEMO}@{digest}")
}

/// 403 that names the blocked digest, the operator and the reason.
fn is_blocked(reply: &Reply, digest: &str) {
    reply.is_refused(403);
    assert!(reply.cache_status().contains("detail=blocked"), "{reply:#?}");
    if reply.method == "HEAD" {
        return;
    }
    assert_eq!(reply.code(), "DENIED");
    let message = reply.message();
    for part in [
        &format!("{digest} was blocked by alice at 2"),
        ": CVE-2026-1;",
        &format!("`ifnewer unblock {digest}`"),
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

/// Every way to ask for the image and its layer.
async fn is_blocked_by_every_way(proxy: &Proxy, reference: &str, image: &Image) {
    for reference in [reference, &image.digest] {
        let path = manifest_path(DEMO, reference);
        is_blocked(&proxy.get(&path).await, &image.digest);
        is_blocked(&proxy.head(&path).await, &image.digest);
        let under_prefix = format!("/v2/docker.io/{DEMO}/manifests/{reference}");
        is_blocked(&proxy.get(&under_prefix).await, &image.digest);
        is_blocked(&proxy.get(&format!("{path}?ns=docker.io")).await, &image.digest);
    }
}

async fn holding() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull(DEMO, "latest", &image).await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn blocked_manifest_is_denied_until_taken_back() {
    let (upstream, proxy, image) = holding().await;
    block(&proxy, &in_demo(&image.digest)).await;
    is_blocked_by_every_way(&proxy, "latest", &image).await;
    // Other images of the repository are served, and a manifest does not block its layers.
    let other = upstream.push(DEMO, "2", Image::with_layers(&["one", "three"]));
    proxy.pull(DEMO, "2", &other).await;
    let events = proxy.admin("/api/v1/events?image=demo:latest").await.json();
    let mut events = events["events"].as_array().unwrap().iter();
    let event = events.rfind(|event| event["reason"] == "blocked").unwrap();
    assert_eq!(event["digest"], json!(image.digest));
    let why = proxy.admin("/api/v1/why?image=demo:latest").await.json();
    assert!(why.to_string().contains("is blocked by the operator"), "{why}");
    assert_eq!(why["cached"]["complete"], true, "{why}");
    let explanation = why["explanation"].as_str().unwrap();
    assert!(explanation.contains("complete=yes blocked=yes"), "{why}");
    let because = why["because"].to_string();
    assert!(
        because.contains(" is complete, ") && !because.contains("incomplete"),
        "{why}"
    );

    unblock(&proxy, &image.digest).await;
    proxy.pull(DEMO, "latest", &image).await;
    proxy.program().says("verdict changed on request").await;
}

#[tokio::test]
async fn blocked_manifest_is_denied_in_outage_and_offline() {
    let (upstream, proxy, image) = holding().await;
    block(&proxy, &image.digest).await;
    upstream.refuses();
    is_blocked_by_every_way(&proxy, "latest", &image).await;
    let proxy = proxy.restart().await;
    is_blocked_by_every_way(&proxy, "latest", &image).await;
    let proxy = proxy.crash().await;
    is_blocked_by_every_way(&proxy, "latest", &image).await;
    post(&proxy, "/api/v1/offline", &json!({ "offline": true })).await;
    is_blocked_by_every_way(&proxy, "latest", &image).await;
    unblock(&proxy, &image.digest).await;
    proxy.pull(DEMO, "latest", &image).await.is_stale();
}

#[tokio::test]
async fn blocked_manifest_is_denied_under_every_policy_and_reload() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let setup = Setup::over(&upstream).default_keys("max_age = \"1h\"");
    let proxy = setup.clone().start().await;
    proxy.pull(DEMO, "latest", &image).await;
    block(&proxy, &in_demo(&image.digest)).await;
    is_blocked_by_every_way(&proxy, "latest", &image).await;
    for policy in ["always", "if-not-present", "never"] {
        let policy = format!("policy = \"{policy}\"");
        setup
            .clone()
            .file("ifnewer.toml", &setup.clone().default_keys(&policy).toml());
        proxy.program().reload();
        let ask = |proxy: &Proxy| proxy.admin("/api/v1/why?image=demo:latest");
        proxy
            .until("the policy", ask, |reply| {
                policy.contains(reply.json()["policy"].as_str().unwrap())
            })
            .await;
        is_blocked_by_every_way(&proxy, "latest", &image).await;
    }
}

#[tokio::test]
async fn status_line_of_a_blocked_head_has_the_reason() {
    let (_upstream, proxy, image) = holding().await;
    block(&proxy, &image.digest).await;
    let path = manifest_path(DEMO, &image.digest);
    let head = format!("HEAD {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    let reply = raw(proxy.registry_address(), head.as_bytes()).await;
    let line = reply.text.lines().next().unwrap();
    assert_eq!(line, "HTTP/1.1 403 Forbidden (blocked in this cache: CVE-2026-1)");
}

#[tokio::test]
async fn blocked_uncached_digest_is_not_fetched() {
    let (upstream, proxy, old) = holding().await;
    let new = upstream.moves(DEMO, "latest", Image::with_layers(&["three"]));
    block(&proxy, &in_demo(&new.digest)).await;
    block(&proxy, &new.layer(0).digest).await;
    upstream.clear_log();
    is_blocked_by_every_way(&proxy, "latest", &new).await;
    is_blocked(
        &proxy.blob(DEMO, &new.layer(0).digest).await,
        &new.layer(0).digest,
    );
    assert_eq!((upstream.manifest_gets(DEMO), upstream.all_blob_gets()), (0, 0));
    // The tag names the blocked digest, so the old one is not served instead. By digest it is served.
    proxy.pull(DEMO, &old.digest, &old).await;

    let refreshed = post(&proxy, "/api/v1/refresh", &json!({ "image": "demo" }))
        .await
        .json();
    assert_eq!(refreshed["result"], "blocked", "{refreshed}");
    assert_eq!((upstream.manifest_gets(DEMO), upstream.all_blob_gets()), (0, 0));
    upstream.moves(DEMO, "latest", old.clone());
    proxy.pull(DEMO, "latest", &old).await;
}

#[tokio::test]
async fn blocked_cold_tag_without_digest_in_head_is_denied() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    block(&proxy, &in_demo(&image.digest)).await;
    is_blocked(&proxy.manifest(DEMO, "latest").await, &image.digest);
    upstream.omits_digest();
    is_blocked(&proxy.manifest(DEMO, "latest").await, &image.digest);
    is_blocked(&proxy.manifest(DEMO, &image.digest).await, &image.digest);
}

#[tokio::test]
async fn blocked_blob_is_denied_whole_and_in_ranges() {
    let (upstream, proxy, image) = holding().await;
    let layer = image.layer(0);
    block(&proxy, &layer.digest).await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    for outage in [false, true] {
        if outage {
            upstream.refuses();
        }
        let path = blob_path(DEMO, &layer.digest);
        is_blocked(&proxy.get(&path).await, &layer.digest);
        is_blocked(&proxy.head(&path).await, &layer.digest);
        is_blocked(&proxy.get(&path).header("range", "bytes=1-").await, &layer.digest);
        let elsewhere = blob_path(DEMO, &image.layer(1).digest);
        assert_eq!(proxy.get(&elsewhere).await.status, 200);
    }
}

#[tokio::test]
async fn blocked_child_and_referrer_are_denied_by_digest() {
    let upstream = Upstream::start().await;
    let children = [Image::with_layers(&["amd64"]), Image::with_layers(&["arm64"])];
    for child in &children {
        upstream.push_untagged(DEMO, child.clone());
    }
    let index = upstream.push(DEMO, "latest", Image::index(&children));
    let signature = Image::attached_to(&index, "application/signature", b"signed");
    let signature = upstream.push_untagged(DEMO, signature);
    let proxy = Proxy::over(&upstream).await;
    block(&proxy, &children[0].digest).await;
    block(&proxy, &in_demo(&signature.digest)).await;
    for outage in [false, true] {
        if outage {
            upstream.refuses();
        }
        if !outage {
            proxy.manifest(DEMO, "latest").await.is_image(&index);
        }
        is_blocked(
            &proxy.manifest(DEMO, &children[0].digest).await,
            &children[0].digest,
        );
        proxy
            .manifest(DEMO, &children[1].digest)
            .await
            .is_image(&children[1]);
        let list = proxy.get(&format!("/v2/{DEMO}/referrers/{}", index.digest)).await;
        assert_eq!(list.json()["manifests"][0]["digest"], json!(signature.digest));
        is_blocked(&proxy.manifest(DEMO, &signature.digest).await, &signature.digest);
    }
}

#[tokio::test]
async fn block_in_one_repository_leaves_others() {
    let (upstream, proxy, image) = holding().await;
    upstream.push("library/other", "latest", image.clone());
    block(&proxy, &in_demo(&image.digest)).await;
    proxy.pull("library/other", "latest", &image).await;
    block(&proxy, &image.digest).await;
    let reply = proxy.manifest("library/other", "latest").await;
    is_blocked(&reply, &image.digest);
    let reply = post(
        &proxy,
        "/api/v1/blocks",
        &json!({ "image": in_demo(&image.digest), "blocked": false }),
    )
    .await
    .json();
    assert_eq!(
        (&reply["was"], &reply["still_blocked"]),
        (&json!(true), &json!(true)),
        "{reply}"
    );
    is_blocked(&proxy.manifest(DEMO, "latest").await, &image.digest);
    unblock(&proxy, &image.digest).await;
    proxy.pull(DEMO, "latest", &image).await;
}

#[tokio::test]
async fn outage_serves_older_image_only_as_without_block() {
    let (upstream, proxy, old) = holding().await;
    let new = upstream.moves(DEMO, "latest", Image::with_layers(&["three"]));
    proxy.manifest(DEMO, "latest").await.is_image(&new);
    block(&proxy, &in_demo(&new.digest)).await;
    is_blocked(&proxy.manifest(DEMO, "latest").await, &new.digest);
    // The blocked image was not pulled whole, so the last whole one is served, as without the block.
    upstream.refuses();
    let reply = proxy.pull(DEMO, "latest", &old).await;
    assert!(reply.header("warning").is_some(), "{reply:#?}");
    assert!(reply.cache_status().contains("previous-complete"), "{reply:#?}");
    let why = proxy.admin("/api/v1/why?image=demo:latest").await.json();
    assert_eq!(why["cached"]["complete"], false, "{why}");
    block(&proxy, &in_demo(&old.digest)).await;
    is_blocked(&proxy.manifest(DEMO, "latest").await, &new.digest);
}

#[tokio::test]
async fn block_beats_min_age_and_approval() {
    let upstream = Upstream::start().await;
    let old = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let keys = "min_age = \"3d\"\non_unknown_age = \"serve\"";
    let proxy = Setup::over(&upstream).default_keys(keys).start().await;
    proxy.pull(DEMO, "latest", &old).await;
    let new = upstream.moves(DEMO, "latest", Image::with_layers(&["two"]));
    // The tag is answered with the old image while the new one is too young, blocked or not.
    for is_blocked_now in [false, true] {
        if is_blocked_now {
            block(&proxy, &in_demo(&new.digest)).await;
            is_blocked(&proxy.manifest(DEMO, &new.digest).await, &new.digest);
        }
        let reply = proxy.pull(DEMO, "latest", &old).await;
        assert!(reply.cache_status().contains("cooling"), "{reply:#?}");
    }
    block(&proxy, &old.digest).await;
    for outage in [false, true] {
        if outage {
            upstream.refuses();
        }
        let reply = proxy.manifest(DEMO, "latest").await;
        assert_eq!(reply.status, 403, "{reply:#?}");
    }
    upstream.recovers();
    unblock(&proxy, &old.digest).await;

    let approval = json!({ "image": in_demo(&new.digest), "approved": true });
    let reply = post(&proxy, "/api/v1/approvals", &approval).await.json();
    assert_eq!(reply["still_blocked"], true, "{reply}");
    let ask = |proxy: &Proxy| proxy.manifest(DEMO, "latest");
    let reply = proxy
        .until("the upstream to be asked again", ask, |reply| reply.status == 403)
        .await;
    is_blocked(&reply, &new.digest);
    unblock(&proxy, &new.digest).await;
    let proxy = proxy.restart().await;
    proxy.pull(DEMO, "latest", &new).await;
}

#[tokio::test]
async fn block_during_fetch_denies_its_response() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let gate = upstream.holds_answers(|seen| seen.method == "GET" && seen.path.contains("/manifests/"));
    let asking = tokio::spawn(proxy.manifest(DEMO, "latest").into_reply());
    gate.reached().await;
    block(&proxy, &in_demo(&image.digest)).await;
    gate.release();
    is_blocked(&asking.await.unwrap(), &image.digest);
}

#[tokio::test]
async fn block_breaks_off_responses_under_way() {
    const LAYER: usize = 2 * 1024 * 1024;
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::of_noise(1, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, LAYER / 2);
    let mut leader = proxy.blob(DEMO, &layer.digest).stream().await;
    gate.reached().await;
    let mut follower = proxy.blob(DEMO, &layer.digest).stream().await;
    for reader in [&mut leader, &mut follower] {
        assert_eq!(reader.read(LAYER / 4).await, layer.bytes[..LAYER / 4]);
    }
    block(&proxy, &layer.digest).await;
    gate.release();
    for reader in [&mut leader, &mut follower] {
        let received = reader.rest().await.unwrap_err();
        assert!(received.len() < LAYER * 3 / 4, "{}", received.len());
    }
    proxy.program().says("was blocked while it was sent").await;
    is_blocked(&proxy.blob(DEMO, &layer.digest).await, &layer.digest);
    unblock(&proxy, &layer.digest).await;
    proxy.pull(DEMO, "latest", &image).await;
}

#[tokio::test]
async fn block_is_not_shown_to_clients_without_a_grant() {
    const APP: &str = "acme/app";
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", APP);
    let image = upstream.push(APP, "1", Image::with_layers(&["private bytes"]));
    let proxy = Proxy::over(&upstream).await;
    let alice = |ask: Ask| ask.basic("alice", "a-secret");
    proxy.pull_with(APP, "1", &image, alice).await;
    let layer = &image.layer(0).digest;
    let paths = [
        manifest_path(APP, "1"),
        manifest_path(APP, &image.digest),
        blob_path(APP, layer),
    ];
    let look = |reply: &Reply| {
        let body = String::from_utf8_lossy(&reply.body).into_owned();
        (reply.status, reply.cache_status().to_owned(), body)
    };
    for outage in [false, true] {
        if outage {
            upstream.refuses();
        }
        let mut before = Vec::new();
        for path in &paths {
            before.push(look(&proxy.get(path).await));
            before.push(look(&proxy.get(path).bearer("made-up").await));
        }
        block(&proxy, &image.digest).await;
        block(&proxy, layer).await;
        upstream.clear_log();
        let mut after = Vec::new();
        for path in &paths {
            after.push(look(&proxy.get(path).await));
            after.push(look(&proxy.get(path).bearer("made-up").await));
        }
        assert_eq!(before, after, "outage: {outage}");
        for (path, digest) in paths.iter().zip([&image.digest, &image.digest, layer]) {
            is_blocked(&alice(proxy.get(path)).await, digest);
        }
        unblock(&proxy, &image.digest).await;
        unblock(&proxy, layer).await;
    }
}

#[tokio::test]
async fn blocked_image_is_not_exported_or_pulled_ahead() {
    let (upstream, proxy, image) = holding().await;
    block(&proxy, &image.layer(1).digest).await;
    let refused = proxy.admin("/api/v1/export?image=demo").await;
    assert_eq!(refused.status, 409, "{refused:#?}");
    assert!(refused.json()["detail"].as_str().unwrap().contains("is blocked"));
    let new = upstream.moves(DEMO, "latest", Image::with_layers(&["three"]));
    block(&proxy, &new.digest).await;
    upstream.clear_log();
    let pull = Ask::new(proxy.admin_address(), "POST", "/api/v1/pulls")
        .header("content-type", "application/json")
        .body(json!({ "image": "demo" }).to_string().as_bytes())
        .unchecked()
        .await;
    assert_eq!(pull.status, 202, "{pull:#?}");
    let ask = |proxy: &Proxy| proxy.admin("/api/v1/pulls/1");
    let failed = proxy
        .until("the pull to fail", ask, |reply| reply.json()["state"] == "failed")
        .await;
    assert!(
        failed.json()["error"].as_str().unwrap().contains("blocked"),
        "{failed:#?}"
    );
    assert_eq!((upstream.manifest_gets(DEMO), upstream.all_blob_gets()), (0, 0));
}

#[tokio::test]
async fn blocked_layer_is_not_prefetched() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one", "two", "three"]));
    let proxy = Setup::over(&upstream).prefetching().start().await;
    block(&proxy, &image.layer(1).digest).await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    proxy
        .blob(DEMO, &image.layer(0).digest)
        .await
        .is_blob(image.layer(0));
    proxy.until_kept(&image.layer(2).digest).await;
    assert_eq!(upstream.blob_gets(&image.layer(1).digest), 0);
}

#[tokio::test]
async fn blocked_manifest_known_after_fetch_is_not_prefetched() {
    let upstream = Upstream::start().await;
    let old = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream).prefetching().start().await;
    proxy.pull(DEMO, "latest", &old).await;
    let new = upstream.moves(DEMO, "latest", Image::with_layers(&["two"]));
    block(&proxy, &in_demo(&new.digest)).await;
    upstream.omits_digest();
    upstream.clear_log();
    for _ in 0..2 {
        is_blocked(&proxy.manifest(DEMO, "latest").await, &new.digest);
    }
    proxy.has_turned(3).await;
    assert_eq!(upstream.all_blob_gets(), 0);
    upstream.recovers();
    upstream.moves(DEMO, "latest", old.clone());
    proxy.pull(DEMO, "latest", &old).await;
}

#[tokio::test]
async fn blocked_digest_of_unproven_response_is_denied() {
    // A front that says 200 to everything and names the blocked digest.
    let (upstream, proxy, image) = holding().await;
    block(&proxy, &image.digest).await;
    let front = Front::new(200, OCI_INDEX, &image.manifest).header("docker-content-digest", &image.digest);
    upstream.is_fronted(|_| true, &front);
    for reference in ["latest", &image.digest] {
        let path = manifest_path(DEMO, reference);
        for ask in [
            proxy.get(&path),
            proxy.head(&path),
            proxy.get(&path).bearer("other"),
        ] {
            let reply = ask.await;
            assert_ne!(reply.status, 200, "{reply:#?}");
            assert_ne!(reply.body, image.manifest);
        }
    }
}
