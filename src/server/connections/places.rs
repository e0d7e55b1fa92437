//! Connection places of the process, in a queue with two priorities.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// A fixed number of places. Addresses with few connections precede those with many: else each connection that a client
/// opens beside a flood of another address waits for the whole flood. Cheap to clone.
#[derive(Clone)]
pub(super) struct Places(Arc<Mutex<State>>);

struct State {
    /// Not zero only while both queues are empty.
    free: usize,
    few: VecDeque<oneshot::Sender<Place>>,
    many: VecDeque<oneshot::Sender<Place>>,
}

/// One place. It is given to the next in the queue when it is dropped.
pub(super) struct Place(Option<Places>);

impl Places {
    pub(super) fn new(free: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            free,
            few: VecDeque::new(),
            many: VecDeque::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.state().free
    }

    pub(super) fn try_acquire(&self) -> Option<Place> {
        let mut state = self.state();
        state.free = state.free.checked_sub(1)?;
        Some(Place(Some(self.clone())))
    }

    /// Queues for a place. `has_many`: the address has many connections. Leaves the queue when it is dropped.
    pub(super) async fn acquire(&self, has_many: bool) -> Option<Place> {
        let receiver = {
            let mut state = self.state();
            if let Some(free) = state.free.checked_sub(1) {
                state.free = free;
                return Some(Place(Some(self.clone())));
            }
            let (sender, receiver) = oneshot::channel();
            let queue = if has_many { &mut state.many } else { &mut state.few };
            // A waiting client that left keeps its entry until the entry is reached or the queue grows.
            queue.retain(|waiting| !waiting.is_closed());
            queue.push_back(sender);
            receiver
        };
        receiver.await.ok()
    }

    fn release(&self) {
        loop {
            let next = {
                let mut state = self.state();
                if let Some(next) = state.few.pop_front().or_else(|| state.many.pop_front()) {
                    next
                } else {
                    state.free += 1;
                    return;
                }
            };
            match next.send(Place(Some(self.clone()))) {
                Ok(()) => return,
                // Its client left: the place is for the next one, and not released once more.
                Err(mut place) => place.0 = None,
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(places) = self.0.take() {
            places.release();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::pin::pin;

    use tokio::time::{Duration, timeout};

    use super::*;

    #[tokio::test]
    async fn t10_address_with_few_connections_precedes_one_with_many() {
        let places = Places::new(1);
        let first = places.try_acquire().unwrap();
        assert!(places.try_acquire().is_none());
        let mut many = pin!(places.acquire(true));
        let mut few = pin!(places.acquire(false));
        assert!(timeout(Duration::ZERO, many.as_mut()).await.is_err());
        assert!(timeout(Duration::ZERO, few.as_mut()).await.is_err());
        drop(first);
        let second = few.await.unwrap();
        assert!(timeout(Duration::ZERO, many.as_mut()).await.is_err());
        drop(second);
        drop(many.await.unwrap());
        assert_eq!(places.free(), 1);
    }

    #[tokio::test]
    async fn place_of_a_client_that_left_goes_to_the_next() {
        let places = Places::new(1);
        let first = places.try_acquire().unwrap();
        let mut next = pin!(places.acquire(true));
        {
            let mut left = Box::pin(places.acquire(false));
            assert!(timeout(Duration::ZERO, left.as_mut()).await.is_err());
            let mut left_with_a_place = Box::pin(places.acquire(false));
            assert!(timeout(Duration::ZERO, left_with_a_place.as_mut()).await.is_err());
            assert!(timeout(Duration::ZERO, next.as_mut()).await.is_err());
            drop(left);
            drop(first);
            // It holds the place, not yet taken out.
            drop(left_with_a_place);
        }
        drop(next.await.unwrap());
        assert_eq!(places.free(), 1);
    }
}
