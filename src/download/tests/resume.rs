//! Transfers that break, drip, or are answered with an error midway.

use tokio::time::Instant;

use super::*;

#[tokio::test(start_paused = true)]
async fn a_break_is_resumed_from_where_it_stopped() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    script.breaking(0, MIB, &blob[..300_000]);
    script.breaking(300_000, MIB, &blob[300_000..700_000]);
    script.ending(700_000, Some(MIB), &blob[700_000..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 300_000, 700_000]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_starts_earlier_is_skipped_into() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    script.breaking(0, MIB, &blob[..333_333]);
    script.breaking(0, MIB, &blob[..555_555]);
    script.ending(123_456, Some(MIB), &blob[123_456..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 333_333, 555_555]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_starts_too_late_is_not_used() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.ending(500, Some(1000), &blob[500..]);
    script.ending(400, Some(1000), &blob[400..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 400, 400]);
}

#[tokio::test(start_paused = true)]
async fn resumes_in_a_row_without_a_byte_end_it() {
    for (answer, cause) in [
        (None, UpstreamFailure::ConnectionRefused),
        (Some(()), UpstreamFailure::ConnectionReset),
    ] {
        let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
        script.breaking(0, 1000, &blob[..400]);
        for _ in 0..20 {
            match answer {
                None => script.silence(UpstreamFailure::ConnectionRefused),
                Some(()) => script.breaking(400, 1000, b""),
            }
        }
        let reader = leader(&downloads, digest(&blob)).start(script.clone());
        match &*stepped(failure(reader)).await {
            Failure::Broken(found) => assert_eq!(*found, cause),
            other => panic!("{other}"),
        }
        assert_eq!(script.asked(), [0, 400, 400, 400, 400, 400, 400, 400]);
        downloads.idle().await;
        assert_eq!((held(&downloads, digest(&blob)), downloads.count()), (None, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_byte_makes_a_resume_fruitful() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(50));
    for at in 0..49 {
        script.breaking(at, 50, &blob[at..=at]);
    }
    script.ending(49, Some(50), &blob[49..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), (0..50).collect::<Vec<u64>>());
}

#[tokio::test(start_paused = true)]
async fn a_clean_end_before_the_stated_total_is_no_end() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.ending(0, Some(1000), &blob[..600]);
    script.ending(600, Some(1000), &blob[600..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 600]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_drips_is_left_for_another() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let dripping = script.stream(0, Some(MIB));
    send(&dripping, &blob[..400]);
    script.ending(400, Some(MIB), &blob[400..]);
    let began = Instant::now();
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 400]);
    assert!(
        began.elapsed().as_secs() >= 30,
        "what is slow for less than half a minute is not too slow"
    );
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_slow_but_not_too_slow_is_kept() {
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
    let (got, ()) = stepped(async { tokio::join!(whole(reader), feeding) }).await;
    assert_eq!(got, blob);
    assert_eq!(script.asked(), [0]);
}

#[tokio::test(start_paused = true)]
async fn dripping_for_ever_is_no_progress() {
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
        matches!(*failed, Failure::Broken(UpstreamFailure::Timeout)),
        "{failed}"
    );
    assert_eq!(script.asked().len(), 8);
    drop(wires);
}

#[tokio::test(start_paused = true)]
async fn errors_midway_are_waited_out_as_long_as_they_ask_for() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.silence(UpstreamFailure::Status(503));
    script.answer(UpstreamResponse {
        retry_after: Some("9".parse().unwrap()),
        ..UpstreamResponse::unavailable(UpstreamFailure::RateLimited)
    });
    script.ending(400, Some(1000), &blob[400..]);
    let began = Instant::now();
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 400, 400, 400]);
    assert!(began.elapsed().as_secs() >= 9, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_us_to_wait_for_hours_is_not_waited_for() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.answer(UpstreamResponse {
        retry_after: Some("3600".parse().unwrap()),
        ..UpstreamResponse::unavailable(UpstreamFailure::RateLimited)
    });
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    let failed = stepped(failure(reader)).await;
    assert!(
        matches!(*failed, Failure::Broken(UpstreamFailure::RateLimited)),
        "{failed}"
    );
    assert_eq!(script.asked(), [0, 400]);
}

#[tokio::test(start_paused = true)]
async fn a_no_midway_is_believed_sooner_than_a_silence() {
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
    assert_eq!(script.asked(), [0, 400, 400, 400]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_another_size_is_not_used() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob[..400]);
    script.ending(400, Some(900), &blob[400..900]);
    script.ending(400, Some(1000), &blob[400..]);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(stepped(whole(reader)).await, blob);
    assert_eq!(script.asked(), [0, 400, 400]);
}

#[tokio::test]
async fn a_break_behind_the_last_byte_is_none() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.breaking(0, 1000, &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(whole(reader).await, blob);
    assert_eq!(script.asked(), [0]);
}

#[tokio::test]
async fn an_endless_stream_is_left_at_the_first_byte_too_many() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(2000));
    let endless = script.stream(0, Some(1000));
    send(&endless, &blob);
    let reader = leader(&downloads, digest(&blob)).start(script);
    let failed = failure(reader).await;
    assert!(
        matches!(*failed, Failure::Wrong(Mismatch::Size { .. })),
        "{failed}"
    );
    drop(endless);
}

#[tokio::test(start_paused = true)]
async fn wrong_bytes_of_two_answers_are_fetched_once_more_and_only_who_had_some_is_broken() {
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
    assert_eq!(stepped(whole(waiting)).await, blob);
    let (_, end) = stepped(drain(first)).await;
    assert!(matches!(
        *end.unwrap_err(),
        Failure::Broken(UpstreamFailure::DigestMismatch)
    ));
    downloads.idle().await;
    assert_eq!(held(&downloads, digest(&blob)).unwrap(), blob);
    assert_eq!(script.asked(), [0, 300_000, 0]);
}

#[tokio::test(start_paused = true)]
async fn wrong_bytes_are_fetched_once_more_and_not_for_ever() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let mut wrong = blob.clone();
    wrong[7] ^= 1;
    script.breaking(0, 1000, &wrong[..300]);
    script.ending(300, Some(1000), &blob[300..]);
    script.ending(0, Some(1000), &wrong);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    let failed = stepped(failure(reader)).await;
    assert!(matches!(*failed, Failure::Wrong(Mismatch::Digest(_))), "{failed}");
    assert_eq!(script.asked(), [0, 300, 0]);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_gives_a_few_bytes_at_a_time_is_left_in_the_end() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    for from in (0..2000).step_by(10) {
        script.breaking(from, MIB, &blob[from..from + 10]);
    }
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert!(matches!(
        &*stepped(failure(reader)).await,
        Failure::Broken(UpstreamFailure::ConnectionReset)
    ));
    assert_eq!(script.asked().len(), 65);
}
