//! Captive portals, login pages, firewalls and redirect targets: a response that is not the registry's grants
//! nothing.

use crate::proxy::{Ask, Proxy, Reply, Setup, blob_path, manifest_path};
use crate::registry::{Front, Image, OCI_MANIFEST, Seen, Upstream, noise, sha256};
use tokio::task::JoinSet;

const ABSENT: &str = "nobody has this";

/// Caches that are asked at a time.
const CACHES: usize = 4;

/// Alice may read `acme/app`, bob `bob/own`, and all clients `library/open`.
async fn private() -> (Upstream, Image) {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    upstream.makes_public("library/open");
    let image = Image::with_layers(&[b"private bytes".to_vec(), noise(7, 200_000)]);
    let image = upstream.push("acme/app", "1", image);
    upstream.push("bob/own", "1", Image::with_layers(&["bob's own"]));
    (upstream, image)
}

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

fn bob(ask: Ask) -> Ask {
    ask.basic("bob", "b-secret")
}

fn is_alices(seen: &Seen) -> bool {
    let shown = seen.header("authorization").unwrap_or_default();
    shown.contains("token-alice") || shown == "Basic YWxpY2U6YS1zZWNyZXQ="
}

/// Responses of a web server in front of the registry, or of one it redirects to. `size` is the right size.
fn answers(size: usize) -> Vec<Front> {
    let filler = vec![b'x'; size];
    let mut fronts = vec![
        Front::new(200, "", b""),
        Front::new(200, "", &filler),
        Front::new(200, "", &filler).chunked(),
        Front::new(200, "application/octet-stream", b"log in"),
        Front::new(200, "application/octet-stream", &filler),
        Front::new(200, "application/octet-stream", &filler).header("etag", "\"{reference}\""),
        Front::new(
            200,
            "application/json",
            br#"{"errors":[{"code":"UNAUTHORIZED"}]}"#,
        ),
        Front::new(200, OCI_MANIFEST, br#"{"errors":[{"code":"UNAUTHORIZED"}]}"#),
        Front::new(200, OCI_MANIFEST, b"<html>Please log in</html>"),
        Front::new(206, "application/octet-stream", b"x")
            .header("content-range", &format!("bytes 0-0/{size}")),
        Front::page(200).chunked(),
    ];
    fronts.extend([200, 202, 203, 204, 226, 400, 404, 405, 416, 451, 500, 511].map(Front::page));
    fronts
}

/// Requests for content of the image, by cached names and by names that do not exist.
fn every_way(proxy: &Proxy, repository: &str, image: &Image) -> Vec<Ask> {
    let absent = sha256(ABSENT.as_bytes());
    let blobs = image
        .blobs
        .iter()
        .map(|blob| blob.digest.clone())
        .chain([absent.clone()]);
    let mut paths: Vec<String> = blobs.map(|digest| blob_path(repository, &digest)).collect();
    for reference in ["1", "gone", &image.digest, &absent] {
        paths.push(manifest_path(repository, reference));
    }
    paths.push(format!("/v2/{repository}/tags/list"));
    paths.push(format!("/v2/{repository}/referrers/{}", image.digest));
    let heads = paths.iter().map(|path| proxy.head(path));
    // Twice, because state learned the first time must grant nothing the second time.
    let gets = paths.iter().chain(&paths).map(|path| proxy.get(path));
    heads.chain(gets).collect()
}

/// Only alice may get bytes of the image. `None`: the response was interrupted.
fn gives_nothing_away(reply: Option<&Reply>, image: &Image, front: &str) {
    let Some(reply) = reply else { return };
    let body = reply.body.as_ref();
    let private = image
        .blobs
        .iter()
        .map(|blob| blob.bytes.as_ref())
        .chain([image.manifest.as_ref()]);
    for bytes in private {
        // The prefix of every manifest.
        let is_manifest = bytes == image.manifest.as_ref();
        let known = if is_manifest {
            bytes
        } else {
            &bytes[..bytes.len().min(16)]
        };
        assert!(
            !body.windows(known.len()).any(|part| part == known),
            "{front}: {reply:#?}"
        );
    }
    let named = reply.header("docker-content-digest");
    assert!(
        named.is_none_or(|named| named != image.digest || reply.status != 200),
        "{front}: {reply:#?}"
    );
}

async fn is_closed(proxy: &Proxy, repository: &str, image: &Image, front: &str) {
    for dress in [bob as fn(Ask) -> Ask, |ask| ask, |ask| ask.bearer("made-up")] {
        for ask in every_way(proxy, repository, image) {
            let reply = dress(ask).unchecked().broken_or_reply().await;
            gives_nothing_away(reply.as_ref(), image, front);
        }
    }
}

/// `fronts` respond to all clients but alice. Most of the time is spent in retries, so several caches are asked at a
/// time, each with some of the fronts.
async fn opens_nothing(fronts: Vec<Front>, is_abroad: bool) {
    let mut running = JoinSet::new();
    for first in 0..CACHES {
        // The fronts that cause retries stand beside each other.
        let some = fronts.iter().skip(first).step_by(CACHES).cloned().collect();
        running.spawn(opens_nothing_one_by_one(some, is_abroad));
    }
    running.join_all().await;
}

/// `fronts` respond one after the other. Then the registry responds again, then it is unavailable.
async fn opens_nothing_one_by_one(fronts: Vec<Front>, is_abroad: bool) {
    let (upstream, image) = private().await;
    let elsewhere = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    proxy.manifest("bob/own", "1").basic("bob", "b-secret").await;
    for front in &fronts {
        if is_abroad {
            let login = Front::redirect(302, &format!("{}/login/{{reference}}", elsewhere.url()));
            upstream.is_fronted(|seen| !is_alices(seen), &login);
            elsewhere.is_fronted(|_| true, front);
        } else {
            upstream.is_fronted(|seen| !is_alices(seen), front);
        }
        is_closed(&proxy, "acme/app", &image, &front.name).await;
        is_closed(&proxy, "bob/own", &image, &front.name).await;
    }
    proxy.pull_with("acme/app", "1", &image, alice).await.is_hit();
    upstream.recovers();
    is_closed(&proxy, "acme/app", &image, "none any more").await;
    upstream.refuses();
    is_closed(&proxy, "acme/app", &image, "the registry is dead").await;
    is_closed(&proxy, "bob/own", &image, "the registry is dead").await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let proxy = proxy.restart().await;
    is_closed(&proxy, "acme/app", &image, "the cache was restarted").await;
}

#[tokio::test]
async fn r01_a_page_in_place_of_a_registry_opens_nothing() {
    opens_nothing(answers("private bytes".len()), false).await;
}

#[tokio::test]
async fn r01_a_redirect_to_a_login_page_opens_nothing() {
    let mut fronts = answers("private bytes".len());
    fronts.extend([401, 403, 404, 405].map(|status| Front::new(status, "application/json", b"{}")));
    opens_nothing(fronts, true).await;
}

/// A manifest without references, and one with references to missing content.
const PLACEHOLDER: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[]}"#;

/// The client chooses the digest, so it may be that of the page itself. Its bytes are then verified, and prove only
/// themselves.
async fn asks_for_the_page(proxy: &Proxy, body: &[u8]) {
    let own = sha256(body);
    let paths = [
        blob_path("acme/app", &own),
        manifest_path("acme/app", &own),
        manifest_path("acme/app", "1"),
        manifest_path("acme/app", "none"),
    ];
    for dress in [bob as fn(Ask) -> Ask, |ask| ask] {
        for path in paths.iter().chain(&paths) {
            dress(proxy.get(path)).unchecked().broken_or_reply().await;
            dress(proxy.head(path)).unchecked().broken_or_reply().await;
        }
    }
}

#[tokio::test]
async fn r01_the_digest_of_a_page_itself_opens_nothing() {
    let sentence = b"Welcome to the portal of this network. Please log in before you go on from here.";
    let other = Image::with_layers(&["another registry's"]).manifest;
    let bodies: [&[u8]; 5] = [b"", b"{}", sentence, PLACEHOLDER, &other];
    for body in bodies {
        // Most of the time is spent in retries.
        let mut running = JoinSet::new();
        for is_abroad in [false, true] {
            // A server that serves a complete image in the registry's place counts as the registry.
            if !is_abroad && body == other.as_ref() {
                continue;
            }
            for media_type in ["", "application/json", "application/octet-stream", OCI_MANIFEST] {
                running.spawn(own_digest_opens_nothing(body.to_vec(), media_type, is_abroad));
            }
        }
        running.join_all().await;
    }
}

/// A page of this type is served in the registry's place, or where the registry redirects to.
async fn own_digest_opens_nothing(body: Vec<u8>, media_type: &'static str, is_abroad: bool) {
    let elsewhere = Upstream::start().await;
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let page = Front::new(200, media_type, &body);
    if is_abroad {
        let away = Front::redirect(307, &format!("{}/login", elsewhere.url()));
        upstream.is_fronted(|seen| !is_alices(seen), &away);
        elsewhere.is_fronted(|_| true, &page);
    } else {
        upstream.is_fronted(|seen| !is_alices(seen), &page);
    }
    let name = format!("{}, elsewhere: {is_abroad}", page.name);
    asks_for_the_page(&proxy, &body).await;
    is_closed(&proxy, "acme/app", &image, &name).await;
    upstream.refuses();
    is_closed(&proxy, "acme/app", &image, &format!("{name}, then dead")).await;
}

#[tokio::test]
async fn r01_a_front_that_repeats_the_digest_opens_nothing() {
    for media_type in ["", "application/json", "application/octet-stream", OCI_MANIFEST] {
        let (upstream, image) = private().await;
        let proxy = Proxy::over(&upstream).await;
        proxy.pull_with("acme/app", "1", &image, alice).await;
        let front = Front::new(200, media_type, b"welcome").header("docker-content-digest", "{reference}");
        upstream.is_fronted(|seen| !is_alices(seen) && seen.path.contains("/sha256:"), &front);
        is_closed(&proxy, "acme/app", &image, &front.name).await;
        upstream.refuses();
        is_closed(&proxy, "acme/app", &image, &format!("{}, then dead", front.name)).await;
    }
}

#[tokio::test]
async fn r01_a_redirect_within_the_registry_opens_nothing() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.is_fronted(
        |seen| !is_alices(seen),
        &Front::redirect(302, "/login?to={reference}"),
    );
    upstream.is_fronted(|seen| seen.path == "/login", &Front::page(200));
    is_closed(&proxy, "acme/app", &image, "the registry's own login page").await;
    upstream.refuses();
    is_closed(&proxy, "acme/app", &image, "the registry is dead").await;
}

#[tokio::test]
async fn r01_a_captive_portal_is_unavailability_and_no_denial() {
    let elsewhere = Upstream::start().await;
    elsewhere.is_fronted(|_| true, &Front::page(200));
    let away = format!("{}/login", elsewhere.url());
    for front in [
        Front::page(200),
        Front::page(202),
        Front::page(404),
        Front::page(511),
        Front::new(204, "", b""),
        Front::redirect(302, &away),
        Front::redirect(307, &away),
    ] {
        let (upstream, image) = private().await;
        let proxy = Proxy::over(&upstream).await;
        proxy.pull_with("acme/app", "1", &image, alice).await;
        upstream.is_fronted(|_| true, &front);
        for _ in 0..2 {
            proxy.pull_with("acme/app", "1", &image, alice).await.is_stale();
        }
        is_closed(&proxy, "acme/app", &image, &front.name).await;
    }
}

#[tokio::test]
async fn r01_the_refusal_of_a_redirects_target_takes_no_right_away() {
    for status in [401, 403, 404, 405] {
        let (upstream, image) = private().await;
        let elsewhere = Upstream::start().await;
        elsewhere.is_fronted(|_| true, &Front::new(status, "text/plain", b"no"));
        let proxy = Proxy::over(&upstream).await;
        proxy.pull_with("acme/app", "1", &image, alice).await;
        let away = Front::redirect(307, &format!("{}/x", elsewhere.url()));
        upstream.is_fronted(|seen| seen.path.starts_with("/v2/acme"), &away);
        proxy.pull_with("acme/app", "1", &image, alice).await.is_stale();
    }
}

#[tokio::test]
async fn r01_a_firewalls_403_remains_a_denial() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    upstream.is_fronted(|_| true, &Front::page(403));
    alice(proxy.manifest("acme/app", "1")).await.is_refused(403);
}

/// A registry whose storage sends no registry headers. The client of the second repository proves access by bytes.
#[tokio::test]
async fn shared_layer_is_proven_by_bytes_and_not_refetched() {
    let upstream = Upstream::start().await;
    let storage = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "*");
    let base = noise(3, 300_000);
    let one = upstream.push("acme/one", "1", Image::with_layers(std::slice::from_ref(&base)));
    let two = upstream.push("acme/two", "1", Image::with_layers(&[base, b"more".to_vec()]));
    upstream.redirects_blobs_to(&storage);
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/one", "1", &one, alice).await;
    storage.clear_log();
    proxy.pull_with("acme/two", "1", &two, alice).await;
    assert!(storage.bytes_sent() < 100_000, "{} bytes", storage.bytes_sent());
    upstream.refuses();
    storage.refuses();
    proxy.pull_with("acme/two", "1", &two, alice).await.is_stale();
}

/// A target that a registry redirects complete requests to is compared by one HEAD, once bytes have proven it.
/// `upstream` redirects everything to the same path of the registry behind it.
async fn redirecting_to(behind: &Upstream) -> Upstream {
    let upstream = Upstream::start().await;
    upstream.redirects_all_to(307, &behind.url());
    upstream
}

#[tokio::test]
async fn r01_a_trusted_registry_behind_a_redirect_makes_public() {
    let behind = Upstream::start().await;
    let upstream = redirecting_to(&behind).await;
    let image = behind.push("library/demo", "1", Image::with_layers(&["one"]));
    let host = behind.url().replace("http://", "");
    let trusts = format!("token_hosts = [\"{host}\"]");
    let proxy = Setup::over(&upstream)
        .upstream_keys("docker.io", &trusts)
        .start()
        .await;
    proxy.pull("library/demo", "1", &image).await;
    behind.clear_log();
    proxy.pull("library/demo", "1", &image).await.is_unchanged();
    assert_eq!((behind.heads("library/demo"), behind.requests().len()), (1, 1));
    behind.refuses();
    proxy.pull("library/demo", "1", &image).await.is_stale();
}

#[tokio::test]
async fn r01_an_unknown_registry_behind_a_redirect_opens_nothing() {
    let behind = Upstream::start().await;
    let upstream = redirecting_to(&behind).await;
    let image = behind.push("library/demo", "1", Image::with_layers(&[noise(3, 5000)]));
    let proxy = Proxy::over(&upstream).await;
    for _ in 0..2 {
        proxy.manifest("library/demo", "1").await.is_image(&image);
        for blob in &image.blobs {
            proxy.blob("library/demo", &blob.digest).await.is_blob(blob);
        }
    }
    behind.refuses();
    is_closed(&proxy, "library/demo", &image, "the registry behind it is dead").await;
}
