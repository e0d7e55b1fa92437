//! Process memory: no password of a disconnected client, and response bytes within the budget.
//!
//! Free buffers of HTTP and TLS may still contain a header as received, in base64. The cache itself keeps nothing
//! decoded from it.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::proxy::{Ask, Proxy, Reply, Setup};
use crate::registry::{Image, Upstream, within};

const STEP_BYTES: usize = 1 << 20;

/// Which of `canaries` are in writable memory of the process, and how often.
fn found<'a>(proxy: &Proxy, canaries: &'a [String]) -> Vec<(&'a str, usize)> {
    let process = format!("/proc/{}", proxy.program().id());
    let maps = BufReader::new(File::open(format!("{process}/maps")).unwrap());
    let memory = File::open(format!("{process}/mem")).unwrap();
    let mut counts = vec![0; canaries.len()];
    let longest = canaries.iter().map(String::len).max().unwrap();
    for line in maps.lines().map(Result::unwrap) {
        let mut words = line.split_whitespace();
        let (range, mode) = (words.next().unwrap(), words.next().unwrap());
        if !mode.starts_with("rw") || line.ends_with("[vvar]") {
            continue;
        }
        let ends = range.split_once('-').unwrap();
        let [mut at, end] = [ends.0, ends.1].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        while at < end {
            let mut step = vec![0; STEP_BYTES.min(usize::try_from(end - at).unwrap())];
            let read = memory.read_at(&mut step, at).unwrap_or(0);
            if read == 0 {
                break;
            }
            let part = &step[..read];
            for (canary, count) in canaries.iter().zip(&mut counts) {
                let bytes = canary.as_bytes();
                *count += part
                    .windows(bytes.len())
                    .filter(|window| *window == bytes)
                    .count();
            }
            // A match across two chunks is complete in the next one.
            let whole = at + read as u64 >= end;
            at += if whole { read } else { read - longest } as u64;
        }
    }
    let counted = canaries.iter().map(String::as_str).zip(counts);
    counted.filter(|(_, count)| *count > 0).collect()
}

#[tokio::test]
async fn idle_process_has_no_password_in_memory() {
    let upstream = Upstream::start_tls().await;
    upstream.requires_token();
    upstream.lets("alice", "canary-of-alice", "acme/app");
    upstream.lets("service", "canary-of-service", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let setup = Setup::over(&upstream).also("shared.test", &upstream);
    let password = setup.file("password", "canary-of-service\n");
    let shared = format!("auth = \"shared\"\nusername = \"service\"\npassword_file = {password:?}");
    let local = format!("local_tokens = \"{}/token\"", upstream.url());
    let setup = setup.upstream_keys("shared.test", &shared);
    let proxy = setup.upstream_keys("docker.io", &local).start().await;
    let (ca, host) = (proxy.ca_pem(), upstream.address().to_string());
    let alice = |ask: Ask| ask.basic("alice", "canary-of-alice");
    let dresses: [&dyn Fn(Ask) -> Ask; 3] = [&|ask| ask, &|ask| ask.tls(&ca, &["h2"]), &|ask| {
        ask.tls(&ca, &["http/1.1"])
    }];
    for dress in dresses {
        proxy
            .pull_with("acme/app", "1", &image, |ask| dress(alice(ask)))
            .await;
        proxy.pull_with("shared.test/acme/app", "1", &image, dress).await;
        let guess = proxy.manifest("acme/app", "1").basic("alice", "canary-guessed");
        dress(guess).unchecked().await;
    }
    let token = alice(proxy.get("/token?scope=repository:acme/app:pull"));
    assert_eq!(token.header("host", &host).unchecked().await.status, 200);
    // Its connections end, and their buffers with them.
    upstream.refuses();
    proxy.has_turned(3).await;

    let canaries = ["canary-of-alice", "canary-guessed"].map(str::to_owned);
    assert_eq!(found(&proxy, &canaries), []);
    // Control: this one is in use, and found.
    let own = ["canary-of-service".to_owned()];
    assert!(!found(&proxy, &own).is_empty(), "the memory was not read");
}

/// A kind of HTTP/2 frame.
const HEADERS: u8 = 1;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An HPACK header without table reference.
fn header(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    for text in [name, value] {
        let length = u8::try_from(text.len()).unwrap();
        match length.checked_sub(127) {
            None => bytes.push(length),
            Some(rest) => bytes.extend([127, rest]),
        }
        bytes.extend(text.as_bytes());
    }
    bytes
}

/// An HTTP/2 connection with a closed window and the maximum number of `GET`s of `path`.
async fn shut_connection(proxy: &Proxy, path: &str, streams: u32) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.registry_address()).await.unwrap();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]));
    for number in 0..streams {
        let head = [
            header(":method", "GET"),
            header(":scheme", "http"),
            header(":authority", "localhost"),
            header(":path", path),
        ];
        bytes.extend(frame(HEADERS, 0b101, 2 * number + 1, &head.concat()));
    }
    stream.write_all(&bytes).await.unwrap();
    stream
}

/// Reads until this many responses have begun.
async fn begun(stream: &mut TcpStream, mut responses: u32) {
    while responses > 0 {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        stream.read_exact(&mut payload).await.unwrap();
        responses -= u32::from(head[3] == HEADERS);
    }
}

/// Resident memory in MiB.
fn resident(proxy: &Proxy) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.program().id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim()
        .strip_suffix(" kB")
        .unwrap()
        .trim()
        .parse::<u64>()
        .unwrap()
        / 1024
}

/// Bytes in memory by the metric.
fn outstanding(metrics: &Reply) -> u64 {
    let text = std::str::from_utf8(&metrics.body).unwrap();
    let mut values = text
        .lines()
        .filter_map(|line| line.strip_prefix("ifnewer_egress_buffered_bytes "));
    values.next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn t03_unread_h2_streams_stay_within_the_budget() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/app", "1", Image::of_noise(1, 3_000_000));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/app", "1", &image).await;
    let path = format!("/v2/library/app/blobs/{}", image.layer(0).digest);
    proxy.get(&path).await.is_blob(image.layer(0));
    let before = resident(&proxy);
    let mut connections = Vec::new();
    for _ in 0..12 {
        connections.push(shut_connection(&proxy, &path, 100).await);
    }
    for connection in &mut connections {
        within("the responses to begin", begun(connection, 100)).await;
    }
    proxy.has_turned(50).await;

    // Each would hold 256 KiB: 300 MiB.
    let grown = resident(&proxy).saturating_sub(before);
    assert!(grown < 80, "grew by {grown} MiB");
    let held = outstanding(&proxy.admin("/metrics").await);
    assert!(
        (1_200 * 4_096..=36 << 20).contains(&held),
        "{held} bytes in memory"
    );
    // A client that reads gets the complete blob, from the same address.
    proxy.get(&path).await.is_blob(image.layer(0));

    drop(connections);
    proxy
        .until(
            "what was in memory to be given back",
            |proxy| proxy.admin("/metrics"),
            |reply| outstanding(reply) == 0,
        )
        .await;
}

#[tokio::test]
async fn t03_unread_downloaded_blob_is_not_in_memory() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/app", "1", Image::of_noise(2, 16_000_000));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/app", "1", &image).await;
    let digest = &image.layer(0).digest;
    proxy.until_kept(digest).await;
    let request = format!("GET /v2/library/app/blobs/{digest} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let mut connections = Vec::new();
    for _ in 0..4 {
        let mut stream = TcpStream::connect(proxy.registry_address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        // The response has begun, and the client reads no further.
        stream.read_exact(&mut [0; 64]).await.unwrap();
        connections.push(stream);
    }
    proxy.has_turned(10).await;
    assert_eq!(outstanding(&proxy.admin("/metrics").await), 0);
    assert_eq!(upstream.blob_gets(digest), 1);
}

/// The allocator settings of a started process.
fn heap_settings(proxy: &Proxy) -> Vec<String> {
    let environment = std::fs::read(format!("/proc/{}/environ", proxy.program().id())).unwrap();
    let variables = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    variables
        .filter(|variable| variable.starts_with("MALLOC_"))
        .map(std::borrow::Cow::into_owned)
        .collect()
}

#[cfg(target_env = "gnu")]
#[tokio::test]
async fn t18_serve_has_one_arena_unless_told_otherwise() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let settings = heap_settings(&proxy);
    assert!(
        settings.contains(&"MALLOC_ARENA_MAX=1".to_owned()),
        "{settings:?}"
    );
    assert_eq!(settings.len(), 3);

    let own = Setup::over(&upstream).environment("MALLOC_ARENA_MAX", "4");
    let proxy = own.start().await;
    assert_eq!(heap_settings(&proxy), ["MALLOC_ARENA_MAX=4"]);
}
