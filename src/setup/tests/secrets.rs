//! Credentials in the files of clients, which no message may print.

use super::applied::{DAEMON, Host};
use super::plan::{difference, render};
use super::*;
use crate::setup::edit::without_userinfo;

#[test]
fn userinfo_is_hidden_with_or_without_scheme() {
    for (line, printed) in [
        ("https://u:s3cret@m.example", "https://…@m.example"),
        ("HTTPS_PROXY=u:s3cret@proxy:3128", "HTTPS_PROXY=…@proxy:3128"),
        ("HTTPS_PROXY=http://u:s3cret@proxy", "HTTPS_PROXY=…@proxy"),
        (
            "\"u:s3cret@a\", 'u:s3cret@b' u:s3cret@c\n",
            "\"…@a\", '…@b' …@c\n",
        ),
        (
            "[\"https://s3cret@m\",\"https://n\"]",
            "[\"https://…@m\",\"https://n\"]",
        ),
        ("https://u:s3@cr/et=//s3@m", "https://…@m"),
        (r#""https://u:s3\"cret@m""#, r#""https://…@m""#),
        ("https://m.example/a=b//c", "https://m.example/a=b//c"),
        ("@ https://@m \u{e9}@\u{e9}", "@ https://@m …@\u{e9}"),
        ("", ""),
    ] {
        assert_eq!(without_userinfo(line), printed);
    }
}

#[test]
fn other_mirrors_are_named_without_credentials() {
    let mirror = "https://u:s3cret@m.example";
    for (client, path, text) in [
        (
            Client::Docker,
            DAEMON,
            format!("{{\"registry-mirrors\":[\"{mirror}\"]}}"),
        ),
        (
            Client::Docker,
            DAEMON,
            format!("{{\"registry-mirrors\":\"{mirror}\"}}"),
        ),
        (
            Client::Containerd,
            "/etc/containerd/certs.d/ghcr.io/hosts.toml",
            format!("[host.\"{mirror}\"]\n"),
        ),
        (
            Client::Buildkit,
            "/etc/buildkit/buildkitd.toml",
            format!("[registry.\"ghcr.io\"]\nmirrors = [\"{mirror}\"]\n"),
        ),
    ] {
        let refused = plan_for(&local(), &options(client), &MemoryFs::with(path, &text)).unwrap_err();
        let told = refused.to_string();
        assert!(
            told.contains("https://…@m.example") && !told.contains("s3cret"),
            "{told}"
        );
    }
}

#[test]
fn differences_are_shown_without_credentials() {
    let daemon = "{\n  \"http-proxy\": \"http://u:s3cret@proxy:3128\",\n  \"a\": 1\n}\n";
    let held = MemoryFs::with(DAEMON, daemon);
    let plan = plan_for(&local(), &options(Client::Docker), &held).unwrap();
    let (shown, _) = render(&plan, &held);
    assert!(
        shown.contains("   \"http-proxy\": \"http://…@proxy:3128\",") && shown.contains("\n@@ -1,"),
        "{shown}"
    );
    assert!(!shown.contains("s3cret"), "{shown}");
    assert!(text(&plan, DAEMON).contains("s3cret"), "the file keeps it");

    let host = Host::new();
    host.put(DAEMON, daemon.as_bytes());
    host.apply(&local(), false).unwrap();
    host.put(DAEMON, host.text(DAEMON).replace("s3cret", "s3cret2").as_bytes());
    let told = host.undo(false).unwrap_err().to_string();
    assert!(
        told.contains("\n-  \"http-proxy\"") && told.contains("\n+  \"http-proxy\""),
        "{told}"
    );
    assert!(!told.contains("s3cret"), "{told}");
}

#[test]
fn secret_settings_of_others_are_not_printed() {
    for secret in [
        "  token = \"glrt-s3cret\"",
        "      password: s3cret",
        "Environment=CI_JOB_TOKEN=s3cret",
        "\"identitytoken\": \"s3cret\"",
        "    auth: dTpzM2NyZXQ= # s3cret",
    ] {
        let before = format!("name = \"a\"\n{secret}\nurl = \"https://auth.example.org\"\n");
        let printed = difference(before.as_bytes(), format!("{before}x = 1\n").as_bytes());
        assert!(
            !printed.contains("s3cret") && !printed.contains("dTpz"),
            "{printed}"
        );
        assert!(
            printed.contains('…') && printed.contains("https://auth.example.org"),
            "{printed}"
        );
        let removed = difference(format!("{secret}\n").as_bytes(), b"\n");
        assert!(!removed.contains("s3cret"), "{removed}");
    }
}
