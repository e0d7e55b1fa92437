//! Several URLs of one upstream: a mirror that lacks the image, then the registry that has it.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Seen, Upstream};

const REPOSITORY: &str = "library/demo";

fn urls(urls: &[&Upstream]) -> String {
    let urls: Vec<_> = urls.iter().map(|upstream| upstream.url()).collect();
    format!("url = {urls:?}")
}

async fn over(upstreams: &[&Upstream]) -> Proxy {
    Setup::empty()
        .upstream("docker.io", &urls(upstreams))
        .start()
        .await
}

fn any(seen: &Seen) -> bool {
    seen.path.starts_with("/v2/")
}

#[tokio::test]
async fn r06_a_no_at_the_first_url_asks_the_next() {
    for refuse in [
        (|_| {}) as fn(&Upstream),
        |mirror| mirror.answers(any, 401),
        |mirror| mirror.answers(any, 403),
        |mirror| mirror.answers(any, 405),
        Upstream::requires_token,
    ] {
        let (mirror, origin) = (Upstream::start().await, Upstream::start().await);
        let image = origin.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
        refuse(&mirror);
        let proxy = over(&[&mirror, &origin]).await;
        proxy
            .head(&manifest_path(REPOSITORY, "latest"))
            .await
            .is_image(&image);
        proxy.pull(REPOSITORY, "latest", &image).await;
        proxy.pull(REPOSITORY, "latest", &image).await.is_unchanged();
        let list = proxy.get("/v2/library/demo/tags/list").await;
        assert_eq!(list.json()["tags"][0], "latest", "{list:#?}");
        let moved = origin.moves(REPOSITORY, "latest", Image::with_layers(&["two"]));
        proxy.pull(REPOSITORY, "latest", &moved).await;
    }
}

#[tokio::test]
async fn r06_a_blob_missing_at_the_first_url_comes_from_the_next() {
    let (mirror, origin) = (Upstream::start().await, Upstream::start().await);
    let image = origin.push(REPOSITORY, "latest", Image::with_layers(&["one", "two"]));
    mirror.push(REPOSITORY, "latest", image.clone());
    for blob in &image.blobs {
        mirror.deletes_blob(REPOSITORY, &blob.digest);
    }
    let proxy = over(&[&mirror, &origin]).await;
    proxy
        .head(&crate::proxy::blob_path(REPOSITORY, &image.layer(0).digest))
        .await
        .is_blob(image.layer(0));
    proxy.pull(REPOSITORY, "latest", &image).await;
    assert_eq!(origin.manifest_gets(REPOSITORY), 0, "the mirror has the manifest");
}

#[tokio::test]
async fn r06_a_no_is_that_of_the_last_url() {
    for (first, last, status) in [
        (404, 401, 401),
        (401, 404, 404),
        (403, 404, 404),
        (404, 403, 403),
        (503, 404, 404),
        (404, 503, 503),
        (401, 503, 503),
    ] {
        let (mirror, origin) = (Upstream::start().await, Upstream::start().await);
        mirror.answers(any, first);
        origin.answers(any, last);
        let proxy = over(&[&mirror, &origin]).await;
        for method in ["HEAD", "GET"] {
            let reply = proxy.ask(method, &manifest_path(REPOSITORY, "latest")).await;
            assert_eq!(reply.status, status, "{first} {last} {method}: {reply:#?}");
        }
    }
}

#[tokio::test]
async fn r06_the_challenge_shown_is_that_of_the_last_url() {
    let (mirror, origin) = (Upstream::start().await, Upstream::start().await);
    mirror.requires_token();
    origin.requires_token();
    let proxy = over(&[&mirror, &origin]).await;
    let reply = proxy.manifest(REPOSITORY, "latest").await;
    reply.is_refused(401);
    let challenge = reply.header("www-authenticate").unwrap();
    assert!(challenge.contains(&origin.url()), "{challenge}");
}

#[tokio::test]
async fn r06_an_outage_of_the_last_url_serves_what_is_held() {
    let (mirror, origin) = (Upstream::start().await, Upstream::start().await);
    let image = origin.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    mirror.answers(any, 401);
    let proxy = over(&[&mirror, &origin]).await;
    proxy.pull(REPOSITORY, "latest", &image).await;
    let proxy = proxy.restart().await;
    origin.refuses();
    for _ in 0..3 {
        proxy.pull(REPOSITORY, "latest", &image).await.is_stale();
    }
    mirror.clear_log();
    proxy.pull(REPOSITORY, "latest", &image).await.is_stale();
    assert_eq!(
        mirror.requests().len(),
        0,
        "an URL that answers hides no outage of the one that has the image"
    );
}

#[tokio::test]
async fn r06_a_denial_by_the_url_that_served_it_is_final() {
    let (private, open) = (Upstream::start().await, Upstream::start().await);
    private.requires_basic("boss", "secret");
    private.lets("amy", "pw", REPOSITORY);
    let image = private.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let proxy = over(&[&private, &open]).await;
    let ask = |proxy: &Proxy| proxy.manifest(REPOSITORY, "latest").basic("amy", "pw");
    ask(&proxy).await.is_image(&image);
    // A public repository of the same name at another URL is a different one.
    open.push(REPOSITORY, "latest", Image::with_layers(&["another"]));
    private.revokes("amy");
    ask(&proxy).await.is_refused(403);
    proxy.manifest(REPOSITORY, "latest").await.is_refused(401);
    open.refuses();
    ask(&proxy).await.is_refused(403);

    let proxy = proxy.restart().await;
    ask(&proxy).await.is_refused(403);
    open.recovers();
    ask(&proxy).await.is_refused(403);
    proxy.manifest(REPOSITORY, "latest").await.is_refused(401);
    private.refuses();
    let reply = proxy.get(&manifest_path(REPOSITORY, &image.digest)).await;
    assert_ne!(reply.status, 200, "the digest of the private image: {reply:#?}");
}
