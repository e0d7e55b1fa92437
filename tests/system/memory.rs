//! What is in the memory of an idle process: no password of a client that has gone.
//!
//! Free buffers of HTTP and TLS may still hold a header as it came, which has it in base64; nothing of ours holds what was
//! read out of it.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;

use crate::proxy::{Ask, Proxy, Setup};
use crate::upstream::{Image, Upstream};

const STEP_BYTES: usize = 1 << 20;

/// Which of `canaries` are in the memory of the process that it can write to, and how often.
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
            // What lies across the edge of two steps is in the next one whole.
            let whole = at + read as u64 >= end;
            at += if whole { read } else { read - longest } as u64;
        }
    }
    let counted = canaries.iter().map(String::as_str).zip(counts);
    counted.filter(|(_, count)| *count > 0).collect()
}

#[tokio::test]
async fn an_idle_process_has_no_password_in_its_memory() {
    let upstream = Upstream::start_tls().await;
    upstream.requires_token();
    upstream.lets("alice", "canary-of-alice", "acme/app");
    upstream.lets("service", "canary-of-service", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let setup = Setup::over(&upstream).also("shared.test", &upstream);
    let password = setup.file("password", "canary-of-service\n");
    let shared = format!("access = \"shared\"\nusername = \"service\"\npassword_file = {password:?}");
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
    // Its connections end, and with them what they keep at hand.
    upstream.refuses();
    proxy.has_turned(3).await;

    let canaries = ["canary-of-alice", "canary-guessed"].map(str::to_owned);
    assert_eq!(found(&proxy, &canaries), []);
    // Found it would have been: this one is in use.
    let own = ["canary-of-service".to_owned()];
    assert!(!found(&proxy, &own).is_empty(), "the memory was not read");
}
