//! Rules of the failure detector, checked over all short histories of requests in two repositories, of two kinds, by
//! two principals.
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
/// The wait for a missing response.
const LATE: Duration = Duration::from_secs(3);

/// A request: its kind, repository and principal, two of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TestRequest {
    is_list: bool,
    is_b: bool,
    principal: u8,
}

impl TestRequest {
    fn all() -> impl Iterator<Item = TestRequest> {
        (0..8_u8).map(|n| TestRequest {
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
    /// A caller's timeout expires; the request continues.
    Expired,
    /// A caller's timeout expires while the request is queued.
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

    /// Sends this request and applies the event.
    fn happens(&mut self, event: Event, request: TestRequest) -> Vec<BreakerChange> {
        self.happens_to(event, (request.kind(), request.endpoint(), request.principal()))
    }

    fn happens_to(
        &mut self,
        event: Event,
        (kind, endpoint, principal): (RequestKind, &Endpoint, [u8; 32]),
    ) -> Vec<BreakerChange> {
        if event == ExpiredQueued {
            self.now += LATE;
            return self
                .detector
                .record_timeout(principal, (endpoint, false), LATE, self.now);
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
                let changes = self
                    .detector
                    .record_timeout(principal, (endpoint, false), LATE, self.now);
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

    fn wait(&mut self, request: TestRequest) -> WaitLimit {
        self.wait_of(request.kind(), request.endpoint(), request.principal())
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

/// All histories of this length, of these events, for all requests that match `is_part`.
fn histories(
    length: u32,
    events: &[Event],
    is_part: fn(&TestRequest) -> bool,
) -> Vec<Vec<(Event, TestRequest)>> {
    let steps: Vec<_> = events
        .iter()
        .flat_map(|event| {
            TestRequest::all()
                .filter(is_part)
                .map(|request| (*event, request))
        })
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
    reason = "an iterator filter takes a reference"
)]
fn by_one_principal(request: &TestRequest) -> bool {
    request.principal == 0
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
fn t05_breaker_rules_over_all_short_histories() {
    for history in histories(3, &ALL, |_| true).into_iter().chain(histories(
        4,
        &[Answered, Denied, Failed, TimedOut],
        by_one_principal,
    )) {
        let mut world = World::new();
        for (event, request) in &history {
            let before: Vec<_> = TestRequest::all().map(|other| world.wait(other)).collect();
            world.happens(*event, *request);
            let after: Vec<_> = TestRequest::all().map(|other| world.wait(other)).collect();
            let own = world.wait(*request);
            match event {
                Answered => assert_eq!(own, WaitLimit::Full, "a response closes every scope: {history:?}"),
                Expired | TimedOut => {
                    assert_ne!(
                        own,
                        WaitLimit::Full,
                        "a missing response is suspected at once: {history:?}"
                    );
                }
                Abandoned | ExpiredQueued => {
                    assert_eq!(after, before, "a queued request changes nothing: {history:?}");
                }
                Denied | Failed => {}
            }
            for (n, other) in TestRequest::all().enumerate() {
                if other.kind() != request.kind() {
                    assert_eq!(after[n], before[n], "other kinds are unchanged: {history:?}");
                }
            }
            let is_failing = after.iter().any(|wait| *wait != WaitLimit::Full);
            let probe = world.detector.next_probe(world.now);
            assert!(
                !is_failing || probe.is_some_and(|(due, _)| due <= world.now + Duration::from_secs(1)),
                "requested content is probed within a second: {history:?}"
            );
        }
    }
}

#[test]
fn t04_failing_repository_leaves_others_closed() {
    let is_a = |request: &TestRequest| !request.is_b && request.principal == 0 && !request.is_list;
    for history in histories(5, &[Answered, Denied, Failed, TimedOut, Expired], is_a) {
        let mut world = World::new();
        let b = TestRequest {
            is_b: true,
            ..history[0].1
        };
        let mut errors_alone = true;
        for (event, a) in &history {
            world.happens(*event, *a);
            errors_alone &= matches!(event, Answered | Failed | Denied);
            let wait = world.wait(b);
            assert_ne!(wait, WaitLimit::None, "the request is sent: {history:?}");
            if errors_alone {
                assert_eq!(wait, WaitLimit::Full, "a 5xx is a response: {history:?}");
            }
            // Querying the wait changes the state, so a copy is queried.
            let mut copy = World::new();
            for (event, a) in &history {
                copy.happens(*event, *a);
            }
            copy.happens(Answered, b);
            assert_eq!(
                copy.wait(b),
                WaitLimit::Full,
                "its own response decides: {history:?}"
            );
        }
    }
}

#[test]
fn t04_other_responses_confine_timeout_to_its_repository() {
    let (mut world, a, b) = (World::new(), tag("a"), tag("b"));
    for _ in 0..10 {
        let id = world.detector.sent(RequestKind::Head, &a, [0; 32], world.now);
        world.now += Duration::from_secs(1);
        world.happens_to(Answered, (RequestKind::Head, &b, [1; 32]));
        world.now += Duration::from_secs(1);
        world
            .detector
            .record_timeout([0; 32], (&a, false), BUDGET, world.now);
        world.detector.cancel(id);
        assert_eq!(world.wait_for(RequestKind::Head, &b), WaitLimit::Full);
    }
    assert_eq!(world.wait_for(RequestKind::Head, &a), WaitLimit::None);
}

#[test]
fn t05_twenty_unresponsive_images_cost_one_timeout() {
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
        world
            .detector
            .record_timeout([0; 32], (&image, false), waited, world.now);
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
            FailureScope::Kind(RequestKind::Head),
            UpstreamFailure::RevalidateTimeout
        )
    );
}

#[test]
fn t05_hanging_request_is_waited_for_once() {
    // One tag, polled: all callers share one request.
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
        world
            .detector
            .record_timeout([0; 32], (&tag, false), waited, world.now);
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

/// Two waits of `SHORT_WAIT` after a timeout, each for another tag, whose request is sent this late.
fn wait_after_requests_sent_late(late: [Duration; 2]) -> WaitLimit {
    let mut world = World::new();
    world.expires(&tag("a"));
    for (name, late) in ["b", "c"].into_iter().zip(late) {
        let tag = tag(name);
        let ends = world.now + SHORT_WAIT;
        world.now += late;
        world.detector.sent(RequestKind::Head, &tag, [0; 32], world.now);
        world.now = ends;
        world
            .detector
            .record_timeout([0; 32], (&tag, false), SHORT_WAIT, world.now);
    }
    world.wait_for(RequestKind::Head, &tag("d"))
}

#[test]
fn t05_request_sent_late_counts_with_the_next_timeout() {
    let late = SHORT_WAIT * 9 / 10;
    let soon = Duration::ZERO;
    assert_eq!(wait_after_requests_sent_late([soon, soon]), WaitLimit::None);
    assert_eq!(wait_after_requests_sent_late([late, soon]), WaitLimit::None);
    assert_eq!(wait_after_requests_sent_late([soon, late]), WaitLimit::Short);
}

/// The bad interleaving: tokens arrive late, and a wait ends just after the registry got the requests.
#[test]
fn t05_wait_for_a_token_is_no_failure_of_the_registry() {
    let mut world = World::new();
    world.expires(&tag("a"));
    let names = ["b", "c", "d"].map(tag);
    let ids = names.each_ref().map(|tag| {
        let id = world.detector.sent(RequestKind::Head, tag, [0; 32], world.now);
        world.detector.waiting_for_token(id, world.now);
        id
    });
    world.now += SHORT_WAIT;
    for tag in &names {
        world
            .detector
            .record_timeout([0; 32], (tag, false), SHORT_WAIT, world.now);
    }
    for id in ids {
        world
            .detector
            .token_finished(id, RequestOutcome::Response, world.now);
    }
    let e = tag("e");
    world.detector.sent(RequestKind::Head, &e, [0; 32], world.now);
    world.now += Duration::from_millis(1);
    world
        .detector
        .record_timeout([0; 32], (&e, false), SHORT_WAIT, world.now);
    assert_eq!(world.wait_for(RequestKind::Head, &tag("f")), WaitLimit::Short);
}

#[test]
fn t05_late_request_with_a_response_counts_nothing() {
    let mut world = World::new();
    let (a, b) = (tag("a"), tag("b"));
    let id = world.detector.sent(RequestKind::Head, &a, [0; 32], world.now);
    world
        .detector
        .record_timeout([0; 32], (&a, false), BUDGET, world.now);
    world.now += BUDGET;
    world.detector.finish(id, RequestOutcome::Response, world.now);
    world
        .detector
        .record_timeout([0; 32], (&b, false), BUDGET, world.now);
    assert_eq!(world.detector.failing().count(), 0);
}

#[test]
fn t05_callers_sharing_a_request_count_one_failure() {
    let (mut world, tag) = (World::new(), tag("a"));
    world.detector.sent(RequestKind::Head, &tag, [0; 32], world.now);
    world.now += BUDGET;
    for _ in 0..10 {
        world
            .detector
            .record_timeout([0; 32], (&tag, false), BUDGET, world.now);
    }
    assert_eq!(world.wait_for(RequestKind::Head, &tag), WaitLimit::Short);
}

#[test]
fn t05_slow_response_shortens_wait_until_a_fast_one() {
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
fn t04_slow_repository_triggers_probe_of_another() {
    let (mut world, a, b) = (World::new(), tag("a"), tag("b"));
    world.happens_to(Answered, (RequestKind::Head, &b, [0; 32]));
    let id = world.detector.sent(RequestKind::Head, &a, [0; 32], world.now);
    world.now += Duration::from_millis(1_900);
    world.detector.finish(id, RequestOutcome::Response, world.now);
    let scope = FailureScope::Kind(RequestKind::Head);
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
fn t04_unresponsive_repository_probes_another_first() {
    let (mut world, a, b) = (World::new(), tag("a"), tag("b"));
    world.happens_to(Answered, (RequestKind::Head, &b, [0; 32]));
    world.expires(&a);
    let scope = FailureScope::Kind(RequestKind::Head);
    let (due, probed) = world.detector.next_probe(world.now).unwrap();
    assert_eq!((due, &probed), (world.now, &scope));
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(b));
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(a));
}

#[test]
fn t05_unsent_request_is_probed_next() {
    let (mut world, scope) = (World::new(), FailureScope::Kind(RequestKind::Head));
    for name in ["a", "b", "a"] {
        world.expires(&tag(name));
    }
    let c = tag("c");
    assert_eq!(world.wait_for(RequestKind::Head, &c), WaitLimit::None);
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(c));
    assert_eq!(world.detector.take_probe(&scope, world.now), Some(tag("a")));
}

#[test]
fn t05_token_service_fails_apart_from_the_registry() {
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
            .record_timeout([0; 32], (&tag(name), false), BUDGET, world.now);
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
    // A registry's response to a caller with its own token does not show whether the token service is available.
    world.happens_to(Answered, (RequestKind::Head, &c, [1; 32]));
    assert_eq!(
        world.detector.open_breaker().unwrap().scope,
        FailureScope::Kind(RequestKind::Token)
    );
    let id = world.detector.sent(RequestKind::Head, &c, [0; 32], world.now);
    world.detector.waiting_for_token(id, world.now);
    let closed = world
        .detector
        .token_finished(id, RequestOutcome::Response, world.now);
    assert_eq!(closed.len(), 1, "{closed:?}");
    assert!(world.detector.open_breaker().is_none());
}

/// The registry sends its 401 after this share of the wait. Returns the scopes that fail.
fn failing_after_challenge_at(challenge: Duration, waits: &[Duration]) -> Vec<(FailureScope, bool)> {
    let mut world = World::new();
    for (n, waited) in waits.iter().enumerate() {
        let tag = tag(&format!("library/{n}"));
        let id = world.detector.sent(RequestKind::Head, &tag, [0; 32], world.now);
        let ends = world.now + *waited;
        world.now += challenge;
        world.detector.waiting_for_token(id, world.now);
        world.now = ends;
        world
            .detector
            .record_timeout([0; 32], (&tag, false), *waited, world.now);
    }
    let failing = world.detector.failing();
    let of_kind = failing.filter(|failing| matches!(failing.scope, FailureScope::Kind(_)));
    of_kind
        .map(|failing| (failing.scope, failing.open_since.is_some()))
        .collect()
}

#[test]
fn t05_silent_token_service_opens_despite_a_late_401() {
    let token = FailureScope::Kind(RequestKind::Token);
    let challenge = SHORT_WAIT * 8 / 10;
    let failing = failing_after_challenge_at(challenge, &[BUDGET, SHORT_WAIT, SHORT_WAIT]);
    assert_eq!(failing, [(token, true)]);
}

/// On a busy host, the short wait ends before the 401.
#[test]
fn t05_silent_token_service_opens_before_the_401() {
    let mut world = World::new();
    for (n, waited) in [BUDGET, SHORT_WAIT, SHORT_WAIT].into_iter().enumerate() {
        let tag = tag(&format!("library/{n}"));
        let id = world.detector.sent(RequestKind::Head, &tag, [0; 32], world.now);
        if n == 0 {
            world.detector.waiting_for_token(id, world.now);
        }
        world.now += waited;
        world
            .detector
            .record_timeout([0; 32], (&tag, true), waited, world.now);
        world.detector.waiting_for_token(id, world.now);
    }
    let open = world.detector.open_breaker().unwrap();
    assert_eq!(open.scope, FailureScope::Kind(RequestKind::Token));
}

#[test]
fn t05_slow_401_alone_does_not_blame_the_token_service() {
    let failing = failing_after_challenge_at(BUDGET * 9 / 10, &[BUDGET]);
    assert_eq!(failing, []);
}

#[test]
fn t05_denial_half_opens_and_next_request_decides() {
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
            "the request is sent"
        );
        world.expires(&a);
        assert_eq!(world.wait_for(RequestKind::Head, &a), WaitLimit::None, "at once");
    }
    world.happens_to(Denied, (RequestKind::Head, &a, [0; 32]));
    world.happens_to(Answered, (RequestKind::Head, &a, [0; 32]));
    assert_eq!(world.wait_for(RequestKind::Head, &a), WaitLimit::Full);
}

#[test]
fn t05_inconclusive_probe_half_opens() {
    let (mut world, a, scope) = (World::new(), tag("a"), FailureScope::Kind(RequestKind::Head));
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
            "the request is sent"
        );
    }
}

#[test]
fn t04_errors_of_one_principal_do_not_affect_others() {
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
        assert!(!world.detector.stops_pulls(ours, true), "{cause}");
        let is_stopped = world.detector.stops_pulls(theirs, true);
        assert_eq!(is_stopped, cause == UpstreamFailure::ConnectionReset, "{cause}");
        fails(&mut world, "a", ours);
        let wait = world.wait_of(RequestKind::Head, &tag("a"), ours);
        assert_eq!(wait, WaitLimit::None, "{cause}: it affects all principals");
    }
}

#[test]
fn breaker_of_lists_or_of_one_repository_stops_no_pulls() {
    for (kind, paths, is_stopped) in [
        (RequestKind::List, ["/v2/a/tags/list", "/v2/b/tags/list"], false),
        (
            RequestKind::Head,
            ["/v2/a/manifests/1", "/v2/a/manifests/2"],
            false,
        ),
        (
            RequestKind::Head,
            ["/v2/a/manifests/1", "/v2/b/manifests/1"],
            true,
        ),
        (
            RequestKind::Token,
            ["/v2/a/manifests/1", "/v2/b/manifests/1"],
            true,
        ),
    ] {
        let mut world = World::new();
        for path in paths.iter().cycle().take(2 * FAILURES_MAX) {
            world.happens_to(TimedOut, (kind, &endpoint(path), [0; 32]));
            world.now -= LATE;
        }
        assert_eq!(
            world.detector.stops_pulls([0; 32], true),
            is_stopped,
            "{kind:?} {paths:?}"
        );
    }
}

#[test]
fn t05_timeout_of_one_principal_affects_all() {
    let mut world = World::new();
    for _ in 0..3 {
        world.happens_to(TimedOut, (RequestKind::Head, &tag("a"), [1; 32]));
        world.now -= LATE;
    }
    assert_eq!(world.wait_for(RequestKind::Head, &tag("a")), WaitLimit::None);
}

#[test]
fn t04_error_affects_only_its_request() {
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
fn connection_failure_affects_every_request() {
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
    for request in TestRequest::all() {
        assert_eq!(world.wait(request), WaitLimit::None);
    }
    let closed = world.happens_to(Denied, (RequestKind::List, &a, [0; 32]));
    assert_eq!(closed.len(), 1, "any response closes the connection scope");
    // Far apart, they do not open a breaker.
    for _ in 0..10 {
        world.now += WINDOW;
        assert_eq!(fails(&mut world), []);
        world.now += Duration::from_secs(1);
    }
}

#[test]
fn rate_limit_or_broken_object_is_a_response() {
    for (cause, expected) in [
        (UpstreamFailure::RateLimited, RequestOutcome::Response),
        (UpstreamFailure::Malformed, RequestOutcome::Response),
        (UpstreamFailure::TooLarge, RequestOutcome::Response),
        (
            UpstreamFailure::Redirects(RedirectFailure::TooMany),
            RequestOutcome::Response,
        ),
        (UpstreamFailure::Abandoned, RequestOutcome::Unknown),
        (UpstreamFailure::Loop, RequestOutcome::Unknown),
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
        "another URL's response is final"
    );
}

#[test]
fn probes_back_off_without_client_requests() {
    let (mut world, scope) = (World::new(), FailureScope::Kind(RequestKind::Head));
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
    assert_eq!(
        waits(&mut world),
        0,
        "a request after an idle time starts a probe"
    );
    for _ in 0..5 {
        world.now += Duration::from_millis(100);
        world.wait_for(RequestKind::Head, &tag("a"));
        let (due, _) = world.detector.next_probe(world.now).unwrap();
        assert!(due <= world.now + Duration::from_secs(1));
        waits(&mut world);
    }
}

#[test]
fn t05_client_chosen_names_take_bounded_memory() {
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
