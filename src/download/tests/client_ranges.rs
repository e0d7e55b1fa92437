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

/// A reader of the range that begins at `start`.
fn part(downloads: &Downloads, registry: &Limited, ranges: Ranges, start: usize, own: &Parts) -> Reader {
    let reader = follower(downloads, registry.digest()).with_range_source(own.clone());
    match ranges {
        Ranges::Closed => reader.within(start as u64, (start + PART).min(SIZE) as u64),
        Ranges::Open => reader.within(start as u64, SIZE as u64).waiting_for_fill(),
    }
}

/// Downloads the blob in parts at once, in this order. Returns the bytes of each and the time it took.
async fn in_parts(
    downloads: &Downloads,
    registry: &Limited,
    ranges: Ranges,
    order: &[usize],
    own: &Parts,
) -> (Vec<(usize, Vec<u8>)>, Duration) {
    let began = Instant::now();
    let mut first = leader(downloads, registry.digest()).start(registry.clone());
    first.info().await.unwrap();
    let mut parts = Vec::new();
    for number in order {
        let start = number * PART;
        let mut reader = part(downloads, registry, ranges, start, own);
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
    let mut received = vec![(0, take(&mut first, PART).await)];
    drop(first);
    for (start, reading) in parts {
        received.push((start, reading.await.unwrap()));
    }
    (received, began.elapsed())
}

fn assert_right(received: &[(usize, Vec<u8>)], registry: &Limited) {
    for (start, bytes) in received {
        let length = PART.min(SIZE - start);
        assert!(
            bytes[..length] == registry.content[*start..start + length],
            "{start}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn ranges_at_once_are_as_fast_as_direct_and_cost_once() {
    for (ranges, order) in [
        (Ranges::Closed, [1, 2, 3, 4]),
        (Ranges::Open, [1, 2, 3, 4]),
        (Ranges::Open, [1, 4, 2, 3]),
    ] {
        let (downloads, registry, own) = (
            parallel_downloads(16),
            Limited::new(Segments::Right),
            Parts::default(),
        );
        let (received, took) = in_parts(&downloads, &registry, ranges, &order, &own).await;
        assert_right(&received, &registry);
        assert_eq!(own.offsets(), [], "no request of a client's own");
        // One part takes a fifth.
        assert!(took < direct() * 25 / 100, "{took:?} of {:?}", direct());
        downloads.idle().await;
        assert!(held(&downloads, registry.digest()).unwrap() == *registry.content);
        let sent = registry.state.sent.load(Ordering::SeqCst);
        assert!(sent <= SIZE + 2 * CHUNK_BYTES, "{} bytes twice", sent - SIZE);
    }
}

#[tokio::test(start_paused = true)]
async fn range_within_a_running_segment_takes_over_its_rest() {
    let (downloads, registry, own) = (
        parallel_downloads(16),
        Limited::new(Segments::Right),
        Parts::default(),
    );
    let (received, _) = in_parts(&downloads, &registry, Ranges::Open, &[3, 4, 1, 2], &own).await;
    assert_right(&received, &registry);
    downloads.idle().await;
    let starts: Vec<u64> = registry
        .opened()
        .iter()
        .map(|(start, _)| *start / MIB as u64)
        .collect();
    assert_eq!(starts, [0, 24, 32, 8, 16]);
    // The connection of the segment is closed where the other begins.
    let sent = registry.state.sent.load(Ordering::SeqCst);
    assert!(sent <= SIZE + 4 * CHUNK_BYTES, "{} bytes twice", sent - SIZE);
}

#[tokio::test(start_paused = true)]
async fn range_whose_segment_fails_comes_from_elsewhere() {
    for segments in [Segments::Denied, Segments::BreakEarly, Segments::Silent] {
        let (downloads, registry, own) = (parallel_downloads(16), Limited::new(segments), Parts::default());
        let (received, _) = in_parts(&downloads, &registry, Ranges::Closed, &[1, 2, 3, 4], &own).await;
        assert_right(&received, &registry);
        downloads.idle().await;
        assert!(held(&downloads, registry.digest()).unwrap() == *registry.content);
    }
}

#[tokio::test(start_paused = true)]
async fn crawling_segment_of_a_client_does_not_stop_the_blob() {
    let (downloads, registry, own) = (
        parallel_downloads(16),
        Limited::new(Segments::Crawl),
        Parts::default(),
    );
    let began = Instant::now();
    let (received, _) = in_parts(&downloads, &registry, Ranges::Closed, &[1, 2, 3, 4], &own).await;
    assert_right(&received, &registry);
    downloads.idle().await;
    assert!(held(&downloads, registry.digest()).unwrap() == *registry.content);
    // At its rate, one segment takes 28 s. None waits for another.
    let took = began.elapsed();
    assert!(took < direct() + Duration::from_secs(28), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn open_ended_range_gets_its_last_bytes_verified() {
    let (downloads, registry, own) = (
        parallel_downloads(16),
        Limited::new(Segments::WrongBytes),
        Parts::default(),
    );
    let (received, _) = in_parts(&downloads, &registry, Ranges::Open, &[4], &own).await;
    let (start, bytes) = received.last().unwrap();
    assert!(bytes.len() < SIZE - start, "{}", bytes.len());
    downloads.idle().await;
    assert!(held(&downloads, registry.digest()).unwrap() == *registry.content);
}

#[tokio::test(start_paused = true)]
async fn open_ended_range_takes_no_permit_that_others_need() {
    let (downloads, registry, own) = (
        parallel_downloads(1),
        Limited::new(Segments::Right),
        Parts::default(),
    );
    let (received, _) = in_parts(&downloads, &registry, Ranges::Open, &[2, 4], &own).await;
    assert_right(&received, &registry);
    downloads.idle().await;
    assert_eq!(registry.segments_opened(), 0);
}

#[tokio::test(start_paused = true)]
async fn small_range_is_fetched_for_its_reader() {
    let (downloads, registry, own) = (
        parallel_downloads(16),
        Limited::new(Segments::Right),
        Parts::default(),
    );
    let mut first = leader(&downloads, registry.digest()).start(registry.clone());
    first.info().await.unwrap();
    let wire = own.part();
    send(&wire, &registry.content[30 * MIB..30 * MIB + 1000]);
    let small = follower(&downloads, registry.digest())
        .with_range_source(own.clone())
        .within(30 * MIB as u64, 30 * MIB as u64 + 1000);
    assert!(read_all(small).await == registry.content[30 * MIB..30 * MIB + 1000]);
    assert_eq!(own.offsets().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn client_that_leaves_its_range_leaves_no_hole() {
    let (downloads, registry, own) = (
        parallel_downloads(16),
        Limited::new(Segments::Right),
        Parts::default(),
    );
    let mut first = leader(&downloads, registry.digest()).start(registry.clone());
    first.info().await.unwrap();
    let mut reader = part(&downloads, &registry, Ranges::Closed, 3 * PART, &own);
    let begun = take(&mut reader, 1).await;
    assert!(begun == registry.content[3 * PART..3 * PART + begun.len()]);
    drop((reader, first));
    downloads.idle().await;
    assert!(held(&downloads, registry.digest()).unwrap() == *registry.content);
    let sent = registry.state.sent.load(Ordering::SeqCst);
    assert!(sent <= SIZE + 4 * CHUNK_BYTES, "{} bytes twice", sent - SIZE);
}
