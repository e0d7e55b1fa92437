//! Ranges far ahead of the transfer.

use super::*;
use crate::download::RangeFuture;

const LARGE: usize = 20 * MIB;
const FAR: usize = 9 * MIB;

/// Scripted range source: each request gets the next response of the script, and after the last one a denial.
#[derive(Clone, Default)]
pub(super) struct Parts {
    answers: Arc<Mutex<VecDeque<Arriving>>>,
    offsets: Arc<Mutex<Vec<(u64, u64)>>>,
    /// Never responds.
    hangs: bool,
}

impl RangeSource for Parts {
    fn open(&mut self, from: u64, until: Option<u64>) -> RangeFuture<'_> {
        let offsets = (from, until.unwrap_or(u64::MAX));
        self.offsets.lock().push(offsets);
        let answer = self.answers.lock().pop_front();
        let hangs = self.hangs;
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            answer.map(|arriving| Box::new(arriving) as Box<dyn ByteStream>)
        })
    }
}

impl Parts {
    pub(super) fn part(&self) -> Wire {
        let (wire, arriving) = unbounded_channel();
        self.answers.lock().push_back(Arriving(arriving));
        wire
    }

    pub(super) fn offsets(&self) -> Vec<(u64, u64)> {
        self.offsets.lock().clone()
    }
}

/// A transfer that is paused at its beginning, and the wire that continues it.
fn paused_fill(blob: &[u8]) -> (Downloads, Wire, Reader) {
    let (downloads, script) = (downloads(), Script::default());
    let wire = script.stream(0, Some(blob.len()));
    let reader = leader(&downloads, digest(blob)).start(script);
    (downloads, wire, reader)
}

fn part_of(downloads: &Downloads, blob: &[u8], (start, end): (usize, usize), parts: &Parts) -> Reader {
    follower(downloads, digest(blob))
        .within(start as u64, end as u64)
        .with_range_source(parts.clone())
}

#[tokio::test]
async fn range_far_ahead_is_fetched_separately() {
    let (blob, parts) = (content(LARGE), Parts::default());
    let (downloads, wire, first) = paused_fill(&blob);
    let part = parts.part();
    send(&part, &blob[FAR..FAR + 1000]);
    send(&part, b"and unrequested bytes");
    let reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
    assert_eq!(read_all(reader).await, blob[FAR..FAR + 1000]);
    assert_eq!(parts.offsets(), [(FAR as u64, FAR as u64 + 1000)]);
    send(&wire, &blob);
    drop(wire);
    assert_eq!(read_all(first).await, blob, "the fill is unaffected");
}

#[tokio::test]
async fn near_long_and_open_ended_ranges_wait_for_the_fill() {
    let (blob, parts) = (content(30 * MIB), Parts::default());
    let (downloads, wire, _first) = paused_fill(&blob);
    let near = part_of(&downloads, &blob, (FAR_BYTES, FAR_BYTES + 10), &parts);
    let long = part_of(&downloads, &blob, (FAR, FAR + 17 * MIB), &parts);
    let endless = part_of(&downloads, &blob, (29 * MIB, 30 * MIB), &parts).waiting_for_fill();
    let all = follower(&downloads, digest(&blob)).with_range_source(parts.clone());
    let readers = [near, long, endless, all].map(|reader| tokio::spawn(read_all(reader)));
    send(&wire, &blob);
    drop(wire);
    let lengths = [10, 17 * MIB, MIB, 30 * MIB];
    for (reader, length) in readers.into_iter().zip(lengths) {
        assert_eq!(reader.await.unwrap().len(), length);
    }
    assert_eq!(parts.offsets(), []);
}

const FAR_BYTES: usize = 8 * MIB;

#[tokio::test]
async fn denied_or_interrupted_range_comes_from_the_fill() {
    for answered in [false, true] {
        let (blob, parts) = (content(LARGE), Parts::default());
        let (downloads, wire, _first) = paused_fill(&blob);
        let part = answered.then(|| parts.part());
        let mut reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
        let mut received = Vec::new();
        if let Some(part) = part {
            send(&part, &blob[FAR..FAR + 300]);
            received = take(&mut reader, 300).await;
            part.send(Err(UpstreamFailure::ConnectionReset)).unwrap();
        }
        send(&wire, &blob);
        drop(wire);
        received.extend(read_all(reader).await);
        assert_eq!(received, blob[FAR..FAR + 1000]);
        assert_eq!(parts.offsets().len(), 1, "requested once");
    }
}

#[tokio::test]
async fn fill_that_arrives_first_is_used() {
    let (blob, mut parts) = (content(LARGE), Parts::default());
    parts.hangs = true;
    let (downloads, wire, _first) = paused_fill(&blob);
    let reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
    let reading = tokio::spawn(read_all(reader));
    while parts.offsets().is_empty() {
        tokio::task::yield_now().await;
    }
    send(&wire, &blob);
    drop(wire);
    assert_eq!(reading.await.unwrap(), blob[FAR..FAR + 1000]);
}

#[tokio::test]
async fn without_a_permit_a_range_waits_for_the_fill() {
    let (blob, parts) = (content(LARGE), Parts::default());
    let (downloads, wire, _first) = paused_fill(&blob);
    let places = u32::try_from(AHEAD_RANGES_MAX).unwrap();
    let taken = Arc::clone(&downloads.shared.ahead_permits)
        .acquire_many_owned(places)
        .await
        .unwrap();
    let reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
    let reading = tokio::spawn(read_all(reader));
    send(&wire, &blob);
    drop(wire);
    assert_eq!(reading.await.unwrap(), blob[FAR..FAR + 1000]);
    assert_eq!(parts.offsets(), []);
    drop(taken);
}

#[tokio::test]
async fn range_permits_are_released_after_read_or_drop() {
    let (blob, parts) = (content(LARGE), Parts::default());
    let (downloads, _wire, _first) = paused_fill(&blob);
    for left in [false, true] {
        let part = parts.part();
        send(&part, &blob[FAR..FAR + 1000]);
        let mut reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
        take(&mut reader, if left { 1 } else { 1000 }).await;
        drop(reader);
        assert_eq!(
            downloads.shared.ahead_permits.available_permits(),
            AHEAD_RANGES_MAX
        );
    }
}
