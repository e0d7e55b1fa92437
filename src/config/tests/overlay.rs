//! Overrides by variables and flags.

use std::path::Path;
use std::time::Duration;

use super::gather;
use crate::config::{Admin, KEYS, Key, Log, LogFormat, StoreLimits};
use crate::policy::Policy;

#[test]
fn variables_are_unique_and_differ_from_kubernetes_ones() {
    let mut names: Vec<String> = KEYS.iter().filter_map(Key::variable).collect();
    let count = names.len();
    for name in &names {
        // No value accepts a NUL. A variable mistaken for one of Kubernetes would be ignored.
        assert!(gather("", &[(name, "\0")], &[]).is_err(), "{name}");
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(count > 30, "{count}");
}

#[test]
fn a_flag_beats_a_variable_beats_the_file() {
    let text = "data = \"file\"\n[listen]\nregistry = [\"127.0.0.1:1\"]\nadmin = \"off\"\n[store]\nsize = \"1 GiB\"\nfree = \"1 MiB\"";
    let variables = [
        ("IFNEWER_DATA", "variable"),
        ("IFNEWER_LISTEN_REGISTRY", "127.0.0.1:2, [::1]:2"),
        ("IFNEWER_STORE_SIZE", "2 GiB"),
    ];
    let config = gather(
        text,
        &variables,
        &[("--listen", "listen.registry", "127.0.0.1:3,127.0.0.1:4")],
    )
    .unwrap();
    assert_eq!(config.data, Path::new("variable"));
    assert_eq!(
        config.listen.registry,
        ["127.0.0.1:3".parse().unwrap(), "127.0.0.1:4".parse().unwrap()]
    );
    assert_eq!(config.listen.admin, Admin::Off);
    assert_eq!(
        config.store,
        StoreLimits {
            bytes_max: 2 << 30,
            free_bytes_min: 1 << 20,
            scrub_rate: 20 << 20
        }
    );

    let config = gather(text, &variables, &[]).unwrap();
    assert_eq!(
        config.listen.registry,
        ["127.0.0.1:2".parse().unwrap(), "[::1]:2".parse().unwrap()]
    );
}

#[test]
fn variables_of_every_kind_are_read() {
    let variables = [
        ("IFNEWER_LOG", "debug"),
        ("IFNEWER_LISTEN", "127.0.0.1:7"),
        ("IFNEWER_ADMIN", "off"),
        ("IFNEWER_LOG_FORMAT", "json"),
        ("IFNEWER_LIMITS_CONNECTIONS_MAX", "7"),
        ("IFNEWER_DEFAULT_STALE_IF_ERROR", "7d"),
        ("IFNEWER_DEFAULT_POLICY", "if-not-present"),
        ("IFNEWER_DEFAULT_UPSTREAM", "ghcr.io"),
        ("IFNEWER_TLS_NAMES", "cache.example.org,10.0.0.1"),
        // An empty variable is unset.
        ("IFNEWER_STORE_SIZE", ""),
        ("IFNEWER_CONFIG", "read elsewhere"),
        ("HOME", "not ours"),
        // A service named `ifnewer`, and one named `ifnewer-eu`, in a pod's namespace.
        ("IFNEWER_SERVICE_HOST", "10.0.0.1"),
        ("IFNEWER_SERVICE_PORT", "5000"),
        ("IFNEWER_SERVICE_PORT_REGISTRY", "5000"),
        ("IFNEWER_PORT", "tcp://10.0.0.1:5000"),
        ("IFNEWER_PORT_5000_TCP", "tcp://10.0.0.1:5000"),
        ("IFNEWER_PORT_5000_TCP_ADDR", "10.0.0.1"),
        ("IFNEWER_EU_SERVICE_HOST", "10.0.0.1"),
        ("IFNEWER_EU_PORT_5000_TCP_PROTO", "tcp"),
    ];
    let config = gather("", &variables, &[]).unwrap();
    assert_eq!(
        config.log,
        Log {
            level: "debug".to_owned(),
            format: LogFormat::Json
        }
    );
    assert_eq!(config.listen.registry, ["127.0.0.1:7".parse().unwrap()]);
    assert_eq!(config.listen.admin, Admin::Off);
    assert_eq!(config.limits.connections_max, 7);
    assert_eq!(&*config.default_upstream, "ghcr.io");
    assert_eq!(config.tls.names, ["cache.example.org", "10.0.0.1"]);
    assert_eq!(config.tls.folder, Path::new("/home/user/.cache/ifnewer/certs"));
    assert_eq!(config.store.bytes_max, 50 << 30);
    assert_eq!(config.data, Path::new("/home/user/.cache/ifnewer"));
    let rule = config.rules.default_for("ghcr.io");
    assert_eq!(
        (rule.policy, rule.stale_if_error),
        (Policy::IfNotPresent, Some(Duration::from_secs(7 * 86_400)))
    );
}
