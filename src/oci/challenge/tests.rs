#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use http::HeaderValue;
use proptest::prelude::*;

use super::*;

fn read(lines: &[&str]) -> Vec<Challenge> {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(WWW_AUTHENTICATE, line.parse().unwrap());
    }
    Challenge::read(&headers)
}

fn bearer(realm: &str, service: Option<&str>, scopes: &[&str], error: Option<&str>) -> Challenge {
    Challenge::Bearer {
        realm: realm.into(),
        service: service.map(Into::into),
        scopes: scopes.iter().map(|scope| (*scope).into()).collect(),
        error: error.map(Into::into),
    }
}

fn basic(realm: &str) -> Challenge {
    Challenge::Basic { realm: realm.into() }
}

fn other(scheme: &str) -> Challenge {
    Challenge::Other(scheme.into())
}

#[test]
fn challenges_of_known_registries_parse() {
    for (line, challenge) in [
        (
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull""#,
            bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                &["repository:library/alpine:pull"],
                None,
            ),
        ),
        (
            r#"bearer Realm="https://a/t", SERVICE=reg, scope="repository:a:pull,push registry:catalog:*", error="insufficient_scope""#,
            bearer(
                "https://a/t",
                Some("reg"),
                &["repository:a:pull,push", "registry:catalog:*"],
                Some("insufficient_scope"),
            ),
        ),
        (
            r#"Basic realm="https://0.dkr.ecr/",service="ecr.amazonaws.com""#,
            basic("https://0.dkr.ecr/"),
        ),
        (
            r#"BASIC realm="a \"quoted\", \\ name""#,
            basic(r#"a "quoted", \ name"#),
        ),
        ("Basic", basic("")),
        ("Negotiate", other("negotiate")),
        ("Negotiate YIIab+/==", other("negotiate")),
        (r#"Digest realm="a", nonce="b""#, other("digest")),
    ] {
        assert_eq!(read(&[line]), [challenge], "{line}");
    }
}

#[test]
fn all_challenges_of_all_lines_parse() {
    let token = bearer("https://a/t?x=1,2", None, &[], None);
    for lines in [
        &[
            r#"Bearer realm="https://a/t?x=1,2""#,
            r#"Basic realm="b, c", Negotiate"#,
        ][..],
        &[r#"Bearer realm="https://a/t?x=1,2" , Basic realm="b, c",Negotiate"#],
        &[r#",, Bearer realm="https://a/t?x=1,2", Basic realm="b, c", Negotiate YII=,"#],
    ] {
        assert_eq!(
            read(lines),
            [token.clone(), basic("b, c"), other("negotiate")],
            "{lines:?}"
        );
    }
}

#[test]
fn any_number_of_spaces_after_the_scheme_parses() {
    for line in [
        "Bearer  realm=\"a\"",
        "Bearer \t  realm=\"a\"",
        "bearer   REALM=a",
    ] {
        assert_eq!(read(&[line]), [bearer("a", None, &[], None)], "{line}");
    }
    assert_eq!(
        read(&["Foo, Bearer  realm=\"a\""]),
        [other("foo"), bearer("a", None, &[], None)]
    );
}

#[test]
fn malformed_challenge_does_not_affect_its_neighbours() {
    for line in [
        r#"Bearer realm=https://a/t, Basic realm="b""#,
        r#"Bearer service="no realm", Basic realm="b""#,
        r#"Bearer realm="", Basic realm="b""#,
        r#"@@@, Basic realm="b""#,
        r#"Basic realm="b", Bearer realm="never closed"#,
    ] {
        assert_eq!(read(&[line]), [basic("b")], "{line}");
    }
    assert_eq!(
        read(&["", "=", "realm=\"x\"", "é", "Basic realm=\"b\""]),
        [basic("b")]
    );
}

#[test]
fn excess_challenges_and_long_lines_are_skipped() {
    assert_eq!(read(&["Basic, ".repeat(40).as_str()]).len(), CHALLENGES_MAX);
    assert_eq!(
        read(&[&format!(
            r#"Basic realm="{}""#,
            "a".repeat(CHALLENGE_LINE_BYTES_MAX)
        )]),
        []
    );
}

proptest! {
    #[test]
    fn quoted_parameters_round_trip(realm in "[ -~]{1,40}", service in "[ -~]{0,40}") {
        let quoted = |text: &str| text.replace('\\', r"\\").replace('"', "\\\"");
        let line = format!(r#"Basic realm="x", Bearer realm="{}",service="{}", Foo"#, quoted(&realm), quoted(&service));
        prop_assert_eq!(read(&[&line]), [basic("x"), bearer(&realm, Some(&service), &[], None), other("foo")]);
    }

    #[test]
    fn no_line_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80), text in "[Ba =,\"\\\\-]{0,60}") {
        for line in [HeaderValue::from_bytes(&bytes), HeaderValue::from_str(&text)].into_iter().flatten() {
            let mut headers = HeaderMap::new();
            headers.insert(WWW_AUTHENTICATE, line);
            let _any = Challenge::read(&headers);
        }
    }
}
