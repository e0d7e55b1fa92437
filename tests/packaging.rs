//! Packaging files against the program: metrics of the dashboard and alert rules exist, settings of the examples
//! exist, and the checkers of the respective systems report nothing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use http::HeaderValue;
use ifnewer::config::{Config, KEYS};
use ifnewer::telemetry::{
    AccessRecord, BodyEnd, CacheResult, Gauges, LastAgent, QuotaGauge, ResourceKind, Telemetry,
    UpstreamRecord,
};
use ifnewer::trace_context::TraceContext;

fn packaging(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(packaging(name)).unwrap()
}

/// The metrics of a cache in which every event occurred once, because a metric without samples is not exported.
fn scrape() -> String {
    let telemetry = Telemetry::new();
    telemetry.shared().set_up(&"s3://images".into(), true);
    let agent = LastAgent::default().of(Some(&HeaderValue::from_static("docker/27.3.1")));
    telemetry.record_access(&AccessRecord {
        at: SystemTime::UNIX_EPOCH,
        upstream: &"docker.io".into(),
        route: "mirror",
        kind: ResourceKind::Tag,
        image: &"library/demo:latest".into(),
        result: CacheResult::Stale,
        reason: "stale-if-error",
        cause: None,
        digest: None,
        age: Some(Duration::from_secs(60)),
        status: 200,
        first_byte: Duration::from_millis(1),
        took: Duration::from_millis(1),
        ended: BodyEnd::Complete,
        bytes: 1,
        error: None,
        client: Some(Ipv4Addr::LOCALHOST.into()),
        agent: &agent,
        trace: &TraceContext::new_root(),
    });
    telemetry.record_client(Ipv4Addr::LOCALHOST.into(), &agent, SystemTime::UNIX_EPOCH, None);
    telemetry.record_upstream(&UpstreamRecord {
        upstream: "docker.io",
        operation: "manifest-head",
        code: "200",
        ended: SystemTime::UNIX_EPOCH,
        took: Duration::from_millis(1),
        trace: &TraceContext::new_root(),
    });
    drop(telemetry.count_tunnel());
    telemetry.open_metrics_text(&Gauges {
        upstreams: vec![("docker.io".into(), true)],
        quotas: vec![QuotaGauge {
            upstream: "docker.io".into(),
            credential: "anonymous",
            limit: Some(200),
            remaining: Some(143),
            resets_at: Some(SystemTime::UNIX_EPOCH),
        }],
        evicted: vec![("size", 1)],
        store_errors: vec![("read", 1)],
        longest_idle: Some(Duration::from_secs(60)),
        certificates: vec![("server", SystemTime::UNIX_EPOCH)],
        ..Gauges::default()
    })
}

/// The names of exported samples.
fn metrics() -> BTreeSet<String> {
    let text = scrape();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .flat_map(|line| {
            let (name, kind) = line.split_once(' ').unwrap();
            let endings: &[&str] = match kind {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_sum", "_count"],
                "info" => &["_info"],
                _ => &[""],
            };
            endings.iter().map(move |ending| format!("{name}{ending}"))
        })
        .collect()
}

/// The names in a query that should be metrics of ifnewer.
fn named(text: &str) -> BTreeSet<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    text.split(|c: char| !is_word(c))
        .filter(|word| word.starts_with("ifnewer_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_metric_of_the_dashboard_and_the_rules_exists() {
    let known = metrics();
    for file in ["grafana/ifnewer.json", "prometheus/rules.yml"] {
        let used = named(&text(file));
        assert!(used.len() > 5, "{file} names hardly any metric: {used:?}");
        let unknown: Vec<_> = used.difference(&known).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?} is none of {known:?}");
    }
}

#[test]
fn the_dashboard_is_json_and_each_panel_asks_something() {
    let dashboard: serde_json::Value = serde_json::from_str(&text("grafana/ifnewer.json")).unwrap();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            assert!(!named(target["expr"].as_str().unwrap()).is_empty(), "{panel}");
        }
    }
}

#[test]
fn settings_reference_matches_the_program() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let written = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        written == ifnewer::config::reference(),
        "make it anew: cargo run -- config reference > docs/configuration.md"
    );
}

#[test]
fn promtool_has_nothing_to_say_about_the_rules() {
    let rules = packaging("prometheus/rules.yml");
    passes("promtool", &["check", "rules", rules.to_str().unwrap()], None);
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let unit = text("ifnewer.service");
    // The check does not need the program installed.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ifnewer.service");
    std::fs::write(&file, unit.replace("/usr/bin/ifnewer", "/bin/true")).unwrap();
    passes(
        "systemd-analyze",
        &["verify", "--man=no", file.to_str().unwrap()],
        Some("ifnewer.service"),
    );
}

#[test]
fn the_unit_leaves_little_exposed() {
    let unit = packaging("ifnewer.service");
    // In tenths of systemd's exposure score, in which an unhardened service has 100.
    let words = ["security", "--offline=true", "--threshold=15", "--no-pager"];
    passes(
        "systemd-analyze",
        &[&words[..], &[unit.to_str().unwrap()]].concat(),
        None,
    );
}

/// The writable paths of the unit match the installed configuration, so that commands in a shell agree.
#[test]
fn installed_configuration_matches_folders_of_the_unit() {
    let config = Config::read(&text("ifnewer.toml"), Path::new("/etc/ifnewer/ifnewer.toml"))
        .unwrap_or_else(|faults| panic!("{faults}"));
    let unit = text("ifnewer.service");
    let folder = |key: &str, parent: &str| {
        let name = unit.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        Path::new(parent).join(name)
    };
    assert_eq!(config.data, folder("CacheDirectory=", "/var/cache"));
    assert!(
        config
            .tls
            .folder
            .starts_with(folder("StateDirectory=", "/var/lib"))
    );
    for apart in ["\nEnvironment=", "\nEnvironmentFile=", "IFNEWER_"] {
        assert!(!unit.contains(apart), "the unit has settings of its own: {apart}");
    }
}

#[test]
fn every_setting_in_the_examples_is_one() {
    let variables: Vec<String> = KEYS.iter().filter_map(ifnewer::config::Key::variable).collect();
    for file in [
        "docker-compose.team.yml",
        "docker-compose.shared.yml",
        "Dockerfile",
    ] {
        let text = text(file);
        let words = text.split(|c: char| !(c.is_ascii_uppercase() || c == '_'));
        for word in words.filter(|word| word.starts_with("IFNEWER_") && *word != "IFNEWER_CONFIG") {
            assert!(
                variables.iter().any(|known| known == word),
                "{file}: {word} is no setting"
            );
        }
    }
    let config = config_of("kubernetes/ifnewer.yaml");
    Config::read(&config, Path::new("ifnewer.toml")).unwrap_or_else(|faults| panic!("{faults}"));
    if cfg!(feature = "shared") {
        // The key is in the pod.
        let config = config_of("kubernetes/ifnewer-shared.yaml");
        let (without_key, key) = (
            config.replace("key_file", "# key_file"),
            "\"/run/keys/records.key\"",
        );
        assert!(config.contains(key));
        let config = Config::read(&without_key, Path::new("ifnewer.toml"));
        let shared = config.unwrap_or_else(|faults| panic!("{faults}")).shared;
        assert_eq!(shared.unwrap().bucket.name(), "s3://acme-images/cluster-a");
    }
}

/// The configuration in a Kubernetes manifest.
fn config_of(file: &str) -> String {
    let manifest = text(file);
    let (_, config) = manifest.split_once("ifnewer.toml: |\n").unwrap();
    let (config, _) = config.split_once("  # For every registry").unwrap();
    config
        .lines()
        .fold(String::new(), |all, line| all + line.trim_start() + "\n")
}

/// Runs a checker. If absent, prints a notice. With `about`, only matching output counts.
fn passes(program: &str, words: &[&str], about: Option<&str>) {
    let Ok(output) = Command::new(program).args(words).output() else {
        assert!(std::env::var_os("CI").is_none(), "{program} is not here");
        eprintln!("SKIPPED: {program} is not here");
        return;
    };
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    match about {
        None => assert!(output.status.success(), "{program}: {said}"),
        Some(about) => assert!(
            !said.lines().any(|line| line.contains(about)),
            "{program}: {said}"
        ),
    }
}
