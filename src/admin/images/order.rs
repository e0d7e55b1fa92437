//! Orders of the image list that need a value of every image: by size and by confirmation time.
//!
//! To order 100,000 images takes 3 s. So the beginning of an order is reused for a while, in proportion to the time that it
//! took. Below [`EXACT_TIME_MAX`] it is made again for each list.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::store::tags::TagKey;

/// Images of a reused order. Lists that go further are ordered for themselves.
pub(super) const ORDERED_MAX: usize = 10_000;

/// An order that took no longer is not reused.
const EXACT_TIME_MAX: Duration = Duration::from_millis(50);

/// An order is reused for this multiple of the time that it took, so that lists take at most a twentieth of one core.
const REUSE_FACTOR: u32 = 20;

/// The longest reuse. An order takes much longer while the disk is slow.
const REUSE_MAX: Duration = Duration::from_secs(60);

/// The first images of an order, and the number of all.
#[derive(Clone)]
pub(super) struct Order {
    pub(super) first: Arc<[TagKey]>,
    pub(super) total: usize,
}

/// The last order by each value.
#[derive(Default)]
pub(in crate::admin) struct Orders {
    pub(super) by_size: LastOrder,
    pub(super) by_confirmation: LastOrder,
}

/// The last order, if it is reused.
#[derive(Default)]
pub(super) struct LastOrder(Mutex<Option<Reused>>);

struct Reused {
    order: Order,
    /// Number of tags when it was made. With fewer, it names removed ones.
    tags: u64,
    until: Instant,
}

impl LastOrder {
    /// The last order, or a new one of the present number of `tags`. Concurrent callers wait for the same one. Blocks.
    pub(super) fn get(&self, tags: u64, order: impl FnOnce() -> Order) -> Order {
        self.get_at(Instant::now, tags, order)
    }

    fn get_at(&self, mut now: impl FnMut() -> Instant, tags: u64, order: impl FnOnce() -> Order) -> Order {
        let mut last = self.0.lock();
        let began = now();
        let known = last.as_ref();
        if let Some(known) = known.filter(|known| tags >= known.tags && began < known.until) {
            return known.order.clone();
        }
        let order = order();
        let ended = now();
        let took = ended.duration_since(began);
        *last = (took > EXACT_TIME_MAX).then(|| Reused {
            order: order.clone(),
            tags,
            until: ended + (took * REUSE_FACTOR).min(REUSE_MAX),
        });
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(total: usize) -> Order {
        Order {
            first: Arc::new([]),
            total,
        }
    }

    /// The total of the order at `at_ms`, if a new one has `total` and takes `took_ms`.
    fn total_at(last: &LastOrder, start: Instant, (at_ms, took_ms): (u64, u64), total: usize) -> usize {
        total_of(last, start, (at_ms, took_ms), 9, total)
    }

    fn total_of(
        last: &LastOrder,
        start: Instant,
        (at_ms, took_ms): (u64, u64),
        tags: u64,
        total: usize,
    ) -> usize {
        let mut times = [at_ms, at_ms + took_ms].into_iter();
        let now = || start + Duration::from_millis(times.next().unwrap_or_default());
        last.get_at(now, tags, || order(total)).total
    }

    #[test]
    fn slow_order_is_reused_for_twenty_times_its_time() {
        let (last, start) = (LastOrder::default(), Instant::now());
        assert_eq!(total_at(&last, start, (0, 100), 1), 1);
        assert_eq!(total_at(&last, start, (2_099, 100), 2), 1);
        assert_eq!(total_at(&last, start, (2_100, 100), 3), 3);
    }

    #[test]
    fn very_slow_order_is_reused_for_a_minute() {
        let (last, start) = (LastOrder::default(), Instant::now());
        assert_eq!(total_at(&last, start, (0, 600_000), 1), 1);
        assert_eq!(total_at(&last, start, (659_999, 0), 2), 1);
        assert_eq!(total_at(&last, start, (660_000, 0), 3), 3);
    }

    #[test]
    fn order_is_made_again_after_a_removal() {
        let (last, start) = (LastOrder::default(), Instant::now());
        assert_eq!(total_of(&last, start, (0, 100), 5, 1), 1);
        assert_eq!(total_of(&last, start, (101, 100), 6, 2), 1);
        assert_eq!(total_of(&last, start, (202, 100), 4, 3), 3);
    }

    #[test]
    fn quick_order_is_made_for_each_list() {
        let (last, start) = (LastOrder::default(), Instant::now());
        assert_eq!(total_at(&last, start, (0, 50), 1), 1);
        assert_eq!(total_at(&last, start, (51, 50), 2), 2);
    }
}
