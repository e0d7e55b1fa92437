//! Which repositories' proofs are in memory beside the cache, so that no two of one repository are.
//!
//! The cache lets go of a repository also while someone is about to write to its file. A second one, loaded from the file
//! meanwhile, would not know what the first one is about to append, and neither would write down what ends it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::SharedSeen;
use crate::store::cache_key::Place;

/// At this many, those no longer used are looked for; and at twice as many as were left then.
const SWEEP_MIN: usize = 1024;

#[derive(Default)]
pub(super) struct InUse(Mutex<Places>);

#[derive(Default)]
struct Places {
    used: HashMap<Place, Weak<SharedSeen>>,
    /// Those whose file lacks a line that takes something back: only memory knows it.
    owing: HashMap<Place, Arc<SharedSeen>>,
    sweep_at: usize,
}

impl InUse {
    pub(super) fn find(&self, place: &Place) -> Option<Arc<SharedSeen>> {
        self.lock().used.get(place)?.upgrade()
    }

    /// Notes what was loaded; not at the same time as another load of the same repository.
    pub(super) fn enter(&self, place: &Place, seen: &Arc<SharedSeen>) {
        let mut places = self.lock();
        if places.used.len() >= places.sweep_at.max(SWEEP_MIN) {
            places.used.retain(|_, used| used.strong_count() > 0);
            places.sweep_at = 2 * places.used.len();
        }
        places.used.insert(place.clone(), Arc::downgrade(seen));
    }

    /// Keeps those whose file could not be appended to, or no longer does.
    pub(super) fn set_owing(&self, place: &Place, seen: &Arc<SharedSeen>, is_owing: bool) {
        let mut places = self.lock();
        if is_owing {
            places.owing.insert(place.clone(), Arc::clone(seen));
        } else if !places.owing.is_empty() {
            places.owing.remove(place);
        }
    }

    /// Those whose file lacks a line that takes something back.
    pub(super) fn owing(&self) -> Vec<(Place, Arc<SharedSeen>)> {
        let places = self.lock();
        let owing = places.owing.iter();
        owing
            .map(|(place, seen)| (place.clone(), Arc::clone(seen)))
            .collect()
    }

    /// The map is whole between any two statements under its lock.
    fn lock(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
