//! Rate limits of one upstream: pauses after 429 responses, and the pull quota of each caller. `window`: the pause
//! and the slow start after it.
//!
//! Docker Hub counts only GETs of manifests as pulls. An exhausted quota therefore does not affect blobs, nor HEADs,
//! which still tell whether a tag moved and whether the caller has access. Each class of requests waits for its own
//! 429. Exception: a limited HEAD means a limit on all requests, so GETs of manifests wait too.

use std::convert::Infallible;
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
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

/// Rate-limit windows cached per upstream.
const WINDOWS_MAX: usize = 4096;
/// Callers per upstream whose quota is recorded; the oldest record is dropped first.
const QUOTAS_MAX: usize = 64;

/// Classes of requests that an upstream limits together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LimitClass {
    /// HEAD of manifests.
    Heads,
    /// GET of manifests: pulls at Docker Hub.
    Manifests,
    /// Blobs, by HEAD and GET.
    Blobs,
    /// Lists of tags and referrers.
    Lists,
}

impl LimitClass {
    /// The class of a request. `transfers`: a GET, or a HEAD that this upstream is known to reject.
    pub(super) fn of(endpoint: &Endpoint, transfers: bool) -> LimitClass {
        match endpoint {
            Endpoint::Manifest { .. } if transfers => LimitClass::Manifests,
            Endpoint::Manifest { .. } => LimitClass::Heads,
            Endpoint::Blob { .. } => LimitClass::Blobs,
            Endpoint::Ping | Endpoint::Tags { .. } | Endpoint::Referrers { .. } => LimitClass::Lists,
        }
    }
}

/// Owner of a quota, without the credential itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QuotaOwner {
    /// Callers without a credential.
    Anonymous,
    /// Callers with the configured credential.
    Configured,
    /// A client's credential: the first bytes of its HMAC, which mean nothing outside this installation.
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

    /// The metric label. All clients share one, so that the number of labels is bounded.
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

/// A caller's pull quota, as the upstream last reported it.
#[derive(Clone, Debug)]
pub struct PullQuota {
    /// Its owner.
    pub owner: QuotaOwner,
    /// The reported quota.
    pub limit: RateLimit,
    /// Time since the report.
    pub ago: Duration,
}

/// Validity of a reported quota without a window.
const REPORT_TTL: Duration = Duration::from_secs(3600);

impl PullQuota {
    /// Whether the reported window may not have ended. Afterwards the report is outdated.
    pub fn is_current(&self) -> bool {
        let window = self.limit.reset_after_s().map(Duration::from_secs);
        self.ago < window.unwrap_or(REPORT_TTL)
    }

    /// The latest time at which the full quota is available again, if reported.
    pub fn resets_at(&self, now: SystemTime) -> Option<SystemTime> {
        let full = Duration::from_secs(self.limit.reset_after_s()?);
        now.checked_add(full)?.checked_sub(self.ago)
    }
}

/// Rate-limit windows by key. A key without a window is not limited.
pub(super) struct Windows<K>(Cache<K, Arc<Window>>);

impl<K: Eq + Hash + Clone> Default for Windows<K> {
    fn default() -> Self {
        Self(Cache::new(WINDOWS_MAX))
    }
}

impl<K: Eq + Hash + Clone> Windows<K> {
    /// Permits a request, or returns the pause.
    pub(super) fn admit(&self, key: &K, now: Instant) -> Result<SendPermit, Pause> {
        self.0
            .get(key)
            .map_or_else(|| Ok(SendPermit::unlimited()), |window| window.admit(now))
    }

    /// The permitted request was limited, or returned a 503 that states a wait.
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

/// Rate-limit state of one upstream.
#[derive(Default)]
pub(super) struct RateLimits {
    /// By URL, class and principal.
    windows: Windows<(Origin, LimitClass, [u8; 32])>,
    /// Serial of the configured credential that the windows apply to, so that a new credential does not wait for the
    /// old one.
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
    /// Sets the serial of the credential used for [`Credential::Configured`].
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

    /// Permits the caller a request of this class to this URL, or returns the pause.
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

    /// The permitted request was limited: starts a pause for this URL, class and caller.
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

    /// Records the quota from a response's headers, if any.
    pub(super) fn record(&self, caller: &Caller, headers: &RateLimit, now: Instant) {
        if headers.is_unknown() {
            return;
        }
        let record = QuotaRecord {
            principal: caller.principal,
            owner: QuotaOwner::of(caller),
            limit: headers.clone(),
            at: now,
        };
        let mut known = self.quotas.lock();
        if let Some(slot) = known.iter_mut().find(|known| known.principal == caller.principal) {
            *slot = record;
            return;
        }
        if known.len() >= QUOTAS_MAX {
            let oldest = known.iter().enumerate().min_by_key(|(_, known)| known.at);
            if let Some(oldest) = oldest.map(|(slot, _)| slot) {
                known.swap_remove(oldest);
            }
        }
        known.push(record);
    }

    /// The pause of this class for the caller at this URL.
    pub(super) fn current_pause(
        &self,
        origin: &Origin,
        class: LimitClass,
        caller: &Caller,
        now: Instant,
    ) -> Option<Pause> {
        self.windows.current_pause(&self.key(origin, class, caller), now)
    }

    /// The recorded quota of this caller.
    pub(super) fn quota_of(&self, caller: &Caller, now: Instant) -> Option<PullQuota> {
        let known = self.quotas.lock();
        let record = known.iter().find(|known| known.principal == caller.principal)?;
        Some(PullQuota {
            owner: record.owner,
            limit: record.limit.clone(),
            ago: now.saturating_duration_since(record.at),
        })
    }

    /// The recorded quotas, ordered by owner.
    pub(super) fn quotas(&self, now: Instant) -> Vec<PullQuota> {
        let known = self.quotas.lock();
        let mut quotas: Vec<PullQuota> = known
            .iter()
            .map(|record| PullQuota {
                owner: record.owner,
                limit: record.limit.clone(),
                ago: now.saturating_duration_since(record.at),
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
    fn limit_classes_wait_apart_but_head_limit_covers_gets() {
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
            let reported = (UpstreamFailure::RateLimited, Some(minute));
            limits.limited((&here, limited), &client(1), permit, reported);
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
    fn quotas_are_per_caller_bounded_and_hide_credentials() {
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
        let reported: Vec<String> = limits
            .quotas(now)
            .iter()
            .map(|one| format!("{} {:?}", one.owner, one.limit.remaining))
            .collect();
        assert_eq!(reported, ["anonymous Some(98)", "client-abababab Some(7)"]);

        for (id, second) in (1..=200).zip(1..) {
            limits.record(&client(id), &remaining(1), now + Duration::from_secs(second));
        }
        let recorded = limits.quotas(now);
        assert_eq!(recorded.len(), QUOTAS_MAX);
        assert!(
            recorded
                .iter()
                .any(|one| one.owner == QuotaOwner::Client(0xc8c8_c8c8)),
            "the newest is kept"
        );
    }
}
