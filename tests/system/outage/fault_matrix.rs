//! Table of upstream faults and the responses that clients get, uncached and cached.
//!
//! A short or wrong body under a 200 is fatal to most clients, a wrong `Content-Type` to all. So each fault must end
//! in a right and complete response, or in a visible error. As a table, a change of behaviour is a change of one
//! line.

use crate::proxy::{Proxy, Reply, blob_path, manifest_path};
use crate::registry::{Blob, Image, Seen, Upstream, noise, sha256};
use tokio::task::JoinSet;

/// Large enough to be sent before it is verified.
const LAYER: usize = 400_000;

/// A fault and its responses. Uncached: the manifest by tag, a small and a large blob. Cached: the manifest, because
/// the blobs come from the store anyway.
type Line = (
    &'static str,
    fn(&Upstream, &Upstream),
    [&'static str; 3],
    &'static str,
);

#[rustfmt::skip]
const TABLE: &[Line] = &[
    // fault | its effect | uncached: manifest, small blob, large blob | cached
    ("nothing",                              |_, _| {},                                                        ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("no digest header",                     |up, _| up.omits_digest(),                                        ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("no manifest Content-Type",             |up, _| up.types_manifests(""),                                   ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("Content-Type with a charset",          |up, _| up.types_manifests(CHARSET),                              ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("Content-Type application/json",        |up, _| up.types_manifests("application/json"),                   ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("everything chunked",                   |up, _| up.omits_length(),                                        ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("HEAD of manifests 405",                |up, _| up.head_not_allowed(),                                    ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("wrong digest header",                  |up, _| up.lies_about_digest(&sha256(b"a lie")),                  ["502 UNAVAILABLE",                 "whole",                           "whole"],                           "stale-fetch-failed-digest-mismatch"),
    ("manifest 404 JSON",                    |up, _| up.answers(manifest, 404),                                ["404 MANIFEST_UNKNOWN",            "whole",                           "whole"],                           "404 MANIFEST_UNKNOWN"),
    ("manifest 404 text",                    |up, _| up.answers_text(manifest, 404),                           ["404 MANIFEST_UNKNOWN",            "whole",                           "whole"],                           "404 MANIFEST_UNKNOWN"),
    ("manifest 403",                         |up, _| up.answers(manifest, 403),                                ["403 DENIED",                      "whole",                           "whole"],                           "403 DENIED"),
    ("manifest 401 without a challenge",     |up, _| up.answers(manifest, 401),                                ["401 UNAUTHORIZED",                "whole",                           "whole"],                           "401 UNAUTHORIZED"),
    ("manifest 429",                         |up, _| up.rate_limits_manifests(Some("60")),                      ["429 TOOMANYREQUESTS Retry-After", "whole",                           "whole"],                           "stale-if-error-rate-limited"),
    ("manifest 500",                         |up, _| up.answers(manifest, 500),                                ["502 UNAVAILABLE",                 "whole",                           "whole"],                           "stale-if-error-http-status"),
    ("manifest 502",                         |up, _| up.answers_text(manifest, 502),                           ["502 UNAVAILABLE",                 "whole",                           "whole"],                           "stale-if-error-http-status"),
    ("manifest 503",                         |up, _| up.answers(manifest, 503),                                ["503 UNAVAILABLE",                 "whole",                           "whole"],                           "stale-if-error-http-status"),
    ("/v2/ 404",                             |up, _| up.answers_text(ping, 404),                               ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("/v2/ 500",                             |up, _| up.answers(ping, 500),                                    ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("/v2/ 401",                             |up, _| up.answers(ping, 401),                                    ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("a token needed, given to anybody",     |up, _| { up.requires_token(); up.makes_public("library/demo") }, ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("blob 404",                             |up, _| up.answers(blob, 404),                                    ["whole",                           "404 BLOB_UNKNOWN",                "404 BLOB_UNKNOWN"],                "unchanged"),
    ("blob 403",                             |up, _| up.answers(blob, 403),                                    ["whole",                           "403 DENIED",                      "403 DENIED"],                      "unchanged"),
    ("blob 429",                             |up, _| up.rate_limits_blobs(Some("60")),                          ["whole",                           "429 TOOMANYREQUESTS Retry-After", "429 TOOMANYREQUESTS Retry-After"], "unchanged"),
    ("blob 500",                             |up, _| up.answers(blob, 500),                                    ["whole",                           "502 UNAVAILABLE",                 "502 UNAVAILABLE"],                 "unchanged"),
    ("each blob breaks off every 100 kB",    |up, _| up.truncates_blob_at(100_000),                            ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("each blob breaks off at its start",    |up, _| up.truncates_blob_at(0),                                  ["whole",                           "502 UNAVAILABLE",                 "502 UNAVAILABLE"],                          "unchanged"),
    ("each blob ends early, without length", |up, _| up.ends_blob_early_at(100_000),                           ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("blob empty",                           |up, _| up.empties_blobs(),                                       ["whole",                           "502 UNAVAILABLE",                 "502 UNAVAILABLE"],                 "unchanged"),
    // Slowly, so that the response to the large one begins before its end is verified, on a busy machine too.
    ("blob corrupt",                         |up, _| { up.corrupts_blob(); up.drips(1_000_000) },              ["whole",                           "502 UNAVAILABLE",                 "broken"],                          "unchanged"),
    ("blob of a wrong type",                 |up, _| up.types_blobs("text/html"),                              ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("blob encoded",                         |up, _| up.gzips(),                                               ["502 UNAVAILABLE",                 "502 UNAVAILABLE",                 "502 UNAVAILABLE"],                 "stale-if-error-malformed"),
    ("blob 307 to another host",             |up, storage| up.redirects_blobs_to(storage),                     ["whole",                           "whole",                           "whole"],                           "unchanged"),
    ("everything 200 and a page",            |up, _| up.answers_html(),                                        ["502 UNAVAILABLE",                 "502 UNAVAILABLE",                 "502 UNAVAILABLE"],                 "stale-if-error-not-registry"),
    ("connection refused",                   |up, _| up.refuses(),                                             ["502 UNAVAILABLE",                 "502 UNAVAILABLE",                 "502 UNAVAILABLE"],                 "stale-if-error-connection-refused"),
    ("connection reset",                     |up, _| up.resets(),                                              ["502 UNAVAILABLE",                 "502 UNAVAILABLE",                 "502 UNAVAILABLE"],                 "stale-if-error-connection-reset"),
];

const CHARSET: &str = "application/vnd.oci.image.manifest.v1+json; charset=utf-8";

fn manifest(seen: &Seen) -> bool {
    seen.path.contains("/manifests/")
}

fn blob(seen: &Seen) -> bool {
    seen.path.contains("/blobs/")
}

fn ping(seen: &Seen) -> bool {
    seen.path == "/v2/"
}

#[tokio::test]
async fn cold_fault_yields_complete_content_or_clear_error() {
    compare(false).await;
}

#[tokio::test]
async fn held_a_fault_becomes_the_held_copy_or_the_registrys_no() {
    compare(true).await;
}

async fn compare(is_held: bool) {
    let mut differences = Vec::new();
    // Most of the time is spent in retries.
    for lines in TABLE.chunks(12) {
        let mut running = JoinSet::new();
        for (fault, inject, cold, held) in lines {
            let expected = if is_held { [*held, "held", "held"] } else { *cold };
            running.spawn(async move { (fault, seen_of(*inject, is_held).await, expected) });
        }
        for (fault, seen, expected) in running.join_all().await {
            if seen != expected {
                differences.push(format!("{fault:40} {seen:?}, expected {expected:?}"));
            }
        }
    }
    assert!(
        differences.is_empty(),
        "held: {is_held}\n{}",
        differences.join("\n")
    );
}

/// The responses to a fault: manifest, small blob and large blob.
async fn seen_of(inject: fn(&Upstream, &Upstream), is_held: bool) -> [String; 3] {
    let (upstream, storage) = (Upstream::start().await, Upstream::start().await);
    let image = upstream.push("library/demo", "latest", Image::with_layers(&[noise(1, LAYER)]));
    let proxy = Proxy::over(&upstream).await;
    if is_held {
        proxy.pull("library/demo", "latest", &image).await;
    }
    inject(&upstream, &storage);
    let manifest = proxy.manifest("library/demo", "latest").await;
    let head = proxy.head(&manifest_path("library/demo", "latest")).await;
    // A wrong digest shows only in the bytes, which an uncached HEAD does not transfer.
    if head.header("docker-content-digest") != Some(&sha256(b"a lie")) {
        agree(&manifest, &head);
    }
    let mut seen = vec![summary(&manifest, |reply| {
        reply.is_image(&image);
    })];
    for blob in [image.config(), image.layer(0)] {
        seen.push(blob_seen(&proxy, blob).await);
    }
    seen.try_into().unwrap()
}

async fn blob_seen(proxy: &Proxy, blob: &Blob) -> String {
    match proxy.blob("library/demo", &blob.digest).broken_or_reply().await {
        Some(reply) => {
            let head = proxy.head(&blob_path("library/demo", &blob.digest)).await;
            if reply.status == 200 && reply.whole {
                agree(&reply, &head);
            }
            summary(&reply, |reply| {
                reply.is_blob(blob);
            })
        }
        None => "broken".to_owned(),
    }
}

/// HEAD and GET agree.
fn agree(get: &Reply, head: &Reply) {
    assert_eq!(get.status, head.status, "{get:#?} {head:#?}");
    for name in ["content-type", "docker-content-digest", "etag"] {
        assert_eq!(get.header(name), head.header(name), "{name}: {get:#?} {head:#?}");
    }
    if get.status == 200 {
        assert_eq!(
            get.header("content-length"),
            head.header("content-length"),
            "{get:#?} {head:#?}"
        );
    }
}

/// A summary of a response. One with status 200 must have right headers.
fn summary(reply: &Reply, is_right: impl Fn(&Reply)) -> String {
    if reply.status != 200 {
        let after = reply.header("retry-after").map_or("", |_| " Retry-After");
        return format!("{} {}{after}", reply.status, reply.code());
    }
    if !reply.whole {
        return "broken".to_owned();
    }
    is_right(reply);
    let status = reply.cache_status();
    let how = status.rsplit("detail=").next().unwrap();
    match reply.header("warning") {
        Some(_) => how.to_owned(),
        None if !status.contains("; hit") => "whole".to_owned(),
        None if how == "revalidated" => "unchanged".to_owned(),
        None => "held".to_owned(),
    }
}
