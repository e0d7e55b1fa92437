//! What an upstream has turned out to do its own way, remembered for an hour: long enough not to ask in vain each time,
//! short enough that a passing fault does not turn free HEADs into counted GETs for good.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::origin::Origin;

/// How long a quirk is believed.
const LIFE: Duration = Duration::from_secs(3600);
/// A HEAD that says no is checked by a GET so often at most, for each name and principal: short, since what is not there
/// now may be pushed the next minute.
const CHECK_AGAIN: Duration = Duration::from_secs(60);
/// Checks of one principal within that time. Who asks for names at random must not double what the upstream gets.
const CHECKS_MAX: usize = 64;
/// Names, each with a principal, of which is remembered that they were checked.
const CHECKED_MAX: usize = 4096;
/// Principals whose checks are counted.
const COUNTED_MAX: usize = 4096;

/// One way to differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quirk {
    /// HEAD of a manifest is refused (405, 501).
    HeadRefused,
    /// HEAD of a manifest does not name the digest, or not the manifest's type.
    NoDigest,
    /// HEAD of a manifest is an error where GET has it: 404 at Nexus.
    HeadUntrue,
    /// HEAD of a manifest is denied (403) where GET has it.
    HeadForbidden,
    /// HEAD of a blob is refused where GET works (public.ecr.aws), or says too little.
    BlobHeadRefused,
    /// HEAD of a blob says 404 where GET has it: Harbor, until it has fetched the blob for that repository.
    BlobHeadUntrue,
}

impl Quirk {
    /// The name for the operator.
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

/// What is known of one upstream's addresses.
#[derive(Debug)]
pub(super) struct Quirks {
    known: Mutex<Vec<Known>>,
    checked: Cache<(Origin, String, [u8; 32]), Instant>,
    /// Since when, and how many.
    counted: Cache<(Origin, [u8; 32]), (Instant, usize)>,
}

#[derive(Clone, Debug)]
struct Known {
    origin: Origin,
    quirk: Quirk,
    until: Instant,
}

/// What is known of one address.
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
    /// Those of the address `origin`.
    pub(super) fn at<'a>(&'a self, origin: &'a Origin) -> QuirksAt<'a> {
        QuirksAt { quirks: self, origin }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Known>> {
        // The list is whole between any two statements.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QuirksAt<'_> {
    /// A GET did what HEAD did not.
    pub(super) fn learn(&self, quirk: Quirk, now: Instant) {
        let mut known = self.quirks.lock();
        known.retain(|one| one.until > now && !(one.quirk == quirk && one.origin == *self.origin));
        known.push(Known {
            origin: self.origin.clone(),
            quirk,
            until: now + LIFE,
        });
    }

    /// Whether the address is known for it.
    pub(super) fn has(&self, quirk: Quirk, now: Instant) -> bool {
        self.known(now).contains(&quirk)
    }

    /// All that is known, for the operator.
    pub(super) fn known(&self, now: Instant) -> Vec<Quirk> {
        let known = self.quirks.lock();
        let here = |one: &&Known| one.until > now && one.origin == *self.origin;
        known.iter().filter(here).map(|one| one.quirk).collect()
    }

    /// Whether a HEAD of `path` that said no to this principal is worth a GET to see if it is true.
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
    fn a_quirk_is_believed_for_an_hour() {
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
    fn a_no_is_checked_once_a_minute_by_name_and_principal() {
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
    fn a_principal_that_asks_at_random_is_not_checked_without_limit() {
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
