//! Pushes and deletions: forwarded unchanged, with their effect visible at once.

use crate::forwarding::host_routing::two_upstreams;
use crate::proxy::{Ask, Proxy, Setup, blob_path, manifest_path, raw};
use crate::registry::{Image, OCI_MANIFEST, Upstream, noise, sha256};

/// A client of ghcr.io whose host resolves to the cache.
fn ask(proxy: &Proxy, method: &str, path: &str) -> Ask {
    let ask = proxy.ask(method, path).tls(&proxy.ca_pem(), &["http/1.1"]);
    ask.server_name("ghcr.io").unchecked()
}

/// The path of a `Location` that leads to the cache.
fn goes_on(location: Option<&str>) -> String {
    let location = location.expect("a Location");
    let path = location.strip_prefix("https://ghcr.io").unwrap_or(location);
    assert!(
        path.starts_with("/v2/"),
        "a Location that leads past us: {location}"
    );
    path.to_owned()
}

/// Pushes as docker does: each blob in chunks, then the manifest.
async fn push(proxy: &Proxy, tag: &str, image: &Image) {
    for blob in &image.blobs {
        let begun = ask(proxy, "POST", "/v2/team/demo/blobs/uploads/").await;
        assert_eq!(begun.status, 202, "{begun:#?}");
        let upload = goes_on(begun.header("location"));
        let sent = ask(proxy, "PATCH", &upload).chunked_body(&blob.bytes).await;
        assert_eq!(sent.status, 202, "{sent:#?}");
        assert_eq!(
            sent.header("range"),
            Some(format!("0-{}", blob.bytes.len() - 1).as_str())
        );
        let upload = goes_on(sent.header("location"));
        let done = ask(proxy, "PUT", &format!("{upload}&digest={}", blob.digest)).await;
        assert_eq!(done.status, 201, "{done:#?}");
        assert_eq!(done.header("docker-content-digest"), Some(blob.digest.as_str()));
    }
    let put = ask(proxy, "PUT", &manifest_path("team/demo", tag))
        .header("content-type", &image.media_type)
        .body(&image.manifest);
    let reply = put.await;
    assert_eq!(reply.status, 201, "{reply:#?}");
    goes_on(reply.header("location"));
}

#[tokio::test]
async fn row_34_a_push_reaches_the_registry_and_the_next_pull_sees_it() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    // Fresh for an hour, so only the write can cause a revalidation.
    let setup = Setup::over(&hub)
        .also("ghcr.io", &other)
        .default_keys("max_age = \"1h\"");
    let proxy = setup.start().await;
    for relative in [false, true] {
        if relative {
            other.locates_relatively();
        }
        let name = if relative { "relative" } else { "absolute" };
        let old = other.push("team/demo", name, Image::with_layers(&["old"]));
        proxy.pull("ghcr.io/team/demo", name, &old).await;
        let new = Image::with_layers(&[noise(5, 300_000), name.as_bytes().to_vec()]);
        push(&proxy, name, &new).await;
        proxy.pull("ghcr.io/team/demo", name, &new).await.is_fetched();
        proxy.pull("ghcr.io/team/demo", name, &new).await.is_hit();
    }
}

#[tokio::test]
async fn pushed_tag_does_not_serve_old_image_in_outage() {
    let (_hub, other, proxy) = two_upstreams().await;
    let old = other.push("team/demo", "1", Image::with_layers(&["old"]));
    proxy.pull("ghcr.io/team/demo", "1", &old).await;
    push(&proxy, "1", &Image::with_layers(&["new"])).await;
    other.refuses();
    proxy.manifest("ghcr.io/team/demo", "1").await.is_unreachable();
}

#[tokio::test]
async fn row_34_a_deleted_tag_is_absent_at_once() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let setup = Setup::over(&hub)
        .also("ghcr.io", &other)
        .default_keys("max_age = \"1h\"");
    let proxy = setup.start().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["one"]));
    proxy.pull("ghcr.io/team/demo", "1", &image).await;
    let path = manifest_path("team/demo", "1");
    assert_eq!(ask(&proxy, "DELETE", &path).await.status, 202);
    assert_eq!(ask(&proxy, "GET", &path).await.status, 404);
    proxy.manifest("ghcr.io/team/demo", "1").await.is_refused(404);
}

#[tokio::test]
async fn deleted_manifest_and_blob_are_404_at_once() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let setup = Setup::over(&hub)
        .also("ghcr.io", &other)
        .default_keys("max_age = \"1h\"");
    let proxy = setup.start().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["one"]));
    proxy.pull("ghcr.io/team/demo", "1", &image).await;
    proxy
        .manifest("ghcr.io/team/demo", &image.digest)
        .await
        .is_image(&image);
    let (by_digest, layer) = (
        manifest_path("team/demo", &image.digest),
        blob_path("team/demo", &image.layer(0).digest),
    );
    assert_eq!(ask(&proxy, "DELETE", &by_digest).await.status, 202);
    assert_eq!(ask(&proxy, "DELETE", &layer).await.status, 202);
    for path in [&by_digest, &manifest_path("team/demo", "1"), &layer] {
        assert_eq!(ask(&proxy, "GET", path).await.status, 404, "{path}");
    }
    // And after a restart.
    let proxy = proxy.restart().await;
    assert_eq!(ask(&proxy, "GET", &by_digest).await.status, 404);
    assert_eq!(ask(&proxy, "GET", &layer).await.status, 404);
}

#[tokio::test]
async fn response_from_before_push_does_not_restore_old_tag() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let setup = Setup::over(&hub)
        .also("ghcr.io", &other)
        .default_keys("max_age = \"1h\"");
    let proxy = setup.start().await;
    other.push("team/demo", "1", Image::with_layers(&["old"]));
    // The registry reads the tag, and the push overtakes its response.
    let path = manifest_path("team/demo", "1");
    let gate = other.holds_bodies(|seen| seen.method == "GET" && seen.path.ends_with("/manifests/1"));
    let early = tokio::spawn(proxy.get(&format!("{path}?ns=ghcr.io")).into_reply());
    gate.reached().await;
    let new = Image::with_layers(&["new"]);
    push(&proxy, "1", &new).await;
    gate.release();
    assert_eq!(
        early.await.unwrap().status,
        200,
        "who asked before may get what was true then"
    );
    proxy.get(&format!("{path}?ns=ghcr.io")).await.is_image(&new);
}

#[tokio::test]
async fn request_after_push_does_not_join_earlier_revalidation() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let proxy = Setup::over(&hub).also("ghcr.io", &other).start().await;
    other.push("team/demo", "1", Image::with_layers(&["old"]));
    let path = manifest_path("team/demo", "1");
    let gate = other.holds_bodies(|seen| seen.method == "GET" && seen.path.ends_with("/manifests/1"));
    let early = tokio::spawn(proxy.get(&format!("{path}?ns=ghcr.io")).into_reply());
    gate.reached().await;
    let new = Image::with_layers(&["new"]);
    push(&proxy, "1", &new).await;
    let late = tokio::spawn(proxy.get(&format!("{path}?ns=ghcr.io")).into_reply());
    gate.reached_by(2).await;
    gate.release();
    early.await.unwrap();
    late.await.unwrap().is_image(&new);
}

#[tokio::test]
async fn a_push_does_not_leave_out_what_the_registry_has_collected() {
    let (_hub, other, proxy) = two_upstreams().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["one"]));
    proxy.pull("ghcr.io/team/demo", "1", &image).await;
    let layer = blob_path("team/demo", &image.layer(0).digest);
    let has = || ask(&proxy, "HEAD", &layer);
    assert_eq!(has().await.status, 200);
    other.refuses();
    assert_eq!(
        has().await.status,
        200,
        "while it is silent there is no push to spoil"
    );
    other.recovers();
    other.deletes_blob("team/demo", &image.layer(0).digest);
    // A client of a mirror route gets the cached tag. A client that may be pushing gets the registry's response.
    let mirrored = blob_path("ghcr.io/team/demo", &image.layer(0).digest);
    proxy.head(&mirrored).await.is_blob(image.layer(0));
    assert_eq!(has().await.status, 404);
    push(&proxy, "1", &image).await;
    assert_eq!(has().await.status, 200);
}

#[tokio::test]
async fn a_write_that_was_refused_changes_nothing() {
    let (_hub, other, proxy) = two_upstreams().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["one"]));
    proxy.pull("ghcr.io/team/demo", "1", &image).await;
    other.forbids("team/demo");
    let reply = ask(&proxy, "PUT", &manifest_path("team/demo", "1"))
        .body(b"{}")
        .await;
    assert_eq!((reply.status, reply.code()), (403, "DENIED".to_owned()));
    other.refuses();
    proxy.pull("ghcr.io/team/demo", "1", &image).await.is_stale();
}

#[tokio::test]
async fn write_forwards_only_headers_of_the_client() {
    let other = Upstream::start().await;
    other.requires_basic("robot", "own");
    other.lets("ann", "secret", "*");
    let setup = Setup::empty().also("ghcr.io", &other);
    let file = setup.file("password", "own");
    let keys = format!("auth = \"shared\"\nusername = \"robot\"\npassword_file = {file:?}");
    let proxy = setup.upstream_keys("ghcr.io", &keys).start().await;
    let path = manifest_path("team/demo", "1");
    let put = || {
        ask(&proxy, "PUT", &path)
            .header("content-type", OCI_MANIFEST)
            .body(b"{}")
    };
    let stranger = put().await;
    assert_eq!(
        stranger.status, 401,
        "the proxy's own credential writes for nobody: {stranger:#?}"
    );
    assert_eq!(
        stranger.header("www-authenticate"),
        Some("Basic realm=\"scripted upstream\"")
    );
    let reply = put()
        .basic("ann", "secret")
        .header("user-agent", "docker/29")
        .header("x-own", "1");
    assert_eq!(
        reply.header("proxy-authorization", "Basic eDp5").await.status,
        201
    );
    let seen = other
        .requests()
        .into_iter()
        .rfind(|seen| seen.method == "PUT")
        .unwrap();
    assert_eq!(
        (seen.path.as_str(), seen.header("user-agent")),
        (path.as_str(), Some("docker/29"))
    );
    assert_eq!(
        (seen.header("x-own"), seen.header("content-length")),
        (Some("1"), Some("2"))
    );
    assert_eq!(
        (seen.header("content-type"), seen.header("proxy-authorization")),
        (Some(OCI_MANIFEST), None)
    );
    assert_eq!(seen.header("host"), Some(other.address().to_string().as_str()));
}

#[tokio::test]
async fn upload_of_64_mib_is_not_buffered() {
    const SIZE: usize = 64 << 20;
    let (_hub, other, proxy) = two_upstreams().await;
    let bytes = noise(3, SIZE);
    let begun = ask(&proxy, "POST", "/v2/team/demo/blobs/uploads/").await;
    let upload = goes_on(begun.header("location"));
    let before = peak_memory(&proxy);
    let patch = ask(&proxy, "PATCH", &upload).chunked_body(&bytes);
    assert_eq!(patch.header("expect", "100-continue").await.status, 202);
    let grown = peak_memory(&proxy).saturating_sub(before);
    assert!(grown < 24 << 20, "grew by {grown} bytes");
    assert_eq!(other.bytes_received(), SIZE as u64);
    let done = ask(&proxy, "PUT", &format!("{upload}&digest={}", sha256(&bytes))).await;
    assert_eq!(done.status, 201, "{done:#?}");
}

/// Peak memory of the process, in bytes.
fn peak_memory(proxy: &Proxy) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.program().id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn over_h2_and_through_connect_it_is_the_same() {
    let (_hub, other, proxy) = two_upstreams().await;
    let path = manifest_path("team/demo", "1");
    for (tag, protocols) in [("a", &["h2"][..]), ("b", &["http/1.1"])] {
        let put = proxy.ask("PUT", &path.replace("/1", &format!("/{tag}")));
        let put = put.tls(&proxy.ca_pem(), protocols).through_connect("ghcr.io:443");
        let reply = put
            .header("content-type", OCI_MANIFEST)
            .body(b"{}")
            .unchecked()
            .await;
        assert_eq!(reply.status, 201, "{reply:#?}");
        let location = reply.header("location").unwrap();
        assert!(
            location.starts_with("https://ghcr.io/v2/team/demo/"),
            "{location}"
        );
    }
    assert_eq!(
        other
            .requests()
            .iter()
            .filter(|seen| seen.method == "PUT")
            .count(),
        2
    );
}

#[tokio::test]
async fn mirror_routes_reject_writes() {
    let (hub, other, proxy) = two_upstreams().await;
    for path in [
        "/v2/team/demo/manifests/1",
        "/v2/ghcr.io/team/demo/manifests/1",
        "/v2/team/demo/manifests/1?ns=ghcr.io",
        "/v2/team/demo/blobs/uploads/",
    ] {
        for method in ["PUT", "POST", "PATCH", "DELETE"] {
            let reply = proxy.ask(method, path).unchecked().await;
            assert_eq!(
                (reply.status, reply.code()),
                (405, "UNSUPPORTED".to_owned()),
                "{method} {path}"
            );
        }
    }
    assert_eq!((hub.requests().len(), other.requests().len()), (0, 0));
}

#[tokio::test]
async fn request_smuggled_in_a_write_is_not_processed() {
    let (_hub, other, proxy) = two_upstreams().await;
    let hidden = "GET /v2/hidden/manifests/latest HTTP/1.1\r\nHost: ghcr.io\r\n\r\n";
    let head = "PATCH /v2/team/demo/blobs/uploads/upload-1 HTTP/1.1\r\nHost: ghcr.io\r\n";
    for (what, framing, body) in [
        (
            "length and chunks",
            "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        (
            "chunks and length",
            "Transfer-Encoding: chunked\r\nContent-Length: 6\r\n",
            "0\r\n\r\n",
        ),
        ("chunks alone", "Transfer-Encoding: chunked\r\n", "0\r\n\r\n"),
        (
            "chunks twice",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        (
            "another coding",
            "Transfer-Encoding: gzip, chunked\r\n",
            "0\r\n\r\n",
        ),
        (
            "chunks not last",
            "Transfer-Encoding: chunked, identity\r\n",
            "0\r\n\r\n",
        ),
        (
            "a disguised coding",
            "Transfer-Encoding: xchunked\r\n",
            "0\r\n\r\n",
        ),
        (
            "a blank before the colon",
            "Transfer-Encoding : chunked\r\n",
            "0\r\n\r\n",
        ),
        ("two lengths", "Content-Length: 0\r\nContent-Length: 5\r\n", ""),
        (
            "a chunk size that is none",
            "Transfer-Encoding: chunked\r\n",
            "0x5\r\nhello\r\n0\r\n\r\n",
        ),
    ] {
        let reply = raw(
            proxy.registry_address(),
            format!("{head}{framing}\r\n{body}{hidden}").as_bytes(),
        )
        .await;
        assert!(reply.replies() <= 1, "{what}: {}", reply.text);
        assert!(
            !other.requests().iter().any(|seen| seen.path.contains("hidden")),
            "{what}"
        );
        let plain = what == "chunks alone" || what.contains("length and") || what.contains("and length");
        if !plain {
            assert!(
                !matches!(reply.status(), Some(200..=299)),
                "{what}: {}",
                reply.text
            );
        }
    }
    // The registry received one framing.
    for seen in other.requests() {
        let framings = [seen.header("content-length"), seen.header("transfer-encoding")];
        assert_eq!(framings.iter().flatten().count(), 1, "{seen:#?}");
    }
    // A read needs no chunked body, at the cache or at an upstream.
    let reading = format!(
        "GET /v2/team/demo/manifests/1 HTTP/1.1\r\nHost: ghcr.io\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"
    );
    let reply = raw(proxy.registry_address(), reading.as_bytes()).await;
    assert_eq!(
        (reply.status(), reply.replies()),
        (Some(400), 1),
        "{}",
        reply.text
    );
}

#[tokio::test]
async fn path_traversal_in_a_write_is_not_forwarded() {
    let (_hub, other, proxy) = two_upstreams().await;
    for (path, status) in [
        ("/v2/../admin", 400),
        ("/v2/%2e%2e/admin", 400),
        ("/v2/team/./blobs/uploads/", 400),
        ("/x/../../y", 404),
    ] {
        let bytes = format!(
            "POST {path} HTTP/1.1\r\nHost: ghcr.io\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert_eq!(reply.status(), Some(status), "{path}: {}", reply.text);
    }
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test]
async fn unavailable_registry_and_aborted_upload_end_the_push() {
    let (_hub, other, proxy) = two_upstreams().await;
    let path = manifest_path("team/demo", "1");
    let head = format!("PUT {path} HTTP/1.1\r\nHost: ghcr.io\r\nContent-Length: 100\r\n\r\nshort");
    let mut stream = tokio::net::TcpStream::connect(proxy.registry_address())
        .await
        .unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes())
        .await
        .unwrap();
    other
        .until("the write", |seen| seen.iter().any(|seen| seen.method == "PUT"))
        .await;
    drop(stream);
    other.refuses();
    let reply = ask(&proxy, "PUT", &path).body(b"{}").await;
    assert!(matches!(reply.status, 502..=504), "{reply:#?}");
    assert!(reply.message().contains("ghcr.io"), "{reply:#?}");
}
