//! Requests as the framework of the admin listener handles them: methods, `HEAD`, queries, forms, and the header fields
//! of every response.

use crate::proxy::{Ask, Proxy, Reply};
use crate::registry::{Image, Upstream};

async fn cached() -> (Upstream, Proxy) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    (upstream, proxy)
}

fn ask(proxy: &Proxy, method: &str, path: &str) -> Ask {
    Ask::new(proxy.admin_address(), method, path).unchecked()
}

fn form(proxy: &Proxy, fields: &[u8]) -> Ask {
    ask(proxy, "POST", "/act")
        .header("content-type", "application/x-www-form-urlencoded")
        .body(fields)
}

/// The detail of the problem document.
fn detail(reply: &Reply) -> String {
    assert_eq!(
        reply.header("content-type"),
        Some("application/problem+json"),
        "{reply:#?}"
    );
    let problem = reply.json();
    assert_eq!(problem["status"], reply.status, "{problem}");
    assert_eq!(problem["type"], "about:blank", "{problem}");
    problem["detail"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn admin_head_has_header_of_get_and_no_body() {
    let (_upstream, proxy) = cached().await;
    for path in [
        "/healthz",
        "/metrics",
        "/style.css",
        "/api/openapi.json",
        "/api/v1/images",
        "/api/v1/image?image=demo",
        "/api/v1/export?image=demo",
        "/api/v1/image?image=absent",
        "/api/v1/nothing",
    ] {
        let (get, head) = (proxy.admin(path).await, ask(&proxy, "HEAD", path).await);
        assert_eq!(head.status, get.status, "{path}");
        assert!(head.body.is_empty(), "{path}: {head:#?}");
        for name in ["content-type", "content-length", "content-disposition"] {
            // The values of counters, and so their lengths, change between two requests.
            if path != "/metrics" || name == "content-type" {
                assert_eq!(head.header(name), get.header(name), "{path}: {name}");
            }
        }
    }
    let stream = ask(&proxy, "HEAD", "/api/v1/events/stream").await;
    assert_eq!(
        (stream.status, stream.header("content-type")),
        (200, Some("text/event-stream"))
    );
}

#[tokio::test]
async fn wrong_admin_method_is_rejected_with_allowed_ones() {
    let (_upstream, proxy) = cached().await;
    for (method, path, status, allowed) in [
        ("PUT", "/api/v1/images", 405, &["GET", "HEAD", "DELETE"][..]),
        ("DELETE", "/api/v1/pins", 405, &["GET", "HEAD", "POST"]),
        ("GET", "/api/v1/refresh", 405, &["POST"]),
        ("POST", "/api/v1/status", 405, &["GET", "HEAD"]),
        ("POST", "/api/v1/nothing", 405, &["GET", "HEAD"]),
        ("POST", "/healthz", 405, &["GET", "HEAD"]),
        ("POST", "/", 405, &["GET", "HEAD"]),
        ("GET", "/api/v1/nothing", 404, &[]),
        ("GET", "/api/v1/pulls/none", 404, &[]),
        ("GET", "/api/v1/pulls/", 404, &[]),
        ("GET", "/api/v1/pulls/%ff", 404, &[]),
        ("HEAD", "/nothing", 404, &[]),
    ] {
        let kind = if path.starts_with("/api/") {
            "application/json"
        } else {
            "application/x-www-form-urlencoded"
        };
        let reply = ask(&proxy, method, path).header("content-type", kind).await;
        assert_eq!(reply.status, status, "{method} {path}: {reply:#?}");
        let found = reply
            .header("allow")
            .unwrap_or_default()
            .split(',')
            .map(str::trim);
        let mut found: Vec<&str> = found.filter(|method| !method.is_empty()).collect();
        let mut allowed = allowed.to_vec();
        found.sort_unstable();
        allowed.sort_unstable();
        assert_eq!(found, allowed, "{method} {path}");
        if method != "HEAD" {
            detail(&reply);
        }
    }
    // Rejected before the router: a form is the only change outside of the API.
    let reply = ask(&proxy, "POST", "/style.css")
        .header("content-type", "application/json")
        .await;
    assert_eq!((reply.status, reply.header("allow")), (405, Some("GET, HEAD")));
    detail(&reply);
}

#[tokio::test]
async fn invalid_admin_query_names_parameter_and_value() {
    let (_upstream, proxy) = cached().await;
    let nine = "/api/v1/events?a=1&b=2&c=3&d=4&e=5&f=6&g=7&h=8&i=9";
    for (path, expected) in [
        ("/api/v1/images?limit=x", "`limit` is a number, not `x`"),
        ("/api/v1/images?offset=-1", "`offset` is a number, not `-1`"),
        (
            "/api/v1/images?sort=colour",
            "`sort` is name, size or confirmed, not `colour`",
        ),
        ("/api/v1/series?span=year", "`span` is hour or day, not `year`"),
        ("/api/v1/events?after=x", "`after` is a number, not `x`"),
        ("/api/v1/events/stream?after=x", "`after` is a number, not `x`"),
        (
            "/api/v1/image",
            "missing image, as in image=docker.io/library/alpine:3.20",
        ),
        (
            "/api/v1/export",
            "missing image, as in image=docker.io/library/alpine:3.20",
        ),
        ("/?from=x", "`from` is a number, not `x`"),
        (
            "/api/v1/images?filter=%zz",
            "a parameter is not percent-encoded UTF-8",
        ),
        (nine, "more than 8 parameters"),
    ] {
        let reply = proxy.admin(path).await;
        assert_eq!(reply.status, 400, "{path}: {reply:#?}");
        assert_eq!(detail(&reply), expected, "{path}");
    }
    let reply = ask(&proxy, "DELETE", "/api/v1/images?image=demo&dry_run=perhaps").await;
    assert_eq!(
        (reply.status, &*detail(&reply)),
        (400, "`dry_run` is true or false, not `perhaps`")
    );
    // Unknown and empty parameters are ignored.
    for path in [
        "/api/v1/images?filter=demo&limit=&upstream=&colour=red",
        "/api/v1/events?after=&limit=&result=",
        "/?from=&notice=&remove=&images=",
    ] {
        assert_eq!(proxy.admin(path).await.status, 200, "{path}");
    }
    let listed = proxy.admin("/api/v1/images?upstream=&limit=0").await.json();
    assert_eq!(
        (&listed["total"], listed["images"].as_array().unwrap().len()),
        (&1.into(), 1)
    );
}

#[tokio::test]
async fn invalid_admin_body_or_form_is_a_problem() {
    let (_upstream, proxy) = cached().await;
    let json = |body: &[u8]| {
        ask(&proxy, "POST", "/api/v1/offline")
            .header("content-type", "application/json")
            .body(body)
    };
    for (body, expected) in [
        (&b"{"[..], "the body is invalid: EOF while parsing"),
        (b"{}", "the body is invalid: missing field `offline`"),
        (
            b"{\"offline\":true,\"on\":1}",
            "the body is invalid: unknown field `on`",
        ),
        (b"{\"offline\":1}", "the body is invalid: invalid type"),
    ] {
        let reply = json(body).await;
        assert_eq!(reply.status, 400, "{reply:#?}");
        let detail = detail(&reply);
        assert!(detail.starts_with(expected), "{detail}");
    }
    let large = vec![b'a'; 70_000];
    for reply in [json(&large).await, form(&proxy, &large).await] {
        assert_eq!(
            (reply.status, &*detail(&reply)),
            (413, "the body is larger than 65536 bytes")
        );
    }
    let chunked = ask(&proxy, "POST", "/act")
        .header("content-type", "application/x-www-form-urlencoded")
        .chunked_body(&large)
        .await;
    assert_eq!(chunked.status, 413, "{chunked:#?}");
    let long = format!("secret=a&reason={}", "r".repeat(5_000));
    for invalid in [
        &b"secret=a&secret=b"[..],
        b"secret=a&reason=x%zz",
        b"secret=a&reason=%ff",
        long.as_bytes(),
    ] {
        let reply = form(&proxy, invalid).await;
        assert_eq!(reply.status, 400, "{reply:#?}");
        assert!(detail(&reply).starts_with("the form is invalid: "), "{reply:#?}");
    }
    let reply = form(&proxy, b"secret=a&reason=\xff").await;
    assert_eq!((reply.status, &*detail(&reply)), (400, "the form is not UTF-8"));
}

#[tokio::test]
async fn every_admin_response_has_fixed_header_fields_once() {
    let (_upstream, proxy) = cached().await;
    let page = proxy.admin("/").await;
    let text = String::from_utf8_lossy(&page.body).into_owned();
    let (_, rest) = text.split_once("name=\"secret\" value=\"").unwrap();
    let secret = rest.split('"').next().unwrap();
    let submitted = form(&proxy, format!("secret={secret}&action=online").as_bytes()).await;
    assert_eq!(submitted.status, 303, "{submitted:#?}");
    let stream = ask(&proxy, "GET", "/api/v1/events/stream").stream().await;
    let mut found = vec![("/act".to_owned(), submitted.headers)];
    found.push(("/api/v1/events/stream".to_owned(), stream.headers.clone()));
    for path in [
        "/",
        "/style.css",
        "/healthz",
        "/metrics",
        "/api/v1/status",
        "/api/v1/export?image=demo",
        "/api/v1/nothing",
    ] {
        found.push((path.to_owned(), proxy.admin(path).await.headers));
    }
    let foreign = proxy.admin("/").header("host", "evil.example").await;
    found.push(("421".to_owned(), foreign.headers));
    for (path, headers) in found {
        for (name, expected) in [
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "same-origin"),
        ] {
            let values: Vec<_> = headers.get_all(name).iter().collect();
            assert_eq!(values, [expected], "{path}: {name}");
        }
        assert_eq!(
            headers.get_all("content-security-policy").iter().count(),
            1,
            "{path}"
        );
    }
}

#[tokio::test]
async fn token_is_prompted_for_in_both_schemes() {
    let upstream = Upstream::start().await;
    let setup = crate::proxy::Setup::over(&upstream);
    let token = setup.file("admin.token", "0123456789abcdef\n");
    let setup = setup.listen_keys(&format!("admin_token_file = {token:?}"));
    let proxy = setup.start().await;
    for path in ["/", "/api/v1/nothing"] {
        let reply = proxy.admin(path).await;
        assert_eq!(reply.status, 401, "{reply:#?}");
        let challenges: Vec<_> = reply.headers.get_all("www-authenticate").iter().collect();
        assert_eq!(
            challenges,
            [
                "Bearer realm=\"ifnewer admin\"",
                "Basic realm=\"ifnewer admin\", charset=\"UTF-8\""
            ]
        );
    }
}
