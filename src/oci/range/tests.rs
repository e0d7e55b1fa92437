#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::ByteRange::{Bounded, FromOffset, Suffix};
use super::*;

fn read(text: &str) -> RangeRequest {
    RangeRequest::read(Some(&text.parse().unwrap()))
}

#[test]
fn valid_ranges_parse_and_others_are_ignored() {
    let single = RangeRequest::Single;
    for (text, request) in [
        ("bytes=0-1", single(Bounded { first: 0, last: 1 })),
        ("Bytes = 5 - ", single(FromOffset(5))),
        ("bytes=-7", single(Suffix(7))),
        ("bytes=500-0", single(Bounded { first: 500, last: 0 })),
        ("bytes=,1-,", single(FromOffset(1))),
        (
            "bytes=0-99999999999999999999",
            single(Bounded {
                first: 0,
                last: u64::MAX,
            }),
        ),
        (
            "bytes=0-1, 4-",
            RangeRequest::Multi(vec![Bounded { first: 0, last: 1 }, FromOffset(4)]),
        ),
        ("", RangeRequest::None),
        ("bytes", RangeRequest::None),
        ("bytes=", RangeRequest::None),
        ("bytes=-", RangeRequest::None),
        ("bytes=a-b", RangeRequest::None),
        ("bytes=+1-2", RangeRequest::None),
        ("bytes=--1", RangeRequest::None),
        ("bytes=1", RangeRequest::None),
        ("bytes=1-2,x", RangeRequest::None),
        ("items=0-1", RangeRequest::None),
    ] {
        assert_eq!(read(text), request, "{text}");
    }
    assert_eq!(RangeRequest::read(None), RangeRequest::None);
    assert!(matches!(
        read(&format!("bytes={}", vec!["0-0"; RANGES_MAX].join(","))),
        RangeRequest::Multi(_)
    ));
    assert_eq!(
        read(&format!("bytes={}", vec!["0-0"; RANGES_MAX + 1].join(","))),
        RangeRequest::None
    );
}

#[test]
fn range_is_clipped_or_unsatisfiable() {
    for (range, size, bytes) in [
        // Cases of the conformance suite, with a body of 4,000 bytes.
        (
            Bounded {
                first: 500,
                last: 1499,
            },
            4000,
            Some((500, 1500)),
        ),
        (FromOffset(500), 4000, Some((500, 4000))),
        (Suffix(500), 4000, Some((3500, 4000))),
        (
            Bounded {
                first: 2000,
                last: 5000,
            },
            4000,
            Some((2000, 4000)),
        ),
        (Bounded { first: 500, last: 0 }, 4000, None),
        (
            Bounded {
                first: 5000,
                last: 10_000,
            },
            4000,
            None,
        ),
        (FromOffset(3999), 4000, Some((3999, 4000))),
        (FromOffset(4000), 4000, None),
        (Suffix(0), 4000, None),
        (Suffix(9999), 4000, Some((0, 4000))),
        (
            Bounded {
                first: 0,
                last: u64::MAX,
            },
            4000,
            Some((0, 4000)),
        ),
        (FromOffset(0), 0, None),
        (Suffix(1), 0, None),
    ] {
        let span = range.resolve(size);
        assert_eq!(
            span.map(|span| (span.start, span.end_exclusive)),
            bytes,
            "{range} of {size}"
        );
    }
}

#[test]
fn content_range_round_trips() {
    let span = ByteSpan::new(0, 2).unwrap();
    assert_eq!(
        (content_range(span, 10), unsatisfied_content_range(10)),
        ("bytes 0-1/10".into(), "bytes */10".into())
    );
    assert_eq!(parse_content_range("bytes 0-1/10"), Some((span, Some(10))));
    assert_eq!(parse_content_range("Bytes 0-1/*"), Some((span, None)));
    for text in [
        "",
        "bytes",
        "bytes */10",
        "bytes 1-0/10",
        "bytes 0-10/10",
        "bytes 0-1",
        "items 0-1/10",
        "bytes 0-x/10",
        "bytes -1/10",
        "bytes 0-18446744073709551615/*",
        "bytes 0-1/99999999999999999999",
    ] {
        assert_eq!(parse_content_range(text), None, "{text}");
    }
}

proptest! {
    #[test]
    fn span_lies_in_the_body_and_round_trips(first: u64, last: u64, size: u64) {
        for range in [FromOffset(first), Bounded { first, last }, Suffix(last)] {
            if let Some(span) = range.resolve(size) {
                prop_assert!(span.start < span.end_exclusive && span.end_exclusive <= size);
                prop_assert_eq!(parse_content_range(&content_range(span, size)), Some((span, Some(size))));
            }
            prop_assert_eq!(read(&format!("bytes={range}")), RangeRequest::Single(range));
        }
    }

    #[test]
    fn no_header_panics(text in "[ -~]{0,40}|bytes=[0-9, -]{0,40}") {
        let _any = (read(&text), parse_content_range(&text));
    }
}

fn sent(text: &str, size: u64) -> ResolvedRange {
    read(text).resolve(size)
}

fn parts(spans: &[(u64, u64)]) -> ResolvedRange {
    let spans = spans
        .iter()
        .map(|(start, end)| ByteSpan::new(*start, *end).unwrap());
    ResolvedRange::Multi(spans.collect())
}

#[test]
fn unsatisfiable_ranges_are_dropped_and_416_only_if_all_are() {
    for (text, expected) in [
        ("bytes=0-0", ResolvedRange::Single(ByteSpan::new(0, 1).unwrap())),
        ("bytes=10-", ResolvedRange::Unsatisfiable),
        ("bytes=0-1,4-5", parts(&[(0, 2), (4, 6)])),
        ("bytes=4-5,0-1", parts(&[(4, 6), (0, 2)])),
        ("bytes=0-1,10-20", parts(&[(0, 2)])),
        ("bytes=0-1,8-20,-1", parts(&[(0, 2), (8, 10)])),
        ("bytes=10-,20-30,-0", ResolvedRange::Unsatisfiable),
        ("lines=0-1,2-3", ResolvedRange::Full),
    ] {
        assert_eq!(sent(text, 10), expected, "{text}");
    }
}

#[test]
fn overlapping_ranges_merge_and_adjacent_ones_stay() {
    for (text, expected) in [
        ("bytes=0-4,2-6", parts(&[(0, 7)])),
        ("bytes=8-9,0-4,2-6", parts(&[(8, 10), (0, 7)])),
        ("bytes=0-,0-,0-,-1", parts(&[(0, 10)])),
        ("bytes=0-1,2-3", parts(&[(0, 2), (2, 4)])),
        ("bytes=6-9,0-3,2-7", parts(&[(0, 10)])),
    ] {
        assert_eq!(sent(text, 10), expected, "{text}");
    }
}

proptest! {
    #[test]
    fn multi_range_sends_each_requested_byte_once(
        asked in prop::collection::vec((0_u64..60, 0_u64..60), 2..20),
        size in 1_u64..50,
    ) {
        let text: Vec<String> = asked.iter().map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))).collect();
        let wanted: std::collections::BTreeSet<u64> = asked
            .iter()
            .flat_map(|(a, b)| *a.min(b)..=*a.max(b))
            .filter(|byte| *byte < size)
            .collect();
        let brought: Vec<u64> = match sent(&format!("bytes={}", text.join(",")), size) {
            ResolvedRange::Multi(spans) => spans.iter().flat_map(|span| span.start..span.end_exclusive).collect(),
            ResolvedRange::Unsatisfiable => Vec::new(),
            other => panic!("{other:?}"),
        };
        let once: std::collections::BTreeSet<u64> = brought.iter().copied().collect();
        prop_assert_eq!(brought.len(), once.len());
        prop_assert_eq!(once, wanted);
    }
}

#[test]
fn several_ranges_of_an_uncached_blob_are_unbounded() {
    let max = |text: &str| read(text).uncached_bytes_max();
    assert_eq!(max("bytes=5-9"), Some(5));
    assert_eq!(max("bytes=-7"), Some(7));
    assert_eq!(max("bytes=5-"), None);
    assert_eq!(max("bytes=0-9,100-109"), None);
}
