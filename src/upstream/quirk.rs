//! What an upstream has turned out to do its own way, remembered for an hour: long enough not to ask in vain each time,
//! short enough that a passing fault does not turn free HEADs into counted GETs for good.

use std::sync::Mutex;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::time::Instant;

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

/// What is known of one upstream.
#[derive(Debug)]
pub(super) struct Quirks {
    known: Mutex<Vec<(Quirk, Instant)>>,
    checked: Cache<(Repository, Quirk), ()>,
}

impl Quirks {
    pub(super) fn new() -> Quirks {
        Quirks {
            known: Mutex::new(Vec::new()),
            checked: Cache::new(CHECKED_MAX),
        }
    }

    /// A GET did what HEAD did not.
    pub(super) fn learn(&self, quirk: Quirk, now: Instant) {
        if let Ok(mut known) = self.known.lock() {
            known.retain(|(one, until)| *one != quirk && *until > now);
            known.push((quirk, now + LIFE));
        }
    }

    /// Whether the upstream is known for it.
    pub(super) fn has(&self, quirk: Quirk, now: Instant) -> bool {
        self.known(now).contains(&quirk)
    }

    /// All that is known, for the operator.
    pub(super) fn known(&self, now: Instant) -> Vec<Quirk> {
        let known = self.known.lock().map(|known| known.clone()).unwrap_or_default();
        known
            .into_iter()
            .filter(|(_, until)| *until > now)
            .map(|(quirk, _)| quirk)
            .collect()
    }

    /// Whether this refusal is the first of its repository, and thus worth a GET to see if it is true.
    pub(super) fn first_check(&self, repository: &Repository, quirk: Quirk) -> bool {
        let key = (repository.clone(), quirk);
        let first = self.checked.get(&key).is_none();
        self.checked.insert(key, ());
        first
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn a_quirk_is_believed_for_an_hour() {
        let (quirks, now) = (Quirks::new(), Instant::now());
        assert!(!quirks.has(Quirk::NoDigest, now));
        quirks.learn(Quirk::NoDigest, now);
        quirks.learn(Quirk::NoDigest, now);
        assert_eq!(quirks.known(now), [Quirk::NoDigest]);
        assert!(!quirks.has(Quirk::HeadRefused, now));
        assert!(!quirks.has(Quirk::NoDigest, now + LIFE));
    }

    #[test]
    fn a_repository_is_checked_once() {
        let (quirks, name) = (Quirks::new(), "library/a".parse().unwrap());
        assert!(quirks.first_check(&name, Quirk::HeadUntrue));
        assert!(!quirks.first_check(&name, Quirk::HeadUntrue));
        assert!(quirks.first_check(&name, Quirk::BlobHeadRefused));
        assert!(quirks.first_check(&"library/b".parse().unwrap(), Quirk::HeadUntrue));
    }
}
