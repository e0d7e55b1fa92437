//! Access log: one record per request, written when the response has ended.

use crate::download::corruption::{SIZE, overwrite, with_a_layer};
use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Blob, Image, Upstream};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;
use std::fs::File;
use std::io::Read as _;

/// The line of the access log about a blob.
async fn line(proxy: &Proxy, blob: &Blob) -> String {
    let part = format!("image=\"library/demo@{}\" status=", blob.digest);
    proxy.program().says(&part).await
}

/// The events about a blob, when there is one.
async fn events(proxy: &Proxy, blob: &Blob) -> Vec<Value> {
    let path = format!("/api/v1/events?image={}", blob.digest);
    let of = |reply: &crate::proxy::Reply| reply.json()["events"].as_array().unwrap().clone();
    let reply = proxy
        .until(
            "an event",
            |proxy| proxy.admin(&path),
            |reply| !of(reply).is_empty(),
        )
        .await;
    of(&reply)
}

async fn metrics(proxy: &Proxy) -> String {
    String::from_utf8(proxy.admin("/metrics").await.body.to_vec()).unwrap()
}

fn requests(text: &str, labels: &[&str]) -> u64 {
    let lines = text
        .lines()
        .filter(|line| line.starts_with("ifnewer_requests_total{"));
    let lines = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
    lines
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

fn incomplete(text: &str, ended: &str) -> u64 {
    let name = format!("ifnewer_response_incomplete_total{{ended=\"{ended}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

#[tokio::test]
async fn log_that_is_not_read_delays_no_pull() {
    const PULLS: usize = 600;
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::of_noise(9, 10));
    let setup = Setup::over(&upstream).default_keys("max_age = \"1h\"");
    let pipe = setup.folder().join("log");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Also open for writing, so that neither this nor the program waits for the other end.
    let mut reader = File::options().read(true).write(true).open(&pipe).unwrap();
    let redirected = format!("exec \"$@\" 2>'{}'", pipe.display());
    let proxy = setup.through(&["sh", "-c", &redirected, "sh"]).start().await;
    for _ in 0..PULLS {
        assert_eq!(proxy.manifest("library/demo", "latest").await.status, 200);
    }
    // A pipe holds 64 KiB, and each line has more than 200 bytes.
    let mut read = vec![0; 64 * 1024];
    reader.read_exact(&mut read).unwrap();
    let line = b"request served upstream=";
    assert!(read.windows(line.len()).filter(|part| part == line).count() > 100);
    reader.read_exact(&mut read[..PULLS * 200 - 64 * 1024]).unwrap();
}

#[tokio::test]
async fn e14_access_record_is_written_at_the_end_of_the_body() {
    let (upstream, proxy, blob) = with_a_layer(1).await;
    let gate = upstream.holds_blob(&blob.digest, SIZE / 2);
    let trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01";
    let mut flow = proxy
        .blob("library/demo", &blob.digest)
        .header("traceparent", trace)
        .stream()
        .await;
    gate.reached().await;
    flow.read(SIZE / 4).await;
    proxy.has_turned(3).await;
    assert!(!proxy.program().stderr().contains("kind=\"blob\" status"));
    assert_eq!(requests(&metrics(&proxy).await, &["kind=\"blob\""]), 0);
    // The client is counted while its response is still being sent.
    let seen = proxy.admin("/api/v1/clients").await.json();
    assert!(seen["clients"][0]["requests"].as_u64().unwrap() > 1, "{seen}");

    gate.release();
    assert!(flow.rest().await.is_ok());
    let line = line(&proxy, &blob).await;
    for part in [
        "status=200",
        "result=\"miss\"",
        "ended=\"complete\"",
        &format!("bytes={SIZE}"),
        "client=127.0.0.1",
        "trace_id=0123456789abcdef0123456789abcdef",
        "first_byte_ms=",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let text = metrics(&proxy).await;
    assert_eq!(requests(&text, &["kind=\"blob\"", "result=\"miss\""]), 1);
    assert_eq!(incomplete(&text, "aborted"), 0);
}

#[tokio::test]
async fn e14_client_that_leaves_is_recorded_as_aborted_over_h1_and_h2() {
    for protocol in ["http/1.1", "h2"] {
        let (upstream, proxy, blob) = with_a_layer(2).await;
        let gate = upstream.holds_blob(&blob.digest, SIZE / 2);
        let ask = proxy.blob("library/demo", &blob.digest);
        let mut flow = ask.tls(&proxy.ca_pem(), &[protocol]).stream().await;
        flow.read(SIZE / 4).await;
        gate.reached().await;
        drop(flow);

        let events = events(&proxy, &blob).await;
        assert_eq!(events.len(), 1, "{events:?}");
        let event = &events[0];
        assert_eq!(
            (&event["result"], &event["ended"]),
            (&"aborted".into(), &"aborted".into())
        );
        let bytes = usize::try_from(event["bytes"].as_u64().unwrap()).unwrap();
        assert!((SIZE / 4..=SIZE / 2).contains(&bytes), "{protocol}: {bytes}");
        let text = metrics(&proxy).await;
        assert_eq!(requests(&text, &["kind=\"blob\"", "result=\"aborted\""]), 1);
        assert_eq!(requests(&text, &["kind=\"blob\""]), 1, "once");
        assert_eq!(incomplete(&text, "aborted"), 1);
        gate.release();
    }
}

#[tokio::test]
async fn e14_client_that_leaves_before_the_head_is_recorded_as_499() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let gate = upstream.holds_answers(|seen| seen.path.contains("/manifests/"));
    let ask = proxy.manifest("library/demo", "1");
    let asking = tokio::spawn(ask.tried());
    gate.reached().await;
    asking.abort();
    let line = proxy.program().says("image=\"library/demo:1\" status=499").await;
    assert!(
        line.contains("ended=\"aborted\"") && line.contains("reason=\"client-left\""),
        "{line}"
    );
    gate.release();
}

#[tokio::test]
async fn e14_hit_that_broke_off_is_no_hit() {
    let (_upstream, proxy, blob) = with_a_layer(3).await;
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
    let path = proxy.until_kept(&blob.digest).await;
    let proxy = proxy.restart().await;
    overwrite(&path, |bytes| bytes[SIZE / 2] ^= 1);

    proxy.blob("library/demo", &blob.digest).visibly_fails().await;
    let line = line(&proxy, &blob).await;
    for part in [
        "WARN",
        "status=200",
        "result=\"failed\"",
        "ended=\"damaged\"",
        "client=127.0.0.1",
        "trace_id=",
        "error=",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let events = events(&proxy, &blob).await;
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0]["result"], "failed");
    let sentence = events[0]["sentence"].as_str().unwrap();
    assert!(sentence.contains("damaged"), "{sentence}");
    let text = metrics(&proxy).await;
    assert_eq!(requests(&text, &["kind=\"blob\"", "result=\"hit\""]), 0);
    assert_eq!(incomplete(&text, "damaged"), 1);
    let page = String::from_utf8(proxy.admin("/").await.body.to_vec()).unwrap();
    assert!(page.contains("mark failed"), "the page shows it");
}

#[tokio::test]
async fn e14_upstream_that_sends_wrong_bytes_is_named_in_the_record() {
    let (upstream, proxy, blob) = with_a_layer(4).await;
    upstream.corrupts_blob();
    // The response begins before the end of the blob is verified.
    upstream.drips(1_000_000);
    let mut stream = Ask::new(proxy.admin_address(), "GET", "/api/v1/events/stream")
        .stream()
        .await;
    stream.read(b": watching\n\n".len()).await;
    proxy.blob("library/demo", &blob.digest).visibly_fails().await;
    let told = stream.read(400).await;
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(
        told.contains("event: decision") && told.contains(&blob.digest),
        "live too: {told}"
    );
    let events = events(&proxy, &blob).await;
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0]["ended"], "upstream-failed", "{events:?}");
    assert_eq!(incomplete(&metrics(&proxy).await, "upstream-failed"), 1);
}

#[tokio::test]
async fn e14_head_and_not_modified_are_recorded_once_and_complete() {
    let (_upstream, proxy, blob) = with_a_layer(5).await;
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
    proxy
        .head(&crate::proxy::blob_path("library/demo", &blob.digest))
        .await;
    let etag = format!("\"{}\"", blob.digest);
    let known = proxy
        .blob("library/demo", &blob.digest)
        .header("if-none-match", &etag);
    assert_eq!(known.await.status, 304);
    let text = metrics(&proxy).await;
    assert_eq!(requests(&text, &["kind=\"blob\""]), 3);
    assert_eq!(incomplete(&text, "aborted"), 0);
}
