#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

mod files;
mod invalid;
mod network;
mod overlay;
mod rendering;
mod shared;
mod show;

use std::fmt::Write as _;

use super::*;
use crate::policy::{OnNotFound, Policy};

const FIXTURE: &str = include_str!("../../config/ifnewer.toml");

fn read(text: &str) -> Config {
    Config::read(text, Path::new("/etc/ifnewer/ifnewer.toml")).unwrap_or_else(|faults| panic!("{faults}"))
}

/// Loads a text with variables and flags, relative to the working directory.
fn gather(
    text: &str,
    variables: &[(&str, &str)],
    flags: &[(&'static str, &'static str, &str)],
) -> Result<Config, Diagnostics> {
    Config::gather(&Sources {
        data: PathBuf::from("/home/user/.cache/ifnewer"),
        working_dir_certs: None,
        text,
        origin: Path::new(""),
        variables: variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        flags: flags
            .iter()
            .map(|(name, key, value)| Flag {
                name,
                key,
                value: (*value).to_owned(),
            })
            .collect(),
    })
}

fn same(left: &Config, right: &Config) {
    assert_eq!(format!("{left:#?}"), format!("{right:#?}"));
}

fn urls(upstream: &UpstreamConfig) -> Vec<String> {
    upstream.urls.iter().map(ToString::to_string).collect()
}

#[test]
fn an_empty_file_works() {
    let config = read("");
    assert_eq!(config.data, Path::new("/var/cache/ifnewer"));
    assert_eq!(&*config.default_upstream, "docker.io");
    assert_eq!(config.listen.registry, ["127.0.0.1:5000".parse().unwrap()]);
    assert_eq!(config.listen.plain_http, PlainHttp::Loopback);
    assert_eq!(config.listen.admin, Admin::Tcp("127.0.0.1:5001".parse().unwrap()));
    assert_eq!(
        config.tls,
        Tls {
            folder: PathBuf::from("/etc/ifnewer/certs"),
            names: vec![],
            constrained: true,
            certificate: None
        }
    );
    assert_eq!(
        config.store,
        StoreLimits {
            bytes_max: 50 << 30,
            free_bytes_min: 5 << 30,
            scrub_rate: 20 << 20
        }
    );
    assert_eq!(
        config.log,
        Log {
            level: "info".to_owned(),
            format: LogFormat::Human
        }
    );
    assert_eq!(config.limits.connections_max, 4096);
    assert_eq!(config.limits.drain, Duration::from_secs(30));

    let rule = config.rules.default_for("docker.io");
    assert_eq!(
        (&*rule.name, rule.policy, rule.on_not_found),
        ("default", Policy::IfNewer, OnNotFound::Refuse)
    );
    assert_eq!(
        (rule.max_age, rule.stale_if_error, rule.revalidate_timeout),
        (Duration::ZERO, None, Duration::from_secs(2))
    );
    assert_eq!(
        (rule.grant_ttl.as_secs(), rule.grant_ttl_offline.as_secs()),
        (300, 43_200)
    );
}

#[test]
fn the_well_known_upstreams_exist() {
    let config = read("");
    let names: Vec<&str> = config.upstreams.iter().map(|upstream| &*upstream.name).collect();
    assert_eq!(
        names,
        WELL_KNOWN.iter().map(|known| known.name).collect::<Vec<_>>()
    );
    let hub = config.upstream("index.docker.io").unwrap();
    assert_eq!(&*hub.name, "docker.io");
    assert_eq!(urls(hub), ["https://registry-1.docker.io"]);
    assert_eq!(hub.auth, AuthMode::PerClient);
    assert_eq!(hub.credential, None);
    assert_eq!(urls(config.upstream("quay.io").unwrap()), ["https://quay.io"]);
    assert!(config.upstream("example.org").is_none());
}

#[test]
fn the_fixture_is_the_default() {
    same(&read(FIXTURE), &read(""));
}

#[test]
fn the_fixture_with_every_comment_removed_is_the_default() {
    let mut text = String::new();
    let mut keys = 0;
    for line in FIXTURE.lines() {
        let setting = line
            .strip_prefix('#')
            .filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
        keys += usize::from(setting.is_some());
        writeln!(text, "{}", setting.unwrap_or(line)).unwrap();
    }
    assert!(keys > 30, "{keys}");
    same(&read(&text), &read(""));
}

#[test]
fn the_fixture_shows_every_key_with_its_default() {
    for key in KEYS.iter() {
        let line = key.default.map_or_else(
            || key.name.to_owned(),
            |default| format!("#{} = {default}", key.name),
        );
        assert!(FIXTURE.contains(&line), "config/ifnewer.toml lacks {line}");
        assert!(key.doc.ends_with('.'), "{}", key.path());
    }
    for known in WELL_KNOWN {
        assert!(FIXTURE.contains(known.name), "{}", known.name);
    }
}

#[test]
fn paths_in_the_file_start_at_its_folder() {
    let config = read("data = \"d\"\n[tls]\nfolder = \"/t\"\ncertificate = \"c.pem\"\nkey = \"../k.pem\"");
    assert_eq!(config.data, Path::new("/etc/ifnewer/d"));
    assert_eq!(config.tls.folder, Path::new("/t"));
    let own = config.tls.certificate.unwrap();
    assert_eq!(
        (own.certificate, own.key),
        ("/etc/ifnewer/c.pem".into(), "/etc/ifnewer/../k.pem".into())
    );
}

#[test]
fn upstreams_are_added_changed_and_removed() {
    let config = read(
        r#"
        default_upstream = "registry.example.org:5000"
        [upstream."registry.example.org:5000"]
        url = ["https://a.example.org/", "http://b.example.org:8080/registry/"]
        hosts = ["r.example.org"]
        auth = "shared"
        proxy = "http://proxy.example.org:3128/"
        connect_timeout = "500ms"
        policy = "always"
        stale_if_error = "1h"
        [upstream."plain.example.org"]
        [upstream."docker.io"]
        url = "https://mirror.example.org"
        grant_ttl_offline = "24h"
        [upstream."quay.io"]
        enabled = false
        "#,
    );
    let added = config.upstream("r.example.org").unwrap();
    assert_eq!(
        urls(added),
        ["https://a.example.org", "http://b.example.org:8080/registry"]
    );
    assert_eq!(added.auth, AuthMode::Shared);
    assert_eq!(
        added.proxy,
        Proxy::Url("http://proxy.example.org:3128".to_owned())
    );
    assert_eq!(added.connect_timeout, Duration::from_millis(500));
    let rule = config.rules.default_for(&added.name);
    assert_eq!(
        (&*rule.name, rule.policy),
        ("upstream registry.example.org:5000", Policy::Always)
    );
    assert_eq!(rule.stale_if_error, Some(Duration::from_secs(3600)));

    assert_eq!(
        urls(config.upstream("plain.example.org").unwrap()),
        ["https://plain.example.org"]
    );
    let hub = config.upstream("registry-1.docker.io").unwrap();
    assert_eq!(urls(hub), ["https://mirror.example.org"]);
    assert_eq!(
        config.rules.default_for("docker.io").grant_ttl_offline,
        Duration::from_secs(86_400)
    );
    assert!(config.upstream("quay.io").is_none());
    assert_eq!(config.upstreams.len(), WELL_KNOWN.len() + 1);
}

#[test]
fn rules_hold_in_their_order() {
    let config = read(
        r#"
        [default]
        max_age = "1m"
        [upstream."ghcr.io"]
        revalidate_timeout = "1s"
        [[rule]]
        images = ["ghcr.io/acme/*:nightly-*"]
        policy = "always"
        [[rule]]
        images = ["docker.io/nginx", "ghcr.io/acme/*"]
        on_not_found = "serve-stale"
        stale_if_error = "forever"
        "#,
    );
    let find = |upstream, repository: &str, tag: &str| {
        config.rules.find(
            upstream,
            &repository.parse().unwrap(),
            Some(&tag.parse().unwrap()),
        )
    };
    let nightly = find("ghcr.io", "acme/web", "nightly-1");
    assert_eq!(
        (&*nightly.name, nightly.policy),
        ("rule 1: ghcr.io/acme/*:nightly-*", Policy::Always)
    );
    assert_eq!(
        (nightly.max_age.as_secs(), nightly.revalidate_timeout.as_secs()),
        (60, 1)
    );
    let stable = find("ghcr.io", "acme/web", "v1");
    assert_eq!(
        (&*stable.name, stable.on_not_found),
        ("rule 2: docker.io/nginx, ghcr.io/acme/*", OnNotFound::ServeStale)
    );
    assert_eq!(
        &*find("docker.io", "library/nginx", "v1").name,
        "rule 2: docker.io/nginx, ghcr.io/acme/*"
    );
    assert_eq!(&*find("ghcr.io", "other/web", "v1").name, "upstream ghcr.io");
}

#[test]
fn summary_shows_effective_settings() {
    let text = "[[rule]]\nimages = [\"ghcr.io/acme/*\"]\npolicy = \"never\"\n[upstream.\"quay.io\"]\npolicy = \"always\"";
    let summary = read(text).summary().to_string();
    for line in [
        "registry  127.0.0.1:5000 (plain HTTP from loopback)",
        "admin     127.0.0.1:5001",
        "store     50.0 GiB, 5.0 GiB kept free",
        "  quay.io  https://quay.io: always, max_age 0s, stale_if_error forever, revalidate_timeout 2s, on_not_found refuse, grant_ttl 5m, grant_ttl_offline 12h",
        "  rule 1: ghcr.io/acme/*",
    ] {
        assert!(summary.lines().any(|l| l == line), "{line}\n{summary}");
    }
}

#[test]
fn min_age_applies_by_default_upstream_and_rule() {
    let config = read(
        "[default]
        min_age = \"3d\"
        [upstream.\"ghcr.io\"]
        min_age = \"0s\"
        [[rule]]
        images = [\"docker.io/library/*\"]
        min_age = \"7d\"
        on_unknown_age = \"serve\"",
    );
    let limit = |upstream, repository: &str| {
        let repository = repository.parse().unwrap();
        let limit = config.rules.find(upstream, &repository, None).age_limit;
        (limit.min_age.as_secs() / 86_400, limit.on_unknown_age.name())
    };
    assert_eq!(limit("quay.io", "acme/web"), (3, "refuse"));
    assert_eq!(limit("ghcr.io", "acme/web"), (0, "refuse"));
    assert_eq!(limit("docker.io", "library/alpine"), (7, "serve"));
}

#[test]
fn min_age_by_digest_applies_by_default_upstream_and_rule() {
    let config = read(
        "[default]
        min_age_by_digest = true
        [upstream.\"docker.io\"]
        min_age = \"3d\"
        [[rule]]
        images = [\"docker.io/acme/*\", \"docker.io/web/*:1\"]
        min_age_by_digest = false",
    );
    let is_on = |upstream, repository: &str| {
        let repository = repository.parse().unwrap();
        let policy = config.rules.find(upstream, &repository, None);
        policy.age_limit.is_on_by_digest()
    };
    assert!(is_on("docker.io", "library/alpine"));
    assert!(is_on("docker.io", "web/a"), "the glob has a tag");
    assert!(!is_on("docker.io", "acme/web"));
    assert!(!is_on("quay.io", "acme/web"), "no minimum age");
    assert!(
        config
            .summary()
            .to_string()
            .contains("on_unknown_age refuse, also by digest")
    );
}

#[test]
fn summary_warns_of_min_age_without_refresh() {
    let summary = |text: &str| read(text).summary().to_string();
    let warns = |text: &str| summary(text).contains("`min_age` without `refresh`");
    assert!(!warns(""));
    assert!(warns("[default]\nmin_age = \"3d\""));
    assert!(!warns("[default]\nmin_age = \"3d\"\nrefresh = \"1h\""));
    assert!(
        !summary("[default]\nmin_age = \"3d\"\nrefresh = \"1h\"\n[[rule]]\nimages = [\"ghcr.io/acme/*\"]\npolicy = \"never\"")
            .contains("without `refresh`"),
        "a rule that never asks can refresh nothing"
    );
    let text = "[default]\nmin_age = \"3d\"\nrefresh = \"1h\"
        [[rule]]\nimages = [\"ghcr.io/acme/*\"]\nrefresh = \"off\"
        [[rule]]\nimages = [\"quay.io/acme/*\"]\nmin_age = \"0s\"\nrefresh = \"off\"";
    let summary = summary(text);
    let warned = summary.split("warning ").nth(1).unwrap_or_default();
    assert!(
        warned.contains("rule 1: ghcr.io/acme/*")
            && !warned.contains("rule 2")
            && !warned.contains("upstream"),
        "{summary}"
    );
}

#[test]
fn refresh_applies_by_default_upstream_and_rule() {
    let config = read(
        "[default]
        refresh = \"1h\"
        [upstream.\"quay.io\"]
        refresh = \"off\"
        refresh_quota_floor = \"50 %\"
        [[rule]]
        images = [\"quay.io/acme/*\"]
        refresh = \"30m\"
        refresh_used_within = \"1d\"
        [[rule]]
        images = [\"ghcr.io/sealed/*\"]
        policy = \"never\"",
    );
    let find = |upstream: &str, repository: &str| {
        let rule = config.rules.find(upstream, &repository.parse().unwrap(), None);
        let refresh = rule.scheduled_refresh();
        (
            refresh.interval.map(|interval| interval.as_secs()),
            refresh.used_within.as_secs(),
            refresh.quota_floor.percent(),
        )
    };
    assert_eq!(find("docker.io", "library/a"), (Some(3600), 604_800, 25));
    assert_eq!(find("quay.io", "a/b"), (None, 604_800, 50));
    assert_eq!(find("quay.io", "acme/b"), (Some(1800), 86_400, 50));
    // Inherited, `refresh` does not contradict `never`: nothing is requested there.
    assert_eq!(find("ghcr.io", "sealed/b"), (None, 604_800, 25));
    let summary = config.summary().to_string();
    assert!(summary.contains("grant_ttl_offline 12h, refresh 1h"), "{summary}");
}

proptest::proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[\\[\\]a-z_.=\"\n 0-9:/*@,#{}]{0,200}") {
        let _ = Config::read(&text, Path::new("f.toml")).map_err(|faults| faults.to_string());
    }

    #[test]
    fn no_value_makes_it_panic(key in 0..KEYS.len(), value in "\\PC{0,40}") {
        let key = &KEYS[key];
        let header = match key.section {
            Section::Top => String::new(),
            Section::Upstream => "[upstream.\"example.org\"]".to_owned(),
            Section::Rule => "[[rule]]".to_owned(),
            section => format!("[{}]", section.name()),
        };
        for value in [value.clone(), format!("'{value}'"), format!("['{value}']")] {
            let text = format!("{header}\n{} = {value}", key.name);
            let _ = Config::read(&text, Path::new("f.toml")).map_err(|faults| faults.to_string());
        }
    }
}

#[test]
fn low_descriptor_limit_lowers_limits() {
    let limits = Limits {
        connections_max: 4096,
        downloads_max: 512,
        ..read("").limits
    };
    assert_eq!(limits.capped_to(1 << 20), limits);
    let few = limits.capped_to(1024);
    assert_eq!(
        (few.connections_max, few.tunnels_max, few.downloads_max),
        (204, 102, 102)
    );
    let held = few.connections_max + few.connections_waiting_max() + few.tunnels_max + 3 * few.downloads_max;
    assert!(held < 1024, "{held} descriptors, and some for the store");
    assert_eq!(limits.capped_to(0).connections_max, 1, "someone is always let in");
}

#[test]
fn t10_default_limit_is_lowered_to_its_total() {
    let limits = read("[limits]\nconnections_max = 100\ndownloads_max = 8").limits;
    assert_eq!(
        (
            limits.connections_per_peer_max,
            limits.tunnels_max,
            limits.downloads_per_upstream_max
        ),
        (100, 100, 8)
    );
    // A single configured timeout keeps its value.
    read("[limits]\nidle_timeout = \"300ms\"\nwrite_timeout = \"300ms\"");
    read("[upstream.\"ghcr.io\"]\nfirst_byte_timeout = \"1s\"");
}

#[test]
fn t10_low_descriptor_limit_is_described() {
    let limits = read("").limits;
    assert_eq!(limits.describe_caps(1 << 20), None);
    assert_eq!(
        limits.describe_caps(1024).as_deref(),
        Some(
            "1024 file descriptors allow 204 connections (connections_max = 4096), 102 tunnels (tunnels_max = 256) and 102 \
             transfers (downloads_max = 256)"
        )
    );
}

#[test]
fn o05_without_file_ca_directory_is_fixed() {
    let folder = |here: Option<&str>, origin: &str, variables: &[(&str, &str)]| {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let config = Config::gather(&Sources {
            data: PathBuf::from("/home/user/.cache/ifnewer"),
            working_dir_certs: here.map(PathBuf::from),
            text: "",
            origin: Path::new(origin),
            variables: variables.iter().map(owned).collect(),
            flags: Vec::new(),
        });
        config.unwrap().tls.folder
    };
    let cases = [
        (None, "", &[][..], "/home/user/.cache/ifnewer/certs"),
        (Some("certs"), "", &[], "certs"),
        (None, "", &[("IFNEWER_DATA", "/srv/cache")], "/srv/cache/certs"),
        (
            Some("certs"),
            "",
            &[("IFNEWER_TLS_FOLDER", "/srv/certs")],
            "/srv/certs",
        ),
        (
            Some("certs"),
            "/etc/ifnewer/ifnewer.toml",
            &[],
            "/etc/ifnewer/certs",
        ),
    ];
    for (here, origin, variables, wanted) in cases {
        assert_eq!(
            folder(here, origin, variables),
            Path::new(wanted),
            "{here:?} {origin} {variables:?}"
        );
    }
}

#[test]
fn r15_a_repository_prefix_is_for_all_urls_or_one_for_each() {
    for (keys, expected) in [
        (
            "url = \"https://h.example\"\nrepository_prefix = \"hub-proxy\"",
            &["https://h.example/v2/hub-proxy"][..],
        ),
        (
            "repository_prefix = \"a/b\"",
            &["https://registry-1.docker.io/v2/a/b"],
        ),
        (
            "url = [\"https://h.example\", \"https://i.example\"]\nrepository_prefix = [\"hub\", \"\"]",
            &["https://h.example/v2/hub", "https://i.example"],
        ),
        (
            "url = [\"https://h.example\", \"https://i.example\"]\nrepository_prefix = \"hub\"",
            &["https://h.example/v2/hub", "https://i.example/v2/hub"],
        ),
        (
            "url = \"https://h.example\"\nrepository_prefix = \"\"",
            &["https://h.example"],
        ),
    ] {
        let config = read(&format!("[upstream.\"docker.io\"]\n{keys}"));
        assert_eq!(urls(config.upstream("docker.io").unwrap()), expected, "{keys}");
    }
}
