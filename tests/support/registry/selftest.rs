//! Tests of the scripted registry itself, through a plain client.

use super::{Image, Upstream, within};
use crate::proxy::Ask;

#[tokio::test]
async fn a_pushed_image_is_served_byte_for_byte() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));

    let reply = upstream
        .ask("GET", "/v2/library/demo/manifests/latest")
        .unchecked()
        .await;
    assert_eq!((reply.status, &reply.body), (200, &image.manifest));
    assert_eq!(reply.header("docker-content-digest"), Some(image.digest.as_str()));
    let head = upstream
        .ask("HEAD", "/v2/library/demo/manifests/latest")
        .unchecked()
        .await;
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, reply.header("content-length"))
    );
    let layer = upstream
        .ask(
            "GET",
            &format!("/v2/library/demo/blobs/{}", image.layer(1).digest),
        )
        .unchecked()
        .await;
    assert_eq!(layer.body, "two");
    assert_eq!(
        (
            upstream.heads("library/demo"),
            upstream.manifest_gets("library/demo")
        ),
        (1, 1)
    );
    assert_eq!(upstream.blob_gets(&image.layer(1).digest), 1);
    assert_eq!(upstream.bytes_sent(), (image.manifest.len() + 3) as u64);
}

#[tokio::test]
async fn a_closed_listener_refuses_and_comes_back_on_the_same_port() {
    let upstream = Upstream::start().await;
    upstream.refuses();
    upstream.ask("GET", "/v2/").unchecked().fails().await;
    upstream.recovers();
    assert_eq!(upstream.ask("GET", "/v2/").unchecked().await.status, 200);
    upstream.resets();
    upstream.ask("GET", "/v2/").unchecked().fails().await;
}

#[tokio::test]
async fn a_hanging_answer_comes_when_it_recovers() {
    let upstream = Upstream::start().await;
    upstream.hangs();
    let ask = tokio::spawn(upstream.ask("GET", "/v2/").unchecked().into_reply());
    upstream.until("the request", |seen| seen.len() == 1).await;
    assert!(!ask.is_finished());
    upstream.recovers();
    assert_eq!(within("the answer", ask).await.unwrap().status, 200);
}

#[tokio::test]
async fn a_truncated_blob_is_cut_and_resumes_by_range() {
    let upstream = Upstream::start().await;
    let blob = upstream.push_blob("demo", &super::noise(1, 100_000));
    let path = format!("/v2/demo/blobs/{}", blob.digest);
    upstream.truncates_blob_at(60_000);
    let cut = upstream.ask("GET", &path).unchecked().await;
    assert_eq!((cut.whole, cut.body.len()), (false, 60_000));
    let rest = upstream
        .ask("GET", &path)
        .header("range", "bytes=60000-")
        .unchecked()
        .await;
    assert_eq!((rest.status, rest.whole), (206, true));
    assert_eq!(rest.header("content-range"), Some("bytes 60000-99999/100000"));
    assert_eq!([&cut.body[..], &rest.body[..]].concat(), blob.bytes);
}

#[tokio::test]
async fn a_gate_holds_a_body_where_it_was_told() {
    let upstream = Upstream::start().await;
    let blob = upstream.push_blob("demo", &super::noise(2, 50_000));
    let gate = upstream.holds_blob(&blob.digest, 20_000);
    let mut stream = upstream
        .ask("GET", &format!("/v2/demo/blobs/{}", blob.digest))
        .stream()
        .await;
    gate.reached().await;
    assert_eq!(stream.read(20_000).await.len(), 20_000);
    gate.release();
    assert_eq!(stream.rest().await.unwrap().len(), 30_000);
}

#[tokio::test]
async fn a_token_opens_what_its_user_may_read() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "secret", "acme/app");
    upstream.push("acme/app", "1", Image::with_layers(&["private"]));
    let path = "/v2/acme/app/manifests/1";

    let refused = upstream.ask("GET", path).unchecked().await;
    assert_eq!(refused.status, 401);
    assert!(
        refused
            .header("www-authenticate")
            .unwrap()
            .contains("scope=\"repository:acme/app:pull\"")
    );
    let token = upstream
        .ask("GET", "/token?service=scripted")
        .basic("alice", "secret")
        .unchecked()
        .await;
    let token = token.json()["token"].as_str().unwrap().to_owned();
    assert_eq!(
        upstream.ask("GET", path).bearer(&token).unchecked().await.status,
        200
    );
    assert_eq!(
        upstream.ask("GET", path).bearer("wrong").unchecked().await.status,
        401
    );
    upstream.revokes("alice");
    assert_eq!(
        upstream.ask("GET", path).bearer(&token).unchecked().await.status,
        401
    );
}

#[tokio::test]
async fn tls_is_spoken_with_the_ca_it_shows() {
    let upstream = Upstream::start_tls().await;
    upstream.push("demo", "1", Image::with_layers(&["x"]));
    for protocol in ["http/1.1", "h2"] {
        let ask = upstream
            .ask("GET", "/v2/demo/manifests/1")
            .tls(upstream.ca_pem(), &[protocol]);
        assert_eq!(ask.unchecked().await.status, 200, "{protocol}");
    }
    upstream.presents_foreign_certificate();
    upstream
        .ask("GET", "/v2/")
        .tls(upstream.ca_pem(), &[])
        .unchecked()
        .fails()
        .await;
}

#[tokio::test]
async fn referrers_and_tags_are_listed() {
    let upstream = Upstream::start().await;
    let image = upstream.push("demo", "a", Image::with_layers(&["x"]));
    upstream.push("demo", "b", Image::with_layers(&["y"]));
    upstream.push_untagged("demo", Image::attached_to(&image, "text/spdx", b"sbom"));
    let page = upstream.ask("GET", "/v2/demo/tags/list?n=1").unchecked().await;
    assert_eq!(page.json()["tags"], serde_json::json!(["a"]));
    assert!(page.header("link").unwrap().contains("last=a"));
    let index = upstream
        .ask("GET", &format!("/v2/demo/referrers/{}", image.digest))
        .unchecked()
        .await;
    assert_eq!(index.json()["manifests"].as_array().unwrap().len(), 1);
}

impl Upstream {
    /// A request straight to the upstream.
    pub fn ask(&self, method: &str, path: &str) -> Ask {
        Ask::new(self.address(), method, path)
    }
}
