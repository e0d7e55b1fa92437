use proptest::prelude::*;

use super::canonical;

#[test]
fn k7_host_has_one_canonical_form() {
    for (text, expected) in [
        ("ghcr.io", Some("ghcr.io")),
        ("GHCR.io", Some("ghcr.io")),
        ("ghcr.io.", Some("ghcr.io")),
        ("ghcr.io:", Some("ghcr.io")),
        ("ghcr.io:443", Some("ghcr.io")),
        ("ghcr.io.:0443", Some("ghcr.io")),
        ("ghcr.io:80", Some("ghcr.io:80")),
        ("r.example:05000", Some("r.example:5000")),
        ("localhost:5000", Some("localhost:5000")),
        ("my_registry", Some("my_registry")),
        ("[::1]", Some("[::1]")),
        ("[0:0::1]:443", Some("[::1]")),
        ("[2001:DB8::1]:5000", Some("[2001:db8::1]:5000")),
        ("", None),
        (".", None),
        (":443", None),
        ("ghcr.io..", None),
        ("ghcr.io:+443", None),
        ("ghcr.io:65979", None),
        ("ghcr.io:443:443", None),
        ("https://ghcr.io", None),
        ("ghcr.io/team", None),
        ("user@ghcr.io", None),
        ("ghcr%2eio", None),
        ("::1", None),
        ("[::1", None),
        ("[::1]5000", None),
        ("[fe80::1%eth0]", None),
        ("[ghcr.io]", None),
    ] {
        assert_eq!(canonical(text).as_deref(), expected, "{text}");
    }
}

proptest! {
    #[test]
    fn k7_the_one_spelling_is_its_own(text in "[\\[]{0,1}[aB.:0-9_-]{0,12}[\\]]{0,1}(:[0-9]{0,5})?\\.?") {
        if let Some(one) = canonical(&text) {
            let again = canonical(&one);
            prop_assert_eq!(again.as_deref(), Some(&*one));
        }
    }
}
