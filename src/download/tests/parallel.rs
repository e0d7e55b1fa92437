//! One blob over several connections.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::time::{Instant, sleep};

use super::*;

const SIZE: usize = 40 * MIB;
const CHUNK_BYTES: usize = 128 * 1024;

/// 128 KiB in 10 ms: 13 MB/s.
const PACE: Duration = Duration::from_millis(10);

/// How the segments of a registry are served.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Segments {
    Right,
    Denied,
    WrongBytes,
    BreakEarly,
    Crawl,
}

/// A registry that limits the rate of each connection, or of all together.
#[derive(Clone)]
struct Limited {
    content: Arc<Vec<u8>>,
    segments: Segments,
    is_limit_shared: bool,
    state: Arc<LimitedState>,
}

#[derive(Default)]
struct LimitedState {
    opened: Mutex<Vec<(u64, Option<u64>)>>,
    open: AtomicUsize,
    open_max: AtomicUsize,
    sent: AtomicUsize,
    first_breaks: AtomicBool,
}

struct Sending {
    from: Limited,
    position: usize,
    end: usize,
    kind: Segments,
    sent: usize,
}

impl Limited {
    fn new(segments: Segments) -> Self {
        Self {
            content: Arc::new(content(SIZE)),
            segments,
            is_limit_shared: false,
            state: Arc::default(),
        }
    }

    fn digest(&self) -> Digest {
        digest(&self.content)
    }

    fn send(&self, from: u64, until: Option<u64>) -> Sending {
        let state = &self.state;
        state.opened.lock().unwrap().push((from, until));
        let open = state.open.fetch_add(1, Ordering::SeqCst) + 1;
        state.open_max.fetch_max(open, Ordering::SeqCst);
        Sending {
            from: self.clone(),
            position: usize::try_from(from).unwrap(),
            end: until.map_or(SIZE, |until| usize::try_from(until).unwrap()),
            kind: if until.is_some() {
                self.segments
            } else {
                Segments::Right
            },
            sent: 0,
        }
    }

    fn opened(&self) -> Vec<(u64, Option<u64>)> {
        self.state.opened.lock().unwrap().clone()
    }

    fn segments_opened(&self) -> usize {
        self.opened().iter().filter(|(_, until)| until.is_some()).count()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.from.state.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ByteStream for Sending {
    fn chunk(&mut self) -> ChunkFuture<'_> {
        Box::pin(async {
            let state = &self.from.state;
            let sharing = if self.from.is_limit_shared {
                state.open.load(Ordering::SeqCst)
            } else {
                1
            };
            let crawls = self.kind == Segments::Crawl && self.sent > MIB;
            sleep(PACE * u32::try_from(sharing).unwrap() * if crawls { 50 } else { 1 }).await;
            if self.kind == Segments::BreakEarly && self.sent > MIB
                || self.kind == Segments::Right
                    && state.first_breaks.load(Ordering::SeqCst)
                    && (self.sent > 12 * MIB || self.position > 12 * MIB)
            {
                return Some(Err(UpstreamFailure::ConnectionReset));
            }
            let end = (self.position + CHUNK_BYTES).min(self.end);
            if self.position == end {
                return None;
            }
            let mut bytes = self.from.content[self.position..end].to_vec();
            if self.kind == Segments::WrongBytes {
                bytes[0] ^= 1;
            }
            self.position = end;
            self.sent += bytes.len();
            state.sent.fetch_add(bytes.len(), Ordering::SeqCst);
            Some(Ok(bytes.into()))
        })
    }
}

impl Source for Limited {
    async fn open(&mut self, from: u64) -> Result<Stream, UpstreamResponse> {
        Ok(Stream {
            start: from,
            total: Some(SIZE as u64),
            body: Box::new(self.send(from, None)),
        })
    }

    fn segments(&self, total: u64) -> Option<Box<dyn RangeSource>> {
        assert_eq!(total, SIZE as u64);
        Some(Box::new(self.clone()))
    }
}

impl RangeSource for Limited {
    fn open(&mut self, from: u64, until: Option<u64>) -> RangeFuture<'_> {
        Box::pin(async move {
            let sending = self.send(from, until);
            (self.segments != Segments::Denied).then(|| Box::new(sending) as Box<dyn ByteStream>)
        })
    }
}

fn parallel_downloads(transfers_max: usize) -> Downloads {
    let disk = Arc::new(MemoryFs::new()) as Arc<dyn FileSystem>;
    let store = Store::open(&Settings::default(), disk, SystemTime::UNIX_EPOCH).unwrap();
    let limits = ParallelLimits {
        connections_max: 4,
        blob_bytes_min: 16 * MIB as u64,
    };
    Downloads::with_parallel(Arc::new(store), BufferPool::default(), transfers_max, limits)
}

/// Downloads the blob and checks what a reader got and what is stored. Returns the time it took.
async fn download(downloads: &Downloads, registry: &Limited) -> Duration {
    let began = Instant::now();
    let reader = leader(downloads, registry.digest()).start(registry.clone());
    let (received, end) = read_to_end(reader).await;
    let took = began.elapsed();
    end.unwrap();
    assert!(received == *registry.content);
    downloads.idle().await;
    assert!(held(downloads, registry.digest()).unwrap() == *registry.content);
    took
}

/// What one connection needs.
fn direct() -> Duration {
    PACE * u32::try_from(SIZE / CHUNK_BYTES).unwrap()
}

#[tokio::test(start_paused = true)]
async fn blob_is_fetched_over_several_connections() {
    let registry = Limited::new(Segments::Right);
    let took = download(&parallel_downloads(16), &registry).await;
    assert!(took < direct() * 6 / 10, "{took:?} of {:?}", direct());
    assert_eq!(registry.state.open_max.load(Ordering::SeqCst), 4);
    let sent = registry.state.sent.load(Ordering::SeqCst);
    assert!(sent <= SIZE + 2 * CHUNK_BYTES, "{} bytes twice", sent - SIZE);
    assert_eq!(
        registry
            .opened()
            .iter()
            .filter(|(_, until)| until.is_none())
            .count(),
        1
    );
}

#[tokio::test(start_paused = true)]
async fn shared_rate_limit_ends_further_connections() {
    let registry = Limited {
        is_limit_shared: true,
        ..Limited::new(Segments::Right)
    };
    let took = download(&parallel_downloads(16), &registry).await;
    assert!(took < direct() * 11 / 10, "{took:?} of {:?}", direct());
    assert_eq!(registry.state.open_max.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn denied_range_costs_one_request() {
    let registry = Limited::new(Segments::Denied);
    download(&parallel_downloads(16), &registry).await;
    assert_eq!(registry.segments_opened(), 1);
}

#[tokio::test(start_paused = true)]
async fn broken_segment_is_continued_by_the_first_stream() {
    let registry = Limited::new(Segments::BreakEarly);
    download(&parallel_downloads(16), &registry).await;
    let sent = registry.state.sent.load(Ordering::SeqCst);
    assert!(sent <= SIZE + 8 * CHUNK_BYTES, "{} bytes twice", sent - SIZE);
}

#[tokio::test(start_paused = true)]
async fn crawling_segment_is_taken_over() {
    let registry = Limited::new(Segments::Crawl);
    let took = download(&parallel_downloads(16), &registry).await;
    // At its rate, the first segment alone would take 16 s longer.
    assert!(
        took < direct() + Duration::from_secs(12),
        "{took:?} of {:?}",
        direct()
    );
}

#[tokio::test(start_paused = true)]
async fn wrong_segment_restarts_once_and_is_remembered() {
    let (downloads, registry) = (parallel_downloads(16), Limited::new(Segments::WrongBytes));
    let reader = leader(&downloads, registry.digest()).start(registry.clone());
    let (received, end) = read_to_end(reader).await;
    assert!(
        end.is_err() && received.len() < SIZE,
        "a wrong blob is never complete"
    );
    downloads.idle().await;
    assert!(held(&downloads, registry.digest()).unwrap() == *registry.content);
    let mut other = Limited::new(Segments::Right);
    other.content = Arc::new(registry.content.iter().rev().copied().collect());
    download(&downloads, &other).await;
    assert_eq!(other.segments_opened(), 0);
}

#[tokio::test(start_paused = true)]
async fn no_connection_is_added_without_a_spare_permit() {
    let registry = Limited::new(Segments::Right);
    download(&parallel_downloads(1), &registry).await;
    assert_eq!(registry.segments_opened(), 0);
}

#[tokio::test(start_paused = true)]
async fn helper_yields_its_permit_to_a_waiting_download() {
    let (downloads, registry) = (parallel_downloads(4), Limited::new(Segments::Right));
    let mut reader = leader(&downloads, registry.digest()).start(registry.clone());
    while registry.state.open.load(Ordering::SeqCst) < 3 {
        reader.next().await.unwrap().unwrap();
    }
    let mut other = Limited::new(Segments::Right);
    other.content = Arc::new(registry.content.iter().rev().copied().collect());
    let asked = Instant::now();
    let mut waiting = leader(&downloads, other.digest()).start(other.clone());
    waiting.first_bytes().await.unwrap();
    // A segment alone takes 0.3 s and more.
    assert!(
        asked.elapsed() < Duration::from_millis(150),
        "{:?}",
        asked.elapsed()
    );
    let (_, end) = read_to_end(reader).await;
    end.unwrap();
    downloads.idle().await;
    assert!(held(&downloads, registry.digest()).unwrap() == *registry.content);
}

#[tokio::test(start_paused = true)]
async fn interrupted_parallel_download_resumes_at_its_front() {
    let (downloads, registry) = (parallel_downloads(16), Limited::new(Segments::BreakEarly));
    registry.state.first_breaks.store(true, Ordering::SeqCst);
    let reader = leader(&downloads, registry.digest()).start(registry.clone());
    let (received, end) = read_to_end(reader).await;
    assert!(end.is_err() && received == registry.content[..received.len()]);
    downloads.idle().await;
    registry.state.first_breaks.store(false, Ordering::SeqCst);
    let before = registry.opened().len();
    download(&downloads, &registry).await;
    let resumed_at = usize::try_from(registry.opened()[before].0).unwrap();
    assert!(resumed_at > 0 && resumed_at <= received.len(), "{resumed_at}");
}
