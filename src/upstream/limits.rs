//! How often an upstream may be asked, as far as it said so: how long to leave it alone after a 429, and what is left of
//! each caller's allowance.
//!
//! Docker Hub counts GETs of manifests as pulls and nothing else, so a quota that is used up says nothing about HEADs,
//! which still tell whether a tag moved and who may read it, nor about blobs. Each kind of question waits for its own
//! 429. One exception: a HEAD that is limited meets a limit on everything, which a GET would meet too.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::origin::Origin;
use super::settings::{Caller, Credential};
use crate::oci::header::RateLimit;
use crate::oci::operation::Operation;

/// Windows remembered, per upstream.
const WINDOWS_MAX: usize = 4096;
/// Callers whose allowance is remembered, per upstream; the one heard of longest ago gives way.
const ALLOWANCES_MAX: usize = 64;

/// Questions that an upstream counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Lane {
    /// Which digest a tag names now.
    Heads,
    /// Manifests: pulls, at Docker Hub.
    Manifests,
    /// Blobs, by HEAD and GET.
    Blobs,
    /// Lists of tags and referrers.
    Lists,
}

impl Lane {
    /// Where a question belongs; `transfers` for a GET, or a HEAD that this upstream is known to refuse.
    pub(super) fn of(operation: &Operation, transfers: bool) -> Lane {
        match operation {
            Operation::Manifest { .. } if transfers => Lane::Manifests,
            Operation::Manifest { .. } => Lane::Heads,
            Operation::Blob { .. } => Lane::Blobs,
            Operation::Ping | Operation::Tags { .. } | Operation::Referrers { .. } => Lane::Lists,
        }
    }
}

/// Whose allowance it is, told without telling the credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Who {
    /// Whoever comes without a credential.
    Anonymous,
    /// The proxy itself, with the credential it is configured with.
    Own,
    /// A client's credential: the beginning of its HMAC, which means nothing outside of this installation.
    Client(u32),
}

impl Who {
    fn of(caller: &Caller) -> Who {
        match caller.credential {
            Credential::Anonymous => Who::Anonymous,
            Credential::Own => Who::Own,
            Credential::Client(_) => {
                let [a, b, c, d, ..] = caller.principal;
                Who::Client(u32::from_be_bytes([a, b, c, d]))
            }
        }
    }

    /// The label for metrics: clients are one, so that their number stays small.
    pub const fn name(self) -> &'static str {
        match self {
            Who::Anonymous => "anonymous",
            Who::Own => "own",
            Who::Client(_) => "client",
        }
    }
}

/// `anonymous`, `own`, `client-1a2b3c4d`.
impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Client(id) => write!(f, "client-{id:08x}"),
            other => f.write_str(other.name()),
        }
    }
}

/// What an upstream last said of a caller's allowance.
#[derive(Clone, Debug)]
pub struct Allowance {
    /// Whose it is.
    pub who: Who,
    /// What was said.
    pub limit: RateLimit,
    /// How long ago.
    pub ago: Duration,
}

impl Allowance {
    /// When all pulls are allowed again at the latest, as far as was said.
    pub fn resets_at(&self, now: SystemTime) -> Option<SystemTime> {
        let full = Duration::from_secs(self.limit.full_after_s()?);
        now.checked_add(full)?.checked_sub(self.ago)
    }
}

/// What is known of one upstream's limits.
pub(super) struct Limits {
    /// Until when an address is left alone with such questions of a principal.
    windows: Cache<(Origin, Lane, [u8; 32]), Instant>,
    /// The own credential that a window is for, so that another one does not wait for it.
    own: AtomicU64,
    allowances: Mutex<Vec<Said>>,
}

struct Said {
    principal: [u8; 32],
    who: Who,
    limit: RateLimit,
    at: Instant,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            windows: Cache::new(WINDOWS_MAX),
            own: AtomicU64::new(0),
            allowances: Mutex::default(),
        }
    }
}

impl Limits {
    /// Callers with [`Credential::Own`] show the credential of this serial from now on.
    pub(super) fn set_own(&self, serial: u64) {
        self.own.store(serial, Ordering::Relaxed);
    }

    fn key(&self, origin: &Origin, lane: Lane, caller: &Caller) -> (Origin, Lane, [u8; 32]) {
        let mut principal = caller.principal;
        if matches!(caller.credential, Credential::Own) {
            let serial = self.own.load(Ordering::Relaxed).to_be_bytes();
            for (to, from) in principal.iter_mut().zip(serial) {
                *to ^= from;
            }
        }
        (origin.clone(), lane, principal)
    }

    /// A 429: the address is left alone with such questions of this caller until then.
    pub(super) fn wait(&self, origin: &Origin, lane: Lane, caller: &Caller, until: Instant) {
        self.windows.insert(self.key(origin, lane, caller), until);
    }

    /// How long `caller` still has to leave this address alone with such a question.
    pub(super) fn waiting(
        &self,
        origin: &Origin,
        lane: Lane,
        caller: &Caller,
        now: Instant,
    ) -> Option<Duration> {
        let left = |lane| {
            let until = self.windows.get(&self.key(origin, lane, caller));
            until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
        };
        let left = if lane == Lane::Manifests {
            left(lane).max(left(Lane::Heads))
        } else {
            left(lane)
        };
        (!left.is_zero()).then_some(left)
    }

    /// Keeps what an answer says of the caller's allowance, if anything.
    pub(super) fn note(&self, caller: &Caller, seen: &RateLimit, now: Instant) {
        if seen.is_unknown() {
            return;
        }
        let said = Said {
            principal: caller.principal,
            who: Who::of(caller),
            limit: seen.clone(),
            at: now,
        };
        let mut known = self.allowances.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = known.iter_mut().find(|known| known.principal == caller.principal) {
            *place = said;
            return;
        }
        if known.len() >= ALLOWANCES_MAX {
            let oldest = known.iter().enumerate().min_by_key(|(_, known)| known.at);
            if let Some(oldest) = oldest.map(|(place, _)| place) {
                known.swap_remove(oldest);
            }
        }
        known.push(said);
    }

    /// The allowances known, in the order of their callers.
    pub(super) fn allowances(&self, now: Instant) -> Vec<Allowance> {
        let known = self.allowances.lock().unwrap_or_else(PoisonError::into_inner);
        let mut allowances: Vec<Allowance> = known
            .iter()
            .map(|said| Allowance {
                who: said.who,
                limit: said.limit.clone(),
                ago: now.saturating_duration_since(said.at),
            })
            .collect();
        allowances.sort_by_key(|allowance| allowance.who);
        allowances
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::trace::Trace;
    use http::HeaderValue;

    fn client(id: u8) -> Caller {
        Caller {
            principal: [id; 32],
            credential: Credential::Client(HeaderValue::from_static("Bearer canary")),
            trace: Trace::begun(),
        }
    }

    fn remaining(pulls: u64) -> RateLimit {
        RateLimit {
            remaining: Some(pulls),
            ..RateLimit::default()
        }
    }

    #[test]
    fn each_kind_of_question_waits_for_its_own_limit_and_a_limit_on_heads_holds_manifests_too() {
        let (now, minute) = (Instant::now(), Duration::from_secs(60));
        let (here, there) = (
            "https://a.example".parse().unwrap(),
            "https://b.example".parse().unwrap(),
        );
        let all = [Lane::Heads, Lane::Manifests, Lane::Blobs, Lane::Lists];
        for (limited, stopped) in [
            (Lane::Heads, &[Lane::Heads, Lane::Manifests][..]),
            (Lane::Manifests, &[Lane::Manifests]),
            (Lane::Blobs, &[Lane::Blobs]),
            (Lane::Lists, &[Lane::Lists]),
        ] {
            let limits = Limits::default();
            limits.wait(&here, limited, &client(1), now + minute);
            for lane in all {
                let waiting = stopped.contains(&lane).then_some(minute);
                assert_eq!(
                    limits.waiting(&here, lane, &client(1), now),
                    waiting,
                    "{limited:?} {lane:?}"
                );
                assert_eq!(limits.waiting(&here, lane, &client(1), now + minute), None);
                assert_eq!(
                    limits.waiting(&here, lane, &client(2), now),
                    None,
                    "another caller"
                );
                assert_eq!(
                    limits.waiting(&there, lane, &client(1), now),
                    None,
                    "another address"
                );
            }
        }
    }

    #[test]
    fn allowances_are_kept_by_caller_told_without_the_credential_and_bounded() {
        let (limits, now) = (Limits::default(), Instant::now());
        let anonymous = Caller {
            principal: [0; 32],
            credential: Credential::Anonymous,
            trace: Trace::begun(),
        };
        limits.note(&anonymous, &remaining(99), now);
        limits.note(&anonymous, &remaining(98), now);
        limits.note(&anonymous, &RateLimit::default(), now);
        limits.note(&client(0xab), &remaining(7), now);
        let told: Vec<String> = limits
            .allowances(now)
            .iter()
            .map(|one| format!("{} {:?}", one.who, one.limit.remaining))
            .collect();
        assert_eq!(told, ["anonymous Some(98)", "client-abababab Some(7)"]);

        for (id, second) in (1..=200).zip(1..) {
            limits.note(&client(id), &remaining(1), now + Duration::from_secs(second));
        }
        let kept = limits.allowances(now);
        assert_eq!(kept.len(), ALLOWANCES_MAX);
        assert!(
            kept.iter().any(|one| one.who == Who::Client(0xc8c8_c8c8)),
            "the newest is kept"
        );
    }
}
