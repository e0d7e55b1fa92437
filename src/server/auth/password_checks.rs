//! Concurrency limit for password checks, and a cache of wrong credentials.
//!
//! A bcrypt check costs a tenth of a CPU second, so few run at a time. Each peer has one check at a time, so a peer
//! that guesses waits for its own checks. The first login of another peer waits for at most one check of each. Peers
//! that recently sent a wrong credential share one permit, so however many they are, another peer waits for one of
//! their checks.
//!
//! A credential that is wrong for a password hash stays wrong for it, so it is not checked again. A fleet with an old
//! password costs one check per credential and not one per request.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::server::host_network;

/// Concurrent checks, and of those the ones for peers with a recent wrong credential.
const CHECKS_MAX: usize = 2;
const SUSPECT_CHECKS_MAX: usize = 1;

/// How long a check waits for a permit.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a wrong credential marks a peer as suspect.
const SUSPECT_TTL: Duration = Duration::from_secs(600);

/// Wrong credentials remembered.
const WRONG_MAX: usize = 4096;

/// Peers that are tracked separately.
const PEERS_MAX: usize = 4096;

/// Keyed hash of a credential and of the password hash it was checked against.
pub(super) type CredentialKey = [u8; 32];

pub(super) struct PasswordChecks {
    /// Granted in order of arrival, one per peer.
    slots: Arc<Semaphore>,
    suspect_slots: Arc<Semaphore>,
    peers: Cache<Option<IpAddr>, Arc<PeerState>>,
    wrong: Cache<CredentialKey, ()>,
}

struct PeerState {
    own_slot: Arc<Semaphore>,
    wrong_at: Mutex<Option<Instant>>,
}

/// Permit for one check. Dropping it releases it.
pub(super) struct CheckPermit {
    _slot: OwnedSemaphorePermit,
    _suspect: Option<OwnedSemaphorePermit>,
    _peer: OwnedSemaphorePermit,
    peer: Arc<PeerState>,
}

impl Default for PasswordChecks {
    fn default() -> Self {
        Self {
            slots: Arc::new(Semaphore::new(CHECKS_MAX)),
            suspect_slots: Arc::new(Semaphore::new(SUSPECT_CHECKS_MAX)),
            peers: Cache::new(PEERS_MAX),
            wrong: Cache::new(WRONG_MAX),
        }
    }
}

impl Default for PeerState {
    fn default() -> Self {
        Self {
            own_slot: Arc::new(Semaphore::new(1)),
            wrong_at: Mutex::default(),
        }
    }
}

impl PeerState {
    fn is_suspect(&self) -> bool {
        let wrong_at = self.wrong_at.lock();
        wrong_at.is_some_and(|at| at.elapsed() < SUSPECT_TTL)
    }
}

impl PasswordChecks {
    /// Waits for a permit for this peer. `None` after [`ACQUIRE_TIMEOUT`].
    pub(super) async fn acquire(&self, peer: Option<IpAddr>) -> Option<CheckPermit> {
        let made = || Ok::<_, std::convert::Infallible>(Arc::default());
        let Ok(peer) = self.peers.get_or_insert_with(&peer.map(host_network), made);
        let permit = async {
            let own = Arc::clone(&peer.own_slot).acquire_owned().await.ok()?;
            let suspect = if peer.is_suspect() {
                Some(Arc::clone(&self.suspect_slots).acquire_owned().await.ok()?)
            } else {
                None
            };
            let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
            Some(CheckPermit {
                _slot: slot,
                _suspect: suspect,
                _peer: own,
                peer,
            })
        };
        timeout(ACQUIRE_TIMEOUT, permit).await.ok().flatten()
    }

    pub(super) fn is_wrong(&self, credential: &CredentialKey) -> bool {
        self.wrong.get(credential).is_some()
    }

    /// Remembers a wrong credential. Marks the peer as suspect if the check still has its permit.
    pub(super) fn record_wrong(&self, credential: CredentialKey, permit: Option<&CheckPermit>) {
        self.wrong.insert(credential, ());
        if let Some(permit) = permit {
            let mut wrong_at = permit.peer.wrong_at.lock();
            *wrong_at = Some(Instant::now());
        }
    }

    #[cfg(test)]
    pub(super) fn close(&self) {
        self.slots.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn host(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    #[tokio::test(start_paused = true)]
    async fn first_login_waits_for_one_check_per_guessing_peer() {
        let checks = Arc::new(PasswordChecks::default());
        for _ in 0..50 {
            let checks = Arc::clone(&checks);
            tokio::spawn(async move {
                let _turn = checks.acquire(Some(host(1))).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            });
        }
        tokio::task::yield_now().await;
        let before = Instant::now();
        assert!(checks.acquire(Some(host(2))).await.is_some());
        assert!(
            before.elapsed() < Duration::from_millis(150),
            "{:?}",
            before.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn t17_a_turn_that_does_not_come_is_not_waited_for_without_end() {
        let checks = PasswordChecks::default();
        let held = checks.acquire(Some(host(1))).await;
        assert!(held.is_some() && checks.acquire(Some(host(1))).await.is_none());
        drop(held);
        assert!(checks.acquire(Some(host(1))).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn e13_a_credential_found_wrong_for_a_hash_stays_wrong() {
        let checks = PasswordChecks::default();
        assert!(!checks.is_wrong(&[1; 32]));
        checks.record_wrong([1; 32], None);
        tokio::time::advance(Duration::from_secs(24 * 60 * 60)).await;
        assert!(checks.is_wrong(&[1; 32]) && !checks.is_wrong(&[2; 32]));
    }

    #[tokio::test(start_paused = true)]
    async fn e13_a_fleet_with_stale_passwords_holds_up_no_new_login() {
        let checks = Arc::new(PasswordChecks::default());
        for last in 0..50 {
            let permit = checks.acquire(Some(host(last))).await;
            checks.record_wrong([last; 32], permit.as_ref());
        }
        // Each peer keeps sending other passwords.
        for last in 0..50 {
            let checks = Arc::clone(&checks);
            tokio::spawn(async move {
                loop {
                    let _turn = checks.acquire(Some(host(last))).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
        }
        for last in 100..110 {
            tokio::task::yield_now().await;
            let before = Instant::now();
            assert!(checks.acquire(Some(host(last))).await.is_some());
            let waited = before.elapsed();
            assert!(waited <= Duration::from_millis(100), "{waited:?}");
        }
    }
}
