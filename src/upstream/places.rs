//! Concurrency limit of one kind of request to an upstream, which can be changed while requests are under way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// So many at a time, in the order in which they came.
pub(super) struct Places {
    free: Arc<Semaphore>,
    size: Mutex<Size>,
}

#[derive(Default)]
struct Size {
    max: usize,
    /// How many of those in use are more than `max`: they are not given out again.
    surplus: usize,
}

/// One of them, until it is dropped.
pub(super) struct Place {
    permit: Option<OwnedSemaphorePermit>,
    places: Arc<Places>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            free: Arc::new(Semaphore::new(0)),
            size: Mutex::default(),
        }
    }
}

impl Places {
    /// One of them, if it is free within this time.
    pub(super) async fn take(self: &Arc<Self>, within: Duration) -> Option<Place> {
        let permit = timeout(within, Arc::clone(&self.free).acquire_owned()).await;
        Some(Place {
            permit: Some(permit.ok()?.ok()?),
            places: Arc::clone(self),
        })
    }

    /// From now on so many. Those under way count.
    pub(super) fn resize(&self, max: usize) {
        let mut size = self.size();
        if max >= size.max {
            let more = max - size.max;
            let kept = more.min(size.surplus);
            size.surplus -= kept;
            self.free.add_permits(more - kept);
        } else {
            let fewer = size.max - max;
            size.surplus += fewer - self.free.forget_permits(fewer);
        }
        size.max = max;
    }

    /// How many are in use.
    pub(super) fn in_use(&self) -> usize {
        let size = self.size();
        (size.max + size.surplus).saturating_sub(self.free.available_permits())
    }

    /// Every change under this lock is complete before it is given back.
    fn size(&self) -> MutexGuard<'_, Size> {
        self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut size = self.places.size();
        if size.surplus > 0
            && let Some(permit) = self.permit.take()
        {
            size.surplus -= 1;
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;

    #[tokio::test]
    async fn o03_requests_under_way_count_against_a_new_limit() {
        let places = Arc::new(Places::default());
        places.resize(4);
        let mut taken = Vec::new();
        for _ in 0..4 {
            taken.push(places.take(AT_ONCE).await.unwrap());
        }
        places.resize(2);
        assert_eq!(places.in_use(), 4);
        taken.truncate(2);
        assert_eq!(places.in_use(), 2);
        assert!(places.take(AT_ONCE).await.is_none(), "two are the limit now");
        taken.pop();
        taken.push(places.take(AT_ONCE).await.unwrap());
        places.resize(3);
        taken.push(places.take(AT_ONCE).await.unwrap());
        assert!(places.take(AT_ONCE).await.is_none());
        drop(taken);
        assert_eq!(places.in_use(), 0);
    }
}
