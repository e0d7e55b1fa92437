//! Resumption of transfers that are interrupted, slow or failing midway.

use tokio::time::Instant;

use super::*;

#[tokio::test(start_paused = true)]
async fn interrupted_transfer_resumes_at_the_last_byte() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    script.breaking(0, MIB, &blob[..300_000]);
    script.breaking(300_000, MIB, &blob[300_000..700_000]);
    script.ending(700_000, Some(MIB), &blob[700_000..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), [0, 300_000, 700_000]);
}

#[tokio::test(start_paused = true)]
async fn stream_that_starts_earlier_is_skipped_forward() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    script.breaking(0, MIB, &blob[..333_333]);
    script.breaking(0, MIB, &blob[..555_555]);
    script.ending(123_456, Some(MIB), &blob[123_456..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), [0, 333_333, 555_555]);
}

#[tokio::test(start_paused = true)]
async fn stream_that_starts_too_late_is_not_used() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.ending(500, Some(1000), &blob[500..]);
    script.ending(400, Some(1000), &blob[400..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), [0, 400, 400]);
}

#[tokio::test(start_paused = true)]
async fn consecutive_resumes_without_a_byte_fail() {
    for (answer, cause) in [
        (None, UpstreamFailure::ConnectionRefused),
        (Some(()), UpstreamFailure::ConnectionReset),
    ] {
        let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
        script.breaking(0, 1000, &blob[..400]);
        for _ in 0..20 {
            match answer {
                None => script.no_response(UpstreamFailure::ConnectionRefused),
                Some(()) => script.breaking(400, 1000, b""),
            }
        }
        let reader = leader(&downloads, digest(&blob)).start(script.clone());
        match &*stepped(failure(reader)).await {
            DownloadError::Interrupted(found) => assert_eq!(*found, cause),
            other => panic!("{other}"),
        }
        assert_eq!(script.offsets(), [0, 400, 400, 400, 400, 400, 400, 400]);
        downloads.idle().await;
        assert_eq!((held(&downloads, digest(&blob)), downloads.count()), (None, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn one_byte_resets_the_failure_count() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(50));
    for at in 0..49 {
        script.breaking(at, 50, &blob[at..=at]);
    }
    script.ending(49, Some(50), &blob[49..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), (0..50).collect::<Vec<u64>>());
}

#[tokio::test(start_paused = true)]
async fn clean_end_before_the_stated_size_is_resumed() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.ending(0, Some(1000), &blob[..600]);
    script.ending(600, Some(1000), &blob[600..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), [0, 600]);
}

#[tokio::test(start_paused = true)]
async fn stream_below_minimum_throughput_is_replaced() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let dripping = script.stream(0, Some(MIB));
    send(&dripping, &blob[..400]);
    script.ending(400, Some(MIB), &blob[400..]);
    let began = Instant::now();
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), [0, 400]);
    assert!(
        began.elapsed().as_secs() >= 30,
        "less than half a minute of low throughput is tolerated"
    );
}

#[tokio::test(start_paused = true)]
async fn stream_above_minimum_throughput_is_kept() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(200_000));
    let slow = script.stream(0, Some(200_000));
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    let feeding = async {
        for part in blob.chunks(20_000) {
            send(&slow, part);
            tokio::time::sleep(Duration::from_secs(15)).await;
        }
        drop(slow);
    };
    let (got, ()) = stepped(async { tokio::join!(read_all(reader), feeding) }).await;
    assert_eq!(got, blob);
    assert_eq!(script.offsets(), [0]);
}

#[tokio::test(start_paused = true)]
async fn endless_low_throughput_fails() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let wires: Vec<Wire> = (0..20)
        .map(|at| {
            let wire = script.stream(at, Some(1000));
            send(&wire, &blob[at..=at]);
            wire
        })
        .collect();
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    let failed = stepped(failure(reader)).await;
    assert!(
        matches!(*failed, DownloadError::Interrupted(UpstreamFailure::Timeout)),
        "{failed}"
    );
    assert_eq!(script.offsets().len(), 8);
    drop(wires);
}

#[tokio::test(start_paused = true)]
async fn retry_after_midway_is_waited_out() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.no_response(UpstreamFailure::Status(503));
    script.answer(UpstreamResponse {
        retry_after: Some("9".parse().unwrap()),
        ..UpstreamResponse::unavailable(UpstreamFailure::RateLimited)
    });
    script.ending(400, Some(1000), &blob[400..]);
    let began = Instant::now();
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), [0, 400, 400, 400]);
    assert!(began.elapsed().as_secs() >= 9, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn retry_after_of_hours_is_not_waited_out() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.answer(UpstreamResponse {
        retry_after: Some("3600".parse().unwrap()),
        ..UpstreamResponse::unavailable(UpstreamFailure::RateLimited)
    });
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    let failed = stepped(failure(reader)).await;
    assert!(
        matches!(*failed, DownloadError::Interrupted(UpstreamFailure::RateLimited)),
        "{failed}"
    );
    assert_eq!(script.offsets(), [0, 400]);
}

#[tokio::test(start_paused = true)]
async fn denial_midway_fails_sooner_than_unavailability() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    for _ in 0..20 {
        script.answer(UpstreamResponse {
            kind: ResponseKind::NotFound,
            ..UpstreamResponse::unavailable(UpstreamFailure::Malformed)
        });
    }
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    stepped(failure(reader)).await;
    assert_eq!(script.offsets(), [0, 400, 400, 400]);
}

#[tokio::test(start_paused = true)]
async fn response_of_another_size_is_not_used() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.ending(400, Some(900), &blob[400..900]);
    script.ending(400, Some(1000), &blob[400..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(read_all(reader)).await, blob);
    assert_eq!(script.offsets(), [0, 400, 400]);
}

#[tokio::test]
async fn interruption_after_the_last_byte_is_ignored() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(script.offsets(), [0]);
}

#[tokio::test]
async fn endless_stream_is_dropped_at_the_first_extra_byte() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(2000));
    let endless = script.stream(0, Some(1000));
    send(&endless, &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    let failed = failure(reader).await;
    assert!(
        matches!(*failed, DownloadError::DigestMismatch(Mismatch::Size { .. })),
        "{failed}"
    );
    drop(endless);
}

#[tokio::test]
async fn endless_stream_without_a_length_ends_past_the_stated_size() {
    let (downloads, blob) = (downloads(), content(MIB));
    let script = Script {
        stated: Some(1000),
        ..Script::default()
    };
    let endless = script.stream(0, None);
    for _ in 0..66 {
        send(&endless, &blob);
    }
    let reader = leader(&downloads, digest(&blob[..1000])).start(script);
    let failed = failure(reader).await;
    assert!(matches!(*failed, DownloadError::DigestMismatch(_)), "{failed}");
    drop(endless);
}

#[tokio::test(start_paused = true)]
async fn mismatch_after_resume_fails_only_readers_with_wrong_bytes() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let mut wrong = blob.clone();
    wrong[7] ^= 1;
    script.breaking(0, MIB, &wrong[..300_000]);
    let rest = script.stream(300_000, Some(MIB));
    script.ending(0, Some(MIB), &blob);
    let leader = leader(&downloads, digest(&blob));
    let waiting = follower(&downloads, digest(&blob));
    let mut first = leader.start(script.clone());
    take(&mut first, 300_000).await;
    send(&rest, &blob[300_000..]);
    drop(rest);
    stepped(begun_again(&waiting)).await;
    assert_eq!(stepped(read_all(waiting)).await, blob);
    let (_, end) = stepped(read_to_end(first)).await;
    assert!(matches!(
        *end.unwrap_err(),
        DownloadError::Interrupted(UpstreamFailure::DigestMismatch)
    ));
    downloads.idle().await;
    assert_eq!(held(&downloads, digest(&blob)).unwrap(), blob);
    assert_eq!(script.offsets(), [0, 300_000, 0]);
}

#[tokio::test(start_paused = true)]
async fn digest_mismatch_restarts_once_only() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let mut wrong = blob.clone();
    wrong[7] ^= 1;
    script.breaking(0, 1000, &wrong[..300]);
    script.ending(300, Some(1000), &blob[300..]);
    script.ending(0, Some(1000), &wrong);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    let failed = stepped(failure(reader)).await;
    assert!(
        matches!(*failed, DownloadError::DigestMismatch(Mismatch::Digest(_))),
        "{failed}"
    );
    assert_eq!(script.offsets(), [0, 300, 0]);
}

#[tokio::test(start_paused = true)]
async fn restart_without_a_length_keeps_the_first_one() {
    for (bytes, is_right) in [(1000, true), (999, false)] {
        let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
        let mut wrong = blob.clone();
        wrong[7] ^= 1;
        script.breaking(0, 1000, &wrong[..300]);
        script.ending(300, Some(1000), &blob[300..]);
        script.ending(0, None, &blob[..bytes]);
        let reader = leader(&downloads, digest(&blob)).start(script.clone());
        let (read, end) = stepped(read_to_end(reader)).await;
        assert_eq!(end.is_ok(), is_right, "{end:?}");
        assert_eq!(read == blob, is_right);
        assert_eq!(script.offsets()[..3], [0, 300, 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn source_with_few_bytes_per_resume_fails_eventually() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    for from in (0..2000).step_by(10) {
        script.breaking(from, MIB, &blob[from..from + 10]);
    }
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert!(matches!(
        &*stepped(failure(reader)).await,
        DownloadError::Interrupted(UpstreamFailure::ConnectionReset)
    ));
    assert_eq!(script.offsets().len(), 65);
}
