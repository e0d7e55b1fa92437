//! Circuit breaker: an unresponsive upstream costs one revalidation timeout for many images, and nothing for what
//! still responds.

#![allow(clippy::disallowed_methods, reason = "tests measure how long a job takes")]

use std::time::{Duration, Instant};

use crate::proxy::{Ask, Proxy, Reply, Setup, manifest_path};
use crate::registry::{Image, Seen, Upstream};

const IMAGES: usize = 20;
/// Limit for twenty images on a busy machine. With one timeout each they would take 40 s.
const JOB_MAX: Duration = Duration::from_secs(15);

fn repository(n: usize) -> String {
    format!("library/app{n}")
}

/// A cache with so many images, each in its own repository.
async fn caching(upstream: &Upstream, count: usize) -> (Proxy, Vec<Image>) {
    let mut images = Vec::new();
    for n in 0..count {
        let image = Image::with_layers(&[&format!("layer {n}")]);
        images.push(upstream.push(&repository(n), "1", image));
    }
    let proxy = Proxy::over(upstream).await;
    for (n, image) in images.iter().enumerate() {
        proxy.pull(&repository(n), "1", image).await;
    }
    (proxy, images)
}

/// The reason of each stale response: `budget` for those that waited.
async fn job(proxy: &Proxy, images: &[Image]) -> Vec<String> {
    let (mut causes, began) = (Vec::new(), Instant::now());
    for (n, image) in images.iter().enumerate() {
        let reply = proxy.manifest(&repository(n), "1").await;
        causes.push(cause(reply.is_image(image).is_stale()));
    }
    assert!(began.elapsed() < JOB_MAX, "{:?}: {causes:?}", began.elapsed());
    causes
}

fn cause(reply: &Reply) -> String {
    let status = reply.cache_status();
    let (_, cause) = status.split_once("stale-if-error-").unwrap();
    cause.to_owned()
}

/// One waits for the revalidation timeout, two for a moment, and the others not at all.
fn is_waited_for_once(causes: &[String]) {
    let waited = causes
        .iter()
        .take_while(|cause| *cause == "revalidate-timeout")
        .count();
    assert!((1..=3).contains(&waited), "{causes:?}");
    assert!(
        causes[waited..].iter().all(|cause| cause == "breaker-open"),
        "{causes:?}"
    );
}

fn waits_for_nothing(causes: &[String]) {
    assert!(causes.iter().all(|cause| cause == "breaker-open"), "{causes:?}");
}

fn is_head(seen: &Seen) -> bool {
    seen.method == "HEAD" && seen.path.contains("/manifests/")
}

#[tokio::test]
async fn t05_upstream_that_hangs_costs_one_budget() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, IMAGES).await;
    upstream.hangs();
    upstream.clear_log();
    is_waited_for_once(&job(&proxy, &images).await);
    waits_for_nothing(&job(&proxy, &images).await);
    let state = proxy.admin("/api/v1/upstreams").await.json();
    let upstreams = state["upstreams"].as_array().unwrap();
    let hub = upstreams.iter().find(|one| one["name"] == "docker.io").unwrap();
    assert_eq!(hub["unavailable"]["cause"], "revalidate-timeout", "{hub:#}");
    assert_eq!(hub["failures"][0]["scope"], "head", "{hub:#}");
    let metrics = proxy.admin("/metrics").await;
    let line = r#"ifnewer_upstream_circuit_breakers_open{upstream="docker.io",scope="head"} "#;
    let text = String::from_utf8_lossy(&metrics.body);
    assert!(text.contains(line), "{text}");
    proxy.program().says("circuit breaker opened").await;

    // It responds again, and a tag that moved meanwhile is served as the new image.
    let new = upstream.moves(&repository(7), "1", Image::with_layers(&["new"]));
    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest(&repository(7), "1");
    let is_new = |reply: &Reply| reply.header("docker-content-digest") == Some(&new.digest);
    proxy.until("the new image", ask, is_new).await;
    proxy.manifest(&repository(3), "1").await.is_unchanged();
}

#[tokio::test]
async fn t05_silent_heads_are_probed_by_heads() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, IMAGES).await;
    // `/v2/` and every GET still respond.
    upstream.hangs_for(is_head);
    upstream.clear_log();
    is_waited_for_once(&job(&proxy, &images).await);
    upstream
        .until("a probe", |seen| {
            seen.iter().filter(|seen| is_head(seen)).count() > 3
        })
        .await;
    waits_for_nothing(&job(&proxy, &images).await);
    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest(&repository(0), "1");
    let is_fresh = |reply: &Reply| reply.cache_status().contains("revalidated");
    proxy.until("the recovery", ask, is_fresh).await;
}

#[tokio::test]
async fn t05_one_polled_tag_opens_the_circuit_breaker() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, 1).await;
    upstream.hangs();
    upstream.clear_log();
    let mut causes = Vec::new();
    for _ in 0..IMAGES {
        causes.extend(job(&proxy, &images).await);
    }
    is_waited_for_once(&causes);
}

#[tokio::test]
async fn o02_twelve_tags_in_a_black_hole_cost_one_budget() {
    let upstream = Upstream::start().await;
    let image = Image::with_layers(&["one"]);
    let tags: Vec<String> = (0..12).map(|n| format!("v{n}")).collect();
    for tag in &tags {
        upstream.push("library/demo", tag, image.clone());
    }
    let proxy = Proxy::over(&upstream).await;
    for tag in &tags {
        proxy.pull("library/demo", tag, &image).await;
    }
    upstream.is_mute();
    let mut causes = Vec::new();
    for tag in &tags {
        causes.push(cause(proxy.manifest("library/demo", tag).await.is_stale()));
    }
    is_waited_for_once(&causes);
}

#[tokio::test]
async fn t05_silent_token_service_after_a_restart_costs_one_budget() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    for n in 0..8 {
        upstream.makes_public(&repository(n));
    }
    let (proxy, images) = caching(&upstream, 8).await;
    upstream.hangs_for(|seen| seen.path == "/token");
    let proxy = proxy.restart().await;
    is_waited_for_once(&job(&proxy, &images).await);
    let state = proxy.admin("/api/v1/upstreams").await.json();
    assert!(state.to_string().contains(r#""scope":"token""#), "{state:#}");
    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest(&repository(0), "1");
    let is_fresh = |reply: &Reply| reply.cache_status().contains("revalidated");
    proxy.until("the recovery", ask, is_fresh).await;
}

#[tokio::test]
async fn t05_open_circuit_breaker_outlives_a_reload() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, 4).await;
    upstream.hangs();
    is_waited_for_once(&job(&proxy, &images).await);
    crate::robustness::reload_state::reload(&proxy).await;
    waits_for_nothing(&job(&proxy, &images).await);
    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest(&repository(0), "1");
    let is_fresh = |reply: &Reply| reply.cache_status().contains("revalidated");
    proxy.until("the recovery", ask, is_fresh).await;
}

#[tokio::test]
async fn t04_errors_of_one_path_leave_other_tags_fresh() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, 1).await;
    upstream.answers(|seen| seen.path.contains("/bad"), 500);
    let good = || proxy.manifest(&repository(0), "1");
    for n in 0..10 {
        for path in [
            manifest_path("library/bad", "1"),
            manifest_path(&format!("library/bad{n}"), "1"),
            format!("/v2/library/bad{n}/tags/list"),
        ] {
            assert!(proxy.get(&path).await.status >= 500);
        }
        good().await.is_image(&images[0]).is_unchanged();
    }
    let new = upstream.moves(&repository(0), "1", Image::with_layers(&["new"]));
    good().await.is_image(&new);
}

#[tokio::test]
async fn t04_silence_of_one_repository_leaves_other_tags_fresh() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, 2).await;
    upstream.hangs_for(|seen| seen.path.starts_with("/v2/library/app0/"));
    let mut causes = Vec::new();
    for _ in 0..6 {
        causes.push(cause(proxy.manifest(&repository(0), "1").await.is_stale()));
        let reply = proxy.manifest(&repository(1), "1").await;
        reply.is_image(&images[1]).is_unchanged();
    }
    is_waited_for_once(&causes);
}

fn list(proxy: &Proxy, n: usize) -> Ask {
    proxy.get(&format!("/v2/{}/tags/list", repository(n)))
}

fn is_list(seen: &Seen) -> bool {
    seen.path.ends_with("/tags/list")
}

#[tokio::test]
async fn t11_equal_tag_lists_are_one_request() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, 1).await;
    let gate = upstream.holds_answers(is_list);
    upstream.clear_log();
    let lists: Vec<_> = (0..100)
        .map(|_| tokio::spawn(list(&proxy, 0).into_reply()))
        .collect();
    gate.reached().await;
    proxy.has_turned(20).await;
    proxy
        .manifest(&repository(0), "1")
        .await
        .is_image(&images[0])
        .is_unchanged();
    let sent = upstream.requests().iter().filter(|seen| is_list(seen)).count();
    assert_eq!(sent, 1);
    gate.release();
    for list in lists {
        assert_eq!(list.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn t11_different_tag_lists_keep_no_tag_waiting() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, 1).await;
    let gate = upstream.holds_answers(is_list);
    let lists: Vec<_> = (0..100)
        .map(|n| {
            let path = format!("/v2/{}/tags/list?n={}", repository(0), n + 1);
            tokio::spawn(proxy.get(&path).into_reply())
        })
        .collect();
    gate.reached_by(4).await;
    proxy.has_turned(20).await;
    for _ in 0..5 {
        proxy
            .manifest(&repository(0), "1")
            .await
            .is_image(&images[0])
            .is_unchanged();
    }
    gate.release();
    for list in lists {
        assert_eq!(list.await.unwrap().status, 200);
    }
}

async fn until_queued(proxy: &Proxy, count: u64) {
    let is_reached = |reply: &Reply| {
        let text = String::from_utf8_lossy(&reply.body);
        let lines = text
            .lines()
            .filter_map(|line| line.strip_prefix("ifnewer_queue_waiting_requests{queue=\"requests\""));
        let waiting = lines.map(|line| line.split(' ').next_back().unwrap().parse::<u64>().unwrap());
        waiting.sum::<u64>() == count
    };
    proxy
        .until("the queue", |proxy| proxy.admin("/metrics"), is_reached)
        .await;
}

#[tokio::test]
async fn t08_list_whose_client_left_the_queue_is_not_fetched() {
    let upstream = Upstream::start().await;
    let image = upstream.push(&repository(0), "1", Image::with_layers(&["layer"]));
    // One permit for lists.
    let limits = "[limits]\ndownloads_per_upstream_max = 1\n";
    let proxy = Setup::over(&upstream).tail(limits).start().await;
    proxy.pull(&repository(0), "1", &image).await;
    let gate = upstream.holds_answers(is_list);
    let first = tokio::spawn(list(&proxy, 0).into_reply());
    gate.reached().await;
    let page = |count: u64| proxy.get(&format!("/v2/{}/tags/list?n={count}", repository(0)));
    let leaving = tokio::spawn(page(7).into_reply());
    until_queued(&proxy, 1).await;
    leaving.abort();
    until_queued(&proxy, 0).await;
    gate.release();
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!(page(8).await.status, 200);
    let lists = upstream.requests().into_iter().filter(is_list);
    let queries: Vec<_> = lists.map(|seen| seen.query.unwrap_or_default()).collect();
    assert_eq!(queries, ["", "n=8"]);
}

#[tokio::test]
async fn t11_cached_lists_are_served_while_upstream_hangs() {
    let upstream = Upstream::start().await;
    let (proxy, images) = caching(&upstream, IMAGES).await;
    for n in 0..IMAGES {
        assert_eq!(list(&proxy, n).await.status, 200);
    }
    upstream.hangs();
    let (mut causes, began) = (Vec::new(), Instant::now());
    for n in 0..IMAGES {
        let reply = list(&proxy, n).await;
        assert_eq!(reply.json()["tags"][0], "1", "{reply:#?}");
        causes.push(cause(&reply));
    }
    is_waited_for_once(&causes);
    assert!(began.elapsed() < JOB_MAX, "{:?}", began.elapsed());
    // A page that was never fetched is cut from the stored list, without waiting.
    let page = format!("/v2/{}/tags/list?n=1", repository(0));
    assert_eq!(proxy.get(&page).await.json()["tags"][0], "1");
    drop(images);
}

#[tokio::test]
async fn t11_list_never_cached_as_such_waits_for_one_budget() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("revalidate_timeout = \"300ms\"")
        .start()
        .await;
    proxy.pull("library/demo", "1", &image).await;
    proxy.get("/v2/library/demo/tags/list").await;
    upstream.hangs();
    // The response arrives although the upstream still holds the request.
    let page = proxy.get("/v2/library/demo/tags/list?n=1").await;
    assert_eq!(page.json()["tags"][0], "1");
}
