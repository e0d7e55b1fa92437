#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::convert::Infallible;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::*;
use crate::config::Config;
use crate::server::Body;
use crate::server::acceptor::{ServeResult, http1};
use crate::server::idle_timeout::{IdlePause, IdleTimeoutStream};
use crate::store::fs::{DirectoryFs, FileSystem};
use crate::telemetry::Telemetry;

/// Larger than the buffer of a socket, and no multiple of a page.
const BLOB_BYTES: usize = 3 * 1024 * 1024 + 17;

fn content() -> Vec<u8> {
    (0_u8..251).cycle().take(BLOB_BYTES).collect()
}

/// The blob on a real disk, and its folder.
fn blob() -> (tempfile::TempDir, Arc<dyn FsFile>) {
    let folder = tempfile::tempdir().unwrap();
    let file = DirectoryFs::open(folder.path())
        .unwrap()
        .create(Path::new("blob"))
        .unwrap();
    file.write_at(&content(), 0).unwrap();
    (folder, file)
}

/// A connection whose requests `GET /<start>-<end>` get that range of `file`.
fn serve(file: Arc<dyn FsFile>) -> (UnixStream, JoinHandle<ServeResult>) {
    let (client, server) = UnixStream::pair().unwrap();
    let queue = SendfileQueue::default();
    let stream = SendfileStream::new(server.into(), queue.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let (start, end) = request.uri().path()[1..].split_once('-').unwrap();
        let (start, end) = (start.parse().unwrap(), end.parse().unwrap());
        let sender = FileSender::new(Arc::clone(&file), start, end, queue.clone());
        let body = Body::sendfile(sender, Telemetry::default());
        async move { Ok::<_, Infallible>(Response::new(body)) }
    });
    // As in the acceptor, because its settings decide whether hyper copies a placeholder.
    let limits = Config::read("", Path::new("ifnewer.toml")).unwrap().limits;
    let stream = IdleTimeoutStream::new(stream, limits.idle_timeout, IdlePause::default());
    let serving = http1(&limits).serve_connection(TokioIo::new(stream), service);
    let connection = tokio::spawn(async move { Ok(serving.with_upgrades().await?) });
    (client, connection)
}

/// Reads the heads and bodies of responses with these lengths.
async fn responses(client: &mut UnixStream, lengths: &[usize]) -> Vec<Vec<u8>> {
    let mut bodies = Vec::new();
    for length in lengths {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        assert!(head.contains(&format!("content-length: {length}\r\n")), "{head}");
        let mut body = vec![0; *length];
        client.read_exact(&mut body).await.unwrap();
        bodies.push(body);
    }
    bodies
}

#[tokio::test]
async fn pipelined_ranges_are_sent_in_order() {
    let (_folder, file) = blob();
    let (mut client, _serving) = serve(file);
    let ranges = [
        (0, BLOB_BYTES),
        (5, 6),
        (1_000_000, 2_000_000),
        (0, 65_536),
        (17, BLOB_BYTES),
    ];
    let requests = ranges.map(|(start, end)| format!("GET /{start}-{end} HTTP/1.1\r\nhost: a\r\n\r\n"));
    let requests = requests.concat();
    client.write_all(requests.as_bytes()).await.unwrap();
    let bodies = responses(&mut client, &ranges.map(|(start, end)| end - start)).await;
    for ((start, end), body) in ranges.iter().zip(bodies) {
        assert!(body == content()[*start..*end], "{start}-{end}");
    }
}

#[tokio::test]
async fn truncated_file_ends_the_connection() {
    let (_folder, file) = blob();
    let (mut client, serving) = serve(file);
    let end = BLOB_BYTES + 100;
    client
        .write_all(format!("GET /0-{end} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut received = Vec::new();
    client.read_to_end(&mut received).await.unwrap();
    let head = received.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
    let sent = &received[head..];
    assert!(sent.len() <= BLOB_BYTES && sent == &content()[..sent.len()]);
    assert!(serving.await.unwrap().is_err());
}

#[tokio::test]
async fn file_truncated_after_the_check_fails_the_stream() {
    let (_folder, file) = blob();
    let (client, server) = UnixStream::pair().unwrap();
    let queue = SendfileQueue::default();
    let mut stream = SendfileStream::new(server.into(), queue.clone());
    let placeholder = queue.push(FileRange {
        file,
        offset: BLOB_BYTES as u64 - 10,
        length: 20,
    });
    assert_eq!(stream.write(&placeholder).await.unwrap(), 10);
    let error = stream.write(&placeholder[10..]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    drop(client);
}

#[tokio::test]
async fn placeholder_without_range_is_not_sent() {
    let (client, server) = UnixStream::pair().unwrap();
    let mut stream = SendfileStream::new(server.into(), SendfileQueue::default());
    let zeros = &PLACEHOLDER[..10];
    assert!(stream.write(zeros).await.is_err());
    assert!(stream.write_vectored(&[IoSlice::new(zeros)]).await.is_err());
    assert_eq!(
        stream
            .write_vectored(&[IoSlice::new(b"head"), IoSlice::new(zeros)])
            .await
            .unwrap(),
        4
    );
    drop(stream);
    let mut received = Vec::new();
    let mut client = client;
    client.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"head");
}

/// A file that is not in the page cache until it was read.
struct Cold {
    file: Arc<dyn FsFile>,
    loads: AtomicUsize,
    is_evicted: AtomicBool,
}

impl Cold {
    fn new(file: Arc<dyn FsFile>) -> Arc<Self> {
        Arc::new(Self {
            file,
            loads: AtomicUsize::new(0),
            is_evicted: AtomicBool::new(true),
        })
    }
}

impl FsFile for Cold {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        self.is_evicted.store(false, Ordering::SeqCst);
        self.file.read_at(into, offset)
    }
    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.is_evicted.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.file.read_at_nowait(into, offset)
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.file.reserve(bytes)
    }
    fn make_read_only(&self) -> io::Result<()> {
        self.file.make_read_only()
    }
    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        assert!(
            !self.is_evicted.load(Ordering::SeqCst),
            "it would wait for the disk"
        );
        self.file.send_to(socket, offset, length)
    }
}

#[tokio::test]
async fn page_cache_miss_is_read_before_it_is_sent() {
    let (_folder, file) = blob();
    let cold = Cold::new(file);
    let (mut client, _serving) = serve(Arc::clone(&cold) as _);
    client
        .write_all(format!("GET /0-{BLOB_BYTES} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let bodies = responses(&mut client, &[BLOB_BYTES]).await;
    assert!(bodies[0] == content());
    assert!(cold.loads.load(Ordering::SeqCst) > 0);
}

#[tokio::test(start_paused = true)]
async fn range_that_waited_for_a_slow_client_is_read_again() {
    let (_folder, file) = blob();
    let cold = Cold::new(file);
    cold.is_evicted.store(false, Ordering::SeqCst);
    let (mut client, server) = UnixStream::pair().unwrap();
    let queue = SendfileQueue::default();
    let mut stream = SendfileStream::new(server.into(), queue.clone());
    let placeholder = queue.push(FileRange {
        file: Arc::clone(&cold) as _,
        offset: 0,
        length: RANGE_BYTES_MAX,
    });
    // The client reads nothing, so the socket is full.
    let mut sent = 0;
    while let Poll::Ready(done) = poll_once(stream.write(&placeholder[sent..])).await {
        sent += done.unwrap();
    }
    assert!(sent < RANGE_BYTES_MAX);
    cold.is_evicted.store(true, Ordering::SeqCst);
    tokio::time::advance(CACHED_PERIOD * 2).await;
    let reading = tokio::spawn(async move {
        let mut received = vec![0; RANGE_BYTES_MAX];
        client.read_exact(&mut received).await.unwrap();
        received
    });
    while sent < RANGE_BYTES_MAX {
        sent += stream.write(&placeholder[sent..]).await.unwrap();
    }
    assert!(reading.await.unwrap() == content()[..RANGE_BYTES_MAX]);
    assert!(cold.loads.load(Ordering::SeqCst) > 0);
}

async fn poll_once<T>(work: impl Future<Output = T>) -> Poll<T> {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|context| Poll::Ready(work.as_mut().poll(context))).await
}

#[tokio::test]
async fn file_without_sendfile_is_copied() {
    let file = crate::store::fs::MemoryFs::new()
        .create(Path::new("blob"))
        .unwrap();
    file.write_at(&content(), 0).unwrap();
    let (mut client, _serving) = serve(file);
    client
        .write_all(format!("GET /3-{BLOB_BYTES} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let bodies = responses(&mut client, &[BLOB_BYTES - 3]).await;
    assert!(bodies[0] == content()[3..]);
}
