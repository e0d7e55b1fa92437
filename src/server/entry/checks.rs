//! Turns for password checks, and the credentials that were found wrong.
//!
//! A check costs a tenth of a second of a processor, so few run at a time. A peer has one turn at a time: a peer that guesses
//! waits for its own guesses, and the first login of another peer for one check of each. Peers that sent a wrong credential
//! lately have one of the turns between them: however many they are, a login of another peer waits for one check of theirs.
//!
//! A credential that was found wrong for a hash is wrong for that hash for ever, so it is not checked again: a fleet that goes
//! on with an old password costs one check for each credential, not one for each request.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::server::host_network;

/// Checks at a time, and of those that sent a wrong credential lately.
const CHECKS_MAX: usize = 2;
const SUSPECT_CHECKS_MAX: usize = 1;

/// How long a check waits for its turn.
const CHECK_WITHIN: Duration = Duration::from_secs(10);

/// How long a peer counts as one that sent a wrong credential.
const SUSPECT_FOR: Duration = Duration::from_secs(600);

/// Wrong credentials remembered.
const WRONG_MAX: usize = 4096;

/// Peers whose turns are told apart.
const PEERS_MAX: usize = 4096;

/// The keyed hash of a credential, and of the hash that it was checked against.
pub(super) type Key = [u8; 32];

pub(super) struct Checks {
    /// In the order of arrival, one of each peer.
    slots: Arc<Semaphore>,
    suspect_slots: Arc<Semaphore>,
    peers: Cache<Option<IpAddr>, Arc<Peer>>,
    wrong: Cache<Key, ()>,
}

struct Peer {
    turns: Arc<Semaphore>,
    wrong_at: Mutex<Option<Instant>>,
}

/// The turn ends when this is dropped.
pub(super) struct Turn {
    _slot: OwnedSemaphorePermit,
    _suspect: Option<OwnedSemaphorePermit>,
    _peer: OwnedSemaphorePermit,
    peer: Arc<Peer>,
}

impl Default for Checks {
    fn default() -> Self {
        Self {
            slots: Arc::new(Semaphore::new(CHECKS_MAX)),
            suspect_slots: Arc::new(Semaphore::new(SUSPECT_CHECKS_MAX)),
            peers: Cache::new(PEERS_MAX),
            wrong: Cache::new(WRONG_MAX),
        }
    }
}

impl Default for Peer {
    fn default() -> Self {
        Self {
            turns: Arc::new(Semaphore::new(1)),
            wrong_at: Mutex::default(),
        }
    }
}

impl Peer {
    fn is_suspect(&self) -> bool {
        let wrong_at = self.wrong_at.lock().unwrap_or_else(PoisonError::into_inner);
        wrong_at.is_some_and(|at| at.elapsed() < SUSPECT_FOR)
    }
}

impl Checks {
    /// Waits for a turn of this peer; `None` where that takes too long.
    pub(super) async fn turn(&self, peer: Option<IpAddr>) -> Option<Turn> {
        let made = || Ok::<_, std::convert::Infallible>(Arc::default());
        let Ok(peer) = self.peers.get_or_insert_with(&peer.map(host_network), made);
        let turn = async {
            let own = Arc::clone(&peer.turns).acquire_owned().await.ok()?;
            let suspect = if peer.is_suspect() {
                Some(Arc::clone(&self.suspect_slots).acquire_owned().await.ok()?)
            } else {
                None
            };
            let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
            Some(Turn {
                _slot: slot,
                _suspect: suspect,
                _peer: own,
                peer,
            })
        };
        timeout(CHECK_WITHIN, turn).await.ok().flatten()
    }

    pub(super) fn is_wrong(&self, credential: &Key) -> bool {
        self.wrong.get(credential).is_some()
    }

    /// A credential was found wrong, in this turn if it lasted until now.
    pub(super) fn note_wrong(&self, credential: Key, turn: Option<&Turn>) {
        self.wrong.insert(credential, ());
        if let Some(turn) = turn {
            let mut wrong_at = turn.peer.wrong_at.lock().unwrap_or_else(PoisonError::into_inner);
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
        let checks = Arc::new(Checks::default());
        for _ in 0..50 {
            let checks = Arc::clone(&checks);
            tokio::spawn(async move {
                let _turn = checks.turn(Some(host(1))).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            });
        }
        tokio::task::yield_now().await;
        let before = Instant::now();
        assert!(checks.turn(Some(host(2))).await.is_some());
        assert!(
            before.elapsed() < Duration::from_millis(150),
            "{:?}",
            before.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn t17_a_turn_that_does_not_come_is_not_waited_for_without_end() {
        let checks = Checks::default();
        let held = checks.turn(Some(host(1))).await;
        assert!(held.is_some() && checks.turn(Some(host(1))).await.is_none());
        drop(held);
        assert!(checks.turn(Some(host(1))).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn e13_a_credential_found_wrong_for_a_hash_stays_wrong() {
        let checks = Checks::default();
        assert!(!checks.is_wrong(&[1; 32]));
        checks.note_wrong([1; 32], None);
        tokio::time::advance(Duration::from_secs(24 * 60 * 60)).await;
        assert!(checks.is_wrong(&[1; 32]) && !checks.is_wrong(&[2; 32]));
    }

    #[tokio::test(start_paused = true)]
    async fn e13_a_fleet_with_stale_passwords_holds_up_no_new_login() {
        let checks = Arc::new(Checks::default());
        for last in 0..50 {
            let turn = checks.turn(Some(host(last))).await;
            checks.note_wrong([last; 32], turn.as_ref());
        }
        // Each goes on with ever other passwords.
        for last in 0..50 {
            let checks = Arc::clone(&checks);
            tokio::spawn(async move {
                loop {
                    let _turn = checks.turn(Some(host(last))).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
        }
        for last in 100..110 {
            tokio::task::yield_now().await;
            let before = Instant::now();
            assert!(checks.turn(Some(host(last))).await.is_some());
            let waited = before.elapsed();
            assert!(waited <= Duration::from_millis(100), "{waited:?}");
        }
    }
}
