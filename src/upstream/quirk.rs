//! What an upstream has turned out to do its own way, remembered for an hour: long enough not to ask in vain each time,
//! short enough that a passing fault does not turn free HEADs into counted GETs for good.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::origin::Origin;
use crate::oci::name::Repository;

/// How long a quirk is believed.
const LIFE: Duration = Duration::from_secs(3600);
/// Repositories of which is remembered that a refusal of HEAD was checked by a GET.
const CHECKED_MAX: usize = 1024;

/// One way to differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quirk {
    /// HEAD of a manifest is refused (405, 501).
    HeadRefused,
    /// HEAD of a manifest does not name the digest.
    NoDigest,
    /// HEAD of a manifest says 404 where GET has it.
    HeadUntrue,
    /// HEAD of a blob is refused where GET works (public.ecr.aws).
    BlobHeadRefused,
}

impl Quirk {
    /// The name for the operator.
    pub const fn name(self) -> &'static str {
        match self {
            Quirk::HeadRefused => "head-refused",
            Quirk::NoDigest => "no-digest",
            Quirk::HeadUntrue => "head-untrue",
            Quirk::BlobHeadRefused => "blob-head-refused",
        }
    }
}

/// What is known of one upstream's addresses.
#[derive(Debug)]
pub(super) struct Quirks {
    known: Mutex<Vec<Known>>,
    checked: Cache<(Origin, Repository, Quirk), ()>,
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

    /// Whether this refusal is the first of its repository, and thus worth a GET to see if it is true.
    pub(super) fn first_check(&self, repository: &Repository, quirk: Quirk) -> bool {
        let key = (self.origin.clone(), repository.clone(), quirk);
        let first = self.quirks.checked.get(&key).is_none();
        self.quirks.checked.insert(key, ());
        first
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
    fn a_repository_is_checked_once() {
        let (quirks, name) = (Quirks::default(), "library/a".parse().unwrap());
        let here = "https://a.example".parse().unwrap();
        let quirks = quirks.at(&here);
        assert!(quirks.first_check(&name, Quirk::HeadUntrue));
        assert!(!quirks.first_check(&name, Quirk::HeadUntrue));
        assert!(quirks.first_check(&name, Quirk::BlobHeadRefused));
        assert!(quirks.first_check(&"library/b".parse().unwrap(), Quirk::HeadUntrue));
    }
}
