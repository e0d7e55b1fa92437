//! Response bodies: complete, ranges, truncated, stalled and encoded ones.

use super::registry::{Registry, response};
use super::*;

#[tokio::test]
async fn body_arrives_complete() {
    let registry = Registry::start(|_| {
        response(200)
            .header("docker-content-digest", &digest("bytes").to_string())
            .body("bytes")
    })
    .await;
    let upstream = upstream(&[&registry]);
    let fetched = upstream
        .get(&anonymous(), &blob("bytes"), &accept(), None)
        .await
        .unwrap();
    assert_eq!(
        (fetched.start, fetched.length, fetched.total),
        (0, Some(5), Some(5))
    );
    assert_eq!(fetched.digest, Some(digest("bytes")));
    assert_eq!(fetched.collect(5).await.unwrap(), "bytes");
}

#[tokio::test]
async fn transfer_resumes_if_ranges_are_supported() {
    for (play, start) in [(206, 2), (200, 0)] {
        let registry = Registry::start(move |seen| {
            assert_eq!(seen.header("range"), Some("bytes=2-"));
            match play {
                206 => response(206).header("content-range", "bytes 2-4/5").body("tes"),
                _ => response(200).body("bytes"),
            }
        })
        .await;
        let fetched = upstream(&[&registry])
            .get(&anonymous(), &blob("bytes"), &accept(), Some(2))
            .await
            .unwrap();
        assert_eq!((fetched.start, fetched.total), (start, Some(5)));
    }
}

#[tokio::test]
async fn unrequested_range_is_rejected() {
    for (from, range) in [
        (None, "bytes 2-4/5"),
        (Some(1), "bytes 2-4/5"),
        (Some(2), "bytes */5"),
        (Some(2), "x"),
    ] {
        let registry =
            Registry::start(move |_| response(206).header("content-range", range).body("tes")).await;
        let refused = upstream(&[&registry])
            .get(&anonymous(), &blob("bytes"), &accept(), from)
            .await;
        assert_eq!(
            refused.unwrap_err().kind,
            ResponseKind::Unavailable(UpstreamFailure::Malformed),
            "{from:?} {range}"
        );
    }
}

#[tokio::test]
async fn range_beyond_the_end_is_forwarded() {
    let registry = Registry::start(|_| response(416).header("content-range", "bytes */5")).await;
    let refused = upstream(&[&registry])
        .get(&anonymous(), &blob("bytes"), &accept(), Some(9))
        .await;
    assert_eq!(
        refused.unwrap_err().kind,
        ResponseKind::Other(http::StatusCode::RANGE_NOT_SATISFIABLE)
    );
}

#[tokio::test]
async fn short_body_is_an_error() {
    for length in [Some("10"), None] {
        let registry = Registry::start(move |_| {
            let play = response(200).body("bytes").cut();
            length.map_or_else(
                || response(200).body("bytes").cut(),
                |length| play.header("content-length", length),
            )
        })
        .await;
        let mut fetched = upstream(&[&registry])
            .get(&anonymous(), &blob("bytes"), &accept(), None)
            .await
            .unwrap();
        let (mut bytes, mut end) = (Vec::new(), None);
        while let Some(chunk) = fetched.chunk().await {
            match chunk {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(cause) => end = Some(cause),
            }
        }
        assert_eq!(end, Some(UpstreamFailure::ConnectionReset), "{length:?}");
        assert!(b"bytes".starts_with(&bytes));
    }
}

#[tokio::test(start_paused = true)]
async fn stalled_body_times_out() {
    let registry =
        Registry::start(|_| response(200).header("content-length", "10").body("bytes").stall()).await;
    let mut fetched = piped(&registry)
        .get(&anonymous(), &blob("bytes"), &accept(), None)
        .await
        .unwrap();
    assert_eq!(fetched.chunk().await, Some(Ok("bytes".into())));
    let before = Instant::now();
    assert_eq!(fetched.chunk().await, Some(Err(UpstreamFailure::Timeout)));
    assert_eq!(before.elapsed().as_secs(), Timeouts::default().idle.as_secs());
    assert_eq!(fetched.chunk().await, None);
}

#[tokio::test(start_paused = true)]
async fn manifest_that_trickles_is_given_up() {
    let registry = Registry::start(|_| response(200).body("bytes").trickle()).await;
    let fetched = piped(&registry)
        .get(&anonymous(), &blob("bytes"), &accept(), None)
        .await
        .unwrap();
    let before = Instant::now();
    assert_eq!(fetched.collect(4096).await, Err(UpstreamFailure::Timeout));
    assert_eq!(before.elapsed().as_secs(), Timeouts::default().idle.as_secs());
}

#[tokio::test]
async fn content_coding_is_rejected_except_identity() {
    for (coding, good) in [
        ("gzip", false),
        ("zstd", false),
        ("identity", true),
        ("identity, gzip", false),
    ] {
        let registry =
            Registry::start(move |_| response(200).header("content-encoding", coding).body("bytes")).await;
        let result = upstream(&[&registry])
            .get(&anonymous(), &blob("bytes"), &accept(), None)
            .await;
        match result {
            Ok(_) => assert!(good, "{coding}"),
            Err(response) => assert_eq!(
                (response.kind, good),
                (ResponseKind::Unavailable(UpstreamFailure::Malformed), false),
                "{coding}"
            ),
        }
    }
}

#[tokio::test]
async fn collected_body_is_limited() {
    for promised in [true, false] {
        let registry = Registry::start(move |_| {
            if promised {
                response(200).body("bytes")
            } else {
                response(200).body("bytes").stall()
            }
        })
        .await;
        let fetched = upstream(&[&registry])
            .get(&anonymous(), &tag(), &accept(), None)
            .await
            .unwrap();
        assert_eq!(fetched.collect(4).await, Err(UpstreamFailure::TooLarge));
    }
}

#[tokio::test]
async fn oversized_manifest_is_unavailable() {
    let registry = Registry::start(|_| response(200).body(MANIFEST)).await;
    let settings = Settings {
        manifest_bytes_max: 100,
        ..settings(&[&registry])
    };
    let response = Upstream::new(settings, &Transport::system())
        .unwrap()
        .head(&anonymous(), &tag(), &accept())
        .await;
    assert_eq!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::TooLarge)
    );
}

#[tokio::test]
async fn oversized_headers_are_rejected() {
    let registry = Registry::start(|_| {
        (0..9).fold(response(200), |play, n| {
            play.header(&format!("x-{n}"), &"y".repeat(8_000))
        })
    })
    .await;
    let response = upstream(&[&registry]).head(&anonymous(), &tag(), &accept()).await;
    assert_eq!(
        response.kind,
        ResponseKind::Unavailable(UpstreamFailure::Malformed)
    );
}

#[tokio::test]
async fn only_the_range_is_requested() {
    let registry = Registry::start(move |seen| {
        assert_eq!(seen.header("range"), Some("bytes=1-2"));
        response(206).header("content-range", "bytes 1-2/5").body("yt")
    })
    .await;
    let part = RangeSpec {
        from: 1,
        until: Some(3),
        ..RangeSpec::default()
    };
    let fetched = upstream(&[&registry])
        .get_part(&anonymous(), &blob("bytes"), &accept(), part)
        .await
        .unwrap();
    assert_eq!(
        (fetched.start, fetched.length, fetched.total),
        (1, Some(2), Some(5))
    );
}

#[tokio::test]
async fn resume_tries_the_next_url_first() {
    let play = |_: &registry::Seen| response(206).header("content-range", "bytes 2-4/5").body("tes");
    let (one, two) = (Registry::start(play).await, Registry::start(play).await);
    let upstream = upstream(&[&one, &two]);
    let mut part = RangeSpec {
        from: 2,
        ..RangeSpec::default()
    };
    for asked in [(1, 0), (1, 1), (2, 1)] {
        let fetched = upstream
            .get_part(&anonymous(), &blob("bytes"), &accept(), part)
            .await
            .unwrap();
        part.after = Some(fetched.url);
        assert_eq!((one.seen().len(), two.seen().len()), asked);
    }
}

#[tokio::test]
async fn resume_skips_urls_without_the_content() {
    let good = Registry::start(|seen| match seen.header("range") {
        Some(_) => response(206).header("content-range", "bytes 2-4/5").body("tes"),
        None => response(200).body("bytes"),
    })
    .await;
    let lacking = Registry::start(|_| response(404)).await;
    let resumed = RangeSpec {
        from: 2,
        after: Some(UrlIndex(0)),
        ..RangeSpec::default()
    };
    let get = async |upstream: Upstream, part| {
        upstream
            .get_part(&anonymous(), &blob("bytes"), &accept(), part)
            .await
            .map(|fetched| fetched.url)
            .map_err(|response| response.kind)
    };
    assert_eq!(get(upstream(&[&good, &lacking]), resumed).await, Ok(UrlIndex(0)));
    assert_eq!(
        get(upstream(&[&lacking]), resumed).await,
        Err(ResponseKind::NotFound)
    );
    let first = RangeSpec::default();
    assert_eq!(get(upstream(&[&lacking, &good]), first).await, Ok(UrlIndex(1)));
}
