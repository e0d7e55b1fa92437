//! Concurrency limit with permits per client address and in total.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// A limit of concurrent operations. Cheap to clone.
#[derive(Clone)]
pub(super) struct ConcurrencyLimit(Arc<Inner>);

struct Inner {
    max: usize,
    per_address_max: usize,
    in_use: Mutex<InUse>,
}

#[derive(Default)]
struct InUse {
    all: usize,
    /// Permits by address. Clients of a unix socket count in `all` only.
    by_address: HashMap<IpAddr, usize>,
}

impl ConcurrencyLimit {
    /// A limit with all permits available.
    pub(super) fn new(max: usize, per_address_max: usize) -> Self {
        Self(Arc::new(Inner {
            max,
            per_address_max,
            in_use: Mutex::default(),
        }))
    }

    /// A permit for this client, or `None` if a limit is reached.
    pub(super) fn try_acquire(&self, client: Option<IpAddr>) -> Option<Permit> {
        let mut in_use = self.0.in_use.lock();
        if in_use.all >= self.0.max {
            return None;
        }
        if let Some(client) = client {
            let client_count = in_use.by_address.entry(client).or_default();
            if *client_count >= self.0.per_address_max {
                return None;
            }
            *client_count += 1;
        }
        in_use.all += 1;
        Some(Permit {
            limit: self.clone(),
            client,
        })
    }
}

/// A permit, released when dropped.
pub(super) struct Permit {
    limit: ConcurrencyLimit,
    client: Option<IpAddr>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut in_use = self.limit.0.in_use.lock();
        in_use.all -= 1;
        let Some(client) = self.client else { return };
        if let Some(client_count) = in_use.by_address.get_mut(&client) {
            *client_count -= 1;
            if *client_count == 0 {
                in_use.by_address.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn t14_address_limit_leaves_permits_for_others() {
        let host = |last| Some(Ipv4Addr::new(192, 0, 2, last).into());
        let limit = ConcurrencyLimit::new(4, 2);
        let mut first_address: Vec<_> = (0..3).filter_map(|_| limit.try_acquire(host(1))).collect();
        assert_eq!(first_address.len(), 2);
        let others: Vec<_> = [host(2), None, host(3)]
            .map(|client| limit.try_acquire(client))
            .into();
        assert_eq!(others.iter().flatten().count(), 2, "four in all");
        first_address.pop();
        assert!(limit.try_acquire(host(1)).is_some());
        drop((first_address, others));
        let in_use = limit.0.in_use.lock();
        assert!(in_use.all == 0 && in_use.by_address.is_empty());
    }
}
