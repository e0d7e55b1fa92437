//! Text rendering of times, sizes and decisions, shared by the page, the API and the command line.

use std::time::{Duration, SystemTime};

use crate::oci::UpstreamFailure;
use crate::policy::{DenyReason, HitReason, MissReason};
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
            "the client left before it was answered".to_owned()
        }
        BodyEnd::Aborted => format!("the client left after {so_far}"),
        BodyEnd::Upstream => format!("{upstream} broke off after {so_far}; the client has a part only"),
        BodyEnd::Disk => format!("the disk failed after {so_far}; the client has a part only"),
        BodyEnd::Damage => {
            format!(
                "the cached bytes were damaged; the client has {so_far} of them, and the next one gets new ones"
            )
        }
    }
}

fn describe_complete(decision: &DecisionRecord) -> String {
    let upstream = &*decision.upstream;
    let silent = |what: &str| match decision.cause {
        Some(cause) => format!("{upstream} {cause}: {what}"),
        None => what.to_owned(),
    };
    match (decision.result, decision.reason) {
        (_, "revalidated") => format!("unchanged at {upstream}"),
        (_, "fresh") => "confirmed a moment ago, so not asked again".to_owned(),
        (_, "immutable") => "asked for by digest, which cannot change".to_owned(),
        (_, "not-revalidated") => "held, and the policy says not to ask".to_owned(),
        (_, "tag-moved") => format!("{upstream} names another digest now, which is held as well"),
        (CacheResult::Stale, "stale-if-error") => silent("served the held copy"),
        (_, "expired-grant") => silent("served by digest, on a right shown before"),
        (_, "stale-fetch-failed") => {
            silent("there is a newer image that could not be had; served the held one")
        }
        (_, "previous-complete") => silent("the newest image is not held whole; served the last one that is"),
        (_, "retained-deleted") => format!("gone at {upstream}, kept as the rule says"),
        (_, "cache-credential-rejected") => {
            format!("{upstream} refuses the credential of the cache; served the held copy")
        }
        (CacheResult::Miss, "not-cached") => format!("not held yet: fetched from {upstream}"),
        (CacheResult::Miss, "new-digest") => format!("newer at {upstream}: fetched"),
        (CacheResult::Miss, "no-digest") => format!("{upstream} does not say which digest it is: fetched"),
        (CacheResult::Miss, "head") => format!("asked {upstream} for the head alone"),
        (_, "collapsed") => "joined a download under way".to_owned(),
        (_, "passthrough") => "passed through, not stored".to_owned(),
        (_, "local-token") => silent("gave a token of ours"),
        (CacheResult::Refused, "forbidden") => {
            format!("refused: {upstream} does not let this credential read it")
        }
        (CacheResult::Refused, "auth-required") => format!("{upstream} wants a credential first"),
        (CacheResult::Refused, "not-found") => format!("refused: {upstream} says there is no such image"),
        (CacheResult::Refused, "upstream-unavailable") => {
            silent("nothing is held that may be served instead")
        }
        (CacheResult::Refused, "stale-limit-exceeded") => {
            silent("the held copy is older than `stale_if_error` allows")
        }
        (CacheResult::Refused, "incomplete") => silent("only a part of the image is held"),
        (CacheResult::Refused, "not-cached" | "not-authorized") => {
            "refused: the policy `never` forbids asking".to_owned()
        }
        (CacheResult::Refused, reason) => format!("refused: {reason}"),
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
            "serve the held copy without asking: it was confirmed less than `max_age` ago".to_owned()
        }
        HitReason::Revalidated => "serve the held copy: the tag still names it".to_owned(),
        HitReason::TagMoved => "serve the image that the tag names now, which is held too".to_owned(),
        HitReason::Immutable => "serve it without asking: what is asked by digest cannot change".to_owned(),
        HitReason::NotRevalidated => {
            "serve the held copy without asking for a newer one, as the policy says".to_owned()
        }
        HitReason::StaleIfError(cause) => format!("serve the held copy with a warning{}", after(Some(cause))),
        HitReason::ExpiredGrant(cause) => format!("serve it on a right shown before{}", after(Some(cause))),
        HitReason::StaleOnFetchError(cause) => format!(
            "serve the held copy with a warning, not the newer one{}",
            after(Some(cause))
        ),
        HitReason::PreviousComplete(cause) => format!(
            "serve the last image that is held whole, with a warning{}",
            after(cause)
        ),
        HitReason::RetainedDeleted => {
            "serve the held copy with a warning: the rule says to keep what is gone".to_owned()
        }
        HitReason::CacheCredentialRejected => {
            "serve the held copy with a warning: the cache's own credential is refused".to_owned()
        }
    }
}

/// Describes a decision to fetch.
pub(super) fn describe_fetch(why: MissReason, upstream: &str) -> String {
    match why {
        MissReason::NotCached => format!("fetch it from {upstream}: it is not held"),
        MissReason::NewDigest => format!("fetch the newer one from {upstream}"),
        MissReason::NoDigest => format!("fetch it from {upstream}, which does not say which digest it is"),
    }
}

/// Describes a decision to deny.
pub(super) fn describe_denial(refusal: DenyReason, upstream: &str) -> String {
    match refusal {
        DenyReason::NotCached => "refuse: it is not held, and the policy `never` forbids asking".to_owned(),
        DenyReason::NotAuthorized => format!(
            "refuse: {upstream} never said yes to this principal for this, and the policy `never` forbids asking"
        ),
        DenyReason::Forbidden => format!("refuse: {upstream} does not let this credential read it"),
        DenyReason::AuthRequired => format!("refuse: {upstream} wants a credential first"),
        DenyReason::NotFound => format!("refuse: {upstream} says there is no such image"),
        DenyReason::UpstreamUnavailable(cause) => {
            format!("refuse: {upstream} {cause}, and nothing may be served instead")
        }
        DenyReason::StaleLimitExceeded(cause) => {
            format!("refuse: {upstream} {cause}, and the held copy is older than `stale_if_error` allows")
        }
        DenyReason::Incomplete(cause) => {
            format!("refuse: {upstream} {cause}, and only a part of the image is held")
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
