#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::*;

fn headers(lines: &[(HeaderName, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in lines {
        headers.append(name, value.parse().unwrap());
    }
    headers
}

fn next(lines: &[&str]) -> Option<String> {
    next_link(&headers(
        &lines.iter().map(|line| (LINK, *line)).collect::<Vec<_>>(),
    ))
}

#[test]
fn docker_hub_rate_limit_parses() {
    let said = headers(&[
        (RATELIMIT_LIMIT, "100;w=21600"),
        (RATELIMIT_REMAINING, "76;w=21600"),
        (DOCKER_RATELIMIT_SOURCE, "192.0.2.1"),
    ]);
    let limit = RateLimit {
        limit: Some(100),
        remaining: Some(76),
        window_s: Some(21_600),
        reset_s: None,
        source: Some("192.0.2.1".into()),
    };
    assert_eq!(RateLimit::read(&said), limit);
    assert!(RateLimit::read(&HeaderMap::new()).is_unknown());
    let odd = headers(&[(RATELIMIT_LIMIT, "many;w=x"), (RATELIMIT_REMAINING, " 5 ; w=60")]);
    assert_eq!(
        RateLimit::read(&odd),
        RateLimit {
            remaining: Some(5),
            window_s: Some(60),
            reset_s: None,
            ..RateLimit::default()
        }
    );
    assert!(RateLimit::read(&headers(&[(DOCKER_RATELIMIT_SOURCE, &"a".repeat(200))])).is_unknown());
}

#[test]
fn next_link_is_found_without_its_host() {
    for (line, target) in [
        (
            r#"</v2/a/tags/list?n=2&last=b>; rel="next""#,
            "/v2/a/tags/list?n=2&last=b",
        ),
        (
            "<https://ghcr.io/v2/a/tags/list?last=b>;rel=next",
            "/v2/a/tags/list?last=b",
        ),
        (r#"<//ghcr.io/v2/a?last=b#x>; REL="prev NEXT""#, "/v2/a?last=b"),
        (r#"<?last=b>; rel="next""#, "?last=b"),
        (r#"<https://ghcr.io?last=b>; rel="next""#, "?last=b"),
        (r#"<tags/list?last=b>; rel="next""#, "tags/list?last=b"),
        (
            r#"</a?x=https://b>; title="x, <y>"; rel="next""#,
            "/a?x=https://b",
        ),
        (r#"</p>; rel="prev", </n>; rel="next""#, "/n"),
    ] {
        assert_eq!(next(&[line]).as_deref(), Some(target), "{line}");
    }
    assert_eq!(
        next(&[r#"</p>; rel="prev""#, r#"</n>; rel="next""#]).as_deref(),
        Some("/n")
    );
}

#[test]
fn other_links_are_no_next_page() {
    for line in [
        "",
        "<",
        "</a",
        "</a>",
        r#"</a>; rel="prev""#,
        r#"</a>; title="next""#,
        r#"<>; rel="next""#,
        r#"<https://ghcr.io>; rel="next""#,
        r#"<https://ghcr.io//evil.example/>; rel="next""#,
        r#"</a b>; rel="next""#,
        r#"</\evil.example/>; rel="next""#,
        r#"<odd+scheme://evil.example/>; rel="next""#,
        "next",
    ] {
        assert_eq!(next(&[line]), None, "{line}");
    }
    assert_eq!(
        next(&[&format!(r#"</{}>; rel="next""#, "a".repeat(LINK_BYTES_MAX))]),
        None
    );
}

proptest! {
    #[test]
    fn next_link_never_names_a_host(line in "[ -~]{0,60}|(<(https?:)?/{0,4}[a-z/?:#]{0,20}>; rel=\"next\",?){1,2}") {
        if let Some(target) = next(&[&line]) {
            prop_assert!(!target.starts_with("//"));
            prop_assert!(!target.split(['/', '?']).next().unwrap().contains(':'));
        }
    }
}

#[test]
fn cache_status_is_kept_only_if_it_can_be_continued() {
    let read = |lines: &[(HeaderName, &str)]| {
        let lines = lines
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()));
        CacheHeaders::read(&lines.collect())
    };
    let status = |line| read(&[(CACHE_STATUS, line)]).and_then(|caches| caches.status);
    assert_eq!(status("a; hit").unwrap(), "a; hit");
    assert_eq!(
        status("a; detail=\"x, \\\" y\"").unwrap(),
        "a; detail=\"x, \\\" y\""
    );
    for incomplete in ["", "a; detail=\"x", "a; detail=\"x\\\"", "a; detail=\u{fc}"] {
        assert_eq!(status(incomplete), None, "{incomplete}");
    }
    let both = read(&[
        (CACHE_STATUS, "a; hit"),
        (CACHE_STATUS, "b; fwd=miss"),
        (AGE, "60"),
        (WARNING, "299 a \"stale\""),
    ]);
    let both = both.unwrap();
    assert_eq!(both.status.unwrap(), "a; hit, b; fwd=miss");
    assert_eq!(
        (both.age_s, both.warning.unwrap()),
        (Some(60), "299 a \"stale\"".parse().unwrap())
    );
    let long = "x".repeat(CACHE_HEADER_BYTES_MAX + 1);
    for dropped in [&*long, "a; detail=\"x"] {
        let others = read(&[(CACHE_STATUS, dropped), (AGE, "60"), (WARNING, "299 - \"stale\"")]);
        let others = others.unwrap();
        assert_eq!((&others.status, others.age_s), (&None, Some(60)), "{dropped}");
        assert!(others.warning.is_some(), "{dropped}");
    }
    assert_eq!(
        read(&[(AGE, "60"), (WARNING, "299 - \"stale\"")]),
        None,
        "no cache describes itself"
    );
}
