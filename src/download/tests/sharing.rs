//! Sharing of one transfer by early, late and later readers, verification before the end is released, and
//! failures.

use super::*;

#[tokio::test]
async fn one_transfer_serves_early_late_and_later_readers() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader(&downloads, digest(&blob));
    let before = follower(&downloads, digest(&blob));
    let mut first = leader.start(script.clone());
    send(&wire, &blob[..MIB / 2]);
    let beginning = take(&mut first, MIB / 2).await;
    let during = follower(&downloads, digest(&blob));
    assert_eq!(downloads.count(), 1);
    send(&wire, &blob[MIB / 2..]);
    drop(wire);
    assert_eq!([beginning, read_all(first).await].concat(), blob);
    assert_eq!(read_all(before).await, blob);
    assert_eq!(read_all(during).await, blob);
    downloads.idle().await;
    assert!(matches!(join(&downloads, digest(&blob)), Joined::Cached(held) if held.size == MIB as u64));
    assert_eq!((script.offsets(), downloads.count()), (vec![0], 0));
}

/// The ranges of the file that a reader gets, and its end.
async fn read_ranges(mut reader: Reader) -> (Vec<u8>, Result<(), Arc<DownloadError>>) {
    let mut received = Vec::new();
    loop {
        match reader.next_piece(100, 300_000).await {
            Some(Ok(Piece::Range(range))) => {
                assert!(range.length <= 300_000 && range.offset == received.len() as u64);
                let mut bytes = vec![0; range.length];
                assert_eq!(
                    range.file.read_at(&mut bytes, range.offset).unwrap(),
                    range.length
                );
                received.extend(bytes);
            }
            Some(Ok(Piece::Bytes(_))) => panic!("the file has them"),
            Some(Err(failure)) => return (received, Err(failure)),
            None => return (received, Ok(())),
        }
    }
}

#[tokio::test]
async fn file_ranges_follow_the_fill() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let reader = leader(&downloads, digest(&blob)).start(script);
    let reading = tokio::spawn(read_ranges(reader));
    send(&wire, &blob[..MIB / 2]);
    tokio::task::yield_now().await;
    send(&wire, &blob[MIB / 2..]);
    drop(wire);
    let (received, end) = reading.await.unwrap();
    assert!(end.is_ok() && received == blob);
}

#[tokio::test]
async fn file_ranges_withhold_the_last_bytes_of_a_corrupt_blob() {
    let (downloads, script, mut blob) = (downloads(), Script::default(), content(MIB));
    let named = digest(&blob);
    blob[MIB - 1] ^= 1;
    script.ending(0, Some(MIB), &blob);
    let (received, end) = read_ranges(leader(&downloads, named).start(script)).await;
    assert!(end.is_err() && received.len() < MIB);
}

#[tokio::test]
async fn miss_after_a_finished_download_finds_it_cached() {
    let (downloads, blob) = (downloads(), content(1000));
    assert_eq!(held(&downloads, digest(&blob)), None, "the first lookup");
    let ingest = downloads.shared.store.begin(&digest(&blob), None).unwrap();
    ingest.file().write_at(&blob, 0).unwrap();
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(&blob);
    ingest
        .commit(Verified::check(hasher, &digest(&blob), 1000, None).unwrap())
        .unwrap();
    assert!(matches!(join(&downloads, digest(&blob)), Joined::Cached(_)));
    assert_eq!(downloads.count(), 0);
}

#[tokio::test]
async fn dropped_leader_fails_followers_and_the_next_leads() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let leaving = leader(&downloads, digest(&blob));
    let waiting = follower(&downloads, digest(&blob));
    drop(leaving);
    assert!(matches!(*failure(waiting).await, DownloadError::Abandoned));
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    assert_eq!(read_all(reader).await, blob);
}

#[tokio::test]
async fn failed_download_leaves_the_map_before_readers_know() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.no_response(UpstreamFailure::ConnectionRefused);
    let leader = leader(&downloads, digest(&blob));
    let mut waiting = follower(&downloads, digest(&blob));
    let _first = leader.start(script);
    // Checked inside the notification itself: nothing runs between the two.
    let count = downloads.clone();
    let seen = waiting
        .progress
        .wait_for(|progress| matches!(progress, Progress::Failed(_)) && count.count() == 0)
        .await;
    assert!(
        matches!(&*seen.unwrap(), Progress::Failed(failure) if matches!(**failure, DownloadError::NotStarted(_)))
    );
    assert!(matches!(join(&downloads, digest(&blob)), Joined::Leader(_)));
}

#[tokio::test]
async fn map_entry_is_removed_before_readers_are_notified() {
    let (downloads, blob) = (downloads(), content(1000));
    let leader = leader(&downloads, digest(&blob));
    let reader = follower(&downloads, digest(&blob));
    // While the map is locked the entry cannot be removed, so no reader may be notified.
    let running = downloads.shared.running.lock();
    let leaving = std::thread::spawn(move || {
        leader
            .guard
            .fail(DownloadError::Interrupted(UpstreamFailure::ConnectionReset));
    });
    for _ in 0..1000 {
        std::thread::yield_now();
        assert!(matches!(&*reader.progress.borrow(), Progress::Opening));
    }
    drop(running);
    leaving.join().unwrap();
    assert_eq!(downloads.count(), 0);
    assert!(matches!(&*reader.progress.borrow(), Progress::Failed(_)));
}

#[tokio::test]
async fn denial_carries_the_upstream_response() {
    let (downloads, script) = (downloads(), Script::default());
    script.no_response(UpstreamFailure::RateLimited);
    let reader = leader(&downloads, digest(b"x")).start(script.clone());
    match &*failure(reader).await {
        DownloadError::NotStarted(answer) => assert_eq!(
            answer.kind,
            ResponseKind::Unavailable(UpstreamFailure::RateLimited)
        ),
        other => panic!("{other}"),
    }
    assert_eq!(
        script.offsets(),
        [0],
        "a denial before the first byte is not retried"
    );
}

#[tokio::test]
async fn last_bytes_are_withheld_until_digest_verification() {
    for total in [Some(MIB), None] {
        let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
        let wire = script.stream(0, total);
        let mut reader = leader(&downloads, digest(&blob)).start(script);
        send(&wire, &blob);
        let open = MIB - usize::try_from(WITHHELD_BYTES).unwrap();
        let beginning = take(&mut reader, open).await;
        assert_eq!(
            beginning.len(),
            open,
            "all but the withheld end of a complete, unverified blob"
        );
        assert!(
            matches!(&*reader.progress.borrow(), Progress::Filling(_, readable) if *readable == open as u64)
        );
        drop(wire);
        assert_eq!([beginning, read_all(reader).await].concat(), blob);
    }
}

#[tokio::test]
async fn corrupt_blob_is_neither_completed_nor_stored() {
    for length in [1000, MIB] {
        for total in [Some(length), None] {
            let (downloads, script, mut wrong) = (downloads(), Script::default(), content(length));
            let wanted = digest(&wrong);
            wrong[length - 1] ^= 1;
            script.ending(0, total, &wrong);
            let leader = leader(&downloads, wanted);
            let joined = follower(&downloads, wanted);
            let first = leader.start(script.clone());
            for reader in [first, joined] {
                let (bytes, end) = read_to_end(reader).await;
                assert!(bytes.len() <= length.saturating_sub(usize::try_from(WITHHELD_BYTES).unwrap()));
                assert!(matches!(
                    *end.unwrap_err(),
                    DownloadError::DigestMismatch(Mismatch::Digest(_))
                ));
            }
            downloads.idle().await;
            assert_eq!((held(&downloads, wanted), script.offsets()), (None, vec![0]));
        }
    }
}

#[tokio::test]
async fn more_bytes_than_announced_fail() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(2000));
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    assert!(matches!(
        *failure(reader).await,
        DownloadError::DigestMismatch(Mismatch::Size { .. })
    ));
}

#[tokio::test]
async fn range_reader_does_not_wait_for_the_remainder() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader(&downloads, digest(&blob));
    let part = follower(&downloads, digest(&blob)).within(100_000, 300_000);
    let nothing = follower(&downloads, digest(&blob)).within(7, 7);
    let _first = leader.start(script);
    send(&wire, &blob[..400_000]);
    assert_eq!(read_all(part).await, blob[100_000..300_000]);
    assert_eq!(read_all(nothing).await, b"");
    assert_eq!(downloads.count(), 1, "the remainder has not arrived");
    drop(wire);
}

#[tokio::test]
async fn download_without_readers_is_still_stored() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let mut first = leader(&downloads, digest(&blob)).start(script);
    let second = follower(&downloads, digest(&blob));
    send(&wire, &blob[..MIB / 2]);
    take(&mut first, 1).await;
    drop((first, second));
    send(&wire, &blob[MIB / 2..]);
    drop(wire);
    downloads.idle().await;
    assert_eq!(held(&downloads, digest(&blob)).unwrap(), blob);
}

#[tokio::test]
async fn empty_blob_is_downloaded() {
    for total in [Some(0), None] {
        let (downloads, script) = (downloads(), Script::default());
        script.ending(0, total, b"");
        let mut reader = leader(&downloads, digest(b"")).start(script);
        reader.settled().await.unwrap();
        assert_eq!(read_all(reader).await, b"");
        downloads.idle().await;
        assert_eq!(held(&downloads, digest(b"")).unwrap(), b"");
    }
}

#[tokio::test]
async fn download_from_elsewhere_authorizes_no_follower() {
    for is_elsewhere in [false, true] {
        let (downloads, blob) = (downloads(), content(MIB));
        let script = Script {
            is_elsewhere,
            ..Script::default()
        };
        let wire = script.stream(0, Some(MIB));
        let mut first = leader(&downloads, digest(&blob)).start(script);
        send(&wire, &blob[..MIB / 2]);
        take(&mut first, 1000).await;
        let Joined::Follower { began_by_same, .. } = join(&downloads, digest(&blob)) else {
            panic!("it is being fetched")
        };
        assert_eq!(began_by_same.is_none(), is_elsewhere);
    }
}

#[tokio::test]
async fn ended_download_is_stored() {
    let (downloads, blob) = (downloads(), content(MIB));
    let script = Script::default();
    script.ending(0, Some(MIB), &blob);
    let mut reader = leader(&downloads, digest(&blob)).start(script);
    reader.settled().await.unwrap();
    downloads.ended(&digest(&blob)).await;
    assert_eq!(held(&downloads, digest(&blob)).unwrap(), blob);
    downloads.ended(&digest(b"of no download")).await;
}
