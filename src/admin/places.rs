//! Places of the admin listener for one kind of work: so many in all, and so many for one client address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Places(Arc<Inner>);

struct Inner {
    max: usize,
    per_address_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    all: usize,
    /// Of those that have any. What comes through a unix socket counts in `all` alone.
    by_address: HashMap<IpAddr, usize>,
}

impl Places {
    /// All of them free.
    pub(super) fn new(max: usize, per_address_max: usize) -> Self {
        Self(Arc::new(Inner {
            max,
            per_address_max,
            taken: Mutex::default(),
        }))
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for this client, if there is one.
    pub(super) fn take(&self, client: Option<IpAddr>) -> Option<Place> {
        let mut taken = self.taken();
        if taken.all >= self.0.max {
            return None;
        }
        if let Some(client) = client {
            let of_client = taken.by_address.entry(client).or_default();
            if *of_client >= self.0.per_address_max {
                return None;
            }
            *of_client += 1;
        }
        taken.all += 1;
        Some(Place {
            places: self.clone(),
            client,
        })
    }
}

/// Free again when dropped.
pub(super) struct Place {
    places: Places,
    client: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        let Some(client) = self.client else { return };
        if let Some(of_client) = taken.by_address.get_mut(&client) {
            *of_client -= 1;
            if *of_client == 0 {
                taken.by_address.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn t14_one_address_leaves_places_for_others_and_gives_its_own_back() {
        let host = |last| Some(Ipv4Addr::new(192, 0, 2, last).into());
        let places = Places::new(4, 2);
        let mut own: Vec<_> = (0..3).filter_map(|_| places.take(host(1))).collect();
        assert_eq!(own.len(), 2);
        let others: Vec<_> = [host(2), None, host(3)].map(|client| places.take(client)).into();
        assert_eq!(others.iter().flatten().count(), 2, "four in all");
        own.pop();
        assert!(places.take(host(1)).is_some());
        drop((own, others));
        let taken = places.taken();
        assert!(taken.all == 0 && taken.by_address.is_empty());
    }
}
