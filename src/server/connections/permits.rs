//! Connection permits of the process, with a queue of two priorities.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// A fixed number of permits. Addresses with few connections precede those with many. Otherwise a client's connection
/// would wait for all connections of another address that floods the cache. Cheap to clone.
#[derive(Clone)]
pub(super) struct Permits(Arc<Mutex<State>>);

struct State {
    /// Zero unless both queues are empty.
    free: usize,
    few: VecDeque<oneshot::Sender<Permit>>,
    many: VecDeque<oneshot::Sender<Permit>>,
}

/// One permit. Its drop gives it to the next waiter of the queue.
pub(super) struct Permit(Option<Permits>);

impl Permits {
    pub(super) fn new(free: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            free,
            few: VecDeque::new(),
            many: VecDeque::new(),
        })))
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.0.lock().free
    }

    pub(super) fn try_acquire(&self) -> Option<Permit> {
        let mut state = self.0.lock();
        state.free = state.free.checked_sub(1)?;
        Some(Permit(Some(self.clone())))
    }

    /// Waits for a permit. `has_many`: the address has many connections. A dropped future leaves the queue.
    pub(super) async fn acquire(&self, has_many: bool) -> Option<Permit> {
        let receiver = {
            let mut state = self.0.lock();
            if let Some(free) = state.free.checked_sub(1) {
                state.free = free;
                return Some(Permit(Some(self.clone())));
            }
            let (sender, receiver) = oneshot::channel();
            let queue = if has_many { &mut state.many } else { &mut state.few };
            // The entry of a client that left stays until it is reached or the queue grows.
            queue.retain(|waiting| !waiting.is_closed());
            queue.push_back(sender);
            receiver
        };
        receiver.await.ok()
    }

    fn release(&self) {
        loop {
            let next = {
                let mut state = self.0.lock();
                if let Some(next) = state.few.pop_front().or_else(|| state.many.pop_front()) {
                    next
                } else {
                    state.free += 1;
                    return;
                }
            };
            match next.send(Permit(Some(self.clone()))) {
                Ok(()) => return,
                // Its client left. The loop gives the permit to the next one, so its drop must not release it again.
                Err(mut permit) => permit.0 = None,
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(permits) = self.0.take() {
            permits.release();
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
        let permits = Permits::new(1);
        let first = permits.try_acquire().unwrap();
        assert!(permits.try_acquire().is_none());
        let mut many = pin!(permits.acquire(true));
        let mut few = pin!(permits.acquire(false));
        assert!(timeout(Duration::ZERO, many.as_mut()).await.is_err());
        assert!(timeout(Duration::ZERO, few.as_mut()).await.is_err());
        drop(first);
        let second = few.await.unwrap();
        assert!(timeout(Duration::ZERO, many.as_mut()).await.is_err());
        drop(second);
        drop(many.await.unwrap());
        assert_eq!(permits.free(), 1);
    }

    #[tokio::test]
    async fn permit_of_client_that_left_goes_to_the_next() {
        let permits = Permits::new(1);
        let first = permits.try_acquire().unwrap();
        let mut next = pin!(permits.acquire(true));
        {
            let mut left = Box::pin(permits.acquire(false));
            assert!(timeout(Duration::ZERO, left.as_mut()).await.is_err());
            let mut left_with_a_permit = Box::pin(permits.acquire(false));
            assert!(
                timeout(Duration::ZERO, left_with_a_permit.as_mut())
                    .await
                    .is_err()
            );
            assert!(timeout(Duration::ZERO, next.as_mut()).await.is_err());
            drop(left);
            drop(first);
            // The permit was sent to it and not received.
            drop(left_with_a_permit);
        }
        drop(next.await.unwrap());
        assert_eq!(permits.free(), 1);
    }
}
