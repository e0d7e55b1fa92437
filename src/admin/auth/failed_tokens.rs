//! Rate limit for wrong admin tokens, per client address (GCRA: a burst, then a constant rate).
//!
//! A request from an address that has used up its allowance waits until another token may be tried. Of several such
//! requests, the first that continues is compared; if it is wrong, the others get 429. If all were compared, the limit
//! would delay an attack and not slow it down. Other addresses are not affected. The number of remembered addresses is
//! bounded; a forgotten address starts with a complete burst.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::server::host_network;

/// Burst of wrong tokens, and the interval at which further ones are compared.
const BURST: u32 = 10;
const ONE_MORE_AFTER: Duration = Duration::from_secs(1);

/// Maximum number of remembered addresses.
const ADDRESSES_MAX: usize = 4096;

/// Wrong tokens per address.
pub(super) struct FailedTokens(Cache<IpAddr, Arc<Mutex<Failures>>>);

/// Wrong tokens of one address.
#[derive(Debug, Default)]
struct Failures {
    /// Count since the address was first remembered.
    wrong: u64,
    /// Time at which the complete burst is available again.
    full_at: Option<Instant>,
}

impl Failures {
    /// Time until another token may be compared; `None` if it may be now.
    fn wait(&self, now: Instant) -> Option<Duration> {
        let used = self.full_at?.saturating_duration_since(now);
        let wait = (used + ONE_MORE_AFTER).saturating_sub(ONE_MORE_AFTER * BURST);
        (!wait.is_zero()).then_some(wait)
    }

    fn note(&mut self, now: Instant) -> u64 {
        let full_at = self.full_at.unwrap_or(now).max(now);
        self.full_at = Some(full_at + ONE_MORE_AFTER);
        self.wrong += 1;
        self.wrong
    }
}

impl Default for FailedTokens {
    fn default() -> Self {
        Self(Cache::new(ADDRESSES_MAX))
    }
}

impl FailedTokens {
    /// Time until another token of this client is compared.
    pub(super) fn wait(&self, client: IpAddr, now: Instant) -> Option<Duration> {
        let failures = self.0.get(&host_network(client))?;
        failures.lock().wait(now)
    }

    /// Records a wrong token and returns the count of this address.
    pub(super) fn note(&self, client: IpAddr, now: Instant) -> u64 {
        let made = || Ok::<_, std::convert::Infallible>(Arc::default());
        let Ok(failures) = self.0.get_or_insert_with(&host_network(client), made);
        failures.lock().note(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    #[test]
    fn t14_wrong_tokens_are_limited_to_one_a_second() {
        let (failed_tokens, start) = (FailedTokens::default(), Instant::now());
        let mut compared = 0;
        // 6,517 attempts a second, for a minute.
        for at in 0..60 * 6_517_u32 {
            let now = start + Duration::from_secs(1) / 6_517 * at;
            if failed_tokens.wait(ONE, now).is_none() {
                compared += 1;
                assert_eq!(failed_tokens.note(ONE, now), compared);
            }
        }
        assert!((60..=u64::from(BURST) + 60).contains(&compared), "{compared}");
    }

    #[test]
    fn t14_wrong_tokens_lock_out_no_other_address() {
        let (failed_tokens, now) = (FailedTokens::default(), Instant::now());
        for _ in 0..BURST {
            assert_eq!(failed_tokens.wait(ONE, now), None);
            failed_tokens.note(ONE, now);
        }
        assert_eq!(failed_tokens.wait(ONE, now), Some(ONE_MORE_AFTER));
        assert_eq!(failed_tokens.wait(OTHER, now), None);
        assert_eq!(failed_tokens.wait(ONE, now + ONE_MORE_AFTER), None);
    }

    #[test]
    fn t14_addresses_with_wrong_tokens_take_bounded_memory() {
        let (failed_tokens, now) = (FailedTokens::default(), Instant::now());
        for address in 0..10 * 4096_u32 {
            failed_tokens.note(Ipv4Addr::from_bits(address).into(), now);
        }
        assert!(
            failed_tokens.0.len() <= ADDRESSES_MAX,
            "{}",
            failed_tokens.0.len()
        );
    }
}
