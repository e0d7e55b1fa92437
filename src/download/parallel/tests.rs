#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "tests may fail loudly"
)]

use super::ramp::MEASURE_WINDOW;
use super::*;

const MIB: u64 = 1024 * 1024;

/// Deterministic pseudo-random numbers (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Runs a plan in a random order to its end. Returns the bytes of the first stream and of the segments.
fn played(seed: u64, total: u64) -> (u64, u64) {
    let mut numbers = Numbers(seed);
    let mut plan = Plan::new(0, total, 4);
    let (mut open, mut by_first, mut by_segments) = (Vec::<Arc<Segment>>::new(), 0, 0);
    while plan.front < total {
        match numbers.below(3) {
            0 if plan.segment_at_front().is_none() => {
                let length = numbers.below(3 * MIB).min(total - plan.front);
                by_first += plan.advance(length);
            }
            1 if open.len() < 3 && numbers.below(2) == 0 => {
                let (start, length) = (numbers.below(total), 1 + numbers.below(16 * MIB));
                let until = (numbers.below(2) == 0).then(|| (start + length).min(total));
                open.extend(plan.assign_to_client(start, until));
            }
            1 if open.len() < 3 => open.extend(plan.take()),
            _ => {}
        }
        if !open.is_empty() {
            let at = usize::try_from(numbers.below(open.len() as u64)).unwrap();
            let segment = Arc::clone(open.get(at).unwrap());
            let length = segment.end() - segment.start;
            if !segment.go_live() {
                open.remove(at);
                continue;
            }
            let fails = numbers.below(50) == 0;
            segment.progress.send_modify(|progress| {
                progress.written = (progress.written + numbers.below(3 * MIB)).min(length);
            });
            if fails || segment.progress.borrow().written == length {
                plan.ended(&segment);
                open.remove(at);
            }
        }
        while let Some(segment) = plan.segment_at_front() {
            let progress = *segment.progress.borrow();
            let state = (plan.front, plan.segments.len());
            by_segments += plan.adopt(&segment, progress);
            if state == (plan.front, plan.segments.len()) {
                break;
            }
        }
        let starts: Vec<u64> = plan.segments.iter().map(|segment| segment.start).collect();
        let has_gap = |(one, next): (&Arc<Segment>, &Arc<Segment>)| one.end() <= next.start;
        let next = plan.segments.iter().skip(1);
        assert!(plan.segments.iter().zip(next).all(has_gap), "segments overlap");
        assert!(starts.is_sorted() && plan.segments.iter().all(|segment| segment.end() <= total));
        assert!(plan.segments.iter().all(|segment| segment.end() > plan.front));
    }
    (by_first, by_segments)
}

#[test]
fn connections_cover_a_blob_exactly_once() {
    for seed in 1..400 {
        let total = 16 * MIB + seed * 997_331;
        let (by_first, by_segments) = played(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), total);
        assert_eq!(by_first + by_segments, total, "seed {seed}");
        assert!(by_first > 0);
    }
}

#[test]
fn segments_shrink_towards_the_end() {
    let mut plan = Plan::new(0, 1024 * MIB, 4);
    let lengths: Vec<u64> = std::iter::from_fn(|| plan.take())
        .map(|segment| (segment.end() - segment.start) / MIB)
        .collect();
    assert_eq!(lengths.first(), Some(&64));
    assert!(
        lengths.is_sorted_by(|one, next| one >= next || *next < 8),
        "{lengths:?}"
    );
    assert!(lengths.last().is_some_and(|length| *length < 8));
    let mut small = Plan::new(0, 7 * MIB, 4);
    assert!(small.take().is_none(), "less than a segment for each of two");
}

/// Feeds rates in MB/s, one per window, and returns the connections after each.
fn ramped(rates: &[(u64, Duration)]) -> usize {
    let (mut ramp, mut connections) = (Ramp::default(), 1);
    let (mut now, mut received, mut stalled) = (Instant::now(), 0, Duration::ZERO);
    for (rate, stall) in rates {
        assert_eq!(
            ramp.measure(now, received, stalled, connections),
            Measured::Nothing
        );
        now += MEASURE_WINDOW;
        received += rate * 1_000_000 / 4;
        stalled += *stall;
        match ramp.measure(now, received, stalled, connections) {
            Measured::Gain => {
                connections += 1;
                ramp.added(connections);
            }
            Measured::NoGain => connections -= 1,
            Measured::Nothing => {}
        }
    }
    connections
}

#[tokio::test]
async fn connection_is_added_while_the_last_one_gained() {
    let free = Duration::ZERO;
    let rates = |rates: &[u64]| rates.iter().map(|rate| (*rate, free)).collect::<Vec<_>>();
    assert_eq!(ramped(&rates(&[40, 80, 120, 160])), 5);
    assert_eq!(ramped(&rates(&[40, 41, 41, 41])), 1, "the limit is shared");
    assert_eq!(ramped(&rates(&[40, 80, 84, 84, 80])), 2);
}

#[tokio::test]
async fn one_slow_window_does_not_end_further_connections() {
    let (free, slow_disk) = (Duration::ZERO, Duration::from_millis(200));
    let rates = |rates: &[u64]| rates.iter().map(|rate| (*rate, free)).collect::<Vec<_>>();
    assert_eq!(ramped(&rates(&[40, 41, 80, 120])), 4);
    assert_eq!(
        ramped(&[(40, slow_disk), (40, slow_disk)]),
        1,
        "the disk is the limit"
    );
    assert_eq!(ramped(&[(40, slow_disk), (40, free), (80, free)]), 3);
    assert_eq!(
        ramped(&[(40, free), (40, slow_disk), (40, slow_disk), (80, free)]),
        3
    );
}

#[tokio::test]
async fn burst_at_the_start_does_not_end_further_connections() {
    let rates = |rates: &[u64]| {
        rates
            .iter()
            .map(|rate| (*rate, Duration::ZERO))
            .collect::<Vec<_>>()
    };
    assert_eq!(ramped(&rates(&[100, 80, 80])), 1);
    assert_eq!(ramped(&rates(&[100, 80, 80, 40, 40, 80])), 3);
    assert_eq!(
        ramped(&rates(&[100, 80, 80, 40, 80, 40])),
        1,
        "one window is no proof"
    );
}

#[tokio::test]
async fn shared_limit_is_measured_again_ever_less_often() {
    let (mut ramp, mut connections) = (Ramp::default(), 1);
    let (began, mut received, mut added) = (Instant::now(), 0, Vec::new());
    for window in 0..2400 {
        let now = began + MEASURE_WINDOW * window;
        match ramp.measure(now, received, Duration::ZERO, connections) {
            Measured::Gain => {
                connections += 1;
                ramp.added(connections);
                added.push(now.duration_since(began).as_secs());
            }
            Measured::NoGain => connections -= 1,
            Measured::Nothing => {}
        }
        received += 10_000_000;
    }
    // Each costs less than 80 ms.
    assert_eq!(added, [0, 9, 26, 59, 124, 253, 510]);
}

#[tokio::test(start_paused = true)]
async fn stream_ends_where_a_segment_or_a_client_begins() {
    let mut plan = Plan::new(0, 256 * MIB, 4);
    assert_eq!(plan.stream_end(), None);
    let first = plan.take().unwrap();
    assert_eq!(plan.stream_end(), Some(first.start));
    plan.ended(&first);
    assert!(plan.assign_to_client(16 * MIB, None).is_some());
    assert_eq!(plan.stream_end(), Some(16 * MIB));
    plan.front = 40 * MIB;
    assert_eq!(
        plan.stream_end(),
        Some(56 * MIB),
        "the distance of open-ended ranges"
    );
    plan.front = 245 * MIB;
    assert_eq!(plan.stream_end(), None);
    tokio::time::advance(CLIENTS_LEFT).await;
    plan.front = 40 * MIB;
    assert_eq!(plan.stream_end(), None, "no client opens connections any more");
}

const CLIENTS_LEFT: Duration = Duration::from_secs(2);

#[test]
fn client_segment_is_neither_long_nor_short() {
    let mut plan = Plan::new(0, 1024 * MIB, 4);
    let long = plan.assign_to_client(16 * MIB, Some(1024 * MIB)).unwrap();
    assert_eq!(
        (long.start, long.end()),
        (16 * MIB, 16 * MIB + plan::SEGMENT_BYTES_MAX)
    );
    // Before it, and before the end of a range, less than a megabyte is left.
    assert!(plan.assign_to_client(16 * MIB - 1, Some(17 * MIB)).is_none());
    assert!(plan.assign_to_client(200 * MIB, Some(200 * MIB + 1)).is_none());
    assert!(plan.assign_to_client(15 * MIB, Some(17 * MIB)).is_some());
    assert!(plan.assign_to_client(1024 * MIB - 1, None).is_some());
}

#[test]
fn no_client_segment_after_one_that_failed() {
    let mut plan = Plan::new(0, 1024 * MIB, 4);
    plan.has_failed_for_reader = true;
    assert!(plan.assign_to_client(16 * MIB, None).is_none());
    // Further connections of the transfer are not affected.
    assert!(plan.take().is_some());
}
