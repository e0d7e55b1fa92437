//! Registry quirks: known departures from the distribution specification, cached for an hour.
//!
//! An hour avoids repeating requests that fail. It is short enough that a transient fault does not replace uncounted
//! HEADs by counted GETs for long.

use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::origin::Origin;

/// How long a quirk is cached.
const LIFE: Duration = Duration::from_secs(3600);
/// Interval at which a negative HEAD is verified by a GET, per name and principal. Short, because missing content may
/// be pushed at any time.
const CHECK_AGAIN: Duration = Duration::from_secs(60);
/// Verifications per principal within that interval, so that requests for random names do not double the load on the
/// upstream.
const CHECKS_MAX: usize = 64;
/// Pairs of name and principal whose last verification is recorded.
const CHECKED_MAX: usize = 4096;
/// Principals whose verifications are counted.
const COUNTED_MAX: usize = 4096;

/// A departure from the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quirk {
    /// Rejects HEAD of a manifest (405, 501).
    HeadRefused,
    /// HEAD of a manifest lacks the digest or the media type.
    NoDigest,
    /// HEAD of a manifest fails although GET succeeds: 404 at Nexus.
    HeadUntrue,
    /// HEAD of a manifest is denied (403) although GET succeeds.
    HeadForbidden,
    /// Rejects HEAD of a blob although GET works (public.ecr.aws), or omits its size.
    BlobHeadRefused,
    /// HEAD of a blob returns 404 although GET succeeds: Harbor, until it has fetched the blob for that repository.
    BlobHeadUntrue,
}

impl Quirk {
    /// The name in the admin API.
    pub const fn name(self) -> &'static str {
        match self {
            Quirk::HeadRefused => "head-refused",
            Quirk::NoDigest => "no-digest",
            Quirk::HeadUntrue => "head-untrue",
            Quirk::HeadForbidden => "head-forbidden",
            Quirk::BlobHeadRefused => "blob-head-refused",
            Quirk::BlobHeadUntrue => "blob-head-untrue",
        }
    }
}

/// Quirks of one upstream's URLs.
#[derive(Debug)]
pub(super) struct Quirks {
    known: Mutex<Vec<Known>>,
    checked: Cache<(Origin, String, [u8; 32]), Instant>,
    /// Start of the interval, and the number of verifications.
    counted: Cache<(Origin, [u8; 32]), (Instant, usize)>,
}

#[derive(Clone, Debug)]
struct Known {
    origin: Origin,
    quirk: Quirk,
    until: Instant,
}

/// Quirks of one URL.
#[derive(Clone, Copy, Debug)]
pub(super) struct QuirksAt<'a> {
    quirks: &'a Quirks,
    origin: &'a Origin,
}

impl Default for Quirks {
    fn default() -> Quirks {
        Quirks {
            known: Mutex::new(Vec::new()),
            checked: Cache::new(CHECKED_MAX),
            counted: Cache::new(COUNTED_MAX),
        }
    }
}

impl Quirks {
    /// The quirks of the URL `origin`.
    pub(super) fn at<'a>(&'a self, origin: &'a Origin) -> QuirksAt<'a> {
        QuirksAt { quirks: self, origin }
    }
}

impl QuirksAt<'_> {
    /// Records that a GET succeeded where the HEAD failed.
    pub(super) fn learn(&self, quirk: Quirk, now: Instant) {
        let mut known = self.quirks.known.lock();
        known.retain(|one| one.until > now && !(one.quirk == quirk && one.origin == *self.origin));
        known.push(Known {
            origin: self.origin.clone(),
            quirk,
            until: now + LIFE,
        });
    }

    /// Whether the URL has this quirk.
    pub(super) fn has(&self, quirk: Quirk, now: Instant) -> bool {
        self.known(now).contains(&quirk)
    }

    /// All known quirks of the URL.
    pub(super) fn known(&self, now: Instant) -> Vec<Quirk> {
        let known = self.quirks.known.lock();
        let here = |one: &&Known| one.until > now && one.origin == *self.origin;
        known.iter().filter(here).map(|one| one.quirk).collect()
    }

    /// Whether to verify a negative HEAD of `path` for this principal by a GET.
    pub(super) fn may_check(&self, principal: [u8; 32], path: String, now: Instant) -> bool {
        let lately = |at: Instant| now.saturating_duration_since(at) < CHECK_AGAIN;
        let key = (self.origin.clone(), path, principal);
        if self.quirks.checked.get(&key).is_some_and(lately) {
            return false;
        }
        let who = (self.origin.clone(), principal);
        let counted = self.quirks.counted.get(&who).filter(|(since, _)| lately(*since));
        let (since, count) = counted.unwrap_or((now, 0));
        if count >= CHECKS_MAX {
            return false;
        }
        self.quirks.counted.insert(who, (since, count + 1));
        self.quirks.checked.insert(key, now);
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn quirk_is_cached_for_an_hour() {
        let (quirks, now) = (Quirks::default(), Instant::now());
        let (here, there) = (
            "https://a.example".parse().unwrap(),
            "https://b.example".parse().unwrap(),
        );
        let (quirks, elsewhere) = (quirks.at(&here), quirks.at(&there));
        assert!(!quirks.has(Quirk::NoDigest, now));
        quirks.learn(Quirk::NoDigest, now);
        quirks.learn(Quirk::NoDigest, now);
        assert_eq!(quirks.known(now), [Quirk::NoDigest]);
        assert!(!quirks.has(Quirk::HeadRefused, now));
        assert!(!elsewhere.has(Quirk::NoDigest, now));
        assert!(!quirks.has(Quirk::NoDigest, now + LIFE));
    }

    #[test]
    fn negative_head_is_verified_once_a_minute() {
        let (quirks, now) = (Quirks::default(), Instant::now());
        let here = "https://a.example".parse().unwrap();
        let quirks = quirks.at(&here);
        let may = |principal: u8, name: &str, at| quirks.may_check([principal; 32], name.to_owned(), at);
        assert!(may(1, "/a", now));
        assert!(!may(1, "/a", now));
        assert!(may(2, "/a", now));
        assert!(may(1, "/b", now));
        assert!(may(1, "/a", now + CHECK_AGAIN));
    }

    #[test]
    fn head_verifications_per_principal_are_bounded() {
        let (quirks, now) = (Quirks::default(), Instant::now());
        let here = "https://a.example".parse().unwrap();
        let quirks = quirks.at(&here);
        let checks = |from: usize, at| {
            (from..from + 2 * CHECKS_MAX)
                .filter(|nth| quirks.may_check([1; 32], nth.to_string(), at))
                .count()
        };
        assert_eq!(checks(0, now), CHECKS_MAX);
        assert_eq!(checks(1000, now), 0);
        assert!(quirks.may_check([2; 32], "/a".to_owned(), now));
        assert_eq!(checks(2000, now + CHECK_AGAIN), CHECKS_MAX);
    }
}
