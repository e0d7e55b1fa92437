//! Partial downloads and their resumption.

use std::path::{Path, PathBuf};

use super::*;

const WHOLE: usize = 5 * MIB / 2;

/// A transfer that fails finally after `length` bytes.
async fn interrupted(downloads: &Downloads, blob: &[u8], length: usize) {
    interrupted_by(downloads, digest(blob), &blob[..length], blob.len()).await;
}

async fn interrupted_by(downloads: &Downloads, digest: Digest, bytes: &[u8], total: usize) {
    let script = Script::default();
    script.breaking(0, total, bytes);
    for _ in 0..10 {
        script.answer(UpstreamResponse {
            kind: ResponseKind::NotFound,
            ..UpstreamResponse::unavailable(UpstreamFailure::Malformed)
        });
    }
    let reader = leader(downloads, digest).start(script);
    let failed = stepped(failure(reader)).await;
    assert!(matches!(*failed, DownloadError::Interrupted(_)), "{failed}");
}

fn left(disk: &MemoryFs) -> Vec<PathBuf> {
    let ingest = Path::new("ingest");
    let folders = disk.list(ingest).unwrap().into_iter();
    folders.map(|entry| ingest.join(entry.name)).collect()
}

/// Flips the byte at `offset` of the partial download.
fn damage(disk: &MemoryFs, offset: u64) {
    let file = disk.open(&left(disk)[0].join("data")).unwrap();
    let mut byte = [0];
    file.read_at(&mut byte, offset).unwrap();
    file.write_at(&[byte[0] ^ 1], offset).unwrap();
}

#[tokio::test(start_paused = true)]
async fn partial_is_resumed_in_this_and_the_next_process() {
    for restarted in [false, true] {
        let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
        let mut downloads = downloads_on(&disk);
        interrupted(&downloads, &blob, 2 * MIB + 5).await;
        if restarted {
            downloads = downloads_on(&disk);
        }
        let script = Script::default();
        script.ending(2 * MIB + 5, Some(WHOLE), &blob[2 * MIB + 5..]);
        let reader = leader(&downloads, digest(&blob)).start(script.clone());
        assert_eq!(read_all(reader).await, blob);
        assert_eq!(script.offsets(), [2 * MIB as u64 + 5]);
        downloads.idle().await;
        assert_eq!(held(&downloads, digest(&blob)).unwrap(), blob);
        assert_eq!(left(&disk), [] as [PathBuf; 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn resumption_is_requested_when_it_may_read_the_disk() {
    let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let downloads = downloads_on(&disk);
    interrupted(&downloads, &blob, 2 * MIB).await;
    let others = Arc::clone(&downloads.shared.resumptions);
    let others = others.acquire_many(6).await.unwrap();
    let script = Script::default();
    script.ending(2 * MIB, Some(WHOLE), &blob[2 * MIB..]);
    let reading = tokio::spawn(read_all(leader(&downloads, digest(&blob)).start(script.clone())));
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(script.offsets(), [] as [u64; 0]);
    drop(others);
    assert_eq!(reading.await.unwrap(), blob);
}

#[tokio::test(start_paused = true)]
async fn after_a_kill_it_resumes_from_the_last_checksum() {
    let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let (killed, script) = (downloads_on(&disk), Script::default());
    let wire = script.stream(0, Some(WHOLE));
    let mut reader = leader(&killed, digest(&blob)).start(script);
    send(&wire, &blob[..2 * MIB + 100_000]);
    take(&mut reader, 2 * MIB + 100_000).await;
    // The old process writes nothing more: the next one finds the folder as it is now.
    let (downloads, script) = (downloads_on(&disk), Script::default());
    let rest = script.stream(2 * MIB, Some(WHOLE));
    let mut reader = leader(&downloads, digest(&blob)).start(script.clone());
    script.was_opened(1).await;
    let mark = usize::try_from(script.offsets()[0]).unwrap();
    assert!((2 * MIB..2 * MIB + 100_000).contains(&mark), "{mark}");
    assert_eq!(
        take(&mut reader, mark).await,
        blob[..mark],
        "before any byte from the upstream"
    );
    send(&rest, &blob[2 * MIB..]);
    drop(rest);
    assert_eq!(read_all(reader).await, blob[mark..]);
}

#[tokio::test(start_paused = true)]
async fn denied_client_gets_no_partial_bytes_and_the_next_does() {
    let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let downloads = downloads_on(&disk);
    interrupted(&downloads, &blob, 2 * MIB).await;
    let script = Script::default();
    script.answer(UpstreamResponse {
        kind: ResponseKind::Denied,
        ..UpstreamResponse::unavailable(UpstreamFailure::Malformed)
    });
    let reader = leader(&downloads, digest(&blob)).start(script);
    let (bytes, end) = read_to_end(reader).await;
    assert_eq!(bytes, b"");
    assert!(
        matches!(&*end.unwrap_err(), DownloadError::NotStarted(answer) if answer.kind == ResponseKind::Denied)
    );
    let script = Script::default();
    script.ending(2 * MIB, Some(WHOLE), &blob[2 * MIB..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(script.offsets(), [2 * MIB as u64]);
}

#[tokio::test(start_paused = true)]
async fn partial_corrupted_on_disk_is_refetched_and_not_served() {
    for damaged in [0, MIB - 1, MIB + 10_000] {
        let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
        interrupted(&downloads_on(&disk), &blob, 2 * MIB).await;
        damage(&disk, damaged as u64);
        let (downloads, script) = (downloads_on(&disk), Script::default());
        script.ending(2 * MIB, Some(WHOLE), &blob[2 * MIB..]);
        script.ending(0, Some(WHOLE), &blob);
        let reader = leader(&downloads, digest(&blob)).start(script.clone());
        assert_eq!(stepped(read_all(reader)).await, blob);
        let offsets = script.offsets();
        assert_eq!((offsets.len(), offsets[0]), (2, 2 * MIB as u64));
        assert!(offsets[1] <= damaged as u64, "{offsets:?}");
        assert_eq!(offsets[1] > 0, damaged > MIB, "{offsets:?}: what agrees is kept");
    }
}

#[tokio::test(start_paused = true)]
async fn upstream_without_ranges_is_read_past_the_partial() {
    let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let downloads = downloads_on(&disk);
    interrupted(&downloads, &blob, 2 * MIB).await;
    let script = Script::default();
    script.ending(0, Some(WHOLE), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(script.offsets(), [2 * MIB as u64]);
}

#[tokio::test(start_paused = true)]
async fn upstream_that_rejects_ranges_gets_a_full_request() {
    let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let downloads = downloads_on(&disk);
    interrupted(&downloads, &blob, 2 * MIB).await;
    let script = Script::default();
    script.no_response(UpstreamFailure::Status(501));
    script.ending(0, Some(WHOLE), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(script.offsets(), [2 * MIB as u64, 0]);
}

#[tokio::test(start_paused = true)]
async fn partial_of_another_size_is_discarded() {
    let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let downloads = downloads_on(&disk);
    interrupted_by(&downloads, digest(&blob), &blob[..2 * MIB], WHOLE + 1).await;
    let script = Script::default();
    script.ending(2 * MIB, Some(WHOLE), &blob[2 * MIB..]);
    script.ending(0, Some(WHOLE), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(script.offsets(), [2 * MIB as u64, 0]);
}

#[tokio::test(start_paused = true)]
async fn digest_mismatch_after_resume_restarts_once() {
    let (disk, blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let downloads = downloads_on(&disk);
    let mut wrong = blob.clone();
    wrong[7] ^= 1;
    interrupted_by(&downloads, digest(&blob), &wrong[..2 * MIB], WHOLE).await;
    let script = Script::default();
    let rest = script.stream(2 * MIB, Some(WHOLE));
    script.ending(0, Some(WHOLE), &blob);
    let leader = leader(&downloads, digest(&blob));
    let waiting = follower(&downloads, digest(&blob));
    let mut first = leader.start(script.clone());
    take(&mut first, 1).await;
    send(&rest, &blob[2 * MIB..]);
    drop(rest);
    begun_again(&waiting).await;
    assert_eq!(read_all(waiting).await, blob);
    assert!(
        read_to_end(first).await.1.is_err(),
        "it had some of the wrong bytes"
    );
    downloads.idle().await;
    assert_eq!(held(&downloads, digest(&blob)).unwrap(), blob);
    assert_eq!(left(&disk), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn digest_mismatch_leaves_no_partial() {
    let (disk, mut blob) = (Arc::new(MemoryFs::new()), content(WHOLE));
    let (downloads, script, wanted) = (downloads_on(&disk), Script::default(), digest(&blob));
    blob[7] ^= 1;
    script.ending(0, Some(WHOLE), &blob);
    let reader = leader(&downloads, wanted).start(script);
    failure(reader).await;
    downloads.idle().await;
    assert_eq!(left(&disk), [] as [PathBuf; 0]);
}
