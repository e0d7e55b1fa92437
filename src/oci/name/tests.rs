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
fn valid_names_are_accepted() {
    for text in [
        "a",
        "0",
        "library/alpine",
        "a.b/c_d/e__f/g-h",
        "a---b",
        "ghcr.io/org/image",
        "a/manifests/b/tags/list",
    ] {
        assert_eq!(text.parse::<Repository>().unwrap().as_str(), text);
    }
    assert!("a".repeat(255).parse::<Repository>().is_ok());
}

#[test]
fn invalid_names_are_rejected_with_the_position() {
    let separator = |at| NameError::Separator { at };
    let character = |at| NameError::Character { at };
    for (text, error) in [
        ("", NameError::Empty),
        ("/a", separator(0)),
        ("a/", separator(2)),
        ("a//b", separator(2)),
        ("-a", separator(0)),
        ("a-", separator(2)),
        ("a./b", separator(2)),
        ("a..b", separator(2)),
        ("../a", separator(0)),
        ("a___b", separator(3)),
        ("a_-b", separator(2)),
        ("a-_b", separator(2)),
        ("Alpine", character(0)),
        ("a:b", character(1)),
        ("localhost:5000/a", character(9)),
        ("a%2fb", character(1)),
        ("aé", character(1)),
        ("a\0", character(1)),
        ("a b", character(1)),
    ] {
        assert_eq!(text.parse::<Repository>(), Err(error), "{text}");
    }
    assert_eq!(
        "a".repeat(256).parse::<Repository>(),
        Err(NameError::TooLong { found: 256, max: 255 })
    );
}

#[test]
fn valid_tags_are_accepted_and_others_rejected() {
    for text in ["latest", "_", "1.2.3-rc.1", "V1__x", "sha256-0123.sig", "9"] {
        assert_eq!(text.parse::<Tag>().unwrap().as_str(), text);
    }
    for (text, error) in [
        ("", NameError::Empty),
        (".INVALID_MANIFEST_NAME", NameError::Separator { at: 0 }),
        ("-x", NameError::Separator { at: 0 }),
        ("a/b", NameError::Character { at: 1 }),
        ("a:b", NameError::Character { at: 1 }),
        ("a+b", NameError::Character { at: 1 }),
        ("a%20", NameError::Character { at: 1 }),
    ] {
        assert_eq!(text.parse::<Tag>(), Err(error), "{text}");
    }
    assert!("a".repeat(128).parse::<Tag>().is_ok());
    assert_eq!(
        "a".repeat(129).parse::<Tag>(),
        Err(NameError::TooLong { found: 129, max: 128 })
    );
}

#[test]
fn colon_makes_a_reference_a_digest() {
    assert!(matches!("latest".parse(), Ok(Reference::Tag(_))));
    assert!(matches!(
        "blake3:00".parse(),
        Ok(Reference::Digest(AnyDigest::Unsupported(_)))
    ));
    assert!(matches!(
        "sha256:00".parse::<Reference>(),
        Err(ReferenceError::Digest(DigestError::Length { .. }))
    ));
    assert_eq!(
        "a/b".parse::<Reference>(),
        Err(ReferenceError::Tag(NameError::Character { at: 1 }))
    );
}

#[test]
fn prefix_is_complete_components() {
    let name: Repository = "ghcr.io/org/image".parse().unwrap();
    assert_eq!(name.first_component(), "ghcr.io");
    assert_eq!(name.strip_prefix("ghcr.io").unwrap().as_str(), "org/image");
    assert_eq!(name.strip_prefix("ghcr.io/org").unwrap().as_str(), "image");
    for prefix in ["", "ghcr", "ghcr.io/", "ghcr.io/org/image", "/"] {
        assert_eq!(name.strip_prefix(prefix), None, "{prefix}");
    }
    let short: Repository = "alpine".parse().unwrap();
    assert!(short.is_one_component() && !name.is_one_component());
    assert_eq!(short.first_component(), "alpine");
    assert_eq!(short.with_prefix("library").unwrap().as_str(), "library/alpine");
    assert_eq!(short.with_prefix("Library"), Err(NameError::Character { at: 0 }));
}

proptest! {
    #[test]
    fn grammar_regex_and_parser_agree(
        right in "[a-z0-9]{1,4}((\\.|_|__|-{1,3})[a-z0-9]{1,3}){0,3}(/[a-z0-9]{1,4}((\\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}){0,3}",
        with in "[a-z]{1,9}",
    ) {
        let name: Repository = right.parse().unwrap();
        prop_assert_eq!(name.to_string(), right);
        prop_assert_eq!(name.with_prefix(&with).unwrap().strip_prefix(&with), Some(name));
    }

    #[test]
    fn accepted_names_round_trip(text in "\\PC{0,20}|[a-zA-Z0-9._/-]{0,20}") {
        if let Ok(name) = text.parse::<Repository>() {
            prop_assert_eq!(name.as_str(), &*text);
        }
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(reference.to_string(), text);
        }
    }
}

#[test]
fn referrers_tags_exclude_signature_tags() {
    let hex = "0123456789abcdef".repeat(4);
    let digest = format!("sha256:{hex}");
    for (text, is_one, subject) in [
        (format!("sha256-{hex}"), true, Some(digest.parse().unwrap())),
        // Truncated, so the subject is unknown.
        (format!("sha512-{hex}"), true, None),
        (format!("sha256-{hex}.sig"), false, None),
        (format!("sha256-{}", hex.to_uppercase()), false, None),
        ("sha256-0123".to_owned(), false, None),
        ("latest".to_owned(), false, None),
    ] {
        let tag: Tag = text.parse().unwrap();
        assert_eq!(
            (tag.is_referrers_tag(), tag.subject()),
            (is_one, subject),
            "{text}"
        );
    }
}
