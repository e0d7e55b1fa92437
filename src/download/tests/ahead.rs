//! Parts that lie far ahead of the fill.

use super::*;
use crate::download::Part;

const LARGE: usize = 20 * MIB;
const FAR: usize = 9 * MIB;

/// Answers each part with the next of its script; after the last one it refuses.
#[derive(Clone, Default)]
pub(super) struct Parts {
    answers: Arc<Mutex<VecDeque<Arriving>>>,
    asked: Arc<Mutex<Vec<(u64, u64)>>>,
    /// Never answers at all.
    hangs: bool,
}

impl Ahead for Parts {
    fn open(&mut self, from: u64, until: Option<u64>) -> Part<'_> {
        let asked = (from, until.unwrap_or(u64::MAX));
        self.asked.lock().unwrap().push(asked);
        let answer = self.answers.lock().unwrap().pop_front();
        let hangs = self.hangs;
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            answer.map(|arriving| Box::new(arriving) as Box<dyn Chunks>)
        })
    }
}

impl Parts {
    pub(super) fn part(&self) -> Wire {
        let (wire, arriving) = unbounded_channel();
        self.answers.lock().unwrap().push_back(Arriving(arriving));
        wire
    }

    pub(super) fn asked(&self) -> Vec<(u64, u64)> {
        self.asked.lock().unwrap().clone()
    }
}

/// A fill that stands at its beginning, and the wire that would bring it on.
fn standing(blob: &[u8]) -> (Downloads, Wire, Reader) {
    let (downloads, script) = (downloads(), Script::default());
    let wire = script.stream(0, Some(blob.len()));
    let reader = leader(&downloads, digest(blob)).start(script);
    (downloads, wire, reader)
}

fn part_of(downloads: &Downloads, blob: &[u8], (start, end): (usize, usize), parts: &Parts) -> Reader {
    follower(downloads, digest(blob))
        .within(start as u64, end as u64)
        .with_ahead(parts.clone())
}

#[tokio::test]
async fn a_part_far_ahead_is_asked_for_alone() {
    let (blob, parts) = (content(LARGE), Parts::default());
    let (downloads, wire, first) = standing(&blob);
    let part = parts.part();
    send(&part, &blob[FAR..FAR + 1000]);
    send(&part, b"and what nobody asked for");
    let reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
    assert_eq!(whole(reader).await, blob[FAR..FAR + 1000]);
    assert_eq!(parts.asked(), [(FAR as u64, FAR as u64 + 1000)]);
    send(&wire, &blob);
    drop(wire);
    assert_eq!(whole(first).await, blob, "the fill knows nothing of it");
}

#[tokio::test]
async fn what_is_near_or_long_or_without_an_end_is_waited_for() {
    let (blob, parts) = (content(30 * MIB), Parts::default());
    let (downloads, wire, _first) = standing(&blob);
    let near = part_of(&downloads, &blob, (FAR_BYTES, FAR_BYTES + 10), &parts);
    let long = part_of(&downloads, &blob, (FAR, FAR + 17 * MIB), &parts);
    let endless = part_of(&downloads, &blob, (29 * MIB, 30 * MIB), &parts).patient();
    let all = follower(&downloads, digest(&blob)).with_ahead(parts.clone());
    let readers = [near, long, endless, all].map(|reader| tokio::spawn(whole(reader)));
    send(&wire, &blob);
    drop(wire);
    let lengths = [10, 17 * MIB, MIB, 30 * MIB];
    for (reader, length) in readers.into_iter().zip(lengths) {
        assert_eq!(reader.await.unwrap().len(), length);
    }
    assert_eq!(parts.asked(), []);
}

const FAR_BYTES: usize = 8 * MIB;

#[tokio::test]
async fn a_part_that_is_refused_or_breaks_off_comes_from_the_fill() {
    for answered in [false, true] {
        let (blob, parts) = (content(LARGE), Parts::default());
        let (downloads, wire, _first) = standing(&blob);
        let part = answered.then(|| parts.part());
        let mut reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
        let mut came = Vec::new();
        if let Some(part) = part {
            send(&part, &blob[FAR..FAR + 300]);
            came = take(&mut reader, 300).await;
            part.send(Err(UpstreamFailure::ConnectionReset)).unwrap();
        }
        send(&wire, &blob);
        drop(wire);
        came.extend(whole(reader).await);
        assert_eq!(came, blob[FAR..FAR + 1000]);
        assert_eq!(parts.asked().len(), 1, "asked once");
    }
}

#[tokio::test]
async fn a_fill_that_comes_first_is_taken() {
    let (blob, mut parts) = (content(LARGE), Parts::default());
    parts.hangs = true;
    let (downloads, wire, _first) = standing(&blob);
    let reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
    let reading = tokio::spawn(whole(reader));
    while parts.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    send(&wire, &blob);
    drop(wire);
    assert_eq!(reading.await.unwrap(), blob[FAR..FAR + 1000]);
}

#[tokio::test]
async fn with_all_places_taken_it_waits_for_the_fill() {
    let (blob, parts) = (content(LARGE), Parts::default());
    let (downloads, wire, _first) = standing(&blob);
    let places = u32::try_from(AHEAD_PARTS_MAX).unwrap();
    let taken = Arc::clone(&downloads.shared.ahead_places)
        .acquire_many_owned(places)
        .await
        .unwrap();
    let reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
    let reading = tokio::spawn(whole(reader));
    send(&wire, &blob);
    drop(wire);
    assert_eq!(reading.await.unwrap(), blob[FAR..FAR + 1000]);
    assert_eq!(parts.asked(), []);
    drop(taken);
}

#[tokio::test]
async fn places_are_free_again_when_parts_are_read_or_left() {
    let (blob, parts) = (content(LARGE), Parts::default());
    let (downloads, _wire, _first) = standing(&blob);
    for left in [false, true] {
        let part = parts.part();
        send(&part, &blob[FAR..FAR + 1000]);
        let mut reader = part_of(&downloads, &blob, (FAR, FAR + 1000), &parts);
        take(&mut reader, if left { 1 } else { 1000 }).await;
        drop(reader);
        assert_eq!(downloads.shared.ahead_places.available_permits(), AHEAD_PARTS_MAX);
    }
}
