#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use std::time::Duration;

use super::super::credentials::basic;
use super::super::origin::Origin;
use super::protocol::{encoded, parse, realm_allowed, with_query};

#[test]
fn realm_must_belong_to_the_registry() {
    let hosts = ["auth.corp.example", "tokens.corp.example:8443", "[fd00::7]"].map(str::to_owned);
    for (origin, realm, allowed) in [
        (
            "https://registry-1.docker.io",
            "https://auth.docker.io/token",
            true,
        ),
        ("https://ghcr.io", "https://ghcr.io/token", true),
        ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth", true),
        ("https://reg.example:5000", "https://reg.example:5001/token", true),
        ("https://10.0.0.1", "https://10.0.0.1:8443/token", true),
        ("https://10.0.0.1", "https://auth.corp.example/token", true),
        ("https://10.0.0.1", "https://AUTH.corp.example:443/token", true),
        ("https://10.0.0.1", "https://tokens.corp.example:8443/token", true),
        ("https://10.0.0.1", "https://[fd00::7]/token", true),
        ("http://10.0.0.1", "http://auth.corp.example/token", true),
        ("https://10.0.0.1", "http://auth.corp.example/token", true),
        ("https://10.0.0.1", "http://auth.corp.example:80/token", true),
        ("https://10.0.0.1", "http://auth.corp.example:8080/token", false),
        ("https://10.0.0.1", "http://user:x@10.0.0.1/token", false),
        ("https://10.0.0.1", "http://evil.example/token", false),
        ("https://10.0.0.1", "https://auth.corp.example:8443/token", false),
        ("https://10.0.0.1", "https://tokens.corp.example/token", false),
        ("https://10.0.0.1", "https://x.auth.corp.example/token", false),
        (
            "https://10.0.0.1",
            "https://auth.corp.example@evil.example/token",
            false,
        ),
        ("http://127.0.0.1:5000", "http://localhost:5001/token", true),
        ("http://reg.example", "http://reg.example/token", true),
        ("https://ghcr.io", "http://ghcr.io/token", true),
        ("https://ghcr.io", "https://ghcr.io.evil.example/token", false),
        ("https://ghcr.io", "https://ghcr.io@evil.example/token", false),
        ("https://ghcr.io", "https://user:x@ghcr.io/token", false),
        ("https://ghcr.io", "https://127.0.0.1/token", false),
        ("https://ghcr.io", "https://169.254.169.254/token", false),
        ("https://10.0.0.1", "https://10.0.0.2/token", false),
        ("https://ghcr.io", "/token", false),
        ("https://ghcr.io", "ghcr.io", false),
        ("https://ghcr.io", "", false),
    ] {
        let origin: Origin = origin.parse().unwrap();
        let found = realm_allowed(&origin, realm, &hosts);
        assert_eq!(found.is_some(), allowed, "{origin} {realm}");
        let is_plain = found.is_some_and(|realm| realm.uri.scheme_str() != Some("https"));
        assert!(!is_plain || origin.is_plain(), "{origin} {realm}: in clear text");
    }
}

#[test]
fn r16_http_realm_is_upgraded_to_https() {
    for (origin, realm, asked) in [
        (
            "https://harbor.example",
            "http://harbor.example/service/token",
            "https://harbor.example/service/token",
        ),
        (
            "https://harbor.example",
            "http://harbor.example:80/t?a=b",
            "https://harbor.example/t?a=b",
        ),
        // The port without TLS does not show the state of the port with TLS.
        (
            "https://art.example",
            "http://art.example:8081/t",
            "https://art.example/t",
        ),
        (
            "https://reg.example:8443/sub",
            "http://reg.example/t",
            "https://reg.example:8443/t",
        ),
        (
            "https://reg.example",
            "http://auth.reg.example:80/t",
            "https://auth.reg.example/t",
        ),
        (
            "https://reg.example",
            "http://auth.reg.example:8443/t",
            "https://auth.reg.example:8443/t",
        ),
        ("https://[::1]:5000", "http://[::1]/t", "https://[::1]:5000/t"),
    ] {
        let found = realm_allowed(&origin.parse().unwrap(), realm, &[]).unwrap();
        assert_eq!((found.uri.to_string().as_str(), found.is_upgraded), (asked, true));
    }
    let plain = realm_allowed(
        &"http://reg.example".parse().unwrap(),
        "http://reg.example/t",
        &[],
    )
    .unwrap();
    assert_eq!((plain.uri.scheme_str(), plain.is_upgraded), (Some("http"), false));
}

#[test]
fn deeply_nested_response_is_no_token() {
    let deep = format!(r#"{{"token":"a","x":{}"#, "[".repeat(60_000));
    assert!(parse(deep.as_bytes()).is_none());
}

#[test]
fn token_lifetime_is_clamped() {
    for (body, seconds) in [
        (r#"{"token":"a"}"#, 60),
        (r#"{"token":"a","expires_in":5}"#, 60),
        (r#"{"token":"a","expires_in":-5}"#, 60),
        (r#"{"token":"a","expires_in":null}"#, 60),
        (
            r#"{"access_token":"a","expires_in":300,"issued_at":"1990-01-01T00:00:00Z"}"#,
            300,
        ),
        (r#"{"token":"","access_token":"a","expires_in":"900"}"#, 900),
        (r#"{"token":"a","expires_in":1e300}"#, 60),
        (r#"{"token":"a","expires_in":99999999}"#, 43200),
    ] {
        let (header, life) = parse(body.as_bytes()).unwrap();
        assert_eq!(
            (header.as_str(), life),
            ("Bearer a", Duration::from_secs(seconds)),
            "{body}"
        );
    }
    for body in [
        "",
        "[]",
        "{}",
        r#"{"token":1}"#,
        "{\"token\":\"a\\r\\nb\"}",
        "\"a\"",
    ] {
        assert!(parse(body.as_bytes()).is_none(), "{body}");
    }
    assert!(parse(format!(r#"{{"token":"{}"}}"#, "a".repeat(17_000)).as_bytes()).is_none());
}

#[test]
fn realm_query_is_kept() {
    let query = encoded(&[("service", "a b&c"), ("scope", "repository:x/y:pull,push")]);
    assert_eq!(query, "service=a%20b%26c&scope=repository:x/y:pull,push");
    for (realm, whole) in [
        ("https://a/token", "https://a/token?q=1"),
        ("https://a/token?", "https://a/token?q=1"),
        ("https://a/token?x=y", "https://a/token?x=y&q=1"),
        ("https://a", "https://a/?q=1"),
    ] {
        assert_eq!(with_query(&realm.parse().unwrap(), "q=1").unwrap(), whole);
    }
    assert_eq!(
        with_query(&"https://a/t".parse().unwrap(), "").unwrap(),
        "https://a/t"
    );
}

#[test]
fn basic_header_follows_rfc_7617_and_is_hidden() {
    let header = basic("Aladdin", "open sesame");
    assert_eq!(header, "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
    assert!(!format!("{header:?}").contains("QWxh"));
}
