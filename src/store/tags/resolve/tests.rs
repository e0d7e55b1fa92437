//! Every small record against every law, and every short history of a tag against what its registry knows.

use std::sync::LazyLock;
use std::time::Duration;

use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue};

use super::*;
use crate::oci::Algorithm;
use crate::store::tags::record::HISTORY_MAX;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_IMAGE: &str = "application/vnd.docker.distribution.manifest.v2+json";

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn accept(lines: &[&str]) -> Accept {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(ACCEPT, HeaderValue::from_str(line).unwrap());
    }
    Accept::read(&headers).unwrap()
}

/// Two that take everything, one that takes no index, and one that says nothing about types.
fn clients() -> &'static [Accept; 4] {
    static CLIENTS: LazyLock<[Accept; 4]> = LazyLock::new(|| {
        [
            accept(&[OCI_INDEX, OCI_IMAGE, DOCKER_LIST, DOCKER_IMAGE]),
            accept(&[DOCKER_IMAGE, DOCKER_LIST, OCI_IMAGE, OCI_INDEX, "*/*"]),
            accept(&[OCI_IMAGE, DOCKER_IMAGE]),
            accept(&["*/*"]),
        ]
    });
    &CLIENTS
}

const IMAGES_ALONE: usize = 2;
const ANYTHING: usize = 3;

/// Two indexes, an image of each, and an image of none.
const NAMES: [&str; 5] = ["index a", "index b", "a", "b", "single"];

static DIGESTS: LazyLock<[Digest; 5]> =
    LazyLock::new(|| NAMES.map(|name| Digest::of(Algorithm::Sha256, name.as_bytes())));

fn digest(of: &str) -> Digest {
    let at = NAMES.iter().position(|name| *name == of).unwrap();
    DIGESTS[at]
}

fn name(of: &Digest) -> &'static str {
    let at = DIGESTS.iter().position(|digest| digest == of).unwrap();
    NAMES[at]
}

fn is_index(name: &str) -> bool {
    name.starts_with("index")
}

fn lists(index: &str, image: &str) -> bool {
    index.strip_prefix("index ") == Some(image)
}

fn media_type(name: &str) -> MediaType {
    let media_type = if is_index(name) { OCI_INDEX } else { OCI_IMAGE };
    media_type.parse().unwrap()
}

fn variant(client: usize, name: &str, since: u64, confirmed: u64) -> Variant {
    let accept = &clients()[client];
    Variant {
        accept: accept.key(),
        digest: digest(name),
        media_type: media_type(name),
        accepts_indexes: accept.lists_indexes(),
        confirmed_at: at(confirmed),
        first_seen_at: at(since),
        previous: None,
        history: Vec::new(),
    }
}

fn record(variants: Vec<Variant>) -> TagRecord {
    TagRecord { variants }
}

/// What is chosen, everything being cached but `uncached`.
fn chosen_without(record: &TagRecord, reader: TagReader<'_>, uncached: Option<&str>) -> Option<ResolvedTag> {
    let is_cached = |digest: &Digest| Some(name(digest)) != uncached;
    let known = |index: &Digest, image: &Digest| is_cached(index).then(|| lists(name(index), name(image)));
    record.newest(reader, &known, &is_cached)
}

fn chosen(record: &TagRecord, reader: TagReader<'_>) -> Option<ResolvedTag> {
    chosen_without(record, reader, None)
}

/// Every variant of this client: nothing, or any digest that it can be given, named since and confirmed at times up to 3.
fn every_variant(client: usize) -> Vec<Option<Variant>> {
    let mut all = vec![None];
    for name in NAMES {
        if client == IMAGES_ALONE && is_index(name) {
            continue;
        }
        for confirmed in 1..=3 {
            all.extend((1..=confirmed).map(|since| Some(variant(client, name, since, confirmed))));
        }
    }
    all
}

/// Calls `check` with every record of these three clients.
fn with_every_record(of: [usize; 3], mut check: impl FnMut(&TagRecord)) {
    let [first, second, third] = of.map(every_variant);
    for one in &first {
        for two in &second {
            for three in &third {
                let variants = [one, two, three].into_iter().flatten().cloned();
                check(&record(variants.collect()));
            }
        }
    }
}

fn with_every_record_and_reader(mut check: impl FnMut(&TagRecord, TagReader<'_>)) {
    let clients = clients();
    for of in [[0, 1, IMAGES_ALONE], [0, IMAGES_ALONE, ANYTHING]] {
        with_every_record(of, |record| {
            for accept in clients {
                check(record, TagReader::Client(accept));
            }
            check(record, TagReader::Operator);
        });
    }
}

fn accepted<'a>(record: &'a TagRecord, reader: TagReader<'_>) -> Vec<&'a Variant> {
    let variants = record.variants.iter();
    variants
        .filter(|variant| match reader {
            TagReader::Client(accept) => {
                variant.accept == accept.key() || accept.accepts(&variant.media_type)
            }
            TagReader::Operator => true,
        })
        .collect()
}

#[test]
fn o01_the_choice_obeys_its_laws_over_every_small_record() {
    let mut checked = 0_u32;
    with_every_record_and_reader(|record, reader| {
        let accepted = accepted(record, reader);
        let Some(named) = chosen(record, reader) else {
            assert!(accepted.is_empty(), "{record:#?} {reader:?}");
            return;
        };
        let case = || format!("{record:#?}\n{reader:?}\n{named:?} {}", name(&named.digest));
        // 1. It is acceptable, and some client was told just this then.
        assert!(
            accepted
                .iter()
                .any(|one| one.digest == named.digest && one.confirmed_at == named.confirmed_at),
            "{}",
            case()
        );
        // 2. Nothing acceptable of the same kind was confirmed later.
        let kind = named.media_type.is_index();
        let of_kind = |one: &&&Variant| one.media_type.is_index() == kind;
        let latest = accepted.iter().filter(of_kind).map(|one| one.confirmed_at).max();
        assert_eq!(latest, Some(named.confirmed_at), "{}", case());
        // 3. Of a single kind the latest wins, whatever was given to this client's own set. So 2 says it.
        // 4. Nothing acceptable shows that the tag has moved since.
        let later = |one: &&&Variant| one.confirmed_at > named.confirmed_at;
        for later in accepted.iter().filter(later) {
            let is_substitute = |digest: &Digest| {
                let mut of = accepted.iter().filter(|one| one.digest == *digest);
                of.any(|one| !one.accepts_indexes)
            };
            let (index, image) = if kind {
                (&named.digest, &later.digest)
            } else {
                (&later.digest, &named.digest)
            };
            assert!(
                later.digest == named.digest || is_substitute(image) && lists(name(index), name(image)),
                "{}",
                case()
            );
        }
        checked += 1;
    });
    assert!(checked > 100_000, "{checked}");
}

#[test]
fn o01_ties_are_decided_by_what_was_named_and_not_by_its_place() {
    with_every_record_and_reader(|record, reader| {
        let mut turned = record.clone();
        turned.variants.reverse();
        assert_eq!(
            chosen(record, reader),
            chosen(&turned, reader),
            "{record:#?} {reader:?}"
        );
    });
}

#[test]
fn o01_a_confirmation_makes_no_answer_older() {
    with_every_record([0, 1, IMAGES_ALONE], |before| {
        for (client, accept) in clients().iter().enumerate() {
            for named in NAMES {
                if client == IMAGES_ALONE && is_index(named) {
                    continue;
                }
                let new = variant(client, named, 4, 4);
                let after = before.with_response(new.clone(), at(4), &|_| true).unwrap();
                let reader = TagReader::Client(accept);
                let own = chosen(&after, reader).unwrap();
                let is_own_or_better = own.digest == new.digest || own.media_type.is_index();
                assert!(is_own_or_better, "{before:#?} {named}: {own:?}");
                let (Some(old), Some(now)) = (
                    chosen(before, TagReader::Operator),
                    chosen(&after, TagReader::Operator),
                ) else {
                    continue;
                };
                // Either it stays, or the new response is it or has ended it.
                let is_ended = || {
                    let is_listed = lists(name(&old.digest), named);
                    !(is_index(name(&old.digest)) && is_listed && !new.accepts_indexes)
                };
                assert!(
                    now.digest == old.digest || now.digest == new.digest || is_ended(),
                    "{before:#?} {named}: {old:?} {now:?}"
                );
                assert!(now.confirmed_at >= old.confirmed_at || is_ended());
            }
        }
    });
}

#[test]
fn o01_what_is_not_cached_is_not_chosen_and_ends_what_is_fresh() {
    with_every_record([0, 1, IMAGES_ALONE], |record| {
        for reader in clients().iter().map(TagReader::Client) {
            for uncached in NAMES {
                let Some(named) = chosen_without(record, reader, Some(uncached)) else {
                    continue;
                };
                assert_ne!(name(&named.digest), uncached, "{record:#?}");
                let has_moved = record.variants.iter().any(|one| {
                    name(&one.digest) == uncached
                        && one.first_seen_at > named.confirmed_at
                        && !lists(name(&named.digest), uncached)
                });
                assert!(!has_moved || named.is_moved, "{record:#?} {reader:?} {uncached}");
            }
        }
    });
}

/// What a tag names: the index a, the index b, an image of none, or alone the image that is also one of b's.
const STATES: [&str; 4] = ["index a", "index b", "single", "b"];

/// What a registry gives to a client in this state.
fn given(state: &'static str, client: usize) -> &'static str {
    match state.strip_prefix("index ") {
        Some(image) if client >= IMAGES_ALONE => image,
        _ => state,
    }
}

#[derive(Clone)]
struct Tag {
    state: &'static str,
    /// Who asked since the tag moved last.
    asked: [bool; 4],
    record: TagRecord,
}

impl Tag {
    fn check(&self, clients: &[Accept; 4]) {
        // What was true of the tag when it was last asked about is what it names now.
        if !self.asked.contains(&true) {
            return;
        }
        for (client, accept) in clients.iter().enumerate() {
            let reader = TagReader::Client(accept);
            let Some(named) = chosen(&self.record, reader) else {
                continue;
            };
            let (own, chosen) = (given(self.state, client), name(&named.digest));
            let case = || {
                format!(
                    "{} {:?} {client}: {chosen}\n{:#?}",
                    self.state, self.asked, self.record
                )
            };
            // One of an index's images, given to those that take no index: nobody can tell whether the tag names it.
            let is_alike = lists(chosen, self.state) && !self.asked[0] && !self.asked[1];
            let is_true = is_alike || chosen == self.state || chosen == given(self.state, IMAGES_ALONE);
            let is_known = (0..4)
                .any(|other| self.asked[other] && accept.accepts(&media_type(given(self.state, other))));
            assert!(is_true || !is_known, "{}", case());
            assert!(is_true || named.is_moved, "{}", case());
            // Its own kind, where a client that is given the same has asked.
            let same = (0..4).any(|other| self.asked[other] && given(self.state, other) == own);
            if same && !is_alike && (client < ANYTHING || self.asked[client]) {
                assert_eq!(chosen, own, "{}", case());
            }
        }
    }

    fn walk(&self, depth: u64, clients: &[Accept; 4], histories: &mut u32) {
        self.check(clients);
        *histories += 1;
        let Some(left) = depth.checked_sub(1) else { return };
        let now = 100 - depth;
        for state in STATES.into_iter().filter(|state| *state != self.state) {
            let moved = Self {
                state,
                asked: [false; 4],
                record: self.record.clone(),
            };
            moved.walk(left, clients, histories);
        }
        for client in 0..4 {
            let variant = variant(client, given(self.state, client), now, now);
            let mut asked = self.asked;
            asked[client] = true;
            let record = self.record.with_response(variant, at(now), &|_| true).unwrap();
            let next = Self {
                asked,
                record,
                ..self.clone()
            };
            next.walk(left, clients, histories);
        }
    }
}

#[test]
fn o01_after_every_short_history_the_newest_word_wins_for_every_client() {
    let mut histories = 0;
    let tag = Tag {
        state: STATES[0],
        asked: [false; 4],
        record: TagRecord::default(),
    };
    tag.walk(5, clients(), &mut histories);
    assert!(histories > 15_000, "{histories}");
}

#[test]
fn o01_the_last_complete_image_follows_the_same_order() {
    let previous = |name: &str, seconds| {
        Some(Previous {
            digest: digest(name),
            media_type: media_type(name),
            confirmed_at: at(seconds),
        })
    };
    let known = |index: &Digest, image: &Digest| Some(lists(name(index), name(image)));
    let complete = |digest: &Digest| name(digest) != "b";
    let full = &clients()[0];
    let record = record(vec![
        Variant {
            previous: previous("single", 2),
            ..variant(1, "b", 3, 3)
        },
        variant(0, "index a", 1, 1),
    ]);
    let found = record.newest_or_previous(TagReader::Client(full), &known, &complete);
    assert_eq!(found.map(|named| name(&named.digest)), Some("single"));
    let newest = record.newest(TagReader::Client(full), &known, &|_| true);
    assert_eq!(newest.map(|named| name(&named.digest)), Some("b"));
}

#[test]
fn o01_a_slow_answer_that_names_what_was_replaced_is_not_the_newest() {
    let complete = |_: &Digest| true;
    let [docker, containerd, ..] = clients();
    let before = record(vec![variant(0, "index a", 1, 1)]);
    let moved = before
        .with_response(variant(0, "index b", 5, 5), at(5), &complete)
        .unwrap();
    // Asked at 4, before the tag moved, and answered at 9.
    let slow = Variant {
        first_seen_at: at(9),
        ..variant(1, "index a", 4, 4)
    };
    let after = moved.with_response(slow, at(9), &complete).unwrap();
    for accept in [docker, containerd] {
        let named = chosen(&after, TagReader::Client(accept)).unwrap();
        assert_eq!((name(&named.digest), named.is_moved), ("index b", false));
    }
    let own = moved.with_response(variant(0, "index a", 4, 4), at(9), &complete);
    assert_eq!(own, None, "a later request of the same set was answered already");
    // What nobody has heard of before is news, however slow the answer.
    let news = moved
        .with_response(variant(1, "single", 4, 4), at(9), &complete)
        .unwrap();
    let named = chosen(&news, TagReader::Client(docker)).unwrap();
    assert_eq!((name(&named.digest), named.confirmed_at), ("single", at(9)));
}

#[test]
fn t17_after_the_clock_was_set_back_the_newest_word_still_wins() {
    let complete = |_: &Digest| true;
    let mut held = TagRecord::default();
    for (client, named, seconds) in [
        (0, "index a", 5_000),
        (1, "index a", 6_000),
        (IMAGES_ALONE, "a", 100),
    ] {
        held = held
            .with_response(variant(client, named, seconds, seconds), at(seconds), &complete)
            .unwrap();
    }
    // IMAGES_ALONE asked when the clock was at 100: the others lie before that now, in their order.
    let times: Vec<_> = held.variants.iter().map(|one| one.confirmed_at).collect();
    let millis = Duration::from_millis;
    assert_eq!(times, [at(100), at(100) - millis(1), at(100) - millis(2)]);
    assert!(held.variants.iter().all(|one| one.first_seen_at <= at(100)));
    let moved = held
        .with_response(variant(1, "index b", 200, 200), at(200), &complete)
        .unwrap();
    for accept in &clients()[..2] {
        let named = chosen(&moved, TagReader::Client(accept)).unwrap();
        assert_eq!(name(&named.digest), "index b");
    }
}

#[test]
fn o01_many_accept_sets_do_not_drive_out_what_the_tag_named_for_others() {
    let complete = |_: &Digest| true;
    let mut held = TagRecord::default();
    let mut answered = |accept: u64, named: &str, seconds| {
        let variant = Variant {
            accept,
            ..variant(0, named, seconds, seconds)
        };
        held = held.with_response(variant, at(seconds), &complete).unwrap();
    };
    answered(1, "index a", 1);
    for seconds in 2..100 {
        answered(seconds, "index b", seconds);
    }
    let names: Vec<_> = held.variants.iter().map(|one| name(&one.digest)).collect();
    assert_eq!(names.len(), crate::store::tags::VARIANTS_MAX);
    assert_eq!(names.last(), Some(&"index a"));
    assert!(held.variants.iter().all(|one| one.history.len() <= HISTORY_MAX));
}
