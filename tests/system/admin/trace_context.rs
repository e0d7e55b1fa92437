//! W3C Trace Context: a client's trace continues in upstream requests.

use crate::forwarding::host_routing::two_upstreams;
use crate::proxy::{Proxy, manifest_path};
use crate::registry::{Image, Seen, Upstream};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Trace id, parent id and flags of an upstream request.
fn carried(seen: &Seen) -> (String, String, String) {
    let line = seen
        .header("traceparent")
        .unwrap_or_else(|| panic!("no trace: {seen:#?}"));
    let parts: Vec<&str> = line.split('-').collect();
    assert_eq!((parts.len(), parts[0]), (4, "00"), "{line}");
    (parts[1].to_owned(), parts[2].to_owned(), parts[3].to_owned())
}

#[tokio::test]
async fn upstream_request_carries_trace_context_of_the_client() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("library/demo");
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let traced = |ask: crate::proxy::Ask| {
        ask.header("traceparent", PARENT)
            .header("tracestate", "shop=1,rojo=2")
    };
    traced(proxy.manifest("library/demo", "latest"))
        .await
        .is_image(&image);
    // The first request fetches, the second revalidates.
    traced(proxy.manifest("library/demo", "latest"))
        .await
        .is_image(&image);
    traced(proxy.blob("library/demo", &image.blobs[0].digest))
        .await
        .is_blob(&image.blobs[0]);

    let of_client: Vec<Seen> = upstream
        .requests()
        .into_iter()
        .filter(|seen| carried(seen).0 == TRACE)
        .collect();
    for (method, part) in [
        ("HEAD", "/manifests/"),
        ("GET", "/manifests/"),
        ("GET", "/blobs/"),
        ("GET", "/token"),
    ] {
        assert!(
            of_client
                .iter()
                .any(|seen| seen.method == method && seen.path.contains(part)),
            "{method} {part} without the client's trace: {:#?}",
            upstream.requests()
        );
    }
    for seen in &of_client {
        let (_, parent, flags) = carried(seen);
        assert_ne!(
            parent, "00f067aa0ba902b7",
            "the client's own part, not ours: {seen:#?}"
        );
        assert_eq!(flags, "01");
        assert_eq!(seen.header("tracestate"), Some("shop=1,rojo=2"));
    }
    let log = proxy.admin("/api/v1/events").await.json();
    assert_eq!(log["events"][0]["trace_id"], TRACE, "{log}");
}

#[tokio::test]
async fn a_client_without_a_trace_gets_one_that_its_log_line_names() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let mut traces = Vec::new();
    for _ in 0..2 {
        upstream.clear_log();
        proxy.manifest("library/demo", "latest").await.is_image(&image);
        let (trace, _, flags) = carried(&upstream.requests()[0]);
        assert_eq!(flags, "00", "nobody records it");
        let told = proxy.admin("/api/v1/events").await.json()["events"][0]["trace_id"].clone();
        assert_eq!(told, trace.as_str());
        traces.push(trace);
    }
    assert_ne!(traces[0], traces[1]);
}

#[tokio::test]
async fn forwarded_push_carries_trace_with_child_span() {
    let (_hub, other, proxy) = two_upstreams().await;
    let ask = proxy
        .ask("POST", "/v2/team/demo/blobs/uploads/")
        .tls(&proxy.ca_pem(), &["http/1.1"])
        .server_name("ghcr.io")
        .unchecked();
    assert_eq!(ask.header("traceparent", PARENT).await.status, 202);
    let requests = other.requests();
    let posted = requests.iter().find(|seen| seen.method == "POST").unwrap();
    let (trace, parent, _) = carried(posted);
    assert_eq!(trace, TRACE);
    assert_ne!(parent, "00f067aa0ba902b7");
}

#[tokio::test]
async fn trace_context_is_not_sent_to_redirect_targets() {
    let (upstream, storage) = (Upstream::start().await, Upstream::start().await);
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.redirects_blobs_to(&storage);
    let proxy = Proxy::over(&upstream).await;
    proxy.ask("GET", &manifest_path("library/demo", "latest")).await;
    let blob = &image.blobs[0];
    let other_cache = "ifnewer-0123456789abcdef";
    let ask = proxy.blob("library/demo", &blob.digest);
    ask.header("cdn-loop", other_cache).await.is_blob(blob);
    assert!(upstream.requests().iter().any(|seen| {
        let passed = seen.header("cdn-loop").unwrap_or_default();
        passed.starts_with(other_cache)
    }));
    let requests = storage.requests();
    assert!(!requests.is_empty());
    for seen in requests {
        assert!(seen.header("traceparent").is_none(), "{seen:#?}");
        // A redirect to this cache itself is a loop.
        let passed = seen.header("cdn-loop").unwrap();
        assert!(
            passed.starts_with("ifnewer-") && !passed.contains(','),
            "{passed}"
        );
        assert_ne!(passed, other_cache);
    }
}
