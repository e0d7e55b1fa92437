//! Tags under different `Accept` headers: all clients get the newest image known from any response.

use std::fs::File;
use std::io::Read;

use crate::proxy::{Ask, Proxy, Reply, Setup, manifest_path};
use crate::registry::{
    DOCKER_LIST, DOCKER_MANIFEST, Front, Image, OCI_INDEX, OCI_MANIFEST, Seen, Upstream, noise,
};

/// The `Accept` lines of clients of today, as they send them.
const CLIENTS: [(&str, &[&str]); 5] = [
    (
        "docker",
        &[
            "application/json",
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            OCI_MANIFEST,
            DOCKER_MANIFEST,
            OCI_INDEX,
            DOCKER_LIST,
        ],
    ),
    (
        "containerd",
        &["application/vnd.docker.distribution.manifest.v2+json, \
             application/vnd.docker.distribution.manifest.list.v2+json, \
             application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*"],
    ),
    (
        "crane",
        &["application/vnd.docker.distribution.manifest.v1+json,\
           application/vnd.docker.distribution.manifest.v1+prettyjws,\
           application/vnd.docker.distribution.manifest.v2+json,\
           application/vnd.oci.image.manifest.v1+json,\
           application/vnd.docker.distribution.manifest.list.v2+json,application/vnd.oci.image.index.v1+json"],
    ),
    (
        "podman",
        &[
            OCI_MANIFEST,
            DOCKER_MANIFEST,
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            "application/vnd.docker.distribution.manifest.v1+json",
            DOCKER_LIST,
            OCI_INDEX,
        ],
    ),
    (
        "oras",
        &["application/vnd.docker.distribution.manifest.v2+json, \
             application/vnd.docker.distribution.manifest.list.v2+json, \
             application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
             application/vnd.oci.artifact.manifest.v1+json"],
    ),
];

/// Does not accept an index.
const OLD: &[&str] = &[DOCKER_MANIFEST, OCI_MANIFEST];

const DOCKER: &[&str] = CLIENTS[0].1;
const CONTAINERD: &[&str] = CLIENTS[1].1;

/// An image whose content depends on `word`.
type Make = fn(&str) -> Image;

/// The images between which a tag moves.
const MOVES: [[Make; 2]; 4] = [[index, index], [single, single], [index, single], [single, index]];

fn single(seed: &str) -> Image {
    Image::with_layers(&[seed])
}

fn index(seed: &str) -> Image {
    Image::index(&[
        Image::with_layers(&[format!("{seed} amd")]),
        Image::with_layers(&[format!("{seed} arm")]),
    ])
}

/// A complete pull of one platform.
async fn pulls(proxy: &Proxy, repository: &str, accept: &[&str], image: &Image) -> Reply {
    let reply = proxy.manifest(repository, "latest").accept(accept).await;
    reply.is_image(image);
    pulls_by_digest(proxy, repository, image.children.first().unwrap_or(image)).await;
    reply
}

async fn pulls_by_digest(proxy: &Proxy, repository: &str, image: &Image) {
    proxy.manifest(repository, &image.digest).await.is_image(image);
    for blob in &image.blobs {
        proxy.blob(repository, &blob.digest).await.is_blob(blob);
        proxy.until_kept(&blob.digest).await;
    }
}

async fn done(proxy: &Proxy, words: &[&str]) -> String {
    let admin = proxy.admin_address().to_string();
    let words: Vec<&str> = words.iter().copied().chain(["--admin", &admin]).collect();
    let mut program = proxy.setup().run(&words);
    let code = program.exit().await;
    let out = program.stdout();
    assert_eq!(code, Some(0), "{words:?}: {out}{}", program.stderr());
    out
}

#[tokio::test]
async fn o01_twenty_of_twenty_orders_of_two_clients_get_the_newest() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let mut orders = Vec::new();
    for (first, first_accepts) in CLIENTS {
        for (second, second_accepts) in CLIENTS.into_iter().filter(|(second, _)| *second != first) {
            for ([old, new], which) in MOVES.into_iter().zip(0..) {
                let repository = format!("orders/{first}-{second}-{which}");
                let (old, new) = (old("old"), new("new"));
                let old = upstream.push(&repository, "latest", old);
                pulls(&proxy, &repository, first_accepts, &old).await;
                let new = upstream.moves(&repository, "latest", new);
                pulls(&proxy, &repository, second_accepts, &new).await;
                orders.push((repository, [first_accepts, second_accepts], new));
            }
        }
    }
    assert_eq!(orders.len(), 20 * MOVES.len());
    upstream.refuses();
    for (repository, clients, new) in &orders {
        for accepts in clients {
            pulls(&proxy, repository, accepts, new).await.is_stale();
        }
    }
    let proxy = proxy.restart().await;
    for (repository, [first_accepts, _], new) in &orders {
        let reply = proxy.manifest(repository, "latest").accept(first_accepts).await;
        reply.is_image(new).is_stale();
    }
}

#[tokio::test]
async fn index_stays_cached_beside_single_platform_image() {
    let upstream = Upstream::start().await;
    let (old, new) = (index("old"), index("new"));
    upstream.push("library/demo", "latest", old.clone());
    upstream.push_also("library/demo", "latest", old.children[0].clone());
    let proxy = Proxy::over(&upstream).await;
    pulls(&proxy, "library/demo", CONTAINERD, &old).await;
    // It is revalidated later and is not newer, because it belongs to the index.
    pulls(&proxy, "library/demo", OLD, &old.children[0]).await;
    upstream.refuses();
    for (accepts, image) in [(CONTAINERD, &old), (DOCKER, &old), (OLD, &old.children[0])] {
        pulls(&proxy, "library/demo", accepts, image).await.is_stale();
    }
    upstream.recovers();
    upstream.push("library/demo", "latest", new.clone());
    upstream.push_also("library/demo", "latest", new.children[0].clone());
    let moved =
        |reply: &Reply| reply.header("docker-content-digest") == Some(new.children[0].digest.as_str());
    let ask = |proxy: &Proxy| proxy.manifest("library/demo", "latest").accept(OLD);
    proxy.until("the upstream to be asked again", ask, moved).await;
    pulls(&proxy, "library/demo", OLD, &new.children[0]).await;
    upstream.refuses();
    // The image of the current index does not belong to the earlier one.
    for accepts in [CONTAINERD, DOCKER, OLD] {
        pulls(&proxy, "library/demo", accepts, &new.children[0])
            .await
            .is_stale();
    }
}

#[tokio::test]
async fn incomplete_newer_image_does_not_hide_newest_complete() {
    let upstream = Upstream::start().await;
    let first = upstream.push("library/demo", "latest", single("first"));
    let proxy = Proxy::over(&upstream).await;
    pulls(&proxy, "library/demo", CONTAINERD, &first).await;
    let second = upstream.moves("library/demo", "latest", single("second"));
    pulls(&proxy, "library/demo", DOCKER, &second).await;
    let third = upstream.moves("library/demo", "latest", single("third"));
    let crane = CLIENTS[2].1;
    proxy
        .manifest("library/demo", "latest")
        .accept(crane)
        .await
        .is_image(&third);
    upstream.refuses();
    for accepts in [CONTAINERD, DOCKER, crane, OLD] {
        let reply = pulls(&proxy, "library/demo", accepts, &second).await;
        assert!(
            reply.cache_status().contains("detail=previous-complete"),
            "{reply:#?}"
        );
    }
}

#[tokio::test]
async fn moved_tag_is_not_fresh_for_any_accept() {
    for (keys, accepts) in [
        ("max_age = \"1h\"", CONTAINERD),
        ("max_age = \"1h\"", OLD),
        ("policy = \"if-not-present\"", CONTAINERD),
    ] {
        let upstream = Upstream::start().await;
        let given = |index: &Image| {
            if accepts == OLD {
                index.children[0].clone()
            } else {
                index.clone()
            }
        };
        let tagged = |index: &Image| {
            upstream.push("library/demo", "latest", index.clone());
            upstream.push_also("library/demo", "latest", index.children[0].clone());
        };
        let (old, new) = (index("old"), index("new"));
        tagged(&old);
        let proxy = Setup::over(&upstream).default_keys(keys).start().await;
        pulls(&proxy, "library/demo", accepts, &given(&old)).await;
        tagged(&new);
        // While fresh it is served without revalidation, and the cache has not seen the new one.
        pulls(&proxy, "library/demo", accepts, &given(&old)).await;
        let told = done(&proxy, &["refresh", "demo"]).await;
        assert!(told.contains("a newer image"), "{told}");
        pulls_by_digest(&proxy, "library/demo", &new.children[0]).await;
        pulls(&proxy, "library/demo", accepts, &given(&new))
            .await
            .is_not_stale();
    }
}

#[tokio::test]
async fn why_ls_show_and_export_agree_with_served_image() {
    for [old, new] in MOVES {
        let upstream = Upstream::start().await;
        let old = upstream.push("library/demo", "latest", old("old"));
        let proxy = Proxy::over(&upstream).await;
        done(&proxy, &["pull", "demo"]).await;
        pulls(&proxy, "library/demo", CONTAINERD, &old).await;
        let new = upstream.moves("library/demo", "latest", new("new"));
        pulls(&proxy, "library/demo", DOCKER, &new).await;
        done(&proxy, &["pin", "demo"]).await;
        upstream.refuses();
        pulls(&proxy, "library/demo", CONTAINERD, &new).await.is_stale();

        let ls: serde_json::Value = serde_json::from_str(&done(&proxy, &["ls", "--json"]).await).unwrap();
        let show: serde_json::Value =
            serde_json::from_str(&done(&proxy, &["show", "demo", "--json"]).await).unwrap();
        let why: serde_json::Value =
            serde_json::from_str(&done(&proxy, &["why", "demo", "--json"]).await).unwrap();
        let expected = serde_json::Value::from(new.digest.as_str());
        for found in [
            &ls["images"][0]["digest"],
            &show["digest"],
            &why["cached"]["digest"],
        ] {
            assert_eq!(*found, expected, "{ls:#} {show:#} {why:#}");
        }
        assert!(!show["contents"].as_array().unwrap().is_empty(), "{show:#}");
        let archive = proxy.setup().folder().join("demo.tar");
        done(&proxy, &["export", "demo", "-o", archive.to_str().unwrap()]).await;
        let index = in_archive(&archive, "index.json");
        assert_eq!(index["manifests"][0]["digest"], expected, "{index:#}");
    }
}

fn in_archive(archive: &std::path::Path, name: &str) -> serde_json::Value {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().to_str() == Some(name) {
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            return serde_json::from_str(&text).unwrap();
        }
    }
    panic!("no {name} in the archive");
}

#[tokio::test]
async fn eviction_keeps_layers_of_the_served_image() {
    const LAYER: usize = 200_000;
    let upstream = Upstream::start().await;
    let of = |seed| Image::with_layers(&[noise(seed, LAYER)]);
    let old = upstream.push("library/demo", "latest", of(1));
    let proxy = Proxy::over(&upstream).await;
    pulls(&proxy, "library/demo", CONTAINERD, &old).await;
    let new = upstream.moves("library/demo", "latest", of(2));
    pulls(&proxy, "library/demo", DOCKER, &new).await;
    upstream.refuses();
    done(&proxy, &["gc"]).await;
    let proxy = proxy.restart().await;
    pulls(&proxy, "library/demo", CONTAINERD, &new).await.is_stale();
    let freed = done(&proxy, &["rm", "demo", "--yes"]).await;
    assert!(freed.contains("demo"), "{freed}");
    for accepts in [CONTAINERD, DOCKER] {
        let ask: Ask = proxy.manifest("library/demo", "latest").accept(accepts);
        ask.await.is_unreachable();
    }
}

#[tokio::test]
async fn slow_response_from_before_move_does_not_restore_old() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", single("old"));
    let proxy = Setup::over(&upstream)
        .default_keys("revalidate_timeout = \"30s\"")
        .start()
        .await;
    pulls(&proxy, "library/demo", CONTAINERD, &old).await;
    let gate = upstream.delays_answers(|seen| {
        seen.method == "HEAD" && seen.accept().iter().any(|line| line.contains("*/*"))
    });
    let address = proxy.registry_address();
    let slow = tokio::spawn(async move {
        Ask::new(address, "GET", "/v2/library/demo/manifests/latest")
            .accept(CONTAINERD)
            .await
    });
    gate.reached().await;
    let new = upstream.moves("library/demo", "latest", single("new"));
    pulls(&proxy, "library/demo", DOCKER, &new).await;
    gate.release();
    slow.await.unwrap().is_image(&old);
    upstream.refuses();
    for accepts in [CONTAINERD, DOCKER] {
        pulls(&proxy, "library/demo", accepts, &new).await.is_stale();
    }
}

/// HEAD returns the new digest, while GET by tag reaches a replica with the old one.
#[tokio::test]
async fn o01_a_lagging_replica_does_not_bring_the_old_image_back() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/one", "latest", single("old"));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/one", "latest", &old).await.is_fetched();
    let new = upstream.moves("library/one", "latest", single("new"));
    let behind = Front::new(200, &old.media_type, &old.manifest);
    let by_tag = |seen: &Seen| seen.method == "GET" && seen.path.ends_with("/manifests/latest");
    upstream.is_fronted(by_tag, &behind);

    proxy.pull("library/one", "latest", &new).await.is_fetched();
    upstream.refuses();
    proxy.pull("library/one", "latest", &new).await.is_stale();
}

/// A tag that moves twice, the second time between HEAD and GET. The image that is new to the cache is the newest.
#[tokio::test]
async fn o01_a_tag_that_moves_after_the_head_is_taken_as_it_is() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/one", "latest", single("old"));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/one", "latest", &old).await.is_fetched();
    upstream.moves("library/one", "latest", single("new"));
    let gate = upstream.holds_answers(|seen| seen.method == "GET" && seen.path.contains("/manifests/"));
    let path = manifest_path("library/one", "latest");
    let pull = tokio::spawn(proxy.get(&path).into_reply());
    gate.reached().await;
    let newest = upstream.moves("library/one", "latest", single("newest"));
    gate.release();
    pull.await.expect("the pull ends").is_image(&newest);
}
