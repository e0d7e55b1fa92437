//! Turns for password checks, and the credentials that were found wrong.
//!
//! A check costs a tenth of a second of a processor, so few run at a time. A peer has one turn at a time: who guesses waits
//! for its own guesses, and the first login of another peer for one check of each. A credential found wrong is remembered
//! for [`WRONG_FOR`]: a fleet that goes on with an old password costs one check a minute, not one a request.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::server::host_network;

/// Checks at a time.
const CHECKS_MAX: usize = 2;

/// How long a check waits for its turn.
const CHECK_WITHIN: Duration = Duration::from_secs(10);

/// How long a wrong credential is known to be wrong.
const WRONG_FOR: Duration = Duration::from_secs(60);

/// Wrong credentials remembered.
const WRONG_MAX: usize = 4096;

/// Peers whose turns are told apart.
const PEERS_MAX: usize = 4096;

/// The keyed hash of a credential.
pub(super) type Key = [u8; 32];

pub(super) struct Checks {
    /// In the order of arrival, one of each peer.
    slots: Arc<Semaphore>,
    peers: Cache<Option<IpAddr>, Arc<Semaphore>>,
    wrong: Cache<Key, Instant>,
}

/// The turn ends when this is dropped.
pub(super) struct Turn {
    _slot: OwnedSemaphorePermit,
    _peer: OwnedSemaphorePermit,
}

impl Default for Checks {
    fn default() -> Self {
        Self {
            slots: Arc::new(Semaphore::new(CHECKS_MAX)),
            peers: Cache::new(PEERS_MAX),
            wrong: Cache::new(WRONG_MAX),
        }
    }
}

impl Checks {
    /// Waits for a turn of this peer; `None` where that takes too long.
    pub(super) async fn turn(&self, peer: Option<IpAddr>) -> Option<Turn> {
        let own = self.peers.get_or_insert_with(&peer.map(host_network), || {
            Ok::<_, std::convert::Infallible>(Arc::new(Semaphore::new(1)))
        });
        let Ok(own) = own;
        let turn = async {
            let peer = own.acquire_owned().await.ok()?;
            let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
            Some(Turn {
                _slot: slot,
                _peer: peer,
            })
        };
        timeout(CHECK_WITHIN, turn).await.ok().flatten()
    }

    pub(super) fn is_wrong(&self, credential: &Key) -> bool {
        let found_at = self.wrong.get(credential);
        found_at.is_some_and(|found_at| found_at.elapsed() < WRONG_FOR)
    }

    pub(super) fn note_wrong(&self, credential: Key) {
        self.wrong.insert(credential, Instant::now());
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
    async fn t17_a_first_login_waits_for_one_check_of_each_peer_that_guesses() {
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
    async fn t17_a_wrong_credential_is_known_for_a_minute() {
        let checks = Checks::default();
        assert!(!checks.is_wrong(&[1; 32]));
        checks.note_wrong([1; 32]);
        assert!(checks.is_wrong(&[1; 32]) && !checks.is_wrong(&[2; 32]));
        tokio::time::advance(WRONG_FOR).await;
        assert!(!checks.is_wrong(&[1; 32]));
    }
}
