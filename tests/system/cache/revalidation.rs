//! Revalidation: an unchanged tag costs one `HEAD` and is served from the cache.

use crate::proxy::{Ask, Proxy, Setup, manifest_path};
use crate::registry::{DOCKER_MANIFEST, Image, OCI_MANIFEST, Upstream};

#[tokio::test]
async fn the_first_pull_is_a_miss_and_says_so() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;

    proxy.pull("library/demo", "latest", &image).await.is_fetched();
    assert!(
        proxy
            .manifest("library/demo", "latest")
            .await
            .is_hit()
            .cache_status()
            .contains("revalidated")
    );
}

#[tokio::test]
async fn an_unchanged_tag_costs_one_head_and_no_byte() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert_eq!(upstream.heads("library/demo"), 1);
    assert_eq!(
        (upstream.manifest_gets("library/demo"), upstream.all_blob_gets()),
        (0, 0)
    );
    assert_eq!(upstream.requests().len(), 1, "{:#?}", upstream.requests());
    assert_eq!(upstream.bytes_sent(), 0);
}

#[tokio::test]
async fn private_tag_costs_one_head_fresh_public_tag_none() {
    type Dress = fn(&Upstream, Ask) -> Ask;
    const OWN_TOKEN: &str = "a token of its own, a new one for each pull";
    let by_password: Dress = |_, ask| ask.basic("alice", "a-secret");
    let by_token: Dress = |upstream, ask| ask.bearer(&upstream.token_for("alice"));
    let tokens: fn(&Upstream) = |upstream| {
        upstream.requires_token();
        upstream.lets("alice", "a-secret", "acme/app");
    };
    let passwords: fn(&Upstream) = |upstream| upstream.requires_basic("alice", "a-secret");
    for (kind, requires, dress) in [
        ("a password, for a token", tokens, by_password),
        (OWN_TOKEN, tokens, by_token),
        ("a password", passwords, by_password),
    ] {
        let upstream = Upstream::start().await;
        requires(&upstream);
        let image = upstream.push("acme/app", "1", Image::with_layers(&["one", "two"]));
        let proxy = Proxy::over(&upstream).await;
        proxy
            .pull_with("acme/app", "1", &image, |ask| dress(&upstream, ask))
            .await;
        // Probes anonymously, once, whether the repository is public.
        if kind == OWN_TOKEN {
            upstream
                .until("the question without a credential", |seen| {
                    seen.iter()
                        .any(|seen| seen.path.contains("/manifests/") && !seen.authorized())
                })
                .await;
        }
        let client = dress(&upstream, proxy.manifest("acme/app", "1"));
        client.await.is_unchanged();
        upstream.clear_log();

        // One client: one token for the whole pull.
        let token = upstream.token_for("alice");
        let dressed = |ask: Ask| match kind {
            OWN_TOKEN => ask.bearer(&token),
            _ => dress(&upstream, ask),
        };
        proxy
            .pull_with("acme/app", "1", &image, dressed)
            .await
            .is_unchanged();
        let asked: Vec<_> = upstream.requests();
        assert_eq!(asked.len(), 1, "{kind}: {asked:#?}");
        assert_eq!(
            (asked[0].method.as_str(), upstream.bytes_sent()),
            ("HEAD", 0),
            "{kind}"
        );
    }
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Setup::over(&upstream)
        .default_keys("max_age = \"1h\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();
    proxy.pull("library/demo", "latest", &image).await.is_hit();
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn it_stays_so_after_a_restart() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let proxy = proxy.restart().await;
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert_eq!((upstream.heads("library/demo"), upstream.bytes_sent()), (1, 0));
}

#[tokio::test]
async fn it_stays_so_after_a_crash() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let proxy = proxy.crash().await;
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert_eq!((upstream.heads("library/demo"), upstream.all_blob_gets()), (1, 0));
}

#[tokio::test]
async fn while_fresh_a_tag_costs_nothing() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("max_age = \"1h\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();

    proxy
        .pull("library/demo", "latest", &image)
        .await
        .is_hit()
        .is_not_stale();
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn a_head_of_the_client_counts_as_the_question() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();

    proxy
        .head(&manifest_path("library/demo", "latest"))
        .await
        .is_image(&image)
        .is_unchanged();
    assert_eq!(
        (upstream.heads("library/demo"), upstream.requests().len()),
        (1, 1)
    );
}

#[tokio::test]
async fn what_a_digest_names_is_never_asked_for_again() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();

    proxy.pull("library/demo", &image.digest, &image).await.is_hit();
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn an_index_is_held_like_any_manifest() {
    let upstream = Upstream::start().await;
    let children = [Image::with_layers(&["amd"]), Image::with_layers(&["arm"])];
    let index = upstream.push("library/multi", "1", Image::index(&children));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/multi", "1", &index).await;
    proxy
        .pull("library/multi", &children[1].digest, &children[1])
        .await;
    upstream.clear_log();

    proxy.pull("library/multi", "1", &index).await.is_unchanged();
    proxy
        .pull("library/multi", &children[1].digest, &children[1])
        .await
        .is_hit();
    assert_eq!(
        (upstream.heads("library/multi"), upstream.requests().len()),
        (1, 1)
    );
}

#[tokio::test]
async fn clients_that_accept_other_types_get_their_own_answer() {
    let upstream = Upstream::start().await;
    let oci = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let docker = upstream.push_also("library/demo", "latest", Image::docker_with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;

    for _ in 0..2 {
        proxy
            .manifest("library/demo", "latest")
            .accept(&[OCI_MANIFEST])
            .await
            .is_image(&oci);
        proxy
            .manifest("library/demo", "latest")
            .accept(&[DOCKER_MANIFEST])
            .await
            .is_image(&docker);
    }
    assert_eq!(upstream.manifest_gets("library/demo"), 2);
    for blob in oci.blobs.iter().chain(&docker.blobs) {
        proxy.blob("library/demo", &blob.digest).await.is_blob(blob);
        proxy.until_kept(&blob.digest).await;
    }
    upstream.refuses();
    proxy
        .manifest("library/demo", "latest")
        .accept(&[DOCKER_MANIFEST])
        .await
        .is_image(&docker)
        .is_stale();
    proxy
        .manifest("library/demo", "latest")
        .accept(&[OCI_MANIFEST])
        .await
        .is_image(&oci)
        .is_stale();
}
