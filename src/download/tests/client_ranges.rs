//! Clients that fetch one blob by several ranges at once.

use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::ahead::Parts;
use super::parallel::{CHUNK_BYTES, Limited, SIZE, Segments, direct, parallel_downloads};
use super::*;

const PART: usize = 8 * MIB;

#[derive(Clone, Copy)]
enum Ranges {
    Closed,
    /// The client leaves where its next range begins.
    Open,
}

/// A download, the upstream of it, and the requests that clients send themselves.
struct Setup {
    downloads: Downloads,
    registry: Limited,
    own: Parts,
}

impl Setup {
    fn new(permits: usize, segments: Segments) -> Self {
        Self {
            downloads: parallel_downloads(permits),
            registry: Limited::new(segments),
            own: Parts::default(),
        }
    }

    /// Starts the download. Its first reader begins at the start of the blob.
    async fn start(&self) -> Reader {
        let mut first = leader(&self.downloads, self.registry.digest()).start(self.registry.clone());
        first.info().await.unwrap();
        first
    }

    /// A further reader.
    fn reader(&self) -> Reader {
        follower(&self.downloads, self.registry.digest()).with_range_source(self.own.clone())
    }

    /// A reader of the part that begins at `start`.
    fn part(&self, ranges: Ranges, start: usize) -> Reader {
        match ranges {
            Ranges::Closed => self
                .reader()
                .within(start as u64, (start + PART).min(SIZE) as u64),
            Ranges::Open => self.reader().within(start as u64, SIZE as u64).waiting_for_fill(),
        }
    }

    /// Downloads the first part and those of `order` at once, and checks their bytes. Returns the time it took.
    async fn in_parts(&self, ranges: Ranges, order: &[usize]) -> Duration {
        let began = Instant::now();
        let mut first = self.start().await;
        let mut parts = Vec::new();
        for number in order {
            let start = number * PART;
            let mut reader = self.part(ranges, start);
            let reading = tokio::spawn(async move {
                let mut bytes = Vec::new();
                while bytes.len() < PART.min(SIZE - start) {
                    match reader.next().await {
                        Some(Ok(more)) => bytes.extend_from_slice(&more),
                        _ => break,
                    }
                }
                bytes.truncate(PART);
                bytes
            });
            parts.push((start, reading));
            tokio::task::yield_now().await;
        }
        assert!(take(&mut first, PART).await == self.registry.content[..PART]);
        drop(first);
        for (start, reading) in parts {
            let end = SIZE.min(start + PART);
            assert!(
                reading.await.unwrap() == self.registry.content[start..end],
                "{start}"
            );
        }
        began.elapsed()
    }

    /// The complete blob is cached in the end.
    async fn assert_cached(&self) {
        self.downloads.idle().await;
        assert!(held(&self.downloads, self.registry.digest()).unwrap() == *self.registry.content);
    }

    /// The upstream sent at most this much twice, where connections were closed.
    fn assert_sent_twice_at_most(&self, bytes: usize) {
        let sent = self.registry.state.sent.load(Ordering::SeqCst);
        assert!(sent <= SIZE + bytes, "{} bytes twice", sent - SIZE);
    }
}

#[tokio::test(start_paused = true)]
async fn ranges_at_once_are_as_fast_as_direct_and_cost_once() {
    for (ranges, order) in [
        (Ranges::Closed, [1, 2, 3, 4]),
        (Ranges::Open, [1, 2, 3, 4]),
        (Ranges::Open, [1, 4, 2, 3]),
    ] {
        let setup = Setup::new(16, Segments::Right);
        let took = setup.in_parts(ranges, &order).await;
        assert_eq!(setup.own.offsets(), [], "no request of a client's own");
        // One part takes a fifth.
        assert!(took < direct() * 25 / 100, "{took:?} of {:?}", direct());
        setup.assert_cached().await;
        setup.assert_sent_twice_at_most(2 * CHUNK_BYTES);
    }
}

#[tokio::test(start_paused = true)]
async fn range_within_a_running_segment_takes_over_its_rest() {
    let setup = Setup::new(16, Segments::Right);
    setup.in_parts(Ranges::Open, &[3, 4, 1, 2]).await;
    setup.assert_cached().await;
    let starts: Vec<u64> = setup
        .registry
        .opened()
        .iter()
        .map(|(start, _)| *start / MIB as u64)
        .collect();
    assert_eq!(starts, [0, 24, 32, 8, 16]);
    // The connection of the segment is closed where the other begins.
    setup.assert_sent_twice_at_most(4 * CHUNK_BYTES);
}

#[tokio::test(start_paused = true)]
async fn range_whose_segment_fails_comes_from_elsewhere() {
    for segments in [Segments::Denied, Segments::BreakEarly, Segments::Silent] {
        let setup = Setup::new(16, segments);
        setup.in_parts(Ranges::Closed, &[1, 2, 3, 4]).await;
        setup.assert_cached().await;
    }
}

#[tokio::test(start_paused = true)]
async fn crawling_segment_of_a_client_does_not_stop_the_blob() {
    let setup = Setup::new(16, Segments::Crawl);
    let began = Instant::now();
    setup.in_parts(Ranges::Closed, &[1, 2, 3, 4]).await;
    setup.assert_cached().await;
    // At its rate, one segment takes 28 s. None waits for another.
    let took = began.elapsed();
    assert!(took < direct() + Duration::from_secs(28), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn open_ended_range_gets_its_last_bytes_verified() {
    let setup = Setup::new(16, Segments::WrongBytes);
    let mut first = setup.start().await;
    let mut reader = setup.part(Ranges::Open, 4 * PART);
    let mut length = 0;
    while let Some(Ok(bytes)) = reader.next().await {
        length += bytes.len();
    }
    assert!(length < SIZE - 4 * PART, "{length}");
    take(&mut first, PART).await;
    drop(first);
    setup.assert_cached().await;
}

#[tokio::test(start_paused = true)]
async fn open_ended_range_takes_no_permit_that_others_need() {
    let setup = Setup::new(1, Segments::Right);
    setup.in_parts(Ranges::Open, &[2, 4]).await;
    setup.assert_cached().await;
    assert_eq!(setup.registry.segments_opened(), 0);
}

#[tokio::test(start_paused = true)]
async fn small_range_is_fetched_for_its_reader() {
    let setup = Setup::new(16, Segments::Right);
    let _first = setup.start().await;
    let span = 30 * MIB..30 * MIB + 1000;
    let wire = setup.own.part();
    send(&wire, &setup.registry.content[span.clone()]);
    let small = setup.reader().within(span.start as u64, span.end as u64);
    assert!(read_all(small).await == setup.registry.content[span]);
    assert_eq!(setup.own.offsets().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn client_that_leaves_its_range_leaves_no_hole() {
    let setup = Setup::new(16, Segments::Right);
    let first = setup.start().await;
    let mut reader = setup.part(Ranges::Closed, 3 * PART);
    let begun = take(&mut reader, 1).await;
    assert!(begun == setup.registry.content[3 * PART..3 * PART + begun.len()]);
    drop((reader, first));
    setup.assert_cached().await;
    setup.assert_sent_twice_at_most(4 * CHUNK_BYTES);
}
