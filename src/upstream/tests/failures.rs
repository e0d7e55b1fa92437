//! Failures of an upstream: retries, failover, rate limits and circuit breakers.

use super::registry::{Registry, hangup, manifest, response};
use http::Uri;

use super::*;

#[tokio::test(start_paused = true)]
async fn server_error_is_retried_once() {
    for (errors, said) in [
        (1, ResponseKind::Digest(digest(MANIFEST))),
        (9, ResponseKind::Unavailable(UpstreamFailure::Status(502))),
    ] {
        let registry = Registry::start(move |seen| {
            if seen.nth < errors {
                response(502)
            } else {
                manifest()
            }
        })
        .await;
        assert_eq!(
            piped(&registry).head(&anonymous(), &tag(), &accept()).await.kind,
            said
        );
        assert_eq!(registry.seen().len(), 2);
    }
}

#[tokio::test]
async fn closed_connection_is_replaced_once() {
    let registry = Registry::start(|seen| if seen.nth == 1 { hangup() } else { manifest() }).await;
    let upstream = upstream(&[&registry]);
    for _ in 0..2 {
        assert_eq!(
            upstream.head(&anonymous(), &tag(), &accept()).await.kind,
            ResponseKind::Digest(digest(MANIFEST))
        );
    }
    assert_eq!(registry.seen().len(), 3);

    let registry = Registry::start(|_| hangup()).await;
    let response = super::upstream(&[&registry])
        .head(&anonymous(), &tag(), &accept())
        .await;
    assert_eq!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::ConnectionReset)
    );
    assert_eq!(registry.seen().len(), 2);
}

#[tokio::test]
async fn closed_port_is_connection_refused() {
    let registry = Registry::start(|_| manifest()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let urls = vec![url.parse().unwrap(), registry.url().parse().unwrap()];
    let closed = Settings {
        proxy: ProxyChoice::None,
        ..Settings::new("a", urls[..1].to_vec())
    };
    let upstream = Upstream::new(closed, &Transport::system()).unwrap();
    assert_eq!(
        upstream.head(&anonymous(), &tag(), &accept()).await.kind,
        ResponseKind::Unavailable(UpstreamFailure::ConnectionRefused)
    );
    assert!(matches!(
        upstream.status().last_failure,
        Some((UpstreamFailure::ConnectionRefused, _))
    ));

    let both = Settings {
        proxy: ProxyChoice::None,
        ..Settings::new("a", urls)
    };
    let upstream = Upstream::new(both, &Transport::system()).unwrap();
    assert_eq!(
        upstream.head(&anonymous(), &tag(), &accept()).await.kind,
        ResponseKind::Digest(digest(MANIFEST))
    );
}

#[tokio::test]
async fn r06_urls_are_tried_in_order_until_success() {
    let silent = Registry::start(|_| response(500).header("retry-after", "1")).await;
    for second in [200, 404, 403] {
        let answering = Registry::start(move |_| match second {
            200 => manifest(),
            status => response(status).header("content-type", "application/json"),
        })
        .await;
        let last = Registry::start(|_| manifest()).await;
        let upstream = upstream(&[&silent, &answering, &last]);
        let said = upstream.head(&anonymous(), &tag(), &accept()).await.kind;
        assert_eq!(said, ResponseKind::Digest(digest(MANIFEST)));
        assert!(upstream.get(&anonymous(), &tag(), &accept(), None).await.is_ok());
        assert_eq!(last.seen().is_empty(), second == 200, "success is final");
    }
}

#[tokio::test]
async fn first_urls_failure_is_reported() {
    let (first, second) = (
        Registry::start(|_| response(503).header("retry-after", "1")).await,
        Registry::start(|_| hangup()).await,
    );
    let response = upstream(&[&first, &second])
        .head(&anonymous(), &tag(), &accept())
        .await;
    assert_eq!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::Status(503))
    );
}

#[tokio::test(start_paused = true)]
async fn rate_limited_caller_waits_and_others_do_not() {
    let registry = Registry::start(|seen| match seen.authorization() {
        Some("Bearer fast") if seen.nth < 2 => response(429).header("retry-after", "20"),
        _ => manifest(),
    })
    .await;
    let upstream = piped(&registry);
    let (fast, slow) = (client("Bearer fast"), client("Bearer slow"));
    let limited = ResponseKind::Unavailable(UpstreamFailure::RateLimited);
    let first = upstream.head(&fast, &tag(), &accept()).await;
    assert_eq!(
        (first.kind, first.retry_after),
        (limited, Some(HeaderValue::from_static("20")))
    );
    tokio::time::advance(Duration::from_secs(5)).await;
    let again = upstream.head(&fast, &tag(), &accept()).await;
    assert_eq!(
        (again.kind, again.retry_after),
        (limited, Some(HeaderValue::from_static("15"))),
        "the remaining pause"
    );
    assert_eq!(registry.seen().len(), 1, "no request within the window");
    assert_eq!(
        upstream.head(&slow, &tag(), &accept()).await.kind,
        ResponseKind::Digest(digest(MANIFEST))
    );
    tokio::time::advance(Duration::from_secs(16)).await;
    assert_eq!(
        upstream.head(&fast, &tag(), &accept()).await.kind,
        ResponseKind::Digest(digest(MANIFEST))
    );
}

#[tokio::test(start_paused = true)]
async fn retry_after_date_uses_the_responses_date() {
    let registry = Registry::start(|_| {
        response(429)
            .header("date", "Sun, 06 Nov 1994 08:49:37 GMT")
            .header("retry-after", "Sun, 06 Nov 1994 08:51:17 GMT")
    })
    .await;
    let response = piped(&registry).head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(response.retry_after, Some(HeaderValue::from_static("100")));
}

#[tokio::test(start_paused = true)]
async fn rate_limits_never_open_the_breaker() {
    let registry = Registry::start(|_| response(429)).await;
    let upstream = piped(&registry);
    for n in 0..10 {
        upstream
            .head(&client(&format!("Bearer {n}")), &tag(), &accept())
            .await;
    }
    assert_eq!(waits(&upstream), Ok(BUDGET));
}

const BUDGET: Duration = Duration::from_secs(2);

/// How long a caller with a cached copy of the tag waits.
fn waits(upstream: &Upstream) -> Result<Duration, UpstreamFailure> {
    upstream.wait_limit(&anonymous(), (&tag(), true), BUDGET)
}

#[tokio::test(start_paused = true)]
async fn breaker_opens_after_three_failures_and_probe_closes_it() {
    let registry = Registry::start(|_| manifest()).await;
    registry.refuses(true);
    let upstream = piped(&registry);
    for _ in 0..3 {
        assert_eq!(upstream.unavailable_now(), None);
        assert_eq!(
            upstream.head(&anonymous(), &tag(), &accept()).await.kind,
            ResponseKind::Unavailable(UpstreamFailure::ConnectionRefused)
        );
    }
    assert_eq!(upstream.unavailable_now(), Some(UpstreamFailure::BreakerOpen));
    let open = upstream.status().open.unwrap();
    assert_eq!(
        (open.scope, open.cause),
        (FailureScope::Connection, UpstreamFailure::ConnectionRefused)
    );
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(
        upstream.unavailable_now(),
        Some(UpstreamFailure::BreakerOpen),
        "it still fails"
    );
    registry.refuses(false);
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert_eq!(upstream.unavailable_now(), None, "detected within half a minute");
    assert_eq!(registry.requests(), ["GET /v2/"], "by one probe");
}

#[tokio::test(start_paused = true)]
async fn uncached_request_closes_the_breaker() {
    let registry = Registry::start(|_| manifest()).await;
    registry.refuses(true);
    let upstream = piped(&registry);
    for _ in 0..3 {
        upstream.head(&anonymous(), &tag(), &accept()).await;
    }
    registry.refuses(false);
    assert_eq!(
        upstream.head(&anonymous(), &tag(), &accept()).await.kind,
        ResponseKind::Digest(digest(MANIFEST))
    );
    assert_eq!(upstream.unavailable_now(), None);
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(registry.seen().len(), 1, "nothing is left to probe");
}

#[tokio::test(start_paused = true)]
async fn failed_token_service_is_probed() {
    let down = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let registry = Registry::start({
        let down = Arc::clone(&down);
        move |seen| match seen.path() {
            "/token" if down.load(std::sync::atomic::Ordering::SeqCst) => response(500),
            "/token" => response(400),
            _ => seen.challenge(),
        }
    })
    .await;
    let upstream = piped(&registry);
    for _ in 0..3 {
        let response = upstream.head(&anonymous(), &tag(), &accept()).await;
        assert_eq!(
            response.kind,
            ResponseKind::Unavailable(UpstreamFailure::TokenService)
        );
    }
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(
        waits(&upstream),
        Err(UpstreamFailure::BreakerOpen),
        "a response to /v2/ is not enough"
    );
    down.store(false, std::sync::atomic::Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert_eq!(waits(&upstream), Ok(BUDGET));
}

#[tokio::test(start_paused = true)]
async fn t05_token_service_that_responded_is_not_probed() {
    let status = Arc::new(std::sync::atomic::AtomicU16::new(500));
    let registry = Registry::start({
        let status = Arc::clone(&status);
        move |seen| match seen.path() {
            "/token" => response(status.load(std::sync::atomic::Ordering::SeqCst)),
            _ => seen.challenge(),
        }
    })
    .await;
    let upstream = piped(&registry);
    for _ in 0..3 {
        upstream.head(&anonymous(), &tag(), &accept()).await;
    }
    assert_eq!(waits(&upstream), Err(UpstreamFailure::BreakerOpen));
    // A rate limit of the token service is no failure, so there is nothing to probe.
    status.store(429, std::sync::atomic::Ordering::SeqCst);
    let other = endpoint("/v2/library/b/manifests/latest");
    upstream.head(&anonymous(), &other, &accept()).await;
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert!(waits(&upstream).is_ok());
}

#[tokio::test(start_paused = true)]
async fn t05_login_page_for_a_probe_half_opens() {
    let is_up = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let registry = Registry::start({
        let is_up = Arc::clone(&is_up);
        move |seen| match seen.header("authorization") {
            _ if !is_up.load(std::sync::atomic::Ordering::SeqCst) => hangup(),
            Some(_) => manifest(),
            None => response(200)
                .header("content-type", "text/html")
                .body("<html>log in"),
        }
    })
    .await;
    let (upstream, caller) = (piped(&registry), client("Bearer a"));
    let waits = || upstream.wait_limit(&caller, (&tag(), true), BUDGET);
    for _ in 0..3 {
        upstream.head(&caller, &tag(), &accept()).await;
    }
    assert_eq!(waits(), Err(UpstreamFailure::BreakerOpen));
    is_up.store(true, std::sync::atomic::Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert_eq!(waits(), Ok(Duration::from_millis(50)));
    upstream.head(&caller, &tag(), &accept()).await;
    assert_eq!(waits(), Ok(BUDGET));
}

#[tokio::test(start_paused = true)]
async fn t05_probe_respects_its_callers_rate_limit() {
    let is_up = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let registry = Registry::start({
        let is_up = Arc::clone(&is_up);
        move |_| {
            if is_up.load(std::sync::atomic::Ordering::SeqCst) {
                response(429).header("retry-after", "3600")
            } else {
                hangup()
            }
        }
    })
    .await;
    let settings = Settings {
        credential: Some(UpstreamCredential::new("robot", "secret").into()),
        ..settings(&[&registry])
    };
    let upstream = Upstream::new(settings, &Transport::with_dialer(registry.dial())).unwrap();
    let caller = Caller {
        principal: [7; 32],
        credential: Credential::Configured,
        ..anonymous()
    };
    for _ in 0..3 {
        upstream.head(&caller, &tag(), &accept()).await;
    }
    is_up.store(true, std::sync::atomic::Ordering::SeqCst);
    let other = endpoint("/v2/library/b/manifests/latest");
    upstream.head(&caller, &other, &accept()).await;
    let before = registry.seen().len();
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(registry.seen().len(), before);
    let wait = upstream.wait_limit(&caller, (&tag(), true), BUDGET);
    assert_eq!(wait, Ok(Duration::from_millis(50)), "its own request decides");
}

#[tokio::test(start_paused = true)]
async fn dropped_upstream_is_not_probed() {
    let registry = Registry::start(|_| hangup()).await;
    let upstream = piped(&registry);
    for _ in 0..3 {
        upstream.head(&anonymous(), &tag(), &accept()).await;
    }
    assert_eq!(waits(&upstream), Err(UpstreamFailure::BreakerOpen));
    let before = registry.seen().len();
    drop(upstream);
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(registry.seen().len(), before);
}

#[tokio::test(start_paused = true)]
async fn missing_response_is_a_timeout() {
    // A connection without a response.
    struct BlackHole;
    impl Dialer for BlackHole {
        fn dial(&self, _: &Uri, _: &AddressLimit, _: Duration) -> DialFuture {
            Box::pin(async {
                let (ours, theirs) = tokio::io::duplex(1024);
                tokio::spawn(async move {
                    let _theirs = theirs;
                    std::future::pending::<()>().await;
                });
                Ok(DialedStream {
                    stream: Box::new(ours),
                    peer: None,
                })
            })
        }
    }
    // R12: 25 s by default, or as configured.
    for within in [None, Some(90)] {
        let mut settings = Settings {
            proxy: ProxyChoice::None,
            ..Settings::new("a", vec!["http://a.example".parse().unwrap()])
        };
        if let Some(within) = within {
            settings.timeouts.headers = Duration::from_secs(within);
        }
        let upstream = Upstream::new(settings, &Transport::with_dialer(Arc::new(BlackHole))).unwrap();
        for endpoint in [tag(), blob("bytes")] {
            let before = Instant::now();
            let got = upstream.get(&anonymous(), &endpoint, &accept(), None).await;
            assert_eq!(
                got.unwrap_err().kind,
                ResponseKind::Unavailable(UpstreamFailure::Timeout)
            );
            assert_eq!(before.elapsed().as_secs(), within.unwrap_or(25));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn hanging_dial_times_out() {
    struct Hang;
    impl Dialer for Hang {
        fn dial(&self, _: &Uri, _: &AddressLimit, _: Duration) -> DialFuture {
            Box::pin(std::future::pending())
        }
    }
    let settings = Settings {
        proxy: ProxyChoice::None,
        ..Settings::new("a", vec!["http://a.example".parse().unwrap()])
    };
    let upstream = Upstream::new(settings, &Transport::with_dialer(Arc::new(Hang))).unwrap();
    let before = Instant::now();
    let response = upstream.head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::ConnectTimeout)
    );
    assert_eq!(before.elapsed().as_secs(), 3);
}

/// Blobs have permits of the download queue. A queued request has no timeout.
#[tokio::test(start_paused = true)]
async fn t02_queued_request_has_no_timeout() {
    let registry = Registry::start(|seen| {
        if seen.method == Method::GET {
            response(200).body("bytes").stall()
        } else {
            manifest()
        }
    })
    .await;
    let upstream = piped(&registry);
    let (caller, manifest) = (anonymous(), tag());
    let accept = accept();
    let mut held = Vec::new();
    // Some permits are reserved for revalidation.
    for _ in 0..DOWNLOADS_MAX - DOWNLOADS_MAX / 8 {
        held.push(upstream.get(&caller, &manifest, &accept, None).await.unwrap());
    }
    assert_eq!(upstream.status().in_flight, held.len());
    let mut waiting = std::pin::pin!(upstream.get(&caller, &manifest, &accept, None));
    let an_hour = Duration::from_secs(3600);
    assert!(tokio::time::timeout(an_hour, &mut waiting).await.is_err());
    let revalidating = Caller {
        class: Class::Revalidation,
        ..caller.clone()
    };
    let response = upstream.head(&revalidating, &tag(), &accept).await;
    assert_eq!(response.kind, ResponseKind::Digest(digest(MANIFEST)));
    drop(
        upstream
            .get(&caller, &blob("bytes"), &accept, None)
            .await
            .unwrap(),
    );
    held.pop();
    assert!(waiting.await.is_ok());
}

/// Time to request so many cached images one after the other, from an upstream behind this dialer.
async fn job_over(dial: Arc<dyn Dialer>) -> Duration {
    let settings = Settings {
        proxy: ProxyChoice::None,
        ..Settings::new("a", vec!["http://a.example".parse().unwrap()])
    };
    let upstream = Upstream::new(settings, &Transport::with_dialer(dial)).unwrap();
    let began = Instant::now();
    for n in 0..20 {
        let image = endpoint(&format!("/v2/library/{n}/manifests/1"));
        let Ok(wait) = upstream.wait_limit(&anonymous(), (&image, true), BUDGET) else {
            continue;
        };
        let (asked, of) = (upstream.clone(), image.clone());
        let asking = tokio::spawn(async move { asked.head(&anonymous(), &of, &accept()).await });
        if tokio::time::timeout(wait, asking).await.is_err() {
            upstream.record_timeout(&anonymous(), &image, wait);
        }
    }
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn t05_dropped_syns_cost_one_timeout() {
    struct Hang;
    impl Dialer for Hang {
        fn dial(&self, _: &Uri, _: &AddressLimit, _: Duration) -> DialFuture {
            Box::pin(std::future::pending())
        }
    }
    let took = job_over(Arc::new(Hang)).await;
    assert!(took < BUDGET + Duration::from_millis(500), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn t05_slow_heads_cost_one_response() {
    /// Each connection is established after 1.9 s.
    struct SlowDialer(Arc<dyn Dialer>);
    impl Dialer for SlowDialer {
        fn dial(&self, uri: &Uri, limit: &AddressLimit, within: Duration) -> DialFuture {
            let dialling = self.0.dial(uri, limit, within);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(1_900)).await;
                dialling.await
            })
        }
    }
    let registry = Registry::start(|_| manifest().header("connection", "close")).await;
    let took = job_over(Arc::new(SlowDialer(registry.dial()))).await;
    assert!(took < Duration::from_secs(3), "{took:?}");
}
