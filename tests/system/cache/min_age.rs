//! Minimum age, as clients and operators see it. Times are stepped in `tests/authz/min_age.rs`.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};

const COOLS: &str = "min_age = \"3d\"\non_unknown_age = \"serve\"";

async fn prints(proxy: &Proxy, words: &[&str]) -> String {
    let admin = proxy.admin_address().to_string();
    let words: Vec<&str> = words.iter().copied().chain(["--admin", &admin]).collect();
    let mut program = proxy.setup().run(&words);
    program.exit().await;
    program.stdout() + &program.stderr()
}

#[tokio::test]
async fn cooling_tag_says_until_when() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream).default_keys(COOLS).start().await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));

    let path = manifest_path("library/demo", "latest");
    for reply in [proxy.get(&path).await, proxy.head(&path).await] {
        assert_eq!(
            reply.header("docker-content-digest"),
            Some(&*old.digest),
            "{reply:#?}"
        );
        assert_eq!(reply.cache_status(), "ifnewer; hit; detail=cooling");
        let until = httpdate::parse_http_date(reply.header("ifnewer-cooling-until").unwrap());
        assert!(until.is_ok(), "{reply:#?}");
        assert!(reply.header("warning").is_none(), "{reply:#?}");
    }
    assert_eq!(upstream.blob_gets(&new.layer(0).digest), 0);
    for words in [&["why", "demo"][..], &["show", "demo"]] {
        let printed = prints(&proxy, words).await;
        let part = format!("the tag names {}", new.digest.get(..19).unwrap());
        for part in [&*part, "served from 20", "first seen under this tag"] {
            assert!(printed.contains(part), "{part}: {printed}");
        }
    }
    assert!(prints(&proxy, &["ls"]).await.contains("complete, cooling"));
    let log = prints(&proxy, &["log", "demo"]).await;
    assert!(
        log.contains("younger than `min_age`; served the newest older one"),
        "{log}"
    );
    let refreshed = prints(&proxy, &["refresh", "demo"]).await;
    assert!(refreshed.contains("than `min_age` allows"), "{refreshed}");
    assert_eq!(
        upstream.blob_gets(&new.layer(0).digest),
        0,
        "a refresh fetches nothing young"
    );

    let name = format!("demo@{}", new.digest);
    let approved = prints(&proxy, &["approve", &name]).await;
    assert!(approved.contains("approved"), "{approved}");
    proxy.pull("library/demo", "latest", &new).await;
}

#[tokio::test]
async fn denial_of_a_young_digest_says_what_to_do() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("min_age = \"3d\"")
        .start()
        .await;
    let path = manifest_path("library/demo", "latest");
    let reply = proxy.get(&path).await;
    reply.is_refused(403);
    assert_eq!(reply.code(), "DENIED");
    let message = reply.message();
    for part in [
        "docker.io/library/demo:latest is not known to be old enough for `min_age`",
        &image.digest,
        "first seen under this tag",
        "nothing shows that it is older, so `on_unknown_age` decides",
        "; served from 20",
        &format!("ifnewer approve docker.io/library/demo@{}", image.digest),
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(reply.cache_status().contains("too-young"), "{reply:#?}");
    let head = proxy.head(&path).await;
    assert_eq!(head.status, 403);
    assert_eq!(
        upstream.manifest_gets("library/demo"),
        1,
        "for the age of its config"
    );
    assert_eq!(upstream.all_blob_gets(), 0);
    proxy.pull("library/demo", &image.digest, &image).await;
}

#[tokio::test]
async fn denial_by_digest_says_what_to_do() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("min_age = \"3d\"\nmin_age_by_digest = true")
        .start()
        .await;
    let path = manifest_path("library/demo", &image.digest);
    let reply = proxy.get(&path).await;
    reply.is_refused(403);
    assert_eq!(reply.code(), "DENIED");
    let message = reply.message();
    let name = format!("docker.io/library/demo@{}", image.digest);
    for part in [
        &*format!("{name} is not known to be old enough for `min_age`"),
        "first seen in this repository",
        "nothing shows that it is older, so `on_unknown_age` decides",
        "; served from 20",
        &format!("ifnewer approve {name}"),
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(reply.cache_status().contains("too-young"), "{reply:#?}");
    assert_eq!(proxy.head(&path).await.status, 403);
    let printed = prints(&proxy, &["why", &name]).await;
    for part in ["is served from 20", "first seen in this repository"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    assert!(!printed.contains("the tag names"), "{printed}");
    prints(&proxy, &["approve", &name]).await;
    proxy.pull("library/demo", &image.digest, &image).await;
}

#[tokio::test]
async fn unverifiable_digest_is_of_unknown_age() {
    let foreign = format!("blake3:{}", "a".repeat(64));
    let path = manifest_path("library/demo", &foreign);
    for (action, is_served) in [("refuse", false), ("serve", true)] {
        let upstream = Upstream::start().await;
        let image = Image::with_layers(&["one"]);
        let image = Image {
            digest: foreign.clone(),
            ..image
        };
        upstream.push("library/demo", "latest", image);
        let keys = format!("min_age = \"3d\"\nmin_age_by_digest = true\non_unknown_age = \"{action}\"");
        let proxy = Setup::over(&upstream).default_keys(&keys).start().await;
        for reply in [proxy.get(&path).await, proxy.head(&path).await] {
            assert_eq!(reply.status == 200, is_served, "{action}: {reply:#?}");
            if reply.status == 403 && reply.method == "GET" {
                let message = reply.message();
                assert!(
                    message.contains("digests of this algorithm cannot be verified"),
                    "{message}"
                );
                assert!(
                    message.contains("`on_unknown_age = \"serve\"` serves such images"),
                    "{message}"
                );
            }
        }
    }
}

#[tokio::test]
async fn registry_without_digests_serves_only_what_is_old_enough() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream).default_keys(COOLS).start().await;
    proxy.pull("library/demo", "latest", &old).await;
    upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    upstream.omits_digest();
    let reply = proxy.pull("library/demo", "latest", &old).await;
    assert!(reply.cache_status().contains("cooling"), "{reply:#?}");
    upstream.recovers();
    upstream.head_not_allowed();
    let reply = proxy.pull("library/demo", "latest", &old).await;
    assert!(reply.cache_status().contains("cooling"), "{reply:#?}");
}
