//! Transfers driven step by step: the upstream is a script, the disk is memory, time is paused.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::*;
use crate::oci::{Algorithm, Hasher};
use crate::store::Settings;
use crate::store::blobs::Verified;
use crate::store::volume::Memory;
use crate::upstream::Said;

const MIB: usize = 1024 * 1024;

/// What comes down the wire next. The sender dropped is the clean end of the stream.
type Wire = UnboundedSender<Result<Bytes, Cause>>;

struct Arriving(UnboundedReceiver<Result<Bytes, Cause>>);

impl Chunks for Arriving {
    fn chunk(&mut self) -> Pin<Box<dyn Future<Output = Option<Result<Bytes, Cause>>> + Send + '_>> {
        Box::pin(self.0.recv())
    }
}

/// Answers each opening with the next of its script; after the last one it is silent.
#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<VecDeque<Result<Stream, Answer>>>>,
    asked: Arc<Mutex<Vec<u64>>>,
}

impl Source for Script {
    fn open(&mut self, from: u64) -> impl Future<Output = Result<Stream, Answer>> + Send {
        self.asked.lock().unwrap().push(from);
        let answer = self.answers.lock().unwrap().pop_front();
        async move { answer.unwrap_or(Err(Answer::silent(Cause::Refused))) }
    }
}

impl Script {
    /// A stream that the test feeds as it goes.
    fn stream(&self, start: usize, total: Option<usize>) -> Wire {
        let (wire, arriving) = unbounded_channel();
        self.answers.lock().unwrap().push_back(Ok(Stream {
            start: start as u64,
            total: total.map(|total| total as u64),
            body: Box::new(Arriving(arriving)),
        }));
        wire
    }

    /// A stream that gives `bytes` and then breaks.
    fn breaking(&self, start: usize, total: usize, bytes: &[u8]) {
        let wire = self.stream(start, Some(total));
        send(&wire, bytes);
        wire.send(Err(Cause::Reset)).unwrap();
    }

    /// A stream that gives `bytes` and ends cleanly.
    fn ending(&self, start: usize, total: Option<usize>, bytes: &[u8]) {
        send(&self.stream(start, total), bytes);
    }

    fn silence(&self, cause: Cause) {
        self.answers.lock().unwrap().push_back(Err(Answer::silent(cause)));
    }

    fn asked(&self) -> Vec<u64> {
        self.asked.lock().unwrap().clone()
    }
}

fn send(wire: &Wire, bytes: &[u8]) {
    for chunk in bytes.chunks(10_000) {
        wire.send(Ok(Bytes::copy_from_slice(chunk))).unwrap();
    }
}

/// Bytes of which no two stretches are alike.
fn content(length: usize) -> Vec<u8> {
    let numbers = (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes());
    numbers.take(length).collect()
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

fn downloads() -> Downloads {
    let store = Store::open(
        &Settings::default(),
        Arc::new(Memory::new()),
        SystemTime::UNIX_EPOCH,
    )
    .unwrap();
    Downloads::new(Arc::new(store), Buffers::default(), 16)
}

fn leader(downloads: &Downloads, digest: Digest) -> Leader {
    match downloads.join(digest) {
        Joined::Leader(leader) => leader,
        Joined::Held(_) => panic!("held already"),
        Joined::Follower(_) => panic!("someone leads already"),
    }
}

fn follower(downloads: &Downloads, digest: Digest) -> Reader {
    match downloads.join(digest) {
        Joined::Follower(reader) => reader,
        Joined::Held(_) => panic!("held already"),
        Joined::Leader(_) => panic!("nobody leads"),
    }
}

fn held(downloads: &Downloads, digest: Digest) -> Option<Vec<u8>> {
    let held = downloads.shared.store.blob(&digest).unwrap()?;
    let mut bytes = vec![0; usize::try_from(held.size).unwrap()];
    let read = held.file.read_at(&mut bytes, 0).unwrap();
    assert_eq!(read, bytes.len());
    Some(bytes)
}

/// Reads exactly `length` bytes, which must be there or on their way.
async fn take(reader: &mut Reader, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < length {
        bytes.extend_from_slice(&reader.next().await.unwrap().unwrap());
    }
    bytes
}

/// All that a reader gets, and how it ends.
async fn drain(mut reader: Reader) -> (Vec<u8>, Result<(), Arc<Failure>>) {
    let mut bytes = Vec::new();
    loop {
        match reader.next().await {
            Some(Ok(more)) => bytes.extend_from_slice(&more),
            Some(Err(failure)) => return (bytes, Err(failure)),
            None => return (bytes, Ok(())),
        }
    }
}

async fn whole(reader: Reader) -> Vec<u8> {
    let (bytes, end) = drain(reader).await;
    end.unwrap();
    bytes
}

/// Steps the paused time while `work` is under way. It does not advance by itself: the writer of a transfer is a thread
/// that waits, which counts as work.
async fn stepped<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = tokio::time::advance(Duration::from_millis(50)) => {}
        }
    }
}

async fn failure(reader: Reader) -> Arc<Failure> {
    drain(reader).await.1.unwrap_err()
}

#[tokio::test]
async fn one_transfer_serves_those_before_during_and_after() {
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
    assert_eq!([beginning, whole(first).await].concat(), blob);
    assert_eq!(whole(before).await, blob);
    assert_eq!(whole(during).await, blob);
    downloads.idle().await;
    assert!(matches!(downloads.join(digest(&blob)), Joined::Held(held) if held.size == MIB as u64));
    assert_eq!((script.asked(), downloads.count()), (vec![0], 0));
}

#[tokio::test]
async fn a_miss_overtaken_by_a_whole_download_finds_it_held() {
    let (downloads, blob) = (downloads(), content(1000));
    assert_eq!(held(&downloads, digest(&blob)), None, "the first look");
    let ingest = downloads.shared.store.begin(&digest(&blob), None).unwrap();
    ingest.file().write_at(&blob, 0).unwrap();
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(&blob);
    ingest
        .commit(Verified::check(hasher, &digest(&blob), 1000, None).unwrap())
        .unwrap();
    assert!(matches!(downloads.join(digest(&blob)), Joined::Held(_)));
    assert_eq!(downloads.count(), 0);
}

#[tokio::test]
async fn a_leader_that_goes_away_fails_its_followers_and_the_next_one_leads() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let leaving = leader(&downloads, digest(&blob));
    let waiting = follower(&downloads, digest(&blob));
    drop(leaving);
    assert!(matches!(*failure(waiting).await, Failure::Abandoned));
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    assert_eq!(whole(reader).await, blob);
}

#[tokio::test]
async fn a_failed_transfer_is_gone_before_its_readers_hear_of_it() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.silence(Cause::Refused);
    let leader = leader(&downloads, digest(&blob));
    let mut waiting = follower(&downloads, digest(&blob));
    let _first = leader.start(script);
    // Looked at inside the notice itself: nothing runs between it and the look.
    let count = downloads.clone();
    let seen = waiting
        .progress
        .wait_for(|progress| matches!(progress, Progress::Failed(_)) && count.count() == 0)
        .await;
    assert!(matches!(&*seen.unwrap(), Progress::Failed(failure) if matches!(**failure, Failure::Refused(_))));
    assert!(matches!(downloads.join(digest(&blob)), Joined::Leader(_)));
}

#[tokio::test]
async fn leaving_comes_before_telling() {
    let (downloads, blob) = (downloads(), content(1000));
    let leader = leader(&downloads, digest(&blob));
    let reader = follower(&downloads, digest(&blob));
    // While the map is locked nobody can leave it, so nobody may be told.
    let running = downloads.shared.running();
    let leaving = std::thread::spawn(move || {
        leader
            .place
            .leave(Progress::Failed(Arc::new(Failure::Broken(Cause::Reset))));
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
async fn a_refusal_is_told_with_the_upstreams_answer() {
    let (downloads, script) = (downloads(), Script::default());
    script.silence(Cause::RateLimited);
    let reader = leader(&downloads, digest(b"x")).start(script.clone());
    match &*failure(reader).await {
        Failure::Refused(answer) => assert_eq!(answer.said, Said::Silent(Cause::RateLimited)),
        other => panic!("{other}"),
    }
    assert_eq!(
        script.asked(),
        [0],
        "a refusal before the first byte is not asked again"
    );
}

#[tokio::test]
async fn the_last_bytes_are_withheld_until_the_digest_is_right() {
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
            "all but the last of a whole, unverified blob"
        );
        assert!(
            matches!(&*reader.progress.borrow(), Progress::Readable(readable) if *readable == open as u64)
        );
        drop(wire);
        assert_eq!([beginning, whole(reader).await].concat(), blob);
    }
}

#[tokio::test]
async fn wrong_bytes_reach_nobody_whole_and_are_not_kept() {
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
                let (bytes, end) = drain(reader).await;
                assert!(bytes.len() <= length.saturating_sub(usize::try_from(WITHHELD_BYTES).unwrap()));
                assert!(matches!(*end.unwrap_err(), Failure::Wrong(Mismatch::Digest(_))));
            }
            downloads.idle().await;
            assert_eq!((held(&downloads, wanted), script.asked()), (None, vec![0]));
        }
    }
}

#[tokio::test]
async fn more_bytes_than_announced_are_wrong() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(2000));
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    assert!(matches!(
        *failure(reader).await,
        Failure::Wrong(Mismatch::Size { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn a_break_is_resumed_from_where_it_stopped() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    script.breaking(0, MIB, &blob[..300_000]);
    script.breaking(300_000, MIB, &blob[300_000..700_000]);
    script.ending(700_000, Some(MIB), &blob[700_000..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 300_000, 700_000]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_starts_earlier_is_skipped_into() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    script.breaking(0, MIB, &blob[..333_333]);
    script.breaking(0, MIB, &blob[..555_555]);
    script.ending(123_456, Some(MIB), &blob[123_456..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 333_333, 555_555]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_starts_too_late_is_not_used() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.ending(500, Some(1000), &blob[500..]);
    script.ending(400, Some(1000), &blob[400..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 400, 400]);
}

#[tokio::test(start_paused = true)]
async fn resumes_in_a_row_without_a_byte_end_it() {
    for (answer, cause) in [(None, Cause::Refused), (Some(()), Cause::Reset)] {
        let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
        script.breaking(0, 1000, &blob[..400]);
        for _ in 0..20 {
            match answer {
                None => script.silence(Cause::Refused),
                Some(()) => script.breaking(400, 1000, b""),
            }
        }
        let reader = leader(&downloads, digest(&blob)).start(script.clone());
        match &*stepped(failure(reader)).await {
            Failure::Broken(found) => assert_eq!(*found, cause),
            other => panic!("{other}"),
        }
        assert_eq!(script.asked(), [0, 400, 400, 400, 400, 400]);
        downloads.idle().await;
        assert_eq!((held(&downloads, digest(&blob)), downloads.count()), (None, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_byte_makes_a_resume_fruitful() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(50));
    for at in 0..49 {
        script.breaking(at, 50, &blob[at..=at]);
    }
    script.ending(49, Some(50), &blob[49..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), (0..50).collect::<Vec<u64>>());
}

#[tokio::test(start_paused = true)]
async fn a_clean_end_before_the_stated_total_is_no_end() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.ending(0, Some(1000), &blob[..600]);
    script.ending(600, Some(1000), &blob[600..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 600]);
}

#[tokio::test]
async fn a_reader_within_a_range_does_not_wait_for_the_rest() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader(&downloads, digest(&blob));
    let part = follower(&downloads, digest(&blob)).within(100_000, 300_000);
    let nothing = follower(&downloads, digest(&blob)).within(7, 7);
    let _first = leader.start(script);
    send(&wire, &blob[..400_000]);
    assert_eq!(whole(part).await, blob[100_000..300_000]);
    assert_eq!(whole(nothing).await, b"");
    assert_eq!(downloads.count(), 1, "the rest has not even arrived");
    drop(wire);
}

#[tokio::test]
async fn it_is_kept_though_all_its_readers_left() {
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
async fn a_blob_of_no_bytes_is_a_blob() {
    for total in [Some(0), None] {
        let (downloads, script) = (downloads(), Script::default());
        script.ending(0, total, b"");
        let mut reader = leader(&downloads, digest(b"")).start(script);
        reader.settled().await.unwrap();
        assert_eq!(whole(reader).await, b"");
        downloads.idle().await;
        assert_eq!(held(&downloads, digest(b"")).unwrap(), b"");
    }
}
