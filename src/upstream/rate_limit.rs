//! How often an upstream may be asked, as far as it said so: how long to leave it alone after a limited request, and what
//! is left of each caller's allowance. `window`: the pause, and how requests go on after it.
//!
//! Docker Hub counts GETs of manifests as pulls and nothing else, so a quota that is used up says nothing about HEADs,
//! which still tell whether a tag moved and who may read it, nor about blobs. Each kind of question waits for its own
//! 429. One exception: a HEAD that is limited meets a limit on everything, which a GET would meet too.

use std::convert::Infallible;
use std::fmt;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::origin::Origin;
use super::settings::{Caller, Credential};
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::RateLimit;

mod window;

pub use window::Pause;
pub(super) use window::SendPermit;
use window::Window;

/// Windows remembered, per upstream.
const WINDOWS_MAX: usize = 4096;
/// Callers whose allowance is remembered, per upstream; the one heard of longest ago gives way.
const QUOTAS_MAX: usize = 64;

/// Questions that an upstream counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LimitClass {
    /// Which digest a tag names now.
    Heads,
    /// Manifests: pulls, at Docker Hub.
    Manifests,
    /// Blobs, by HEAD and GET.
    Blobs,
    /// Lists of tags and referrers.
    Lists,
}

impl LimitClass {
    /// Where a question belongs; `transfers` for a GET, or a HEAD that this upstream is known to refuse.
    pub(super) fn of(endpoint: &Endpoint, transfers: bool) -> LimitClass {
        match endpoint {
            Endpoint::Manifest { .. } if transfers => LimitClass::Manifests,
            Endpoint::Manifest { .. } => LimitClass::Heads,
            Endpoint::Blob { .. } => LimitClass::Blobs,
            Endpoint::Ping | Endpoint::Tags { .. } | Endpoint::Referrers { .. } => LimitClass::Lists,
        }
    }
}

/// Whose allowance it is, told without telling the credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QuotaOwner {
    /// Whoever comes without a credential.
    Anonymous,
    /// The proxy itself, with the credential it is configured with.
    Configured,
    /// A client's credential: the beginning of its HMAC, which means nothing outside of this installation.
    Client(u32),
}

impl QuotaOwner {
    fn of(caller: &Caller) -> QuotaOwner {
        match caller.credential {
            Credential::Anonymous => QuotaOwner::Anonymous,
            Credential::Configured => QuotaOwner::Configured,
            Credential::Client(_) => {
                let [a, b, c, d, ..] = caller.principal;
                QuotaOwner::Client(u32::from_be_bytes([a, b, c, d]))
            }
        }
    }

    /// The label for metrics: clients are one, so that their number stays small.
    pub const fn name(self) -> &'static str {
        match self {
            QuotaOwner::Anonymous => "anonymous",
            QuotaOwner::Configured => "cache",
            QuotaOwner::Client(_) => "client",
        }
    }
}

/// `anonymous`, `own`, `client-1a2b3c4d`.
impl fmt::Display for QuotaOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QuotaOwner::Client(id) => write!(f, "client-{id:08x}"),
            other => f.write_str(other.name()),
        }
    }
}

/// What an upstream last said of a caller's allowance.
#[derive(Clone, Debug)]
pub struct PullQuota {
    /// Whose it is.
    pub owner: QuotaOwner,
    /// What was said.
    pub limit: RateLimit,
    /// How long ago.
    pub ago: Duration,
}

impl PullQuota {
    /// When all pulls are allowed again at the latest, as far as was said.
    pub fn resets_at(&self, now: SystemTime) -> Option<SystemTime> {
        let full = Duration::from_secs(self.limit.reset_after_s()?);
        now.checked_add(full)?.checked_sub(self.ago)
    }
}

/// Windows by what is limited together. One that was never limited is open.
pub(super) struct Windows<K>(Cache<K, Arc<Window>>);

impl<K: Eq + Hash + Clone> Default for Windows<K> {
    fn default() -> Self {
        Self(Cache::new(WINDOWS_MAX))
    }
}

impl<K: Eq + Hash + Clone> Windows<K> {
    /// Lets a request through, or says until when not.
    pub(super) fn admit(&self, key: &K, now: Instant) -> Result<SendPermit, Pause> {
        self.0
            .get(key)
            .map_or_else(|| Ok(SendPermit::unlimited()), |window| window.admit(now))
    }

    /// The request of this turn was limited, or answered by a 503 that states a wait.
    pub(super) fn limited(
        &self,
        key: &K,
        permit: SendPermit,
        cause: UpstreamFailure,
        stated: Option<Duration>,
    ) -> Pause {
        let new = || Ok::<_, Infallible>(Arc::new(Window::new(Instant::now())));
        match self.0.get_or_insert_with(key, new) {
            Ok(window) => permit.limited(&window, cause, stated),
            Err(never) => match never {},
        }
    }

    fn current_pause(&self, key: &K, now: Instant) -> Option<Pause> {
        self.0.get(key)?.current_pause(now)
    }
}

/// What is known of one upstream's limits.
#[derive(Default)]
pub(super) struct RateLimits {
    /// By address, kind of request and principal.
    windows: Windows<(Origin, LimitClass, [u8; 32])>,
    /// The own credential that a window is for, so that another one does not wait for it.
    configured_serial: AtomicU64,
    quotas: Mutex<Vec<QuotaRecord>>,
}

struct QuotaRecord {
    principal: [u8; 32],
    owner: QuotaOwner,
    limit: RateLimit,
    at: Instant,
}

impl RateLimits {
    /// Callers with [`Credential::Configured`] show the credential of this serial from now on.
    pub(super) fn set_configured_serial(&self, serial: u64) {
        self.configured_serial.store(serial, Ordering::Relaxed);
    }

    fn key(&self, origin: &Origin, class: LimitClass, caller: &Caller) -> (Origin, LimitClass, [u8; 32]) {
        let mut principal = caller.principal;
        if matches!(caller.credential, Credential::Configured) {
            let serial = self.configured_serial.load(Ordering::Relaxed).to_be_bytes();
            for (to, from) in principal.iter_mut().zip(serial) {
                *to ^= from;
            }
        }
        (origin.clone(), class, principal)
    }

    /// Lets `caller` put such a question to this address now, or says how long not.
    pub(super) fn admit(
        &self,
        origin: &Origin,
        class: LimitClass,
        caller: &Caller,
        now: Instant,
    ) -> Result<SendPermit, Pause> {
        let key = |class| self.key(origin, class, caller);
        if class == LimitClass::Manifests
            && let Some(pause) = self.windows.current_pause(&key(LimitClass::Heads), now)
        {
            return Err(pause);
        }
        self.windows.admit(&key(class), now)
    }

    /// The question of this turn was limited: the address is left alone with such questions of this caller.
    pub(super) fn limited(
        &self,
        (origin, class): (&Origin, LimitClass),
        caller: &Caller,
        permit: SendPermit,
        (cause, stated): (UpstreamFailure, Option<Duration>),
    ) -> Pause {
        self.windows
            .limited(&self.key(origin, class, caller), permit, cause, stated)
    }

    /// Keeps what an answer says of the caller's allowance, if anything.
    pub(super) fn record(&self, caller: &Caller, headers: &RateLimit, now: Instant) {
        if headers.is_unknown() {
            return;
        }
        let said = QuotaRecord {
            principal: caller.principal,
            owner: QuotaOwner::of(caller),
            limit: headers.clone(),
            at: now,
        };
        let mut known = self.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = known.iter_mut().find(|known| known.principal == caller.principal) {
            *place = said;
            return;
        }
        if known.len() >= QUOTAS_MAX {
            let oldest = known.iter().enumerate().min_by_key(|(_, known)| known.at);
            if let Some(oldest) = oldest.map(|(place, _)| place) {
                known.swap_remove(oldest);
            }
        }
        known.push(said);
    }

    /// The allowances known, in the order of their callers.
    pub(super) fn quotas(&self, now: Instant) -> Vec<PullQuota> {
        let known = self.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        let mut quotas: Vec<PullQuota> = known
            .iter()
            .map(|said| PullQuota {
                owner: said.owner,
                limit: said.limit.clone(),
                ago: now.saturating_duration_since(said.at),
            })
            .collect();
        quotas.sort_by_key(|quota| quota.owner);
        quotas
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::queue::{Class, Peer};
    use crate::trace_context::TraceContext;
    use http::HeaderValue;

    fn client(id: u8) -> Caller {
        Caller {
            principal: [id; 32],
            credential: Credential::Client(HeaderValue::from_static("Bearer canary")),
            peer: Peer::Local,
            class: Class::Interactive,
            waiters: None,
            trace: TraceContext::new_root(),
            wait_deadline: None,
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
        let address = |text: &str| text.parse::<Origin>().unwrap();
        let (here, there) = (address("https://a.example"), address("https://b.example"));
        let all = [
            LimitClass::Heads,
            LimitClass::Manifests,
            LimitClass::Blobs,
            LimitClass::Lists,
        ];
        for (limited, stopped) in [
            (LimitClass::Heads, &[LimitClass::Heads, LimitClass::Manifests][..]),
            (LimitClass::Manifests, &[LimitClass::Manifests]),
            (LimitClass::Blobs, &[LimitClass::Blobs]),
            (LimitClass::Lists, &[LimitClass::Lists]),
        ] {
            let limits = RateLimits::default();
            let permit = limits.admit(&here, limited, &client(1), now).unwrap();
            let told = (UpstreamFailure::RateLimited, Some(minute));
            limits.limited((&here, limited), &client(1), permit, told);
            for class in all {
                let waits = |origin, id, now| limits.admit(origin, class, &client(id), now).is_err();
                let later = Instant::now() + minute;
                assert_eq!(
                    waits(&here, 1, now),
                    stopped.contains(&class),
                    "{limited:?} {class:?}"
                );
                assert!(!waits(&here, 1, later), "{limited:?} {class:?}");
                assert!(!waits(&here, 2, now), "another caller");
                assert!(!waits(&there, 1, now), "another address");
            }
        }
    }

    #[test]
    fn allowances_are_kept_by_caller_told_without_the_credential_and_bounded() {
        let (limits, now) = (RateLimits::default(), Instant::now());
        let anonymous = Caller {
            principal: [0; 32],
            credential: Credential::Anonymous,
            peer: Peer::Local,
            class: Class::Interactive,
            waiters: None,
            trace: TraceContext::new_root(),
            wait_deadline: None,
        };
        limits.record(&anonymous, &remaining(99), now);
        limits.record(&anonymous, &remaining(98), now);
        limits.record(&anonymous, &RateLimit::default(), now);
        limits.record(&client(0xab), &remaining(7), now);
        let told: Vec<String> = limits
            .quotas(now)
            .iter()
            .map(|one| format!("{} {:?}", one.owner, one.limit.remaining))
            .collect();
        assert_eq!(told, ["anonymous Some(98)", "client-abababab Some(7)"]);

        for (id, second) in (1..=200).zip(1..) {
            limits.record(&client(id), &remaining(1), now + Duration::from_secs(second));
        }
        let kept = limits.quotas(now);
        assert_eq!(kept.len(), QUOTAS_MAX);
        assert!(
            kept.iter()
                .any(|one| one.owner == QuotaOwner::Client(0xc8c8_c8c8)),
            "the newest is kept"
        );
    }
}
