//! Text rendering of times, sizes and decisions, shared by the page, the API and the command line.

use std::time::{Duration, SystemTime};

use crate::oci::UpstreamFailure;
use crate::policy::min_age::YoungDigest;
use crate::policy::{DenyReason, HitReason, MissReason};
use crate::proxy::Refreshed;
use crate::store::tags::NEVER_CONFIRMED;
use crate::telemetry::{BodyEnd, CacheResult, DecisionRecord};

/// RFC 3339 with seconds.
pub(super) fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Time of the last upstream confirmation; `None` if there was none.
pub(super) fn confirmed(at: SystemTime) -> Option<String> {
    (at != NEVER_CONFIRMED).then(|| rfc3339(at))
}

/// `1.5 GiB`.
pub fn bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// The two largest units, as in `3h 20m`, `5d 2h` or `12s`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let mut left = seconds;
    let mut parts = Vec::new();
    for (length, unit) in units {
        let count = left / length;
        left %= length;
        if count > 0 {
            parts.push(format!("{count}{unit}"));
        } else if !parts.is_empty() {
            break;
        }
        if parts.len() == 2 {
            break;
        }
    }
    if parts.is_empty() {
        parts.push("0s".to_owned());
    }
    parts.join(" ")
}

/// Shortened digest: the algorithm and twelve hex digits.
pub fn short_digest(digest: &str) -> String {
    match digest.split_once(':') {
        Some((algorithm, hex)) => format!("{algorithm}:{}", hex.get(..12).unwrap_or(hex)),
        None => digest.to_owned(),
    }
}

/// One-sentence explanation of a logged decision.
pub(super) fn describe_decision(decision: &DecisionRecord) -> String {
    let so_far = bytes(decision.bytes);
    let upstream = &*decision.upstream;
    match decision.ended {
        BodyEnd::Complete => describe_complete(decision),
        BodyEnd::Aborted if decision.reason == "client-left" => {
            "the client disconnected before the response".to_owned()
        }
        BodyEnd::Aborted => format!("the client disconnected after {so_far}"),
        BodyEnd::Upstream => format!("{upstream} failed after {so_far}; the response is incomplete"),
        BodyEnd::Disk => format!("the disk failed after {so_far}; the response is incomplete"),
        BodyEnd::Blocked => format!("blocked by the operator after {so_far}; the response is incomplete"),
        BodyEnd::Damage => {
            format!(
                "the cached data was damaged after {so_far}; the response is incomplete, and the next request fetches it again"
            )
        }
    }
}

fn describe_complete(decision: &DecisionRecord) -> String {
    let upstream = &*decision.upstream;
    let with_cause = |what: &str| match decision.cause {
        Some(cause) => format!("{upstream} {cause}: {what}"),
        None => what.to_owned(),
    };
    match (decision.result, decision.reason) {
        (_, "revalidated") => format!("unchanged at {upstream}"),
        (_, "fresh") => "recently confirmed, not revalidated".to_owned(),
        (_, "immutable") => "requested by digest, which is immutable".to_owned(),
        (_, "not-revalidated") => "cached, and the policy does not revalidate".to_owned(),
        (_, "tag-moved") => format!("the tag has moved at {upstream} to an image that is cached"),
        (CacheResult::Stale, "stale-if-error") => with_cause("served the cached copy"),
        (_, "expired-grant") => with_cause("served by digest, on an expired grant"),
        (_, "stale-fetch-failed") => with_cause("a newer image could not be fetched; served the cached one"),
        (_, "previous-complete") => {
            with_cause("the newest image is incomplete; served the last complete one")
        }
        (_, "retained-deleted") => format!("deleted at {upstream}, retained by the policy"),
        (_, "cache-credential-rejected") => {
            format!("{upstream} rejects the cache's credential; served the cached copy")
        }
        (CacheResult::Miss, "not-cached") => format!("not cached: fetched from {upstream}"),
        (CacheResult::Miss, "new-digest") => format!("new digest at {upstream}: fetched"),
        (_, "cooling") => {
            format!("the tag's digest at {upstream} is younger than `min_age`; served the newest older one")
        }
        (CacheResult::Miss, "no-digest") => format!("{upstream} returns no digest: fetched"),
        (CacheResult::Miss, "head") => format!("HEAD forwarded to {upstream}"),
        (_, "shared") => "read from the shared storage".to_owned(),
        (_, "collapsed") => "joined a running download".to_owned(),
        (_, "passthrough") => "passed through, not stored".to_owned(),
        (_, "local-token") => with_cause("issued a local token"),
        (CacheResult::Denied, "forbidden") => {
            format!("denied: {upstream} does not authorize this credential")
        }
        (CacheResult::Denied, "auth-required") => format!("{upstream} requires authentication"),
        (CacheResult::Denied, "not-found") => format!("denied: the image does not exist at {upstream}"),
        (CacheResult::Denied, "upstream-unavailable") => with_cause("no cached copy may be served instead"),
        (CacheResult::Denied, "stale-limit-exceeded") => {
            with_cause("the cached copy is older than `stale_if_error` allows")
        }
        (CacheResult::Denied, "incomplete") => with_cause("the cached image is incomplete"),
        (CacheResult::Denied, "blocked") => "denied: the digest is blocked by the operator".to_owned(),
        (CacheResult::Denied, "not-cached" | "not-authorized") => {
            "denied: the policy `never` disables upstream requests".to_owned()
        }
        (CacheResult::Denied, "too-young") => {
            "denied: younger than `min_age`, and nothing older can be served".to_owned()
        }
        (CacheResult::Denied, reason) => format!("denied: {reason}"),
        (_, reason) => reason.to_owned(),
    }
}

/// Describes a decision to serve.
pub(super) fn describe_serve(served: HitReason, upstream: &str) -> String {
    let after = |cause: Option<UpstreamFailure>| {
        cause.map_or(String::new(), |cause| format!(", because {upstream} {cause}"))
    };
    match served {
        HitReason::Fresh => {
            "serve the cached copy without revalidation: it was confirmed less than `max_age` ago".to_owned()
        }
        HitReason::Revalidated => "serve the cached copy: the tag is unchanged".to_owned(),
        HitReason::TagMoved => "serve the image that the tag names now, which is cached".to_owned(),
        HitReason::Immutable => "serve it without revalidation: a digest is immutable".to_owned(),
        HitReason::NotRevalidated => "serve the cached copy without revalidation, by policy".to_owned(),
        HitReason::StaleIfError(cause) => {
            format!("serve the cached copy with a warning{}", after(Some(cause)))
        }
        HitReason::ExpiredGrant(cause) => format!("serve it on an expired grant{}", after(Some(cause))),
        HitReason::StaleOnFetchError(cause) => format!(
            "serve the cached copy with a warning instead of the newer one{}",
            after(Some(cause))
        ),
        HitReason::PreviousComplete(cause) => {
            format!("serve the last complete image with a warning{}", after(cause))
        }
        HitReason::RetainedDeleted => {
            "serve the cached copy with a warning: the policy retains deleted images".to_owned()
        }
        HitReason::CacheCredentialRejected => {
            "serve the cached copy with a warning: the cache's credential is rejected".to_owned()
        }
        HitReason::Cooling(youth) => {
            format!(
                "serve the newest cached image that `min_age` allows; {}",
                describe_youth(&youth)
            )
        }
    }
}

/// The digest that is too young, and from when on it is served.
pub(super) fn describe_youth(youth: &YoungDigest) -> String {
    let end = youth.describe_served_from();
    youth.digest.map_or_else(
        || end.clone(),
        |digest| format!("the tag names {}, {end}", short_digest(&digest.to_string())),
    )
}

/// The same for a digest that no tag need name.
pub(super) fn describe_young_digest(youth: &YoungDigest) -> String {
    let end = youth.describe_served_from();
    youth.digest.map_or_else(
        || end.clone(),
        |digest| format!("{} is {end}", short_digest(&digest.to_string())),
    )
}

/// Describes a decision to fetch.
pub(super) fn describe_fetch(why: MissReason, upstream: &str) -> String {
    match why {
        MissReason::NotCached => format!("fetch it from {upstream}: it is not cached"),
        MissReason::NewDigest => format!("fetch the new digest from {upstream}"),
        MissReason::NoDigest => format!("fetch it from {upstream}, which returns no digest"),
        MissReason::Cooling(youth) => format!(
            "fetch the newest image that `min_age` allows from {upstream}; {}",
            describe_youth(&youth)
        ),
    }
}

/// Describes a decision to deny.
pub(super) fn describe_denial(refusal: DenyReason, upstream: &str) -> String {
    match refusal {
        DenyReason::NotCached => {
            "deny: it is not cached, and the policy `never` disables upstream requests".to_owned()
        }
        DenyReason::NotAuthorized => format!(
            "deny: {upstream} has not authorized this client, and the policy `never` disables upstream requests"
        ),
        DenyReason::Forbidden => format!("deny: {upstream} does not authorize this credential"),
        DenyReason::AuthRequired => format!("deny: {upstream} requires authentication"),
        DenyReason::NotFound => format!("deny: the image does not exist at {upstream}"),
        DenyReason::UpstreamUnavailable(cause) => {
            format!("deny: {upstream} {cause}, and no cached copy may be served instead")
        }
        DenyReason::StaleLimitExceeded(cause) => {
            format!("deny: {upstream} {cause}, and the cached copy is older than `stale_if_error` allows")
        }
        DenyReason::Incomplete(cause) => {
            format!("deny: {upstream} {cause}, and the cached image is incomplete")
        }
        DenyReason::TooYoung(youth) => {
            format!(
                "deny: nothing that `min_age` allows can be served; {}",
                describe_young_digest(&youth)
            )
        }
        DenyReason::Blocked(digest) => format!("deny: {digest} is blocked by the operator"),
    }
}

/// Describes the result of a revalidation.
pub(super) fn describe_refresh(refreshed: Refreshed, upstream: &str) -> String {
    match refreshed {
        Refreshed::Unchanged(_) => format!("unchanged at {upstream}"),
        Refreshed::Newer(_) => format!("{upstream} has a newer image, which is cached now"),
        Refreshed::TooYoung(youth) => format!(
            "younger at {upstream} than `min_age` allows: {}",
            describe_youth(&youth)
        ),
        Refreshed::Blocked(digest) => format!("{upstream} names {digest}, which is blocked and not fetched"),
        Refreshed::NotFound => format!("deleted at {upstream}; retained until a client requests it"),
        Refreshed::Denied => format!("{upstream} does not authorize this credential"),
        Refreshed::Unavailable(cause) => format!("{upstream} {cause}; the cached image is kept"),
        Refreshed::FetchFailed(cause) => {
            format!("a newer image could not be fetched: {upstream} {cause}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_shows_two_largest_units() {
        for (seconds, parts) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (3_661, "1h 1m"),
            (90_061, "1d 1h"),
            (3_605, "1h"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), parts);
        }
    }

    #[test]
    fn sizes_and_digests_are_short() {
        assert_eq!(bytes(1_610_612_736), "1.5 GiB");
        assert_eq!(short_digest("sha256:0123456789abcdef"), "sha256:0123456789ab");
    }
}
