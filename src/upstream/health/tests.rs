//! Laws of the state machine, over all short histories of requests in two repositories, of two kinds, by two principals.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::sync::LazyLock;

use http::Method;

use super::breaker::{FAILURES_MAX, WINDOW};
use super::*;
use crate::oci::failure::RedirectFailure;

const BUDGET: Duration = Duration::from_secs(2);
/// The wait for a response that does not come.
const LATE: Duration = Duration::from_secs(3);

/// A request: its kind, its repository and its principal, each one of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    is_list: bool,
    is_b: bool,
    principal: u8,
}

impl Asked {
    fn all() -> impl Iterator<Item = Asked> {
        (0..8_u8).map(|n| Asked {
            is_list: n & 1 > 0,
            is_b: n & 2 > 0,
            principal: n >> 2,
        })
    }

    fn kind(self) -> RequestKind {
        if self.is_list {
            RequestKind::List
        } else {
            RequestKind::Head
        }
    }

    fn endpoint(self) -> &'static Endpoint {
        static ALL: LazyLock<[Endpoint; 4]> = LazyLock::new(|| {
            [
                endpoint("/v2/a/manifests/1"),
                endpoint("/v2/b/manifests/1"),
                endpoint("/v2/a/tags/list"),
                endpoint("/v2/b/tags/list"),
            ]
        });
        &ALL[usize::from(self.is_list) * 2 + usize::from(self.is_b)]
    }

    fn principal(self) -> [u8; 32] {
        [self.principal; 32]
    }
}

fn endpoint(path: &str) -> Endpoint {
    Endpoint::parse(&Method::GET, path, None).unwrap()
}

fn tag(repository: &str) -> Endpoint {
    endpoint(&format!("/v2/{repository}/manifests/1"))
}

/// What happens to a request, after [`Self::after`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Answered,
    Denied,
    Failed,
    TimedOut,
    /// An asker's budget; the request goes on.
    Expired,
    /// An asker's budget, while the request waits for a place.
    ExpiredQueued,
    Abandoned,
}

use Event::{Abandoned, Answered, Denied, Expired, ExpiredQueued, Failed, TimedOut};

struct World {
    detector: FailureDetector,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self {
            detector: FailureDetector::default(),
            now: Instant::now(),
        }
    }

    /// Sends a request for it, and what happens happens.
    fn happens(&mut self, event: Event, asked: Asked) -> Vec<BreakerChange> {
        self.happens_to(event, (asked.kind(), asked.endpoint(), asked.principal()))
    }

    fn happens_to(
        &mut self,
        event: Event,
        (kind, endpoint, principal): (RequestKind, &Endpoint, [u8; 32]),
    ) -> Vec<BreakerChange> {
        if event == ExpiredQueued {
            self.now += LATE;
            return self.detector.record_timeout(principal, endpoint, LATE, self.now);
        }
        let id = self.detector.sent(kind, endpoint, principal, self.now);
        self.now += match event {
            TimedOut | Expired => LATE,
            _ => Duration::from_millis(1),
        };
        let ended = match event {
            Answered => RequestOutcome::Response,
            Denied => RequestOutcome::Denied,
            Failed => RequestOutcome::ServerError(UpstreamFailure::Status(500)),
            TimedOut => RequestOutcome::NoResponse(UpstreamFailure::Timeout),
            Expired => {
                let changes = self.detector.record_timeout(principal, endpoint, LATE, self.now);
                self.detector.cancel(id);
                return changes;
            }
            Abandoned | ExpiredQueued => {
                self.detector.cancel(id);
                return Vec::new();
            }
        };
        self.detector.finish(id, ended, self.now)
    }

    fn wait(&mut self, asked: Asked) -> WaitLimit {
        self.wait_of(asked.kind(), asked.endpoint(), asked.principal())
    }

    fn wait_for(&mut self, kind: RequestKind, endpoint: &Endpoint) -> WaitLimit {
        self.wait_of(kind, endpoint, [0; 32])
    }

    fn wait_of(&mut self, kind: RequestKind, endpoint: &Endpoint, principal: [u8; 32]) -> WaitLimit {
        let query = WaitQuery {
            kind,
            endpoint,
            principal,
            needs_token: false,
        };
        self.detector.wait(&query, BUDGET, self.now)
    }

    fn expires(&mut self, endpoint: &Endpoint) -> Vec<BreakerChange> {
        self.happens_to(Expired, (RequestKind::Head, endpoint, [0; 32]))
    }
}

/// Every history of so many of these events of any request that `is_part` of it.
fn histories(length: u32, events: &[Event], is_part: fn(&Asked) -> bool) -> Vec<Vec<(Event, Asked)>> {
    let steps: Vec<_> = events
        .iter()
        .flat_map(|event| Asked::all().filter(is_part).map(|asked| (*event, asked)))
        .collect();
    let mut all = vec![Vec::new()];
    for _ in 0..length {
        all = all
            .iter()
            .flat_map(|history| {
                steps.iter().map(|step| {
                    let mut longer = history.clone();
                    longer.push(*step);
                    longer
                })
            })
            .collect();
    }
    all
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "a filter of iterators takes a reference"
)]
fn by_one_principal(asked: &Asked) -> bool {
    asked.principal == 0
}

const ALL: [Event; 7] = [
    Answered,
    Denied,
    Failed,
    TimedOut,
    Expired,
    ExpiredQueued,
    Abandoned,
];

#[test]
fn t05_laws_of_every_short_history() {
    for history in histories(3, &ALL, |_| true).into_iter().chain(histories(
        4,
        &[Answered, Denied, Failed, TimedOut],
        by_one_principal,
    )) {
        let mut world = World::new();
        for (event, asked) in &history {
            let before: Vec<_> = Asked::all().map(|other| world.wait(other)).collect();
            world.happens(*event, *asked);
            let after: Vec<_> = Asked::all().map(|other| world.wait(other)).collect();
            let own = world.wait(*asked);
            match event {
                Answered => assert_eq!(
                    own,
                    WaitLimit::Full,
                    "a response ends every suspicion: {history:?}"
                ),
                Expired | TimedOut => {
                    assert_ne!(own, WaitLimit::Full, "a silence is one at once: {history:?}")
                }
                Abandoned | ExpiredQueued => {
                    assert_eq!(after, before, "what was not sent is no sign: {history:?}");
                }
                Denied | Failed => {}
            }
            for (n, other) in Asked::all().enumerate() {
                if other.kind() != asked.kind() {
                    assert_eq!(after[n], before[n], "other kinds are as before: {history:?}");
                }
            }
            let is_failing = after.iter().any(|wait| *wait != WaitLimit::Full);
            let probe = world.detector.next_probe(world.now);
            assert!(
                !is_failing || probe.is_some_and(|(due, _)| due <= world.now + Duration::from_secs(1)),
                "what clients ask for is probed within a second: {history:?}"
            );
        }
    }
}

#[test]
fn t04_one_bad_repository_leaves_others_alone() {
    let is_a = |asked: &Asked| !asked.is_b && asked.principal == 0 && !asked.is_list;
    for history in histories(5, &[Answered, Denied, Failed, TimedOut, Expired], is_a) {
        let mut world = World::new();
        let b = Asked {
            is_b: true,
            ..history[0].1
        };
        let mut errors_alone = true;
        for (event, a) in &history {
            world.happens(*event, *a);
            errors_alone &= matches!(event, Answered | Failed | Denied);
            let wait = world.wait(b);
            assert_ne!(wait, WaitLimit::None, "it is asked all the same: {history:?}");
            if errors_alone {
                assert_eq!(wait, WaitLimit::Full, "a 5xx is a response: {history:?}");
            }
            // Without a look at what fails, the history would not go on as it was.
            let mut copy = World::new();
            for (event, a) in &history {
                copy.happens(*event, *a);
            }
            copy.happens(Answered, b);
            assert_eq!(
                copy.wait(b),
                WaitLimit::Full,
                "its own response tells: {history:?}"
            );
        }
    }
}

#[test]
fn t04_responses_meanwhile_keep_a_silence_to_its_repository() {
    let (mut world, a, b) = (World::new(), tag("a"), tag("b"));
    for _ in 0..10 {
        let id = world.detector.sent(RequestKind::Head, &a, [0; 32], world.now);
        world.now += Duration::from_secs(1);
        world.happens_to(Answered, (RequestKind::Head, &b, [1; 32]));
        world.now += Duration::from_secs(1);
        world.detector.record_timeout([0; 32], &a, BUDGET, world.now);
        world.detector.cancel(id);
        assert_eq!(world.wait_for(RequestKind::Head, &b), WaitLimit::Full);
    }
    assert_eq!(world.wait_for(RequestKind::Head, &a), WaitLimit::None);
}

#[test]
fn t05_twenty_silent_images_cost_one_budget() {
    let mut world = World::new();
    let mut waits = Vec::new();
    for n in 0..20 {
        let image = tag(&format!("library/{n}"));
        let wait = world.wait_for(RequestKind::Head, &image);
        waits.push(wait);
        let waited = match wait {
            WaitLimit::Full => BUDGET,
            WaitLimit::Short => SHORT_WAIT,
            WaitLimit::None => continue,
        };
        world.detector.sent(RequestKind::Head, &image, [0; 32], world.now);
        world.now += waited;
        world.detector.record_timeout([0; 32], &image, waited, world.now);
    }
    assert_eq!(
        waits[..4],
        [
            WaitLimit::Full,
            WaitLimit::Short,
            WaitLimit::Short,
            WaitLimit::None
        ]
    );
    assert!(waits[4..].iter().all(|wait| *wait == WaitLimit::None));
    let open = world.detector.open_breaker().unwrap();
    assert_eq!(
        (open.scope, open.cause),
        (
            FailureScope::RequestKind(RequestKind::Head),
            UpstreamFailure::RevalidateTimeout
        )
    );
}

#[test]
fn t05_one_request_that_hangs_is_waited_for_once() {
    // One tag, polled: all its askers share one request.
    let (mut world, tag) = (World::new(), tag("a"));
    world.detector.sent(RequestKind::Head, &tag, [0; 32], world.now);
    let mut waits = Vec::new();
    for _ in 0..4 {
        let wait = world.wait_for(RequestKind::Head, &tag);
        waits.push(wait);
        let waited = match wait {
            WaitLimit::Full => BUDGET,
            WaitLimit::Short => SHORT_WAIT,
            WaitLimit::None => continue,
        };
        world.now += waited;
        world.detector.record_timeout([0; 32], &tag, waited, world.now);
    }
    assert_eq!(
        waits,
        [
            WaitLimit::Full,
            WaitLimit::Short,
            WaitLimit::Short,
            WaitLimit::None
        ]
    );
}

#[test]
fn t05_many_askers_of_one_request_are_one_silence() {
    let (mut world, tag) = (World::new(), tag("a"));
    world.detector.sent(RequestKind::Head, &tag, [0; 32], world.now);
    world.now += BUDGET;
    for _ in 0..10 {
        world.detector.record_timeout([0; 32], &tag, BUDGET, world.now);
    }
    assert_eq!(world.wait_for(RequestKind::Head, &tag), WaitLimit::Short);
}

#[test]
fn t05_slow_responses_shorten_the_wait_until_a_quick_one() {
    let (mut world, a, b) = (World::new(), tag("a"), tag("b"));
    let mut takes = |millis: u64, of: &Endpoint| {
        let id = world.detector.sent(RequestKind::Head, of, [0; 32], world.now);
        world.now += Duration::from_millis(millis);
        world.detector.finish(id, RequestOutcome::Response, world.now);
        (
            world.wait_for(RequestKind::Head, &a),
            world.wait_for(RequestKind::Head, &b),
        )
    };
    assert_eq!(takes(900, &a), (WaitLimit::Full, WaitLimit::Full));
    assert_eq!(takes(1_900, &a), (WaitLimit::Short, WaitLimit::Short));
    assert_eq!(takes(100, &b), (WaitLimit::Short, WaitLimit::Full));
    assert_eq!(takes(100, &a), (WaitLimit::Full, WaitLimit::Full));
}

#[test]
fn t04_a_slow_repository_has_another_one_looked_at() {
    let (mut world, a, b) = (World::new(), tag("a"), tag("b"));
    world.happens_to(Answered, (RequestKind::Head, &b, [0; 32]));
    let id = world.detector.sent(RequestKind::Head, &a, [0; 32], world.now);
    world.now += Duration::from_millis(1_900);
    world.detector.finish(id, RequestOutcome::Response, world.now);
    let scope = FailureScope::RequestKind(RequestKind::Head);
    assert_eq!(
        world.detector.next_probe(world.now),
        Some((world.now, scope.clone()))
    );
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(b.clone()));
    world.happens_to(Answered, (RequestKind::Head, &b, [0; 32]));
    assert_eq!(world.wait_for(RequestKind::Head, &b), WaitLimit::Full);
    assert_eq!(world.wait_for(RequestKind::Head, &a), WaitLimit::Short);
    assert_eq!(world.detector.next_probe(world.now), None);
}

#[test]
fn t04_a_silent_repository_has_another_one_looked_at_first() {
    let (mut world, a, b) = (World::new(), tag("a"), tag("b"));
    world.happens_to(Answered, (RequestKind::Head, &b, [0; 32]));
    world.expires(&a);
    let scope = FailureScope::RequestKind(RequestKind::Head);
    let (due, probed) = world.detector.next_probe(world.now).unwrap();
    assert_eq!((due, &probed), (world.now, &scope));
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(b));
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(a));
}

#[test]
fn t05_what_a_client_was_turned_away_with_is_probed_next() {
    let (mut world, scope) = (World::new(), FailureScope::RequestKind(RequestKind::Head));
    for name in ["a", "b", "a"] {
        world.expires(&tag(name));
    }
    let c = tag("c");
    assert_eq!(world.wait_for(RequestKind::Head, &c), WaitLimit::None);
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(c));
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(tag("a")));
}

#[test]
fn t05_a_token_service_fails_apart_from_the_registry() {
    let mut world = World::new();
    for name in ["a", "b", "a"] {
        let id = world
            .detector
            .sent(RequestKind::Head, &tag(name), [0; 32], world.now);
        world.now += Duration::from_millis(5);
        world.detector.waiting_for_token(id, world.now);
        world.now += BUDGET;
        world
            .detector
            .record_timeout([0; 32], &tag(name), BUDGET, world.now);
        world.detector.cancel(id);
    }
    let c = tag("c");
    let mut waits = |needs_token| {
        let query = WaitQuery {
            kind: RequestKind::Head,
            endpoint: &c,
            principal: [0; 32],
            needs_token,
        };
        world.detector.wait(&query, BUDGET, world.now)
    };
    assert_eq!((waits(true), waits(false)), (WaitLimit::None, WaitLimit::Full));
    // An answer of the registry's to one with a token of his own says nothing of the token service.
    world.happens_to(Answered, (RequestKind::Head, &c, [1; 32]));
    assert_eq!(
        world.detector.open_breaker().unwrap().scope,
        FailureScope::RequestKind(RequestKind::Token)
    );
    let id = world.detector.sent(RequestKind::Head, &c, [0; 32], world.now);
    world.detector.waiting_for_token(id, world.now);
    let closed = world
        .detector
        .token_finished(id, RequestOutcome::Response, world.now);
    assert_eq!(closed.len(), 1, "{closed:?}");
    assert!(world.detector.open_breaker().is_none());
}

#[test]
fn t05_a_denial_half_opens_and_the_next_request_decides() {
    let mut world = World::new();
    for name in ["a", "b", "a"] {
        world.expires(&tag(name));
    }
    let a = tag("a");
    for _ in 0..3 {
        world.happens_to(Denied, (RequestKind::Head, &a, [0; 32]));
        assert_eq!(
            world.wait_for(RequestKind::Head, &a),
            WaitLimit::Short,
            "it is asked"
        );
        world.expires(&a);
        assert_eq!(world.wait_for(RequestKind::Head, &a), WaitLimit::None, "at once");
    }
    world.happens_to(Denied, (RequestKind::Head, &a, [0; 32]));
    world.happens_to(Answered, (RequestKind::Head, &a, [0; 32]));
    assert_eq!(world.wait_for(RequestKind::Head, &a), WaitLimit::Full);
}

#[test]
fn t05_probe_that_says_nothing_half_opens() {
    let (mut world, a, scope) = (
        World::new(),
        tag("a"),
        FailureScope::RequestKind(RequestKind::Head),
    );
    for name in ["a", "b", "a"] {
        world.expires(&tag(name));
    }
    for _ in 0..3 {
        let began = world.now;
        world.expires(&a);
        world.detector.probe_ended(&scope, began);
        assert_eq!(
            world.wait_for(RequestKind::Head, &a),
            WaitLimit::None,
            "it failed"
        );
        let began = world.now + LATE;
        world.detector.probe_ended(&scope, began);
        assert_eq!(
            world.wait_for(RequestKind::Head, &tag("c")),
            WaitLimit::Short,
            "it is asked"
        );
    }
}

#[test]
fn t04_errors_of_one_principal_keep_no_other_waiting() {
    let (ours, theirs) = ([0; 32], [1; 32]);
    for cause in [UpstreamFailure::Status(500), UpstreamFailure::ConnectionReset] {
        let mut world = World::new();
        let fails = |world: &mut World, name: &str, principal| {
            let id = world
                .detector
                .sent(RequestKind::Head, &tag(name), principal, world.now);
            let ended = match cause {
                UpstreamFailure::ConnectionReset => RequestOutcome::NoResponse(cause),
                _ => RequestOutcome::ServerError(cause),
            };
            world.detector.finish(id, ended, world.now);
        };
        for name in ["a", "a", "a", "b", "b", "b"] {
            fails(&mut world, name, theirs);
        }
        for name in ["a", "b"] {
            let wait = world.wait_of(RequestKind::Head, &tag(name), theirs);
            assert_eq!(wait, WaitLimit::None, "{cause}");
            let wait = world.wait_of(RequestKind::Head, &tag(name), ours);
            assert_eq!(wait, WaitLimit::Full, "{cause}");
        }
        fails(&mut world, "a", ours);
        let wait = world.wait_of(RequestKind::Head, &tag("a"), ours);
        assert_eq!(wait, WaitLimit::None, "{cause}: it is no other's alone");
    }
}

#[test]
fn t05_silence_of_one_principal_concerns_all() {
    let mut world = World::new();
    for _ in 0..3 {
        world.happens_to(TimedOut, (RequestKind::Head, &tag("a"), [1; 32]));
        world.now -= LATE;
    }
    assert_eq!(world.wait_for(RequestKind::Head, &tag("a")), WaitLimit::None);
}

#[test]
fn t04_an_error_concerns_what_was_asked_for_alone() {
    let mut world = World::new();
    let (bad, good) = (endpoint("/v2/a/manifests/bad"), endpoint("/v2/a/manifests/good"));
    for n in 0..FAILURES_MAX {
        assert_eq!(world.wait_for(RequestKind::Head, &bad), WaitLimit::Full, "{n}");
        world.happens_to(Failed, (RequestKind::Head, &bad, [0; 32]));
    }
    assert_eq!(world.wait_for(RequestKind::Head, &bad), WaitLimit::None);
    assert_eq!(world.wait_for(RequestKind::Head, &good), WaitLimit::Full);
    world.happens_to(Answered, (RequestKind::Head, &good, [0; 32]));
    assert_eq!(world.wait_for(RequestKind::Head, &bad), WaitLimit::None);
    world.happens_to(Answered, (RequestKind::Head, &bad, [0; 32]));
    assert_eq!(world.wait_for(RequestKind::Head, &bad), WaitLimit::Full);
}

#[test]
fn no_connection_concerns_every_request() {
    let (mut world, a) = (World::new(), tag("a"));
    let fails = |world: &mut World| {
        let id = world.detector.sent(RequestKind::Head, &a, [0; 32], world.now);
        world.detector.finish(
            id,
            RequestOutcome::NoConnection(UpstreamFailure::ConnectionRefused),
            world.now,
        )
    };
    assert_eq!(fails(&mut world), []);
    assert_eq!(fails(&mut world), []);
    assert_eq!(
        fails(&mut world),
        [opened(
            FailureScope::Connection,
            UpstreamFailure::ConnectionRefused
        )]
    );
    for asked in Asked::all() {
        assert_eq!(world.wait(asked), WaitLimit::None);
    }
    let closed = world.happens_to(Denied, (RequestKind::List, &a, [0; 32]));
    assert_eq!(closed.len(), 1, "any response shows a connection");
    // Far apart they open nothing.
    for _ in 0..10 {
        world.now += WINDOW;
        assert_eq!(fails(&mut world), []);
        world.now += Duration::from_secs(1);
    }
}

#[test]
fn a_limit_or_a_broken_object_is_a_response() {
    for (cause, expected) in [
        (UpstreamFailure::RateLimited, RequestOutcome::Response),
        (UpstreamFailure::Malformed, RequestOutcome::Response),
        (UpstreamFailure::TooLarge, RequestOutcome::Response),
        (
            UpstreamFailure::Redirects(RedirectFailure::TooMany),
            RequestOutcome::Response,
        ),
        (UpstreamFailure::Busy, RequestOutcome::Unknown),
        (UpstreamFailure::NotRegistry, RequestOutcome::Unknown),
        (UpstreamFailure::TokenService, RequestOutcome::Unknown),
        (
            UpstreamFailure::ConnectionReset,
            RequestOutcome::NoResponse(UpstreamFailure::ConnectionReset),
        ),
        (
            UpstreamFailure::Status(503),
            RequestOutcome::ServerError(UpstreamFailure::Status(503)),
        ),
        (
            UpstreamFailure::Dns,
            RequestOutcome::NoConnection(UpstreamFailure::Dns),
        ),
    ] {
        assert_eq!(
            RequestOutcome::of(&UpstreamResponse::unavailable(cause), true),
            expected,
            "{cause}"
        );
    }
    let storage = UpstreamResponse {
        is_redirect_target: true,
        ..UpstreamResponse::unavailable(UpstreamFailure::ConnectionRefused)
    };
    assert_eq!(
        RequestOutcome::of(&storage, true),
        RequestOutcome::ServerError(UpstreamFailure::ConnectionRefused)
    );
    assert_eq!(
        RequestOutcome::of(&UpstreamResponse::unavailable(UpstreamFailure::Timeout), false),
        RequestOutcome::Unknown,
        "another URL has the last word"
    );
}

#[test]
fn probes_come_each_second_while_clients_ask_and_rarely_otherwise() {
    let (mut world, scope) = (World::new(), FailureScope::RequestKind(RequestKind::Head));
    for name in ["a", "b", "a"] {
        world.expires(&tag(name));
    }
    let waits = |world: &mut World| {
        let (due, _) = world.detector.next_probe(world.now).unwrap();
        let wait = due.saturating_duration_since(world.now);
        world.now = due.max(world.now);
        world.detector.take_probe(&scope, world.now);
        wait.as_secs()
    };
    waits(&mut world);
    let quiet: Vec<_> = (0..8).map(|_| waits(&mut world)).collect();
    assert_eq!(quiet, [1, 2, 4, 8, 16, 30, 30, 30]);
    world.now += Duration::from_secs(10);
    world.wait_for(RequestKind::Head, &tag("a"));
    assert_eq!(waits(&mut world), 0, "a request after a quiet time starts one");
    for _ in 0..5 {
        world.now += Duration::from_millis(100);
        world.wait_for(RequestKind::Head, &tag("a"));
        let (due, _) = world.detector.next_probe(world.now).unwrap();
        assert!(due <= world.now + Duration::from_secs(1));
        waits(&mut world);
    }
}

#[test]
fn t05_names_that_strangers_choose_take_bounded_memory() {
    let mut world = World::new();
    for n in 0..3_000 {
        let name = tag(&format!("made/up-{n}"));
        let event = if n % 2 == 0 { Failed } else { TimedOut };
        world.happens_to(event, (RequestKind::Head, &name, [0; 32]));
        world.now -= LATE / 2;
    }
    assert_eq!(world.detector.repositories.len(), REPOSITORIES_MAX);
    assert!(world.detector.pending.is_empty());
    world.now += FORGET_AFTER * 2;
    world.detector.next_probe(world.now);
    assert_eq!(world.detector.repositories.len(), 0);
}
