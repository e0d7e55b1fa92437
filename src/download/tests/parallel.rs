//! One blob over several connections.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::time::{Instant, sleep};

use super::*;
use crate::store::fs::{Entry, FsFile};

pub(super) const SIZE: usize = 40 * MIB;
pub(super) const CHUNK_BYTES: usize = 128 * 1024;

/// 128 KiB in 10 ms: 13 MB/s.
const PACE: Duration = Duration::from_millis(10);

/// How the segments of a registry are served.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Segments {
    Right,
    /// Each response takes this long to begin.
    Late,
    /// No byte follows the head of a response.
    Silent,
    Denied,
    /// The first one is right, the others are denied.
    DeniedLater,
    WrongBytes,
    BreakEarly,
    /// The first one breaks before its last chunk, the others are right.
    FirstBreaks,
    Crawl,
}

/// A registry that limits the rate of each connection, or of all together.
#[derive(Clone)]
pub(super) struct Limited {
    pub(super) content: Arc<Vec<u8>>,
    segments: Segments,
    is_limit_shared: bool,
    /// Sends more than was requested.
    ignores_bounds: bool,
    pub(super) state: Arc<LimitedState>,
}

#[derive(Default)]
pub(super) struct LimitedState {
    opened: Mutex<Vec<(u64, Option<u64>)>>,
    /// The streams that were opened after the first one.
    resumed: Mutex<Vec<(u64, Option<u64>)>>,
    /// Since when no connection is open, and how long that was the case.
    idle: Mutex<(Option<Instant>, Duration)>,
    open: AtomicUsize,
    open_max: AtomicUsize,
    pub(super) sent: AtomicUsize,
    first_breaks: AtomicBool,
    /// Bytes that were sent and are still in memory, and their maximum.
    in_memory: AtomicUsize,
    in_memory_max: AtomicUsize,
}

/// A chunk that is counted as long as it is in memory.
struct Chunk(Vec<u8>, Arc<LimitedState>);

impl Chunk {
    fn new(bytes: Vec<u8>, state: &Arc<LimitedState>) -> Self {
        let in_memory = state.in_memory.fetch_add(bytes.len(), Ordering::SeqCst) + bytes.len();
        state.in_memory_max.fetch_max(in_memory, Ordering::SeqCst);
        Self(bytes, Arc::clone(state))
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.1.in_memory.fetch_sub(self.0.len(), Ordering::SeqCst);
    }
}

struct Sending {
    from: Limited,
    position: usize,
    end: usize,
    kind: Segments,
    sent: usize,
}

impl Limited {
    pub(super) fn new(segments: Segments) -> Self {
        Self {
            content: Arc::new(content(SIZE)),
            segments,
            is_limit_shared: false,
            ignores_bounds: false,
            state: Arc::default(),
        }
    }

    pub(super) fn digest(&self) -> Digest {
        digest(&self.content)
    }

    fn send(&self, from: u64, until: Option<u64>, kind: Segments) -> Sending {
        let state = &self.state;
        let mut idle = state.idle.lock();
        if let Some(since) = idle.0.take() {
            idle.1 += since.elapsed();
        }
        drop(idle);
        let open = state.open.fetch_add(1, Ordering::SeqCst) + 1;
        state.open_max.fetch_max(open, Ordering::SeqCst);
        Sending {
            from: self.clone(),
            position: usize::try_from(from).unwrap(),
            end: until.map_or(SIZE, |until| usize::try_from(until).unwrap()),
            kind,
            sent: 0,
        }
    }

    pub(super) fn opened(&self) -> Vec<(u64, Option<u64>)> {
        self.state.opened.lock().clone()
    }

    pub(super) fn segments_opened(&self) -> usize {
        self.opened().iter().filter(|(_, until)| until.is_some()).count()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.from.state.open.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.from.state.idle.lock().0 = Some(Instant::now());
        }
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
            if self.kind == Segments::Silent {
                std::future::pending::<()>().await;
            }
            let crawls = self.kind == Segments::Crawl && self.sent > MIB;
            sleep(PACE * u32::try_from(sharing).unwrap() * if crawls { 50 } else { 1 }).await;
            if self.kind == Segments::BreakEarly && self.sent > MIB
                || self.kind == Segments::FirstBreaks && self.position + CHUNK_BYTES >= self.end
                || matches!(self.kind, Segments::Right | Segments::Late)
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
            Some(Ok(Bytes::from_owner(Chunk::new(bytes, state))))
        })
    }
}

impl Source for Limited {
    async fn open(&mut self, from: u64, until: Option<u64>) -> Result<Stream, UpstreamResponse> {
        let is_first = self.opened().is_empty();
        self.state.opened.lock().push((from, None));
        if !is_first {
            self.state.resumed.lock().push((from, until));
        }
        let until = until.filter(|_| !self.ignores_bounds);
        Ok(Stream {
            start: from,
            total: Some(SIZE as u64),
            body: Box::new(self.send(from, until, Segments::Right)),
        })
    }

    fn segments(&self, total: u64) -> Option<Box<dyn RangeSource>> {
        assert_eq!(total, SIZE as u64);
        Some(Box::new(self.clone()))
    }
}

impl RangeSource for Limited {
    fn another(&self) -> Option<Box<dyn RangeSource>> {
        Some(Box::new(self.clone()))
    }

    fn open(&mut self, from: u64, until: Option<u64>) -> RangeFuture<'_> {
        Box::pin(async move {
            let is_first = self.segments_opened() == 0;
            self.state.opened.lock().push((from, until));
            let kind = match self.segments {
                Segments::FirstBreaks if !is_first => Segments::Right,
                Segments::DeniedLater if is_first => Segments::Right,
                Segments::DeniedLater => Segments::Denied,
                kind => kind,
            };
            let sending = self.send(from, until, kind);
            if self.segments == Segments::Late {
                sleep(Duration::from_millis(500)).await;
            }
            (kind != Segments::Denied).then(|| Box::new(sending) as Box<dyn ByteStream>)
        })
    }
}

pub(super) fn parallel_downloads(transfers_max: usize) -> Downloads {
    parallel_downloads_on(Arc::new(MemoryFs::new()), transfers_max)
}

fn parallel_downloads_on(disk: Arc<dyn FileSystem>, transfers_max: usize) -> Downloads {
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
pub(super) fn direct() -> Duration {
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
async fn stream_between_segments_is_bounded_and_not_delayed() {
    for ignores_bounds in [false, true] {
        let registry = Limited {
            ignores_bounds,
            ..Limited::new(Segments::FirstBreaks)
        };
        download(&parallel_downloads(16), &registry).await;
        let mut segments = registry.opened();
        segments.retain(|(_, until)| until.is_some());
        let (broken, next) = (segments[0], segments[1]);
        let resumed = registry.state.resumed.lock().clone();
        let (from, until) = resumed[0];
        assert!(from > broken.0 && from < next.0, "{resumed:?}");
        assert_eq!(until, Some(next.0), "{resumed:?}");
        let sent = registry.state.sent.load(Ordering::SeqCst);
        assert!(sent <= SIZE + 4 * CHUNK_BYTES, "{} bytes twice", sent - SIZE);
    }
}

#[tokio::test(start_paused = true)]
async fn stream_after_a_segment_is_opened_at_once() {
    let registry = Limited::new(Segments::BreakEarly);
    download(&parallel_downloads(16), &registry).await;
    assert_eq!(registry.state.resumed.lock().len(), 1);
    let idle = registry.state.idle.lock().1;
    assert!(idle < Duration::from_millis(20), "{idle:?}");
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
async fn many_transfers_at_once_get_no_further_connection() {
    let (downloads, registry) = (parallel_downloads(64), Limited::new(Segments::Right));
    let mut others = Vec::new();
    for _ in 0..11 {
        others.push(downloads.admit("docker.io", options().demand).await.unwrap());
    }
    let mut reader = leader(&downloads, registry.digest()).start(registry.clone());
    take(&mut reader, 10 * MIB).await;
    assert_eq!(registry.segments_opened(), 0);
    others.pop();
    let (_, end) = read_to_end(reader).await;
    end.unwrap();
    assert_eq!(registry.state.open_max.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn slow_responses_open_no_more_connections_than_allowed() {
    let registry = Limited::new(Segments::Late);
    download(&parallel_downloads(16), &registry).await;
    let open_max = registry.state.open_max.load(Ordering::SeqCst);
    assert!((2..=4).contains(&open_max), "{open_max}");
}

#[tokio::test(start_paused = true)]
async fn segment_without_a_byte_is_taken_over() {
    let registry = Limited::new(Segments::Silent);
    let took = download(&parallel_downloads(16), &registry).await;
    assert!(took < direct() * 11 / 10, "{took:?} of {:?}", direct());
}

#[tokio::test(start_paused = true)]
async fn upstream_that_denied_a_connection_is_spared_for_a_while() {
    let (downloads, registry) = (parallel_downloads(16), Limited::new(Segments::Denied));
    download(&downloads, &registry).await;
    let mut other = Limited::new(Segments::Right);
    other.content = Arc::new(registry.content.iter().rev().copied().collect());
    download(&downloads, &other).await;
    assert_eq!(other.segments_opened(), 0);
    tokio::time::advance(Duration::from_secs(601)).await;
    let mut third = Limited::new(Segments::Right);
    let (front, back) = registry.content.split_at(SIZE / 2);
    third.content = Arc::new([back, front].concat());
    download(&downloads, &third).await;
    assert!(third.segments_opened() > 1);
}

#[tokio::test(start_paused = true)]
async fn later_denied_segment_spares_no_upstream() {
    // Permits for one further connection.
    let (downloads, registry) = (parallel_downloads(2), Limited::new(Segments::DeniedLater));
    download(&downloads, &registry).await;
    let mut other = Limited::new(Segments::Right);
    other.content = Arc::new(registry.content.iter().rev().copied().collect());
    download(&downloads, &other).await;
    assert!(registry.segments_opened() > 1 && other.segments_opened() > 1);
}

/// A permit of another upstream, when it is granted.
async fn permit_of_another_upstream(downloads: &Downloads) -> Duration {
    permit_of("ghcr.io", downloads).await
}

async fn permit_of(upstream: &str, downloads: &Downloads) -> Duration {
    let asked = Instant::now();
    let _permit = downloads.admit(upstream, options().demand).await.unwrap();
    asked.elapsed()
}

#[tokio::test(start_paused = true)]
async fn no_helper_yields_to_an_upstream_at_its_own_limit() {
    let (downloads, registry) = (parallel_downloads(16), Limited::new(Segments::Right));
    downloads.resize_upstream("ghcr.io", 1);
    let _permit = downloads.admit("ghcr.io", options().demand).await.unwrap();
    let took = tokio::select! {
        biased;
        _ = permit_of_another_upstream(&downloads) => panic!("it is at its limit"),
        took = download(&downloads, &registry) => took,
    };
    assert!(took < direct() * 6 / 10, "{took:?} of {:?}", direct());
    assert_eq!(registry.state.open_max.load(Ordering::SeqCst), 4);
    let sent = registry.state.sent.load(Ordering::SeqCst);
    assert!(sent <= SIZE + 2 * CHUNK_BYTES, "{} bytes twice", sent - SIZE);
    let streams = registry.opened().len() - registry.segments_opened();
    assert_eq!(streams, 1, "no helper left a segment unfinished");
}

#[tokio::test(start_paused = true)]
async fn helper_yields_its_permit_to_its_own_upstream() {
    // Large blobs have three of four permits. The limit may be lowered when the connections are open.
    for (limit, connections, new_limit) in [(2, 2, 2), (4, 3, 4), (4, 3, 2)] {
        let (downloads, registry) = (parallel_downloads(16), Limited::new(Segments::Right));
        downloads.resize_upstream("docker.io", limit);
        let mut reader = leader(&downloads, registry.digest()).start(registry.clone());
        while registry.state.open.load(Ordering::SeqCst) < connections {
            reader.next().await.unwrap().unwrap();
        }
        downloads.resize_upstream("docker.io", new_limit);
        let reading = tokio::spawn(read_to_end(reader));
        let waited = permit_of("docker.io", &downloads).await;
        assert!(waited <= Duration::from_millis(150), "{new_limit}: {waited:?}");
        reading.await.unwrap().1.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn helper_yields_its_permit_to_another_upstream() {
    for segments in [Segments::Right, Segments::Silent] {
        let (downloads, registry) = (parallel_downloads(2), Limited::new(segments));
        let mut reader = leader(&downloads, registry.digest()).start(registry.clone());
        while registry.segments_opened() == 0 {
            reader.next().await.unwrap().unwrap();
        }
        let reading = tokio::spawn(read_to_end(reader));
        let waited = permit_of_another_upstream(&downloads).await;
        assert!(waited <= Duration::from_millis(600), "{waited:?}");
        reading.await.unwrap().1.unwrap();
    }
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

/// A disk that cannot read back what was written beyond 20 MiB, except from the page cache.
struct Unreadable(MemoryFs);

struct UnreadableFile(Arc<dyn FsFile>);

impl FileSystem for Unreadable {
    fn folder(&self) -> Option<&Path> {
        None
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        Ok(Arc::new(UnreadableFile(self.0.create(path)?)))
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.0.open(path)
    }
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.0.append(path, bytes)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.remove_dir_all(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.sync_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.0.list(path)
    }
    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.0.mode(path)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.0.free_bytes()
    }
}

impl FsFile for UnreadableFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        if offset > 20 * MIB as u64 {
            return Err(io::ErrorKind::Other.into());
        }
        self.0.read_at(into, offset)
    }
    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at_nowait(into, offset)
    }
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.0.reserve(bytes)
    }
    fn make_read_only(&self) -> io::Result<()> {
        self.0.make_read_only()
    }
}

#[tokio::test(start_paused = true)]
async fn disk_that_cannot_read_back_a_segment_repeats_no_byte() {
    let downloads = parallel_downloads_on(Arc::new(Unreadable(MemoryFs::new())), 16);
    let registry = Limited::new(Segments::Right);
    let reader = leader(&downloads, registry.digest()).start(registry.clone());
    let reader = reader.with_range_source(registry.clone());
    let (received, end) = read_to_end(reader).await;
    end.unwrap();
    assert!(received == *registry.content);
    assert!(registry.segments_opened() > 1);
}

#[tokio::test(start_paused = true)]
async fn further_connections_keep_to_the_memory_budget() {
    let (downloads, registry) = (parallel_downloads(16), Limited::new(Segments::Right));
    let budget = &downloads.shared.queued_bytes;
    let left = CHUNK_BYTES;
    let taken = budget.available_permits() - left;
    budget
        .try_acquire_many(u32::try_from(taken).unwrap())
        .unwrap()
        .forget();
    download(&downloads, &registry).await;
    assert!(registry.state.open_max.load(Ordering::SeqCst) >= 3);
    assert_eq!(budget.available_permits(), left, "all shares are given back");
    // Each of the four connections waits for its share with one chunk.
    let in_memory = registry.state.in_memory_max.load(Ordering::SeqCst);
    assert!(in_memory <= left + 4 * CHUNK_BYTES, "{in_memory}");
}

#[tokio::test(start_paused = true)]
async fn only_a_client_that_waits_for_the_blob_adds_connections() {
    let background = JoinOptions {
        demand: Demand::BACKGROUND,
        wants_complete: true,
    };
    let part = JoinOptions {
        wants_complete: false,
        ..options()
    };
    for options in [background, part] {
        let (downloads, registry) = (parallel_downloads(16), Limited::new(Segments::Right));
        let Joined::Leader(leader) = join_as(&downloads, registry.digest(), options) else {
            panic!("nobody leads");
        };
        let (received, end) = read_to_end(leader.start(registry.clone())).await;
        end.unwrap();
        assert!(received == *registry.content);
        assert_eq!(registry.segments_opened(), 0);
    }
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
