#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::path::Path;

use serde_json::json;

use super::canary::{Image, result};
use super::*;

fn image(text: &str) -> Image {
    Image::read(text).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn an_image_is_read_by_dockers_rules() {
    for (text, registry, repository, reference) in [
        ("alpine", "docker.io", "library/alpine", "latest"),
        ("alpine:3.20", "docker.io", "library/alpine", "3.20"),
        (
            "docker.io/library/alpine",
            "docker.io",
            "library/alpine",
            "latest",
        ),
        ("index.docker.io/acme/x", "docker.io", "acme/x", "latest"),
        ("ghcr.io/acme/x:1", "ghcr.io", "acme/x", "1"),
        ("localhost:5000/x", "localhost:5000", "x", "latest"),
        ("alpine@sha256:ab", "docker.io", "library/alpine", "sha256:ab"),
    ] {
        let read = image(text);
        let got = (
            read.registry.as_str(),
            read.repository.as_str(),
            read.reference.as_str(),
        );
        assert_eq!(got, (registry, repository, reference), "{text}");
    }
    for wrong in ["", "alpine:", "ghcr.io/", "a b", "alpine?x=1", "alpine&tag=x"] {
        assert_eq!(Image::read(wrong), None, "{wrong}");
    }
}

fn event(repository: &str, reference: &str, outcome: &str) -> Value {
    json!({ "repository": repository, "reference": reference, "result": outcome, "reason": "r", "route": "mirror" })
}

#[test]
fn pull_missing_from_the_log_fails_the_canary() {
    let hello = image("hello-world");
    let other = [
        event("library/other", "latest", "hit"),
        event("library/hello-world", "1.0", "hit"),
    ];
    let seen = [event("library/hello-world", "latest", "hit")];
    let by_digest = [event("library/hello-world", "sha256:ab", "hit")];
    let refused = [event("library/hello-world", "latest", "denied")];
    let broken = || Err("it broke".to_owned());

    assert_eq!(result(&hello, &Ok(()), &seen).state, State::Ok);
    assert_eq!(result(&hello, &Ok(()), &by_digest).state, State::Ok);
    for (pulled, events, part) in [
        (Ok(()), &[][..], "NOT through"),
        (Ok(()), &other[..], "NOT through"),
        (Ok(()), &refused[..], "without the cache"),
        (broken(), &[][..], "did not request it from this cache: it broke"),
        (broken(), &seen[..], "the pull failed: it broke"),
    ] {
        let check = result(&hello, &pulled, events);
        assert_eq!(check.state, State::Failed, "{check:?}");
        assert!(check.found.contains(part), "{check:?}");
        assert!(!check.remedy.is_empty());
    }
}

fn options() -> Options {
    Options {
        address: None,
        ca: None,
        canary: "hello-world".to_owned(),
        docker: PathBuf::from("/var/run/docker.sock"),
    }
}

fn is_ours(listen: &str, url: &str) -> bool {
    let text = format!("[listen]\nregistry = {listen}\n[tls]\nnames = [\"cache.example.org\"]");
    let config = Config::read(&text, Path::new("/ifnewer.toml")).unwrap();
    let root = RootFs::open(Path::new("/")).unwrap();
    let context = CheckContext {
        config: &config,
        options: &options(),
        root: &root,
        endpoint: Err(SetupError::Address(String::new())),
        now: SystemTime::UNIX_EPOCH,
    };
    context.is_ours(url)
}

#[test]
fn our_own_address_is_known_in_every_spelling() {
    for (listen, url) in [
        ("[\"127.0.0.1:5000\"]", "http://127.0.0.1:5000/"),
        ("[\"127.0.0.1:5000\"]", "http://localhost:5000"),
        ("[\"[::1]:5000\"]", "https://[::1]:5000/"),
        ("[\"0.0.0.0:5000\"]", "http://172.17.0.1:5000"),
        ("[\"10.0.0.5:443\"]", "https://cache.example.org"),
        ("[\"10.0.0.5:5000\"]", "10.0.0.5:5000"),
    ] {
        assert!(is_ours(listen, url), "{listen} {url}");
    }
    for (listen, url) in [
        ("[\"127.0.0.1:5000\"]", "http://127.0.0.1:5001"),
        ("[\"127.0.0.1:5000\"]", "https://mirror.gcr.io"),
        ("[\"0.0.0.0:5000\"]", "https://mirror.example.org:5000"),
        ("[\"10.0.0.5:5000\"]", "http://127.0.0.1:5000"),
        ("[\"127.0.0.1:5000\"]", ""),
    ] {
        assert!(!is_ours(listen, url), "{listen} {url}");
    }
}

#[test]
fn the_exit_code_is_how_many_failed() {
    let mut report = Report(vec![
        Check::ok("a", "b"),
        Check::skipped("c", "d"),
        Check::failed("e", "f", "g"),
    ]);
    assert_eq!(report.exit_code(), 1);
    assert_eq!(report.json()["failed"], 1);
    assert_eq!(report.json()["checks"][2]["remedy"], "g");
    let text = report.to_string();
    assert!(text.contains("FAILED   e                  f; g\n"), "{text}");
    assert!(text.ends_with("1 ok, 1 failed, 1 skipped\n"), "{text}");
    report
        .0
        .extend(std::iter::repeat_n(Check::failed("e", "f", "g"), 1_000));
    assert_eq!(report.exit_code(), 100);
}

#[test]
fn what_the_running_cache_finds_counts_too() {
    let told = |further: Value| {
        let mut upstream = json!({ "name": "docker.io", "unavailable": null, "rate_limits": [] });
        upstream
            .as_object_mut()
            .unwrap()
            .extend(further.as_object().unwrap().clone());
        let seen = json!({ "upstreams": [{ "name": "ghcr.io", "unavailable": { "text": "x" } }, upstream] });
        cache::merge_results(Check::ok("u", "available"), "docker.io", Some(&seen))
    };
    assert_eq!(told(json!({})).state, State::Ok);
    let limits = |left: u64| {
        json!({ "rate_limits": [{ "remaining": 50, "limit": 200, "credential": "cache" },
        { "remaining": left, "limit": 100, "credential": "anonymous" }, { "remaining": null }] })
    };
    let check = told(limits(7));
    assert!(
        check.found.contains("7 of 100 pulls left for \"anonymous\""),
        "{check:?}"
    );
    assert_eq!(told(limits(0)).state, State::Failed);
    let check = told(json!({ "unavailable": { "text": "docker.io refused the connection" } }));
    assert!(
        check.state == State::Failed && check.found.contains("refused"),
        "{check:?}"
    );
}

#[test]
fn ipv6_admin_address_is_bracketed_in_host() {
    let admin = Admin::Tcp("[::1]:5001".parse().unwrap());
    let mut host = String::new();
    let target = Target::admin(&admin, &mut host);
    assert!(matches!(target, Some(Target::Plain("[::1]", 5001))));
}

#[test]
fn stopped_shared_storage_fails_the_check() {
    let stopped = json!({ "seconds": 3, "failure": "denied" });
    for (storage, state, part) in [
        (json!(null), State::Failed, "does not use it"),
        (json!({ "name": "s3://a" }), State::Ok, "s3://a is used"),
        (
            json!({ "name": "s3://a", "conditions_kept": false }),
            State::Ok,
            "ignores conditions",
        ),
        (
            json!({ "name": "s3://a", "reads_stopped": stopped }),
            State::Failed,
            "s3://a cannot be read: denied",
        ),
        (
            json!({ "name": "s3://a", "writes_stopped": stopped }),
            State::Failed,
            "s3://a accepts no uploads: denied",
        ),
    ] {
        let check = cache::judge_shared_storage("shared storage", &json!({ "storage": storage }));
        assert_eq!(check.state, state, "{storage}");
        assert!(check.found.contains(part), "{}", check.found);
    }
}
