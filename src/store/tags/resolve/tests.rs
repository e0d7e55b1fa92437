//! Tag resolution: every small record against every rule, and every short history of a tag against its registry.

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

/// Two clients that accept everything, one that accepts no index, and one without an `Accept` header.
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

/// Two indexes, an image of each, and an image of neither.
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
        is_by_record: false,
        history: Vec::new(),
    }
}

fn record(variants: Vec<Variant>) -> TagRecord {
    TagRecord { variants }
}

/// The chosen digest if everything except `uncached` is cached.
fn chosen_without(record: &TagRecord, reader: TagReader<'_>, uncached: Option<&str>) -> Option<ResolvedTag> {
    let is_cached = |digest: &Digest| Some(name(digest)) != uncached;
    let known = |index: &Digest, image: &Digest| is_cached(index).then(|| lists(name(index), name(image)));
    record.newest(reader, &known, &is_cached)
}

fn chosen(record: &TagRecord, reader: TagReader<'_>) -> Option<ResolvedTag> {
    chosen_without(record, reader, None)
}

/// Every variant of this client: none, or any digest that it can get, first seen and confirmed at times up to 3.
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
fn o01_resolve_obeys_rules_for_every_small_record() {
    let mut checked = 0_u32;
    with_every_record_and_reader(|record, reader| {
        let accepted = accepted(record, reader);
        let Some(named) = chosen(record, reader) else {
            assert!(accepted.is_empty(), "{record:#?} {reader:?}");
            return;
        };
        let case = || format!("{record:#?}\n{reader:?}\n{named:?} {}", name(&named.digest));
        // Rule 1: it is acceptable, and some client got exactly this response at that time.
        assert!(
            accepted
                .iter()
                .any(|one| one.digest == named.digest && one.confirmed_at == named.confirmed_at),
            "{}",
            case()
        );
        // Rule 2: no acceptable variant of the same kind was confirmed later.
        let kind = named.media_type.is_index();
        let of_kind = |one: &&&Variant| one.media_type.is_index() == kind;
        let latest = accepted.iter().filter(of_kind).map(|one| one.confirmed_at).max();
        assert_eq!(latest, Some(named.confirmed_at), "{}", case());
        // Rule 3: of one kind the latest wins, regardless of what this client's own set got (implied by 2). Rule 4: no
        // acceptable variant shows that the tag has moved since.
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
fn o01_resolve_ties_do_not_depend_on_variant_order() {
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
fn o01_confirmation_never_makes_resolution_older() {
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
                // The choice stays, or the new response is the choice or outdates it.
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
fn o01_uncached_variant_is_not_chosen_but_ends_freshness() {
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

/// Possible states of a tag: index a, index b, an image of neither, or the image of b on its own.
const STATES: [&str; 4] = ["index a", "index b", "single", "b"];

/// The response of a registry to a client in this state.
fn response_for(state: &'static str, client: usize) -> &'static str {
    match state.strip_prefix("index ") {
        Some(image) if client >= IMAGES_ALONE => image,
        _ => state,
    }
}

#[derive(Clone)]
struct Tag {
    state: &'static str,
    /// The clients that revalidated since the tag last moved.
    asked: [bool; 4],
    record: TagRecord,
}

impl Tag {
    fn check(&self, clients: &[Accept; 4]) {
        // The tag still has the state of its last revalidation.
        if !self.asked.contains(&true) {
            return;
        }
        for (client, accept) in clients.iter().enumerate() {
            let reader = TagReader::Client(accept);
            let Some(named) = chosen(&self.record, reader) else {
                continue;
            };
            let (own, chosen) = (response_for(self.state, client), name(&named.digest));
            let case = || {
                format!(
                    "{} {:?} {client}: {chosen}\n{:#?}",
                    self.state, self.asked, self.record
                )
            };
            // An image of an index, sent to clients that accept no index: the tag may point to the index or to the
            // image.
            let is_alike = lists(chosen, self.state) && !self.asked[0] && !self.asked[1];
            let is_true =
                is_alike || chosen == self.state || chosen == response_for(self.state, IMAGES_ALONE);
            let is_known = (0..4).any(|other| {
                self.asked[other] && accept.accepts(&media_type(response_for(self.state, other)))
            });
            assert!(is_true || !is_known, "{}", case());
            assert!(is_true || named.is_moved, "{}", case());
            // The client's own kind, if a client with the same kind has revalidated.
            let same = (0..4).any(|other| self.asked[other] && response_for(self.state, other) == own);
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
            let variant = variant(client, response_for(self.state, client), now, now);
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
fn o01_newest_response_wins_after_every_short_history() {
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
fn o01_last_complete_image_follows_the_same_rules() {
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
fn o01_slow_response_with_replaced_digest_is_not_newest() {
    let complete = |_: &Digest| true;
    let [docker, containerd, ..] = clients();
    let before = record(vec![variant(0, "index a", 1, 1)]);
    let moved = before
        .with_response(variant(0, "index b", 5, 5), at(5), &complete)
        .unwrap();
    // Requested at 4, before the tag moved, and received at 9.
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
    assert_eq!(
        own, None,
        "a later request of the same set already got a response"
    );
    // A digest that is new for the tag is the newest, however slow the response.
    let news = moved
        .with_response(variant(1, "single", 4, 4), at(9), &complete)
        .unwrap();
    let named = chosen(&news, TagReader::Client(docker)).unwrap();
    assert_eq!((name(&named.digest), named.confirmed_at), ("single", at(9)));
}

#[test]
fn t17_newest_response_wins_after_clock_set_back() {
    let complete = |_: &Digest| true;
    let mut cached = TagRecord::default();
    for (client, named, seconds) in [
        (0, "index a", 5_000),
        (1, "index a", 6_000),
        (IMAGES_ALONE, "a", 100),
    ] {
        cached = cached
            .with_response(variant(client, named, seconds, seconds), at(seconds), &complete)
            .unwrap();
    }
    // The request of IMAGES_ALONE was at clock time 100; all other confirmations move to before it, in their order.
    let times: Vec<_> = cached.variants.iter().map(|one| one.confirmed_at).collect();
    let millis = Duration::from_millis;
    assert_eq!(times, [at(100), at(100) - millis(1), at(100) - millis(2)]);
    assert!(cached.variants.iter().all(|one| one.first_seen_at <= at(100)));
    let moved = cached
        .with_response(variant(1, "index b", 200, 200), at(200), &complete)
        .unwrap();
    for accept in &clients()[..2] {
        let named = chosen(&moved, TagReader::Client(accept)).unwrap();
        assert_eq!(name(&named.digest), "index b");
    }
}

#[test]
fn o01_many_accept_sets_do_not_displace_other_digests() {
    let complete = |_: &Digest| true;
    let mut cached = TagRecord::default();
    let mut answered = |accept: u64, named: &str, seconds| {
        let variant = Variant {
            accept,
            ..variant(0, named, seconds, seconds)
        };
        cached = cached.with_response(variant, at(seconds), &complete).unwrap();
    };
    answered(1, "index a", 1);
    for seconds in 2..100 {
        answered(seconds, "index b", seconds);
    }
    let names: Vec<_> = cached.variants.iter().map(|one| name(&one.digest)).collect();
    assert_eq!(names.len(), crate::store::tags::VARIANTS_MAX);
    assert_eq!(names.last(), Some(&"index a"));
    assert!(cached.variants.iter().all(|one| one.history.len() <= HISTORY_MAX));
}
