#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::*;

fn accept(lines: &[&str]) -> Accept {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(ACCEPT, line.parse().unwrap());
    }
    let read = Accept::read(&headers).unwrap();
    let unshared = Accept::of(headers.get_all(ACCEPT).iter().cloned().collect()).unwrap();
    assert!(read.header_values().eq(unshared.header_values()));
    // A view of the received bytes would keep the credential between them.
    let is_view =
        |(kept, sent): (&HeaderValue, &HeaderValue)| kept.as_bytes().as_ptr() == sent.as_bytes().as_ptr();
    assert!(
        !read
            .header_values()
            .zip(headers.get_all(ACCEPT))
            .any(|pair| !pair.1.is_empty() && is_view(pair))
    );
    read
}

#[test]
fn order_lines_case_and_weights_do_not_change_the_set() {
    let set = accept(&["a/b, c/d", "e/f"]);
    for same in [
        &["e/f", "c/d", "a/b"][..],
        &["C/D;q=0.5 ,,A/b ; x=y", "e/f,e/f"],
        &["a/b,c/d,e/f,g/h;q=0"],
    ] {
        assert_eq!((accept(same).key(), &accept(same)), (set.key(), &set));
    }
    assert_ne!(accept(&["a/b, c/d"]).key(), set.key());
    assert_ne!(Accept::any().key(), set.key());
}

#[test]
fn key_is_stable_across_runs() {
    // The first 8 bytes of SHA-256 of nothing, and of "a/b\n".
    assert_eq!(Accept::any().key(), 0xe3b0_c442_98fc_1c14);
    assert_eq!(accept(&["a/b"]).key(), key_of(&["a/b".into()]));
}

#[test]
fn lines_are_forwarded_unchanged() {
    let lines = ["a/B;q=0.3, c/d", "nonsense", "x/y"];
    assert_eq!(
        accept(&lines)
            .header_values()
            .map(|line| line.to_str().unwrap())
            .collect::<Vec<_>>(),
        lines
    );
    assert_eq!(Accept::any().header_values().count(), 0);
}

#[test]
fn type_is_accepted_by_name_wildcard_or_empty_set() {
    for (lines, admitted) in [
        (&[][..], true),
        (&["nonsense"], true),
        (&["*/*"], true),
        (&["*;q=.2"], true),
        (&["application/*"], true),
        (&["a/b", "APPLICATION/VND.oci.image.index.v1+JSON;q=0.1"], true),
        (&["text/*"], false),
        (&["application/json"], false),
        (&["application/vnd.oci.image.index.v1+json;q=0, a/b"], false),
    ] {
        let index: MediaType = "application/vnd.oci.image.index.v1+json; charset=utf-8"
            .parse()
            .unwrap();
        assert_eq!(accept(lines).accepts(&index), admitted, "{lines:?}");
    }
}

#[test]
fn own_set_accepts_every_current_manifest_type() {
    for name in MediaType::CURRENT_MANIFESTS {
        assert!(Accept::manifests().accepts(&name.parse().unwrap()));
    }
    let lines: Vec<_> = Accept::manifests()
        .header_values()
        .map(|line| line.to_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        accept(&lines.iter().map(String::as_str).collect::<Vec<_>>()),
        Accept::manifests()
    );
}

#[test]
fn too_many_types_or_bytes_are_rejected() {
    let refused = |line: String| {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, line.parse().unwrap());
        Accept::read(&headers).unwrap_err()
    };
    assert_eq!(refused("a/b,".repeat(65)), AcceptError::TooMany { found: 65 });
    assert_eq!(refused("x".repeat(8193)), AcceptError::TooLong { found: 8193 });
}

proptest! {
    #[test]
    fn shuffled_set_has_the_same_key(
        (types, shuffled) in proptest::collection::vec("[a-z]{1,5}/[a-z+.]{1,9}", 0..20)
            .prop_flat_map(|types| (Just(types.clone()), Just(types).prop_shuffle())),
    ) {
        let lines = |types: &[String]| accept(&types.iter().map(String::as_str).collect::<Vec<_>>());
        prop_assert_eq!(lines(&types).key(), lines(&shuffled).key());
    }

    #[test]
    fn no_line_panics(bytes in proptest::collection::vec(32u8.., 0..60)) {
        if let Ok(line) = HeaderValue::from_bytes(&bytes) {
            let _any = Accept::of(vec![line]);
        }
    }
}

#[test]
fn wildcards_list_no_type_and_one_index_type_is_not_all() {
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    const LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    let listed = |lines: &[&str]| {
        let set = accept(lines);
        (set.lists(&INDEX.parse().unwrap()), set.lists_indexes())
    };
    assert_eq!(listed(&[]), (false, false));
    assert_eq!(listed(&["*/*", "application/*"]), (false, false));
    assert_eq!(listed(&[INDEX]), (true, false));
    assert_eq!(listed(&[LIST]), (false, false));
    assert_eq!(listed(&[&format!("{INDEX};q=0"), LIST]), (false, false));
    assert_eq!(listed(&[&INDEX.to_uppercase(), LIST, "*/*"]), (true, true));
    assert!(Accept::manifests().lists_indexes());
}
