//! Disk failures in the middle of a download.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::ahead::Parts;
use super::*;
use crate::store::fs::{Entry, FsFile};

/// A file system that accepts this many bytes per file. It reserves space for another file only if a partial
/// download exists.
struct Small {
    disk: Arc<MemoryFs>,
    bytes_max: u64,
    /// Why no download can create a file.
    uncreatable: Option<Errno>,
}

struct SmallFile {
    disk: Arc<MemoryFs>,
    file: Arc<dyn FsFile>,
    bytes_max: u64,
}

impl FileSystem for Small {
    fn folder(&self) -> Option<&Path> {
        None
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        if let Some(errno) = self.uncreatable.filter(|_| path.ends_with("data")) {
            return Err(errno.into());
        }
        Ok(Arc::new(SmallFile {
            disk: Arc::clone(&self.disk),
            file: self.disk.create(path)?,
            bytes_max: self.bytes_max,
        }))
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.disk.open(path)
    }
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.disk.append(path, bytes)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_dir_all(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.sync_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.disk.list(path)
    }
    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.disk.mode(path)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }
}

impl FsFile for SmallFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if offset + bytes.len() as u64 > self.bytes_max {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_at(bytes, offset)
    }
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(into, offset)
    }
    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at_nowait(into, offset)
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn reserve(&self, bytes: u64) -> io::Result<()> {
        let ingests = self.disk.list(Path::new("ingest"))?;
        if ingests.iter().any(|entry| entry.name.starts_with("sha256-")) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.reserve(bytes)
    }
    fn make_read_only(&self) -> io::Result<()> {
        self.file.make_read_only()
    }
}

fn downloads_on_a_small_disk(bytes_max: usize) -> Downloads {
    downloads_on(Small {
        disk: Arc::new(MemoryFs::new()),
        bytes_max: bytes_max as u64,
        uncreatable: None,
    })
}

fn downloads_on(disk: Small) -> Downloads {
    let disk = Arc::new(disk);
    let store = Store::open(&Settings::default(), disk, SystemTime::UNIX_EPOCH).unwrap();
    Downloads::new(Arc::new(store), BufferPool::default(), 16)
}

#[tokio::test]
async fn full_disk_evicts_partial_downloads_first() {
    let (downloads, left, blob) = (downloads_on_a_small_disk(MIB), content(1000), content(MIB / 2));
    let store = &downloads.shared.store;
    let ingest = store.begin(&digest(&left), None).unwrap();
    ingest.file().write_at(&left[..500], 0).unwrap();
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(&left[..500]);
    ingest.suspend(500, &hasher);
    let script = Script::default();
    script.ending(0, Some(blob.len()), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    assert_eq!(read_all(reader).await, blob);
    downloads.idle().await;
    assert_eq!(held(&downloads, digest(&blob)).unwrap(), blob);
    assert!(store.take_partial(&digest(&left)).is_none());
}

/// A download on a disk that accepts `room` bytes: its leader, and a follower that has read nothing yet.
fn disk_failed(blob: &[u8], room: usize, parts: &Parts) -> (Downloads, Reader, Reader) {
    let (downloads, script) = (downloads_on_a_small_disk(room), Script::default());
    script.ending(0, Some(blob.len()), blob);
    let leader = leader(&downloads, digest(blob));
    let waiting = follower(&downloads, digest(blob)).with_range_source(parts.clone());
    let first = leader.start(script).with_range_source(parts.clone());
    (downloads, first, waiting)
}

#[tokio::test]
async fn disk_failure_readers_get_a_verified_remainder() {
    // In the middle, within the withheld end, and after the first bytes.
    for room in [600_000, 1_030_000, 10_000] {
        let (blob, parts) = (content(MIB), Parts::default());
        for _ in 0..2 {
            send(&parts.part(), &blob[room..]);
        }
        let (downloads, first, waiting) = disk_failed(&blob, room, &parts);
        assert_eq!(read_all(first).await, blob, "{room}");
        assert_eq!(read_all(waiting).await, blob, "{room}");
        assert_eq!(parts.offsets(), [(room as u64, MIB as u64); 2]);
        assert_eq!((downloads.count(), held(&downloads, digest(&blob))), (0, None));
    }
}

#[tokio::test]
async fn corrupt_remainder_never_completes_a_blob() {
    let (blob, parts) = (content(MIB), Parts::default());
    let mut wrong = blob.clone();
    wrong[MIB - 1] ^= 1;
    send(&parts.part(), &wrong[600_000..]);
    let (_downloads, first, _) = disk_failed(&blob, 600_000, &parts);
    let (bytes, end) = read_to_end(first).await;
    assert!(matches!(
        *end.unwrap_err(),
        DownloadError::Interrupted(UpstreamFailure::DigestMismatch)
    ));
    assert!(bytes.len() <= MIB - usize::try_from(WITHHELD_BYTES).unwrap());
}

#[tokio::test]
async fn short_or_denied_remainder_fails_the_reader() {
    for answered in [true, false] {
        let (blob, parts) = (content(MIB), Parts::default());
        if answered {
            send(&parts.part(), &blob[600_000..700_000]);
        }
        let (_downloads, first, _) = disk_failed(&blob, 600_000, &parts);
        let failed = failure(first).await;
        assert!(
            matches!(
                *failed,
                DownloadError::Interrupted(_) | DownloadError::DiskFailed(_)
            ),
            "{failed}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn remainder_without_a_permit_fails_after_a_while() {
    let (blob, parts) = (content(MIB), Parts::default());
    let (downloads, first, _) = disk_failed(&blob, 600_000, &parts);
    let all = u32::try_from(AHEAD_RANGES_MAX).unwrap();
    let _taken = downloads.shared.ahead_permits.acquire_many(all).await.unwrap();
    let failed = failure(first).await;
    assert!(matches!(*failed, DownloadError::DiskFailed(_)), "{failed}");
    assert_eq!(parts.offsets(), []);
}

#[tokio::test]
async fn range_is_read_from_the_file_then_from_upstream() {
    let (blob, parts) = (content(MIB), Parts::default());
    send(&parts.part(), &blob[600_000..700_000]);
    let (downloads, first, waiting) = disk_failed(&blob, 600_000, &parts);
    assert_eq!(
        read_all(waiting.within(500_000, 700_000)).await,
        blob[500_000..700_000]
    );
    assert_eq!(read_all(first.within(7, 77)).await, blob[7..77]);
    assert_eq!(parts.offsets(), [(600_000, 700_000)]);
    drop(downloads);
}

#[tokio::test]
async fn blob_of_unknown_size_without_space_streams_unstored() {
    let limits = crate::store::Limits {
        bytes_max: 1_000_000,
        free_bytes_min: 0,
    };
    let settings = Settings {
        limits,
        ..Settings::default()
    };
    let disk = Arc::new(MemoryFs::new());
    let store = Store::open(
        &settings,
        Arc::clone(&disk) as Arc<dyn FileSystem>,
        SystemTime::UNIX_EPOCH,
    )
    .unwrap();
    while !store.usage().is_complete {
        tokio::task::yield_now().await;
    }
    let downloads = Downloads::new(Arc::new(store), BufferPool::default(), 16);
    let (bytes, script) = (content(3 * MIB), Script::default());
    script.ending(0, None, &bytes);
    let reader = leader(&downloads, digest(&bytes)).start(script.clone());
    let parts = Parts::default();
    send(&parts.part(), &bytes[1_000_000..]);
    let reader = reader.with_range_source(parts);
    assert_eq!(read_all(reader).await, bytes);
    assert_eq!(held(&downloads, digest(&bytes)), None);
    assert!(disk.list(Path::new("ingest")).unwrap().is_empty());
}

/// Readers whose response began while the transfer was queued, so they cannot join again.
#[tokio::test]
async fn t08_denied_leader_does_not_fail_followers() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    script.no_response(UpstreamFailure::ConnectionRefused);
    let parts = Parts::default();
    send(&parts.part(), &blob);
    let leader = leader(&downloads, digest(&blob));
    let waiting = follower(&downloads, digest(&blob)).with_range_source(parts.clone());
    let first = leader.start(script).with_range_source(parts.clone());
    assert!(matches!(*failure(first).await, DownloadError::NotStarted(_)));
    assert_eq!(read_all(waiting).await, blob);
    assert_eq!(parts.offsets(), [(0, u64::MAX)]);
}

#[tokio::test]
async fn t08_full_disk_does_not_fail_queued_readers() {
    let downloads = downloads_within(1_000_000);
    let (blob, script, parts) = (content(3 * MIB), Script::default(), Parts::default());
    script.ending(0, Some(blob.len()), &blob);
    send(&parts.part(), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    let mut reader = reader.with_range_source(parts.clone());
    let failed = reader.info().await.err().unwrap();
    assert!(matches!(*failed, DownloadError::Unstorable(_)), "{failed}");
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(parts.offsets(), [(0, u64::MAX)]);
}

/// Downloads into a store of this size.
fn downloads_within(bytes_max: u64) -> Downloads {
    let limits = crate::store::Limits {
        bytes_max,
        free_bytes_min: 0,
    };
    let settings = Settings {
        limits,
        ..Settings::default()
    };
    let disk = Arc::new(MemoryFs::new()) as Arc<dyn FileSystem>;
    let store = Store::open(&settings, disk, SystemTime::UNIX_EPOCH).unwrap();
    // Before the usage is counted, reservations succeed.
    while !store.usage().is_complete {
        std::thread::yield_now();
    }
    Downloads::new(Arc::new(store), BufferPool::default(), 16)
}

/// A body of one chunk, and whether its end was read.
struct Watched(Option<Bytes>, Arc<AtomicBool>);

impl ByteStream for Watched {
    fn chunk(&mut self) -> ChunkFuture<'_> {
        let chunk = self.0.take();
        self.1.store(chunk.is_none(), Ordering::Relaxed);
        Box::pin(std::future::ready(chunk.map(Ok)))
    }
}

#[tokio::test]
async fn small_response_is_read_to_its_end_without_a_descriptor() {
    for (errno, size, is_elsewhere, is_read) in [
        (Errno::MFILE, MIB, false, true),
        (Errno::MFILE, MIB + 1, false, false),
        (Errno::MFILE, MIB, true, false),
        (Errno::NOSPC, MIB, false, false),
        (Errno::ROFS, MIB, false, false),
    ] {
        let downloads = downloads_on(Small {
            disk: Arc::new(MemoryFs::new()),
            bytes_max: u64::MAX,
            uncreatable: Some(errno),
        });
        let (blob, is_at_end) = (content(size), Arc::default());
        let script = Script {
            is_elsewhere,
            ..Script::default()
        };
        script.answers.lock().push_back(Ok(Stream {
            start: 0,
            total: Some(size as u64),
            body: Box::new(Watched(Some(blob.clone().into()), Arc::clone(&is_at_end))),
        }));
        let mut reader = leader(&downloads, digest(&blob)).start(script);
        let failed = reader.info().await.err().unwrap();
        assert!(matches!(*failed, DownloadError::Unstorable(_)), "{failed}");
        assert_eq!(
            is_at_end.load(Ordering::Relaxed),
            is_read,
            "{errno:?} {size} {is_elsewhere}"
        );
    }
}
