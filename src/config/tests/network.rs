//! Networks and host patterns.

use crate::config::network::{redirect, tunnel};

#[test]
fn tunnel_rule_matches_one_port() {
    for (text, host, port, allowed) in [
        ("auth.example.org", "auth.example.org", 443, true),
        ("auth.example.org", "auth.example.org", 22, false),
        ("auth.example.org", "evil.example.org", 443, false),
        ("*.example.org", "a.b.example.org", 443, true),
        ("*.example.org", "example.org", 443, false),
        ("*.example.org", "a.example.org.evil.example", 443, false),
        ("*.example.org:8443", "a.example.org", 8443, true),
        ("[::1]:8443", "::1", 8443, true),
        ("[::1]", "::1", 443, true),
    ] {
        assert_eq!(
            tunnel(text).unwrap().allows(host, port),
            allowed,
            "{text} {host} {port}"
        );
    }
    for text in ["", "https://a", "a/b", "a:b", "A.example", "a b"] {
        assert!(tunnel(text).is_err(), "{text}");
    }
}

#[test]
fn r13_redirect_entry_is_host_or_network() {
    for text in [
        "s3.example.org",
        "s3.example.org:9000",
        "*.s3.example.org",
        "http://minio.internal:9000",
        "http://minio",
        "https://minio.internal",
        "10.20.0.0/16",
        "http://10.20.0.0/16",
        "10.1.2.3",
        "http://[fd00::1]",
        "fd00::/8",
        "localhost:9000",
        "10.20.3.4:9000",
        "[fd00::1]:9000",
    ] {
        assert!(redirect(text).is_ok(), "{text}");
    }
    assert!(redirect("http://minio:9000").unwrap().plain);
    assert!(!redirect("https://minio:9000").unwrap().plain);
    for text in [
        "",
        "*",
        "*.*",
        "10.*",
        "10.20",
        "0.0.0.0/0",
        "http://::/0",
        "10.0.0.0/33",
        "ftp://minio",
        "http://minio/bucket",
        "http://user@minio",
        "Minio.internal",
        "minio:port",
        "a b",
    ] {
        assert!(redirect(text).is_err(), "{text}");
    }
}
