//! Tests of the rules of claims: single steps, and any interleaving of several caches with kills, lost and late replies.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn present(etag: &str, record: Option<ClaimRecord>) -> Look {
    Look::Present {
        etag: etag.to_owned(),
        age: Some(SECOND),
        record,
    }
}

fn of(me: &BootId) -> ClaimRecord {
    ClaimRecord::new(me)
}

fn entry(me: &BootId) -> (Entry, Watch, Instant) {
    (Entry::new(me, true, Some(100)), Watch::default(), Instant::now())
}

#[test]
fn part_of_each_byte_is_found() {
    let starts = [0, FIRST_PART_BYTES, FIRST_PART_BYTES + PART_BYTES];
    for (start, end) in starts.into_iter().zip(starts.into_iter().skip(1)) {
        assert_eq!(
            (part_start(start), part_start(end - 1), part_end(start)),
            (start, start, end)
        );
    }
    assert_eq!(part_end(u64::MAX), u64::MAX);
}

#[test]
fn absent_claim_is_created_and_led() {
    let me = BootId::random();
    let (mut entry, mut watch, now) = entry(&me);
    assert_eq!(entry.looked(Look::Absent, &mut watch, now), Step::Create(of(&me)));
    let Step::Lead(held) = entry.written(Written::Done("1".into()), now) else {
        panic!("created");
    };
    assert!(held.is_current(now) && !held.is_current(now + DEAD_AFTER));
}

#[test]
fn refusal_without_a_claim_is_tried_again_and_not_for_ever() {
    let me = BootId::random();
    let (mut entry, mut watch, now) = entry(&me);
    for _ in 0..LOOKS_MAX {
        assert_eq!(entry.looked(Look::Absent, &mut watch, now), Step::Create(of(&me)));
        assert_eq!(entry.written(Written::Refused, now), Step::Look);
    }
    let step = entry.looked(Look::Absent, &mut watch, now);
    assert_eq!(step, Step::Alone(Alone::Contended));
}

#[test]
fn lost_reply_to_a_create_is_found_by_the_own_id() {
    let me = BootId::random();
    let (mut entry, mut watch, now) = entry(&me);
    entry.looked(Look::Absent, &mut watch, now);
    assert_eq!(entry.written(Written::Unknown, now), Step::Look);
    let Step::Lead(mut held) = entry.looked(present("7", Some(of(&me))), &mut watch, now) else {
        panic!("won");
    };
    assert!(!held.is_current(now), "not before a write");
    assert!(matches!(held.next(now), HeldStep::Write(_, etag) if etag == "7"));
}

#[test]
fn lost_create_is_not_repeated() {
    let me = BootId::random();
    let (mut entry, mut watch, now) = entry(&me);
    entry.looked(Look::Absent, &mut watch, now);
    entry.written(Written::Unknown, now);
    let step = entry.looked(Look::Absent, &mut watch, now);
    assert_eq!(step, Step::Alone(Alone::Unavailable));
}

#[test]
fn claim_is_followed_until_it_rests_and_then_taken_over() {
    let (me, other) = (BootId::random(), BootId::random());
    let (_, mut watch, now) = entry(&me);
    let theirs = ClaimRecord {
        published: FIRST_PART_BYTES,
        wanted: true,
        ..of(&other)
    };
    let mut enter = |at: Instant, etag: &str| {
        let mut entry = Entry::new(&me, true, None);
        entry.looked(present(etag, Some(theirs.clone())), &mut watch, at)
    };
    assert!(matches!(enter(now, "1"), Step::Follow(_)));
    assert!(matches!(enter(now + SECOND * 9, "1"), Step::Follow(_)));
    assert!(
        matches!(enter(now + SECOND * 10, "2"), Step::Follow(_)),
        "it has changed"
    );
    let Step::TakeOver(record, etag) = enter(now + SECOND * 20, "2") else {
        panic!("dead");
    };
    assert!(etag == "2" && record.is_of(&me) && record.wanted && record.published == FIRST_PART_BYTES);
}

#[test]
fn old_claim_is_taken_over_at_the_first_look() {
    let (me, other) = (BootId::random(), BootId::random());
    for (age, is_dead) in [(15, false), (16, true)] {
        let (mut entry, mut watch, now) = entry(&me);
        let look = Look::Present {
            etag: "1".into(),
            age: Some(SECOND * age),
            record: Some(of(&other)),
        };
        let step = entry.looked(look, &mut watch, now);
        assert_eq!(matches!(step, Step::TakeOver(..)), is_dead, "{step:?}");
    }
}

#[test]
fn unusable_claims_are_not_followed() {
    let (me, other) = (BootId::random(), BootId::random());
    let of_size = |size| ClaimRecord {
        size: Some(size),
        ..of(&other)
    };
    for (may_write, record, alone) in [
        (true, None, Alone::Invalid),
        (true, Some(of_size(99)), Alone::Invalid),
        (false, Some(of_size(100)), Alone::ReadOnly),
    ] {
        let (_, mut watch, now) = entry(&me);
        let mut entry = Entry::new(&me, may_write, Some(100));
        let step = entry.looked(present("1", record), &mut watch, now);
        assert_eq!(step, Step::Alone(alone));
    }
    let (_, mut watch, now) = entry(&me);
    let mut entry = Entry::new(&me, false, Some(100));
    assert_eq!(
        entry.looked(Look::Absent, &mut watch, now),
        Step::Alone(Alone::ReadOnly)
    );
}

#[test]
fn records_that_are_none_are_not_parsed() {
    for text in [
        "",
        "{}",
        "[]",
        "\u{fffd}",
        r#"{"owner":"","beat":0,"size":null,"received":0,"published":0,"wanted":false}"#,
        r#"{"owner":"a","beat":0,"size":1,"received":0,"published":2,"wanted":false}"#,
        r#"{"owner":"a","beat":-1,"size":1,"received":0,"published":0,"wanted":false}"#,
        r#"{"version":2}"#,
    ] {
        assert_eq!(ClaimRecord::parse(text.as_bytes()), None, "{text}");
    }
    let record = of(&BootId::random());
    let bytes = record.to_bytes();
    assert!(bytes.len() as u64 <= RECORD_BYTES_MAX);
    assert_eq!(ClaimRecord::parse(&bytes), Some(record));
}

fn held(me: &BootId, now: Instant) -> Held {
    Held::new(me, "1".into(), of(me), now)
}

#[test]
fn owner_beats_and_looks_until_parts_are_wanted() {
    let (me, now) = (BootId::random(), Instant::now());
    let mut held = held(&me, now);
    assert_eq!(held.next(now), HeldStep::Rest(now + LOOK));
    assert_eq!(held.next(now + LOOK), HeldStep::Look);
    let wanted = ClaimRecord {
        wanted: true,
        ..of(&me)
    };
    held.looked(present("2", Some(wanted)), now + LOOK);
    assert!(held.is_wanted());
    assert_eq!(
        held.next(now + LOOK),
        HeldStep::Rest(now + BEAT),
        "no further looks"
    );
    held.publish(FIRST_PART_BYTES);
    let HeldStep::Write(record, etag) = held.next(now + LOOK) else {
        panic!("published");
    };
    assert!(etag == "2" && record.published == FIRST_PART_BYTES && record.wanted);
}

#[test]
fn refused_beat_of_the_same_owner_is_repeated() {
    let (me, now) = (BootId::random(), Instant::now());
    let mut held = held(&me, now);
    held.set_size(100);
    let HeldStep::Write(record, _) = held.next(now) else {
        panic!("the size is new");
    };
    held.written(&record, Written::Refused, now);
    assert_eq!(held.next(now), HeldStep::Look, "at once");
    let wanted = ClaimRecord {
        wanted: true,
        ..of(&me)
    };
    held.looked(present("2", Some(wanted)), now);
    let HeldStep::Write(record, etag) = held.next(now) else {
        panic!("again");
    };
    assert!(etag == "2" && record.wanted && record.size == Some(100));
    held.written(&record, Written::Done("3".into()), now);
    assert_eq!(held.next(now), HeldStep::Rest(now + BEAT));
}

#[test]
fn claim_of_another_owner_is_lost() {
    let (me, now) = (BootId::random(), Instant::now());
    for look in [
        Look::Absent,
        present("2", Some(of(&BootId::random()))),
        present("2", None),
    ] {
        let mut held = held(&me, now);
        held.looked(look, now);
        assert_eq!(held.next(now), HeldStep::Lost);
    }
    let mut held = held(&me, now);
    for second in 3..10 {
        let at = now + SECOND * second;
        if let HeldStep::Write(record, _) = held.next(at) {
            held.written(&record, Written::Unknown, at);
        }
        held.looked(Look::Failed, at);
    }
    assert_eq!(
        held.next(now + DEAD_AFTER),
        HeldStep::Lost,
        "it cannot be kept alive"
    );
}

fn follow(record: ClaimRecord, looks: &[(u64, Look)]) -> FollowStep {
    let (mut watch, now) = (Watch::default(), Instant::now());
    let mut followed = Followed::new(record, now);
    let mut last = FollowStep::Wait;
    for (second, look) in looks {
        last = followed.looked(
            look.clone(),
            0,
            &mut watch,
            now + SECOND * u32::try_from(*second).unwrap(),
        );
    }
    last
}

#[test]
fn follower_leaves_what_lies_stalls_or_dies() {
    let other = BootId::random();
    let with = |size: Option<u64>, received, published| ClaimRecord {
        size,
        received,
        published,
        ..of(&other)
    };
    let size = Some(PART_BYTES);
    let first = with(size, 0, 0);
    let some = |etag: &str, record| present(etag, Some(record));
    let cases = [
        (vec![(1, Look::Absent)], FollowStep::Gone),
        (vec![(1, some("1", with(size, 0, 9)))], FollowStep::Read),
        (
            vec![(1, some("1", with(size, 0, 9))), (2, some("2", first.clone()))],
            FollowStep::Invalid,
        ),
        (vec![(1, some("1", with(Some(7), 0, 0)))], FollowStep::Invalid),
        (vec![(1, some("1", with(None, 0, 0)))], FollowStep::Invalid),
        (vec![(1, present("1", None))], FollowStep::Invalid),
        (
            vec![(1, some("1", first.clone())), (11, some("1", first.clone()))],
            FollowStep::Dead,
        ),
        (
            vec![(1, some("1", first.clone())), (12, some("2", first.clone()))],
            FollowStep::Stalled,
        ),
        // A slow upstream, and an owner that no look finds.
        (
            vec![
                (6, some("1", with(size, 5, 0))),
                (14, some("2", with(size, 6, 0))),
            ],
            FollowStep::Wait,
        ),
        (vec![(11, Look::Failed)], FollowStep::Wait),
        (vec![(12, Look::Failed)], FollowStep::Stalled),
    ];
    for (looks, expected) in cases {
        assert_eq!(follow(first.clone(), &looks), expected, "{looks:?}");
    }
    // Another owner begins again.
    let next = ClaimRecord {
        owner: BootId::random().0,
        size: None,
        published: 0,
        ..first.clone()
    };
    let looks = [(1, some("1", with(size, 9, 9))), (2, some("2", next))];
    assert_eq!(follow(first, &looks), FollowStep::Wait);
}

/// What happens to a request.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    RequestLost,
    ReplyLost,
    /// It takes effect later, and its reply is lost.
    Late(u64),
}

#[derive(Clone, Debug)]
enum Write {
    Create(ClaimRecord),
    Update(ClaimRecord, String),
}

/// The bucket: one claim, and whether the blob is there.
#[derive(Default)]
struct World {
    claim: Option<(u64, ClaimRecord, Instant)>,
    writes: u64,
    has_blob: bool,
    late: Vec<(Instant, Write)>,
}

impl World {
    fn settle(&mut self, now: Instant) {
        let late = std::mem::take(&mut self.late);
        let (due, later): (Vec<_>, Vec<_>) = late.into_iter().partition(|(at, _)| *at <= now);
        self.late = later;
        for (at, write) in due {
            self.apply(write, at);
        }
    }

    fn apply(&mut self, write: Write, now: Instant) -> Written {
        let (record, may) = match (write, &self.claim) {
            (Write::Create(record), claim) => (record, claim.is_none()),
            (Write::Update(record, etag), Some((current, ..))) => (record, etag == current.to_string()),
            (Write::Update(record, _), None) => (record, false),
        };
        if !may {
            return Written::Refused;
        }
        self.writes += 1;
        self.claim = Some((self.writes, record, now));
        Written::Done(self.writes.to_string())
    }

    fn write(&mut self, write: Write, fault: Fault, now: Instant) -> Written {
        match fault {
            Fault::None => self.apply(write, now),
            Fault::RequestLost => Written::Unknown,
            Fault::ReplyLost => {
                self.apply(write, now);
                Written::Unknown
            }
            Fault::Late(after) => {
                self.late.push((now + Duration::from_millis(after), write));
                Written::Unknown
            }
        }
    }

    fn look(&self, fault: Fault, now: Instant) -> Look {
        match (&self.claim, fault) {
            (claim, Fault::None) => match claim {
                None => Look::Absent,
                Some((etag, record, at)) => Look::Present {
                    etag: etag.to_string(),
                    age: Some(now.saturating_duration_since(*at)),
                    record: Some(record.clone()),
                },
            },
            _ => Look::Failed,
        }
    }
}

enum Doing {
    Enters(Entry, Step),
    /// With the bytes that are still missing.
    Holds(Held, u32),
    Follows(Followed),
    Done,
    Killed,
}

struct Cache {
    me: BootId,
    watch: Watch,
    doing: Doing,
}

impl Cache {
    fn new() -> Self {
        let me = BootId::random();
        Self {
            doing: Doing::Enters(Entry::new(&me, true, None), Step::Look),
            watch: Watch::default(),
            me,
        }
    }

    fn enter(&self) -> Doing {
        Doing::Enters(Entry::new(&self.me, true, None), Step::Look)
    }

    fn is_current(&self, now: Instant) -> bool {
        matches!(&self.doing, Doing::Holds(held, _) if held.is_current(now))
    }

    /// Sends one request. Returns whether a conditional write succeeded.
    fn step(&mut self, world: &mut World, fault: Fault, now: Instant) -> bool {
        let mut has_written = false;
        let doing = std::mem::replace(&mut self.doing, Doing::Done);
        self.doing = match doing {
            Doing::Enters(mut entry, step) => {
                let next = match step {
                    Step::Look => entry.looked(world.look(fault, now), &mut self.watch, now),
                    Step::Create(record) => {
                        let written = world.write(Write::Create(record), fault, now);
                        has_written = matches!(written, Written::Done(_));
                        entry.written(written, now)
                    }
                    Step::TakeOver(record, etag) => {
                        let written = world.write(Write::Update(record, etag), fault, now);
                        has_written = matches!(written, Written::Done(_));
                        entry.written(written, now)
                    }
                    other => other,
                };
                match next {
                    Step::Lead(_) if world.has_blob => {
                        world.claim = None;
                        Doing::Done
                    }
                    Step::Lead(held) => Doing::Holds(held, 12),
                    Step::Follow(followed) => Doing::Follows(followed),
                    // Served by its upstream.
                    Step::Alone(_) => Doing::Done,
                    next => Doing::Enters(entry, next),
                }
            }
            Doing::Holds(mut held, left) => {
                held.receive(100 - u64::from(left));
                match held.next(now) {
                    HeldStep::Write(record, etag) => {
                        let written = world.write(Write::Update(record.clone(), etag), fault, now);
                        has_written = matches!(written, Written::Done(_));
                        held.written(&record, written, now);
                    }
                    HeldStep::Look => held.looked(world.look(fault, now), now),
                    HeldStep::Rest(_) => {}
                    // Its own download goes on, and the blob is uploaded.
                    HeldStep::Lost => {
                        world.has_blob = true;
                        self.doing = Doing::Done;
                        return false;
                    }
                }
                match left {
                    0 => {
                        world.has_blob = true;
                        if held.is_current(now) {
                            world.claim = None;
                        }
                        Doing::Done
                    }
                    left => Doing::Holds(held, left - 1),
                }
            }
            Doing::Follows(mut followed) => {
                if let (Some(wanted), Some(etag)) = (followed.wanted(), self.watch.etag()) {
                    world.write(Write::Update(wanted, etag), fault, now);
                }
                match followed.looked(world.look(fault, now), 1000, &mut self.watch, now) {
                    FollowStep::Read | FollowStep::Wait => Doing::Follows(followed),
                    FollowStep::Gone if world.has_blob => Doing::Done,
                    FollowStep::Gone | FollowStep::Dead => self.enter(),
                    FollowStep::Stalled => Doing::Done,
                    FollowStep::Invalid => panic!("no claim here is invalid"),
                }
            }
            over => over,
        };
        has_written
    }
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        6 => Just(Fault::None),
        1 => Just(Fault::RequestLost),
        1 => Just(Fault::ReplyLost),
        1 => (1..20_000_u64).prop_map(Fault::Late),
    ]
}

/// Cache, pause before its next request in milliseconds, fault, and whether it is killed after.
fn turns() -> impl Strategy<Value = Vec<(usize, u64, Fault, bool)>> {
    let pause = prop_oneof![4 => 0..300_u64, 1 => 300..12_000_u64];
    prop::collection::vec((0..4_usize, pause, fault(), prop::bool::weighted(0.02)), 0..150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_interleaving_has_one_owner_and_ends(count in 1..=4_usize, turns in turns()) {
        let (mut world, mut now) = (World::default(), Instant::now());
        let mut caches: Vec<Cache> = (0..count).map(|_| Cache::new()).collect();
        let check = |caches: &[Cache], writer: usize, now: Instant| {
            let others = caches.iter().enumerate().filter(|(number, _)| *number != writer);
            let current = others.filter(|(_, cache)| cache.is_current(now)).count();
            assert!(!caches[writer].is_current(now) || current == 0, "two owners");
        };
        for (number, pause, fault, is_killed) in turns {
            now += Duration::from_millis(pause);
            world.settle(now);
            let number = number % count;
            if caches[number].step(&mut world, fault, now) {
                check(&caches, number, now);
            }
            if is_killed {
                caches[number].doing = Doing::Killed;
            }
        }
        // Without further faults, each cache that lives is served.
        for _ in 0..400 {
            for number in 0..count {
                now += Duration::from_millis(100);
                world.settle(now);
                if caches[number].step(&mut world, Fault::None, now) {
                    check(&caches, number, now);
                }
            }
        }
        let is_over = |cache: &Cache| matches!(cache.doing, Doing::Done | Doing::Killed);
        prop_assert!(caches.iter().all(is_over));
    }
}
