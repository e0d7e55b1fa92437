//! The decision tables of `docs/policies.md`: each cell is the result of `policy::decide`, as for a request.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use ifnewer::oci::{Algorithm, Digest, UpstreamFailure};
use ifnewer::policy::min_age::{Maturity, YoungDigest};
use ifnewer::policy::{
    AgeFacts, Authorization, CacheState, CachedEntry, Completeness, ContentKind, CredentialOwner, Decision,
    MissReason, OlderDigest, OnNotFound, Policy, Presence, Revalidation, decide,
};

use crate::text::{read, root};

const BEGIN: &str = "<!-- decisions -->\n";
const END: &str = "<!-- /decisions -->";
const STALE: Duration = Duration::from_secs(3_600);

#[test]
fn policy_tables_match_the_decisions() {
    let path = root().join("docs/policies.md");
    let document = read(&path);
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    let expected = tables();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
    } else {
        assert_eq!(
            found, expected,
            "update them: UPDATE_DOCS=1 cargo test --test docs"
        );
    }
}

fn tables() -> String {
    let complete = Some(cached(old(), now() - Duration::from_secs(60)));
    let mut out = String::new();
    table(&mut out, "Cached image, client with a grant", &rows(), |row| {
        CacheState {
            authorization: Authorization::Granted,
            ..state(row, complete)
        }
    });
    table(&mut out, "Cached image, client without a grant", &rows(), |row| {
        state(row, complete)
    });
    let possible: Vec<_> = rows().into_iter().filter(|row| row.also_without_a_copy).collect();
    table(
        &mut out,
        "No cached image, client with a grant",
        &possible,
        |row| CacheState {
            authorization: Authorization::Granted,
            ..state(row, None)
        },
    );
    cooling_table(&mut out);
    out.push('\n');
    out
}

/// The table for `min_age`, for a client with a grant.
#[expect(clippy::too_many_lines, reason = "one row for each case")]
fn cooling_table(out: &mut String) {
    let young = |name: &[u8]| {
        Maturity::Young(YoungDigest {
            digest: Some(Digest::of(Algorithm::Sha256, name)),
            since: None,
            may_be_older: false,
            served_from: None,
        })
    };
    let older = |presence| {
        Some(OlderDigest {
            digest: old(),
            presence,
        })
    };
    let whole = Some(cached(old(), now() - Duration::from_secs(60)));
    let (mature, none) = (Maturity::Mature, Presence::None);
    let another = Revalidation::Digest {
        digest: Digest::of(Algorithm::Sha256, b"new"),
        presence: none,
    };
    let same = Revalidation::Digest {
        digest: old(),
        presence: Presence::Complete,
    };
    let silent = Revalidation::Unavailable(UpstreamFailure::Timeout);
    let stored = older(Presence::Complete);
    writeln!(out, "\nWith `min_age`, client with a grant:\n").unwrap();
    let policies = [Policy::Always, Policy::IfNewer, Policy::IfNotPresent];
    let names = policies.map(|policy| format!("`{policy}`")).join(" | ");
    writeln!(
        out,
        "| the tag names, at the registry | {names} |\n|---|---|---|---|"
    )
    .unwrap();
    for (words, copy, copy_age, revalidation, named, older) in [
        (
            "a digest that is old enough, not cached",
            None,
            mature,
            another,
            mature,
            None,
        ),
        (
            "a younger one; the older image is cached",
            whole,
            mature,
            another,
            young(b"new"),
            stored,
        ),
        (
            "a younger one; the older image is not cached",
            None,
            mature,
            another,
            young(b"new"),
            older(none),
        ),
        (
            "a younger one; no older digest is known",
            None,
            mature,
            another,
            young(b"new"),
            None,
        ),
        (
            "a younger one, which is cached; no older digest is known",
            whole,
            young(b"old"),
            same,
            young(b"old"),
            None,
        ),
        (
            "unavailable; the cached image is old enough",
            whole,
            mature,
            silent,
            mature,
            stored,
        ),
        (
            "unavailable; the cached image is younger",
            whole,
            young(b"old"),
            silent,
            mature,
            None,
        ),
    ] {
        let cells = policies.map(|policy| {
            cell(&CacheState {
                policy,
                kind: ContentKind::Tag,
                cached: copy,
                blocked: None,
                authorization: Authorization::Granted,
                revalidation,
                on_not_found: OnNotFound::Refuse,
                max_age: Duration::ZERO,
                stale_if_error: None,
                cooling: Some(AgeFacts {
                    cached: copy_age,
                    previous: mature,
                    named,
                    older,
                }),
                now: now(),
            })
        });
        writeln!(out, "| {words} | {} |", cells.join(" | ")).unwrap();
    }
}

/// The registry's response and the other inputs of a row.
struct Row {
    words: &'static str,
    revalidation: Revalidation,
    on_not_found: OnNotFound,
    confirmed_long_ago: bool,
    also_without_a_copy: bool,
}

fn rows() -> Vec<Row> {
    let row = |words, revalidation| Row {
        words,
        revalidation,
        on_not_found: OnNotFound::Refuse,
        confirmed_long_ago: false,
        also_without_a_copy: false,
    };
    let also = |words, revalidation| Row {
        also_without_a_copy: true,
        ..row(words, revalidation)
    };
    let presence = Presence::None;
    vec![
        row(
            "the same digest",
            Revalidation::Digest {
                digest: old(),
                presence: Presence::Complete,
            },
        ),
        also(
            "another digest",
            Revalidation::Digest {
                digest: Digest::of(Algorithm::Sha256, b"new"),
                presence,
            },
        ),
        also(
            "another digest, which is blocked",
            Revalidation::Blocked(Digest::of(Algorithm::Sha256, b"new")),
        ),
        row(
            "another digest, but the fetch failed",
            Revalidation::FetchFailed(UpstreamFailure::ConnectionReset),
        ),
        also("401 or 403", Revalidation::Denied(CredentialOwner::Client)),
        row(
            "401 or 403 to the cache's own credential",
            Revalidation::Denied(CredentialOwner::Proxy),
        ),
        also("404", Revalidation::NotFound),
        Row {
            on_not_found: OnNotFound::ServeStale,
            ..row(
                "404, with `on_not_found = \"serve-stale\"`",
                Revalidation::NotFound,
            )
        },
        also("unavailable", Revalidation::Unavailable(UpstreamFailure::Timeout)),
        Row {
            confirmed_long_ago: true,
            ..row(
                "unavailable, `stale_if_error` exceeded",
                Revalidation::Unavailable(UpstreamFailure::Timeout),
            )
        },
    ]
}

fn table(out: &mut String, title: &str, rows: &[Row], state: impl Fn(&Row) -> CacheState) {
    writeln!(out, "\n{title}:\n").unwrap();
    let policies = Policy::ALL.map(|policy| format!("`{policy}`")).join(" | ");
    writeln!(out, "| registry's response | {policies} |\n|---|---|---|---|---|").unwrap();
    for row in rows {
        let cells = Policy::ALL.map(|policy| cell(&CacheState { policy, ..state(row) }));
        writeln!(out, "| {} | {} |", row.words, cells.join(" | ")).unwrap();
    }
}

/// The final decision: after revalidation, if the first decision requires it.
fn cell(s: &CacheState) -> String {
    let first = decide(&CacheState {
        revalidation: Revalidation::NotDone,
        ..*s
    });
    let (is_requested, decision) = match first {
        // Uncached content is fetched, and the result is decided again.
        Decision::Revalidate | Decision::Fetch(_) => (true, decide(s)),
        other => (false, other),
    };
    let name = decision.name();
    match decision {
        Decision::Serve(_) if is_requested => format!("cached copy, `{name}`"),
        Decision::Serve(_) => format!("cached copy, `{name}`; no request"),
        Decision::Fetch(MissReason::Cooling(_)) => format!("older copy, `{name}`"),
        Decision::Fetch(_) => format!("new copy, `{name}`"),
        Decision::Deny(_) if is_requested => format!("denied, `{name}`"),
        Decision::Deny(_) => format!("denied, `{name}`; no request"),
        Decision::Revalidate | Decision::ProbeLayers(_) => panic!("not final: {decision:?}"),
    }
}

fn state(row: &Row, copy: Option<CachedEntry>) -> CacheState {
    CacheState {
        policy: Policy::IfNewer,
        kind: ContentKind::Tag,
        cached: copy.map(|copy| CachedEntry {
            confirmed_at: if row.confirmed_long_ago {
                now() - 2 * STALE
            } else {
                copy.confirmed_at
            },
            ..copy
        }),
        blocked: None,
        authorization: Authorization::Unknown,
        revalidation: row.revalidation,
        on_not_found: row.on_not_found,
        max_age: Duration::ZERO,
        stale_if_error: Some(STALE),
        cooling: None,
        now: now(),
    }
}

fn cached(digest: Digest, confirmed_at: SystemTime) -> CachedEntry {
    CachedEntry {
        digest,
        confirmed_at,
        is_moved: false,
        completeness: Completeness::Complete,
        is_invalidated: false,
    }
}

fn old() -> Digest {
    Digest::of(Algorithm::Sha256, b"old")
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
}
