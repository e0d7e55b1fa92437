#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::*;

fn read(text: &str) -> (Query, Option<String>) {
    Query::parse(Some(text)).unwrap()
}

#[test]
fn ns_is_removed_and_other_parameters_keep_order() {
    let (query, ns) = read("n=3&ns=localhost%3A5000&last=b&x");
    assert_eq!(ns.as_deref(), Some("localhost:5000"));
    assert_eq!(
        (query.get("n"), query.get("last"), query.get("x"), query.get("ns")),
        (Some("3"), Some("b"), Some(""), None)
    );
    assert_eq!(query.to_string(), "?n=3&last=b&x=");
}

#[test]
fn missing_query_and_empty_ns_are_equal() {
    for text in [None, Some(""), Some("&&"), Some("ns=")] {
        assert_eq!(Query::parse(text), Ok((Query::default(), None)));
    }
    assert_eq!(Query::default().to_string(), "");
}

#[test]
fn text_decodes_and_encodes_as_registries_expect() {
    assert_eq!(read("a=x%2By+z").0.get("a"), Some("x+y z"));
    assert_eq!(read("a=x%2By+z").0.render(), "a=x%2By%20z");
    assert_eq!(read("a=%0d%0a%26").0.render(), "a=%0D%0A%26");
    assert_eq!(
        read("artifactType=application/a.b").0.render(),
        "artifactType=application/a.b"
    );
}

#[test]
fn invalid_query_is_rejected_with_its_reason() {
    for (text, error) in [
        ("a=%", QueryError::Encoding),
        ("a=%4", QueryError::Encoding),
        ("a=%zz", QueryError::Encoding),
        ("a=%ff", QueryError::Encoding),
        ("ns=a&ns=b", QueryError::TwoNamespaces),
        ("1&2&3&4&5&6&7&8&9", QueryError::TooMany),
    ] {
        assert_eq!(Query::parse(Some(text)), Err(error), "{text}");
    }
    assert!(Query::parse(Some("1&2&3&4&5&6&7&8&ns=a")).is_ok());
    assert_eq!(
        Query::parse(Some(&"a".repeat(4097))),
        Err(QueryError::TooLong { found: 4097 })
    );
}

#[test]
fn r10_page_size_is_a_number_and_forwarded() {
    for (sent, asked) in [
        ("n=0", "n=0"),
        ("n=10", "n=10"),
        ("n=1000", "n=1000"),
        ("n=1001", "n=1001"),
        ("n=99999999999999999999999", "n=99999999999999999999999"),
        ("last=x", "last=x"),
    ] {
        assert_eq!(read(sent).0.with_page_size().unwrap().render(), asked);
    }
    for sent in ["n=", "n", "n=-1", "n=%2B1", "n=1.5", "n=ten", "n=1&n=x"] {
        assert_eq!(read(sent).0.with_page_size(), Err(QueryError::PageSize), "{sent}");
    }
}

proptest! {
    #[test]
    fn rendered_query_round_trips(pairs in proptest::collection::vec(("[a-m]\\PC{0,5}", ".{0,9}"), 0..8)) {
        let query = Query(pairs);
        prop_assert_eq!(Query::parse(Some(&query.render())), Ok((query, None)));
    }

    #[test]
    fn no_query_panics(text in ".{0,60}|[%+&=nsa-f0-9]{0,60}") {
        let _any = Query::parse(Some(&text)).map(|(query, _)| query.with_page_size());
    }
}
