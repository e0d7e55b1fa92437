#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::*;

#[test]
fn error_body_is_the_json_of_the_spec() {
    let mut problem = ErrorBody::new(ErrorCode::ManifestUnknown, "docker.io has no \"x\"");
    assert_eq!(
        &problem.body()[..],
        br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"docker.io has no \"x\""}]}"#
    );
    problem.detail = Some(json!({ "tag": "x" }));
    let body: Value = serde_json::from_slice(&problem.body()).unwrap();
    assert_eq!(body["errors"][0]["detail"]["tag"], "x");
}

#[test]
fn upstream_error_parses_in_every_known_form() {
    for (body, code, message) in [
        (
            r#"{"errors":[{"code":"DENIED","message":"no"},{"code":"X"}]}"#,
            "DENIED",
            "no",
        ),
        (
            r#"{"errors":[{"code":"DENIED","message":"","detail":"more"}]}"#,
            "DENIED",
            "more",
        ),
        (r#"{"errors":[{"code":"DENIED"}]}"#, "DENIED", ""),
        (r#"{"errors":[{"message":"no"}]}"#, "UNKNOWN", "no"),
        (
            r#"{"message":"toomanyrequests: slow down"}"#,
            "UNKNOWN",
            "toomanyrequests: slow down",
        ),
        (
            r#"{"details":"incorrect username or password"}"#,
            "UNKNOWN",
            "incorrect username or password",
        ),
        (r#"{"message":" a\u001b[31m\r\nb\u0000 "}"#, "UNKNOWN", "a[31mb"),
    ] {
        assert_eq!(
            ErrorBody::read(body.as_bytes()),
            Some((code.into(), message.into())),
            "{body}"
        );
    }
    for body in [
        "",
        "<html>",
        "[]",
        "{}",
        "7",
        r#"{"errors":[]}"#,
        r#"{"errors":{}}"#,
        r#"{"errors":[{"code":7}]}"#,
    ] {
        assert_eq!(ErrorBody::read(body.as_bytes()), None, "{body}");
    }
}

#[test]
fn long_message_is_cut_at_a_character_and_huge_body_skipped() {
    let long = json!({ "message": "é".repeat(400) }).to_string();
    assert_eq!(ErrorBody::read(long.as_bytes()).unwrap().1, "é".repeat(256));
    let huge = json!({ "message": "a".repeat(ERROR_BODY_BYTES_MAX) }).to_string();
    assert_eq!(ErrorBody::read(huge.as_bytes()), None);
}

proptest! {
    #[test]
    fn error_body_round_trips(message in "[ -~é]{0,100}") {
        let problem = ErrorBody::new(ErrorCode::Unavailable, message.trim());
        prop_assert_eq!(ErrorBody::read(&problem.body()), Some(("UNAVAILABLE".into(), message.trim().into())));
    }

    #[test]
    fn no_body_panics(bytes: Vec<u8>) {
        let _any = ErrorBody::read(&bytes);
    }
}
