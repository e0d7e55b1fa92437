#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use super::*;
use crate::policy::refresh::RefreshInterval;

const MINUTE: Duration = Duration::from_secs(60);

fn default() -> EffectivePolicy {
    EffectivePolicy {
        name: Arc::from("default"),
        policy: Policy::IfNewer,
        max_age: Duration::ZERO,
        stale_if_error: None,
        revalidate_timeout: Duration::from_secs(2),
        on_not_found: OnNotFound::Refuse,
        grant_ttl: 5 * MINUTE,
        grant_ttl_offline: 720 * MINUTE,
        prefetch: true,
        refresh: RefreshPolicy::OFF,
        age_limit: AgeLimit::OFF,
    }
}

fn policy(policy: Policy) -> PolicyOverrides {
    PolicyOverrides {
        policy: Some(policy),
        ..PolicyOverrides::default()
    }
}

fn pattern(text: &str) -> ImagePattern {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Rules that each set policy `never`, for the upstreams of the tests.
fn rules(globs: &[&str]) -> Rules {
    let rules = globs
        .iter()
        .map(|glob| (vec![pattern(glob)], policy(Policy::Never)))
        .collect();
    let names = ["docker.io", "ghcr.io", "localhost:5000"];
    Rules::new(
        default(),
        names.map(|name| (Arc::from(name), PolicyOverrides::default())),
        rules,
    )
    .unwrap()
}

fn matched(rules: &Rules, upstream: &str, repository: &str, tag: Option<&str>) -> String {
    let tag = tag.map(|tag| tag.parse().unwrap());
    rules
        .find(upstream, &repository.parse().unwrap(), tag.as_ref())
        .name
        .to_string()
}

#[test]
fn globs_match_as_documented() {
    let table = [
        ("ghcr.io/acme/web", "ghcr.io", "acme/web", Some("v1"), true),
        ("ghcr.io/acme/web", "ghcr.io", "acme/web", None, true),
        ("ghcr.io/acme/web", "ghcr.io", "acme/web2", Some("v1"), false),
        ("ghcr.io/acme/*", "ghcr.io", "acme/web", Some("v1"), true),
        ("ghcr.io/acme/*", "ghcr.io", "acme/web/api", Some("v1"), true),
        ("ghcr.io/*/api", "ghcr.io", "acme/web/api", Some("v1"), true),
        ("ghcr.io/acme/*", "docker.io", "acme/web", Some("v1"), false),
        ("*/acme/web", "docker.io", "acme/web", Some("v1"), true),
        ("*", "docker.io", "acme/web", Some("v1"), true),
        ("*", "docker.io", "acme/web", None, true),
        ("*:latest", "docker.io", "acme/web", Some("latest"), true),
        ("*:latest", "docker.io", "acme/web", Some("v1"), false),
        ("*:latest", "docker.io", "acme/web", None, false),
        (
            "ghcr.io/acme/*:nightly-*",
            "ghcr.io",
            "acme/web",
            Some("nightly-3"),
            true,
        ),
        (
            "ghcr.io/acme/*:nightly-*",
            "ghcr.io",
            "acme/web",
            Some("weekly-3"),
            false,
        ),
        ("ghcr.io/acme/*:nightly-*", "ghcr.io", "acme/web", None, false),
        (
            "ghcr.io/acme/web:{dev,edge}",
            "ghcr.io",
            "acme/web",
            Some("edge"),
            true,
        ),
        ("ghcr.io/acme/web:v[0-9]", "ghcr.io", "acme/web", Some("v7"), true),
        ("ghcr.io/acme/web:v?", "ghcr.io", "acme/web", Some("v77"), false),
        (
            "localhost:5000/acme/web",
            "localhost:5000",
            "acme/web",
            Some("5000"),
            true,
        ),
        (
            "localhost:5000/acme/web:v1",
            "localhost:5000",
            "acme/web",
            Some("v1"),
            true,
        ),
        // A port is not taken for a tag.
        ("*:5*", "localhost:5000", "acme/web", Some("v1"), false),
        (
            "docker.io/library/nginx",
            "docker.io",
            "library/nginx",
            Some("v1"),
            true,
        ),
        ("docker.io/nginx", "docker.io", "library/nginx", Some("v1"), true),
        (
            "docker.io/ngin?:v*",
            "docker.io",
            "library/nginx",
            Some("v1"),
            true,
        ),
        ("ghcr.io/nginx", "ghcr.io", "library/nginx", Some("v1"), false),
    ];
    for (glob, upstream, repository, tag, expected) in table {
        let name = matched(&rules(&[glob]), upstream, repository, tag);
        let expected_name = if expected {
            format!("rule 1: {glob}")
        } else {
            "default".to_owned()
        };
        assert_eq!(name, expected_name, "{glob} on {upstream}/{repository} {tag:?}");
    }
}

#[test]
fn first_match_wins_also_for_hub_short_names() {
    let rules = rules(&["docker.io/nginx:v1", "docker.io/library/*", "*"]);
    assert_eq!(
        matched(&rules, "docker.io", "library/nginx", Some("v1")),
        "rule 1: docker.io/nginx:v1"
    );
    assert_eq!(
        matched(&rules, "docker.io", "library/nginx", Some("v2")),
        "rule 2: docker.io/library/*"
    );
    assert_eq!(
        matched(&rules, "docker.io", "acme/nginx", Some("v1")),
        "rule 3: *"
    );
    assert_eq!(
        matched(&rules, "ghcr.io", "library/nginx", Some("v1")),
        "rule 3: *"
    );
}

#[test]
fn rule_overrides_only_its_own_settings() {
    let upstream = PolicyOverrides {
        grant_ttl: Some(MINUTE),
        stale_if_error: Some(StaleLimit::Within(9 * MINUTE)),
        ..PolicyOverrides::default()
    };
    let rule = PolicyOverrides {
        max_age: Some(MINUTE),
        ..policy(Policy::Always)
    };
    let forever = PolicyOverrides {
        stale_if_error: Some(StaleLimit::Unlimited),
        ..PolicyOverrides::default()
    };
    let rules = Rules::new(
        default(),
        [
            (Arc::from("ghcr.io"), upstream),
            (Arc::from("quay.io"), PolicyOverrides::default()),
        ],
        vec![
            (vec![pattern("*/a/*"), pattern("*/b/*")], rule),
            (vec![pattern("*/c/*")], forever),
        ],
    )
    .unwrap();
    let find = |upstream, repository: &str| rules.find(upstream, &repository.parse().unwrap(), None).clone();

    let at_ghcr = EffectivePolicy {
        name: Arc::from("upstream ghcr.io"),
        stale_if_error: Some(9 * MINUTE),
        grant_ttl: MINUTE,
        ..default()
    };
    assert_eq!(find("ghcr.io", "x/y"), at_ghcr);
    assert_eq!(*rules.default_for("ghcr.io"), at_ghcr);
    let name = Arc::from("rule 1: */a/*, */b/*");
    assert_eq!(
        find("ghcr.io", "b/y"),
        EffectivePolicy {
            name,
            policy: Policy::Always,
            max_age: MINUTE,
            ..at_ghcr.clone()
        }
    );
    assert_eq!(
        find("ghcr.io", "c/y"),
        EffectivePolicy {
            name: Arc::from("rule 2: */c/*"),
            stale_if_error: None,
            ..at_ghcr
        }
    );
    assert_eq!(find("quay.io", "x/y"), default());
    assert_eq!(find("unheard.of", "a/y"), default());
    assert_eq!(
        rules.names().collect::<Vec<_>>(),
        ["rule 1: */a/*, */b/*", "rule 2: */c/*"]
    );
}

#[test]
fn single_policy_needs_no_upstreams() {
    let rules = Rules::single(default());
    assert_eq!(
        matched(&rules, "docker.io", "library/nginx", Some("v1")),
        "default"
    );
}

#[test]
fn glob_that_matches_no_image_is_rejected() {
    let long = "a/".repeat(300);
    let table = [
        ("", ImagePatternError::Empty),
        (":v1", ImagePatternError::Empty),
        ("ghcr.io/acme/web:", ImagePatternError::Empty),
        (long.as_str(), ImagePatternError::TooLong),
        ("ghcr.io/acme/web@sha256:00", ImagePatternError::Digest),
        ("https://ghcr.io/acme", ImagePatternError::Url),
        ("ghcr.io", ImagePatternError::NoRepository),
        ("nginx:v1", ImagePatternError::NoRepository),
        ("ghcr.io/a:b/c", ImagePatternError::SlashInTag),
        ("{ghcr.io/a:b,quay.io/c}", ImagePatternError::SlashInTag),
    ];
    for (text, expected) in table {
        assert_eq!(text.parse::<ImagePattern>().unwrap_err(), expected, "{text}");
    }
    for text in ["ghcr.io/[", "ghcr.io/{a", "ghcr.io/a:["] {
        assert!(
            matches!(text.parse::<ImagePattern>(), Err(ImagePatternError::Glob(_))),
            "{text}"
        );
    }
}

#[test]
fn glob_upstream_is_known_without_wildcards() {
    let table = [
        ("ghcr.io/*", Some("ghcr.io")),
        ("localhost:5000/a:v1", Some("localhost:5000")),
        ("*.example.org/a", None),
        ("*", None),
        ("*:v1", None),
        ("{ghcr.io,quay.io}/a", None),
    ];
    for (glob, expected) in table {
        assert_eq!(pattern(glob).upstream(), expected, "{glob}");
    }
}

#[test]
fn rule_overrides_refresh_and_never_disables_it() {
    let on = EffectivePolicy {
        refresh: RefreshPolicy {
            interval: Some(60 * MINUTE),
            ..default().refresh
        },
        ..default()
    };
    assert_eq!(on.scheduled_refresh().interval, Some(60 * MINUTE));
    let never = on.with_overrides(Arc::from(""), &policy(Policy::Never));
    assert_eq!(never.scheduled_refresh().interval, None);
    let changes = PolicyOverrides {
        refresh: RefreshOverrides {
            interval: Some(RefreshInterval::Off),
            used_within: Some(MINUTE),
            quota_floor: None,
        },
        ..PolicyOverrides::default()
    };
    let off = on.with_overrides(Arc::from(""), &changes);
    assert_eq!((off.refresh.interval, off.refresh.used_within), (None, MINUTE));
    assert_eq!(off.refresh.quota_floor, on.refresh.quota_floor);
}
