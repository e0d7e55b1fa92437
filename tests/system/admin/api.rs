//! Admin API against its generated `OpenAPI` document: every documented path is called, every response is valid, and undocumented
//! paths are rejected.

mod schema;

use crate::proxy::{Ask, Proxy, Reply, Setup};
use crate::registry::{Image, Upstream, noise, within};
use serde_json::{Value, json};

/// A cache with images and events.
async fn busy() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    upstream.tells_rate_limit(100, 73);
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    proxy.manifest("library/absent", "latest").await;
    (upstream, proxy, image)
}

fn post(proxy: &Proxy, path: &str, body: &Value) -> Ask {
    Ask::new(proxy.admin_address(), "POST", path)
        .header("content-type", "application/json")
        .body(body.to_string().as_bytes())
        .unchecked()
}

fn import(proxy: &Proxy, query: &str, archive: &[u8]) -> Ask {
    Ask::new(proxy.admin_address(), "POST", &format!("/api/v1/import{query}"))
        .header("content-type", "application/x-tar")
        .body(archive)
        .unchecked()
}

fn delete(proxy: &Proxy, path: &str) -> Ask {
    Ask::new(proxy.admin_address(), "DELETE", path).unchecked()
}

async fn document(proxy: &Proxy) -> Value {
    proxy.admin("/api/openapi.json").await.json()
}

/// The response, validated against the document.
fn valid(document: &Value, path: &str, reply: &Reply) -> Value {
    let method = reply.method.to_lowercase();
    let responses = &document["paths"][path][&method]["responses"];
    let response = &responses[reply.status.to_string()];
    assert!(
        response.is_object(),
        "{} is not documented for {method} {path}: {reply:#?}",
        reply.status
    );
    let kind = reply.header("content-type").unwrap();
    let schema = &response["content"][kind]["schema"];
    assert!(schema.is_object(), "{kind} is not documented for {method} {path}");
    if !kind.contains("json") {
        return Value::Null;
    }
    let answer = reply.json();
    schema::check(document, schema, &answer, path);
    answer
}

#[tokio::test]
async fn every_documented_path_responds_as_documented() {
    let (_upstream, proxy, image) = busy().await;
    let document = document(&proxy).await;
    let mut called = Vec::new();
    let demo = "docker.io/library/demo:latest";
    for (path, query) in [
        ("/api/v1/status", ""),
        ("/api/v1/series", "?span=day"),
        ("/api/v1/images", "?filter=demo&sort=size&limit=1"),
        ("/api/v1/image", "?image=docker.io/library/demo:latest"),
        ("/api/v1/why", "?image=demo"),
        ("/api/v1/upstreams", ""),
        ("/api/v1/shared", ""),
        ("/api/v1/transfers", ""),
        ("/api/v1/events", "?image=demo"),
        ("/api/v1/clients", ""),
        ("/api/v1/pulls", ""),
        ("/api/v1/offline", ""),
        ("/api/v1/verify", ""),
        ("/api/v1/export", "?image=demo,docker.io/library/demo:latest"),
        ("/api/v1/pins", ""),
        ("/api/openapi.json", ""),
        ("/healthz", ""),
        ("/readyz", ""),
        ("/metrics", ""),
        ("/ca.pem", ""),
    ] {
        let reply = proxy.admin(&format!("{path}{query}")).await;
        assert_eq!(reply.status, 200, "{path}: {reply:#?}");
        let answer = valid(&document, path, &reply);
        match path {
            "/api/v1/image" => assert_eq!(answer["digest"], json!(image.digest)),
            "/api/v1/images" => assert_eq!(answer["total"], 1),
            "/api/v1/status" => assert_eq!(answer["healthy"], true, "{answer}"),
            "/api/v1/clients" => assert_eq!(answer["clients"].as_array().unwrap().len(), 1, "{answer}"),
            _ => {}
        }
        called.push(format!("get {path}"));
    }
    for (path, body, status) in [
        (
            "/api/v1/why",
            json!({ "image": demo, "username": "u", "password": "p" }),
            200,
        ),
        ("/api/v1/pulls", json!({ "image": demo }), 202),
        ("/api/v1/refresh", json!({ "image": demo }), 200),
        ("/api/v1/offline", json!({ "offline": false }), 200),
        ("/api/v1/gc", json!({ "dry_run": true }), 200),
        ("/api/v1/verify", json!({ "rebuild_index": true }), 202),
        ("/api/v1/pins", json!({ "image": demo, "pinned": false }), 200),
    ] {
        let reply = post(&proxy, path, &body).await;
        assert_eq!(reply.status, status, "{path}: {reply:#?}");
        valid(&document, path, &reply);
        called.push(format!("post {path}"));
    }
    called.extend(verdicts_respond_as_documented(&proxy, &document, &image).await);
    let archive = proxy.admin("/api/v1/export?image=demo").await.body;
    let reply = import(&proxy, "", &archive).await;
    let imported = valid(
        &document,
        "/api/v1/import",
        &Reply {
            path: "/api/v1/import".to_owned(),
            ..reply
        },
    );
    assert_eq!(imported["images"][0]["already_cached"], true);
    called.push("post /api/v1/import".to_owned());
    let reply = proxy.admin("/api/v1/pulls/1").await;
    let pulls = valid(
        &document,
        "/api/v1/pulls/{id}",
        &Reply {
            path: "/api/v1/pulls/{id}".to_owned(),
            ..reply
        },
    );
    assert_eq!(pulls["id"], 1);
    called.push("get /api/v1/pulls/{id}".to_owned());
    let reply = delete(&proxy, "/api/v1/images?image=demo&dry_run=true").await;
    assert!(
        valid(&document, "/api/v1/images", &reply)["bytes_freed"]
            .as_u64()
            .unwrap()
            > 0
    );
    called.push("delete /api/v1/images".to_owned());
    called.push("get /api/v1/events/stream".to_owned());

    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let name = format!("{method} {path}");
            assert!(called.contains(&name), "{name} is documented and not tested");
        }
    }
}

/// Blocks and approvals: lists, changes and invalid requests. Returns what was called.
async fn verdicts_respond_as_documented(proxy: &Proxy, document: &Value, image: &Image) -> Vec<String> {
    let mut called = Vec::new();
    let in_demo = format!("demo@{}", image.digest);
    for (path, word) in [("/api/v1/blocks", "blocked"), ("/api/v1/approvals", "approved")] {
        for (is_given, was) in [(true, false), (true, true), (false, true), (false, false)] {
            let body = json!({ "image": in_demo, word: is_given, "by": "alice", "reason": "read" });
            let reply = post(proxy, path, &body).await;
            assert_eq!(reply.status, 200, "{reply:#?}");
            assert_eq!(valid(document, path, &reply)["was"], was, "{reply:#?}");
            let list = proxy.admin(path).await;
            let key = path.rsplit('/').next().unwrap();
            let listed = valid(document, path, &list)[key].as_array().unwrap().len();
            assert_eq!(listed, usize::from(is_given));
        }
        for wrong in [
            "demo:latest",
            "sha256:00",
            "sha999:00",
            "",
            "dockr.io/x@sha256:00",
        ] {
            let reply = post(proxy, path, &json!({ "image": wrong, word: true })).await;
            assert_eq!(reply.status, 400, "{wrong}: {reply:#?}");
            valid(document, path, &reply);
        }
        called.extend([format!("get {path}"), format!("post {path}")]);
    }
    called
}

#[tokio::test]
async fn every_request_error_is_a_problem_document() {
    let (upstream, proxy, _image) = busy().await;
    let index = Image::index(&[Image::with_layers(&["three"])]);
    upstream.push("library/multi", "latest", index);
    proxy.manifest("library/multi", "latest").await;
    let document = document(&proxy).await;
    let get = |path: &str| proxy.admin(path);
    let demo = json!({ "image": "demo" });
    let cases = [
        (
            "/api/v1/image",
            get("/api/v1/image?image=docker.io/library/dmo:latest"),
            404,
        ),
        (
            "/api/v1/image",
            get("/api/v1/image?image=dockr.io/library/demo"),
            400,
        ),
        ("/api/v1/image", get("/api/v1/image"), 400),
        ("/api/v1/images", get("/api/v1/images?sort=colour"), 400),
        ("/api/v1/series", get("/api/v1/series?span=year"), 400),
        (
            "/api/v1/gc",
            post(
                &proxy,
                "/api/v1/gc",
                &json!({ "dry_run": true, "unused_for": "long" }),
            ),
            400,
        ),
        ("/api/v1/events", get("/api/v1/events?after=x"), 400),
        ("/api/v1/pulls/{id}", get("/api/v1/pulls/99"), 404),
        (
            "/api/v1/images",
            get("/api/v1/images").header("host", "evil.example"),
            421,
        ),
        (
            "/api/v1/why",
            post(&proxy, "/api/v1/why", &json!({ "imag": "demo" })),
            400,
        ),
        (
            "/api/v1/pulls",
            post(&proxy, "/api/v1/pulls", &json!("x".repeat(70_000))),
            413,
        ),
        (
            "/api/v1/refresh",
            post(&proxy, "/api/v1/refresh", &demo).header("origin", "http://evil.example"),
            403,
        ),
        (
            "/api/v1/offline",
            Ask::new(proxy.admin_address(), "POST", "/api/v1/offline")
                .body(b"offline=true")
                .unchecked(),
            415,
        ),
        (
            "/api/v1/images",
            delete(&proxy, "/api/v1/images?image=absent"),
            404,
        ),
        ("/api/v1/export", get("/api/v1/export?image=absent"), 404),
        ("/api/v1/export", get("/api/v1/export?image=demo,"), 400),
        ("/api/v1/export", get("/api/v1/export?image=multi"), 409),
        ("/api/v1/import", import(&proxy, "?public=perhaps", b""), 400),
        ("/api/v1/import", import(&proxy, "", b"no archive"), 422),
        ("/api/v1/import", post(&proxy, "/api/v1/import", &demo), 415),
    ];
    for (path, ask, status) in cases {
        let reply = ask.await;
        assert_eq!(reply.status, status, "{path}: {reply:#?}");
        let problem = valid(&document, path, &reply);
        assert_eq!(reply.header("content-type"), Some("application/problem+json"));
        if status == 404 && path == "/api/v1/image" {
            assert_eq!(
                problem["nearest"][0], "docker.io/library/demo:latest",
                "{problem}"
            );
        }
        if reply.path.contains("dockr.io") {
            assert_eq!(problem["nearest"][0], "docker.io", "{problem}");
        }
    }
    let reply = post(&proxy, "/api/v1/status", &demo).await;
    assert_eq!(reply.status, 405, "{reply:#?}");
    let reply = get("/api/v1/nothing").await;
    assert_eq!(reply.status, 404, "{reply:#?}");
}

#[tokio::test]
async fn a_decision_is_told_with_its_reason_and_the_clients_trace() {
    let (upstream, proxy, image) = busy().await;
    upstream.refuses();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let reply = proxy
        .manifest("library/demo", "latest")
        .header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"))
        .await;
    reply.is_stale();
    let told = proxy
        .admin(&format!("/api/v1/events?trace_id={trace}"))
        .await
        .json();
    let event = &told["events"][0];
    assert_eq!(
        (&event["result"], &event["reason"], &event["cause"]),
        (
            &json!("stale"),
            &json!("stale-if-error"),
            &json!("connection-refused")
        ),
        "{told}"
    );
    assert_eq!(event["digest"], json!(image.digest));
    let sentence = event["sentence"].as_str().unwrap();
    assert_eq!(
        sentence,
        "docker.io refused the connection: served the cached copy"
    );
    proxy.program().says(trace).await;
}

#[tokio::test]
async fn decisions_are_streamed_as_they_are_made() {
    let (_upstream, proxy, image) = busy().await;
    let mut stream = Ask::new(proxy.admin_address(), "GET", "/api/v1/events/stream")
        .unchecked()
        .stream()
        .await;
    assert_eq!(stream.headers.get("content-type").unwrap(), "text/event-stream");
    assert_eq!(&stream.read(12).await[..], b": watching\n\n");
    proxy.pull("library/demo", "latest", &image).await;
    let mut line = String::new();
    while !line.ends_with("\n\n") {
        line.push(char::from(stream.read(1).await[0]));
    }
    let data = line.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    let event: Value = serde_json::from_str(data).unwrap();
    let document = document(&proxy).await;
    schema::check(
        &document,
        &json!({ "$ref": "#/components/schemas/Event" }),
        &event,
        "stream",
    );
    assert_eq!(event["reason"], "revalidated");
}

#[tokio::test]
async fn offline_mode_sends_no_upstream_request() {
    let (upstream, proxy, image) = busy().await;
    upstream.push("library/other", "latest", Image::with_layers(&["three"]));
    let reply = post(&proxy, "/api/v1/offline", &json!({ "offline": true })).await;
    assert_eq!(reply.json(), json!({ "offline": true, "was": false }));
    upstream.clear_log();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
    let refused = proxy.manifest("library/other", "latest").await;
    assert_eq!(refused.status, 503, "{refused:#?}");
    let why = proxy.admin("/api/v1/why?image=other").await.json();
    assert_eq!(why["reason"], "upstream-unavailable", "{why}");
    assert_eq!(upstream.requests().len(), 0);
    let status = proxy.admin("/api/v1/status").await.json();
    assert_eq!(
        (&status["offline"], &status["healthy"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(proxy.admin("/readyz").await.status, 200, "what is held is served");

    post(&proxy, "/api/v1/offline", &json!({ "offline": false })).await;
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
}

#[tokio::test]
async fn pull_job_fetches_every_layer_and_second_run_finds_all() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    for expected in ["fetched", "cached"] {
        let begun = post(&proxy, "/api/v1/pulls", &json!({ "image": "demo" }))
            .await
            .json();
        let path = format!("/api/v1/pulls/{}", begun["id"]);
        let done = proxy
            .until(
                "the pull to be done",
                |proxy| proxy.admin(&path),
                |reply| reply.json()["state"] == "done",
            )
            .await
            .json();
        assert_eq!(done["digest"], json!(image.digest), "{done}");
        let layers = done["layers"].as_array().unwrap();
        assert_eq!(layers.len(), image.blobs.len());
        for layer in layers {
            assert_eq!(
                (&layer["state"], &layer["received"]),
                (&json!(expected), &layer["size"]),
                "{done}"
            );
        }
        for blob in &image.blobs {
            proxy.until_kept(&blob.digest).await;
        }
    }
    upstream.refuses();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
    let begun = post(&proxy, "/api/v1/pulls", &json!({ "image": "library/absent" }))
        .await
        .json();
    let path = format!("/api/v1/pulls/{}", begun["id"]);
    let failed = proxy
        .until(
            "the pull to fail",
            |proxy| proxy.admin(&path),
            |reply| reply.json()["state"] == "failed",
        )
        .await
        .json();
    assert!(
        failed["error"]
            .as_str()
            .unwrap()
            .contains("docker.io refused the connection"),
        "{failed}"
    );
}

#[tokio::test]
async fn refresh_revalidates_fresh_tag_and_fetches_newer_image() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("max_age = \"1h\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &old).await;
    let refresh = || post(&proxy, "/api/v1/refresh", &json!({ "image": "demo" }));
    assert_eq!(refresh().await.json()["result"], "revalidated");
    let new = upstream.push("library/demo", "latest", Image::with_layers(&["two"]));
    proxy.manifest("library/demo", "latest").await.is_image(&old);
    let refreshed = refresh().await.json();
    assert_eq!(
        (&refreshed["result"], &refreshed["digest"]),
        (&json!("new-digest"), &json!(new.digest))
    );
    proxy.manifest("library/demo", "latest").await.is_image(&new);
    upstream.refuses();
    let silent = refresh().await.json();
    assert_eq!(
        (&silent["result"], &silent["cause"]),
        (&json!("upstream-unavailable"), &json!("connection-refused"))
    );
}

#[tokio::test]
async fn deleting_an_image_frees_only_unshared_content() {
    let upstream = Upstream::start().await;
    let one = upstream.push(
        "library/one",
        "latest",
        Image::with_layers(&["shared", "only one"]),
    );
    let two = upstream.push(
        "library/two",
        "latest",
        Image::with_layers(&["shared", "only two"]),
    );
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/one", "latest", &one).await;
    proxy.pull("library/two", "latest", &two).await;

    let path = "/api/v1/images?image=docker.io/library/one:latest";
    let trial = delete(&proxy, &format!("{path}&dry_run=true")).await.json();
    assert_eq!(
        proxy.admin("/api/v1/images").await.json()["total"],
        2,
        "a trial removes nothing"
    );
    let gone = delete(&proxy, path).await.json();
    assert_eq!(trial["bytes_freed"], gone["bytes_freed"]);
    assert!(
        gone["bytes_freed"].as_u64().unwrap() > 0 && gone["manifests"] == 1,
        "{gone}"
    );
    assert_eq!(delete(&proxy, path).await.status, 404);

    upstream.refuses();
    proxy.pull("library/two", "latest", &two).await.is_stale();
    proxy.manifest("library/one", "latest").await.is_unreachable();
    let unique = one
        .blobs
        .iter()
        .filter(|blob| !two.blobs.iter().any(|other| other.digest == blob.digest));
    for blob in unique {
        assert!(proxy.setup().kept_blob(&blob.digest).is_none(), "{}", blob.digest);
    }
}

#[tokio::test]
async fn what_is_pinned_is_said_to_be_and_is_not_let_go_of() {
    let (_upstream, proxy, _image) = busy().await;
    let demo = "docker.io/library/demo:latest";
    let pin = |pinned: bool| {
        post(
            &proxy,
            "/api/v1/pins",
            &json!({ "image": "demo", "pinned": pinned }),
        )
    };
    let reply = pin(true).await;
    assert_eq!(
        reply.json(),
        json!({ "image": demo, "pinned": true, "was": false })
    );
    valid(&document(&proxy).await, "/api/v1/pins", &reply);
    assert_eq!(pin(true).await.json()["was"], true);
    assert_eq!(proxy.admin("/api/v1/pins").await.json()["pins"], json!([demo]));
    assert_eq!(
        proxy.admin("/api/v1/images").await.json()["images"][0]["pinned"],
        true
    );
    let refused = delete(&proxy, "/api/v1/images?image=demo").await;
    assert_eq!(refused.status, 409, "{refused:#?}");
    assert_eq!(pin(false).await.json()["was"], true);
    assert_eq!(delete(&proxy, "/api/v1/images?image=demo").await.status, 200);
}

#[tokio::test]
async fn why_says_in_words_what_would_be_done_and_from_what() {
    let (upstream, proxy, _image) = busy().await;
    let why = proxy.admin("/api/v1/why?image=demo").await.json();
    assert_eq!(why["reason"], "revalidate", "{why}");
    let then: Vec<&str> = why["what_if"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| case["upstream_response"].as_str().unwrap())
        .collect();
    assert_eq!(
        then,
        [
            "the same digest",
            "another digest",
            "401 or 403",
            "404",
            "nothing usable"
        ]
    );
    let because = why["because"].to_string();
    for part in [
        "policy if-newer, by default",
        "complete",
        "docker.io has authorized a client without a credential",
    ] {
        assert!(because.contains(part), "{part}: {because}");
    }
    upstream.clear_log();
    let stranger = json!({ "image": "ghcr.io/acme/private", "username": "stranger", "password": "canary" });
    let why = post(&proxy, "/api/v1/why", &stranger).await.json();
    assert!(
        why["because"]
            .to_string()
            .contains("has not authorized this credential"),
        "{why}"
    );
    assert!(!why.to_string().contains("canary"));
    assert_eq!(upstream.requests().len(), 0, "asking why asks nobody");
}

#[tokio::test]
async fn a_download_under_way_is_seen_with_who_waits_for_it() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let blob = image.blobs.last().unwrap();
    let gate = upstream.holds_blob(&blob.digest, 0);
    let first = tokio::spawn(proxy.blob("library/demo", &blob.digest).into_reply());
    let seen = proxy
        .until(
            "the download to be seen",
            |proxy| proxy.admin("/api/v1/transfers"),
            |reply| {
                reply.json()["transfers"]
                    .as_array()
                    .is_some_and(|all| !all.is_empty())
            },
        )
        .await
        .json();
    assert_eq!(seen["transfers"][0]["digest"], json!(blob.digest));
    assert_eq!(seen["transfers"][0]["readers"], 1, "{seen}");
    gate.release();
    within("the download", first).await.unwrap().is_blob(blob);
}

#[tokio::test]
async fn reachable_admin_address_requires_a_token() {
    let upstream = Upstream::start().await;
    let setup = Setup::over(&upstream);
    let token = setup.file("admin.token", "0123456789abcdef\n");
    let proxy = setup
        .listen_keys(&format!("admin_token_file = {token:?}"))
        .start()
        .await;
    assert_eq!(proxy.admin("/healthz").await.status, 200);
    assert_eq!(proxy.admin("/metrics").await.status, 200);
    for authorization in ["", "Bearer 0123456789abcdeX", "Basic eDp5"] {
        let ask = proxy
            .admin("/api/v1/images")
            .header("authorization", authorization);
        assert_eq!(ask.await.status, 401, "{authorization}");
    }
    let offline = || post(&proxy, "/api/v1/offline", &json!({ "offline": true }));
    assert_eq!(offline().await.status, 401);
    assert_eq!(offline().bearer("0123456789abcdef").await.status, 200);
    assert_eq!(
        proxy.admin("/").basic("anyone", "0123456789abcdef").await.status,
        200
    );
}

#[tokio::test]
async fn offline_mode_persists_over_a_restart() {
    let (upstream, proxy, image) = busy().await;
    post(&proxy, "/api/v1/offline", &json!({ "offline": true })).await;
    let proxy = proxy.restart().await;
    proxy.program().says("offline mode restored").await;
    upstream.clear_log();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
    assert_eq!(upstream.requests().len(), 0);
    assert_eq!(proxy.admin("/api/v1/offline").await.json()["offline"], true);
    post(&proxy, "/api/v1/offline", &json!({ "offline": false })).await;
    let proxy = proxy.crash().await;
    assert_eq!(proxy.admin("/api/v1/offline").await.json()["offline"], false);
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
}

#[tokio::test]
async fn what_a_tag_named_before_is_told_also_after_a_restart() {
    let (upstream, mut proxy, first) = busy().await;
    let second = upstream.moves("library/demo", "latest", Image::with_layers(&["newer"]));
    proxy.pull("library/demo", "latest", &second).await;
    let third = upstream.moves("library/demo", "latest", Image::with_layers(&["newest"]));
    proxy.pull("library/demo", "latest", &third).await;
    for _ in 0..2 {
        let reply = proxy.admin("/api/v1/image?image=demo").await;
        let shown = valid(&document(&proxy).await, "/api/v1/image", &reply);
        let past: Vec<_> = shown["history"]
            .as_array()
            .unwrap()
            .iter()
            .map(|past| &past["digest"])
            .collect();
        assert_eq!(past, [&json!(second.digest), &json!(first.digest)], "{shown}");
        assert_eq!(shown["digest"], json!(third.digest));
        assert!(shown["last_pulled_at"].is_string(), "{shown}");
        proxy = proxy.restart().await;
    }
}

#[tokio::test]
async fn image_deleted_during_pull_reaches_client_complete() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(1, 400_000));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 100_000);
    let pulling = tokio::spawn(proxy.blob("library/demo", &layer.digest).into_reply());
    gate.reached().await;
    let gone = delete(&proxy, "/api/v1/images?image=demo").await;
    assert_eq!(gone.status, 200, "{gone:#?}");
    assert_eq!(proxy.admin("/api/v1/images").await.json()["total"], 0);
    gate.release();
    within("the pull", pulling).await.unwrap().is_blob(layer);

    proxy.pull("library/demo", "latest", &image).await;
    upstream.refuses();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
}

#[tokio::test]
async fn tag_deleted_during_revalidation_is_cached_again_complete() {
    let (upstream, proxy, _old) = busy().await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["newer"]));
    let gate = upstream.holds_answers(|seen| seen.method == "HEAD");
    let asking = tokio::spawn(proxy.manifest("library/demo", "latest").into_reply());
    gate.reached().await;
    assert_eq!(delete(&proxy, "/api/v1/images?image=demo").await.status, 200);
    gate.release();
    within("the answer", asking).await.unwrap().is_image(&new);
    proxy.pull("library/demo", "latest", &new).await;
    upstream.refuses();
    proxy.pull("library/demo", "latest", &new).await.is_stale();
}

#[tokio::test]
async fn pulls_and_collections_at_once_lose_nothing() {
    let upstream = Upstream::start().await;
    let images: Vec<Image> = (0..12)
        .map(|seed| {
            let image = Image::with_layers(&[noise(7, 100_000), noise(100 + seed, 50_000)]);
            upstream.push("library/demo", &seed.to_string(), image)
        })
        .collect();
    let proxy = std::sync::Arc::new(Proxy::over(&upstream).await);
    let collecting = {
        let proxy = std::sync::Arc::clone(&proxy);
        tokio::spawn(async move {
            let all = json!({ "dry_run": false, "unused_for": "0s" });
            loop {
                let reply = post(&proxy, "/api/v1/gc", &all).await;
                assert_eq!(reply.status, 200, "{reply:#?}");
                tokio::task::yield_now().await;
            }
        })
    };
    for (seed, image) in images.iter().enumerate() {
        proxy
            .manifest("library/demo", &seed.to_string())
            .await
            .is_image(image);
        for blob in &image.blobs {
            proxy.blob("library/demo", &blob.digest).await.is_blob(blob);
        }
    }
    assert!(!collecting.is_finished(), "a collection failed");
    collecting.abort();
    for (seed, image) in images.iter().enumerate() {
        proxy.pull("library/demo", &seed.to_string(), image).await;
    }
    upstream.refuses();
    for (seed, image) in images.iter().enumerate() {
        proxy
            .pull("library/demo", &seed.to_string(), image)
            .await
            .is_stale();
    }
}

/// Covered by the archive tests, which know broken archives, and by the store's tests of verdicts.
const ELSEWHERE: &[&str] = &[
    "get /api/v1/export 409",
    "get /api/v1/export 503",
    "post /api/v1/import 400",
    "post /api/v1/import 409",
    "post /api/v1/import 422",
    "post /api/v1/import 500",
    "post /api/v1/import 503",
    "post /api/v1/import 507",
    "post /api/v1/blocks 409",
    "post /api/v1/blocks 500",
    "post /api/v1/approvals 409",
    "post /api/v1/approvals 500",
];

const TOKEN: &str = "0123456789abcdef";

/// A cache with an admin token, a provided certificate and a pinned image.
async fn guarded() -> (Upstream, Proxy) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let setup = Setup::over(&upstream);
    let token = setup.file("admin.token", &format!("{TOKEN}\n"));
    let setup = setup.listen_keys(&format!("admin_token_file = {token:?}"));
    // The generated certificate serves as a provided one.
    let proxy = setup.clone().start().await;
    let certs = setup.folder().join("certs");
    let brought = format!(
        "[tls]\nfolder = {certs:?}\ncertificate = {:?}\nkey = {:?}",
        certs.join("server.pem"),
        certs.join("server.key")
    );
    proxy.pull("library/demo", "latest", &image).await;
    let proxy = proxy.restart_as(setup.tls(&brought)).await;
    let pinned = json!({ "image": "demo", "pinned": true });
    assert_eq!(
        post(&proxy, "/api/v1/pins", &pinned).bearer(TOKEN).await.status,
        200
    );
    (upstream, proxy)
}

#[tokio::test]
async fn every_documented_error_can_be_provoked_and_is_a_problem() {
    let (upstream, proxy) = guarded().await;
    let document = proxy.admin("/api/openapi.json").bearer(TOKEN).await.json();
    let mut open = Vec::new();
    let mut unprovoked = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            for status in operation["responses"].as_object().unwrap().keys() {
                let name = format!("{method} {path} {status}");
                let status: u16 = status.parse().unwrap();
                if status < 400 || ELSEWHERE.contains(&name.as_str()) {
                    continue;
                }
                let Some(ask) = provocation(&proxy, &upstream, (method, path, status), &mut open).await
                else {
                    unprovoked.push(name);
                    continue;
                };
                let reply = ask.await;
                assert_eq!(reply.status, status, "{name}: {reply:#?}");
                assert_eq!(
                    reply.header("content-type"),
                    Some("application/problem+json"),
                    "{name}"
                );
                let reply = Reply {
                    path: path.clone(),
                    ..reply
                };
                valid(&document, path, &reply);
            }
        }
    }
    assert!(
        unprovoked.is_empty(),
        "documented, and nobody knows how to provoke it: {unprovoked:#?}"
    );
}

/// Expects this error. `open` keeps connections that must stay open.
async fn provocation(
    proxy: &Proxy,
    upstream: &Upstream,
    (method, path, status): (&str, &str, u16),
    open: &mut Vec<crate::proxy::Flow>,
) -> Option<Ask> {
    let real = path.replace("{id}", "999999");
    let plain = |path: &str| Ask::new(proxy.admin_address(), &method.to_uppercase(), path).unchecked();
    let kind = if path.ends_with("import") {
        "application/x-tar"
    } else {
        "application/json"
    };
    let ask = |path: &str| plain(path).bearer(TOKEN).header("content-type", kind);
    Some(match (status, method, path) {
        (401, ..) => plain(&real).header("content-type", kind),
        (421, ..) => ask(&real).header("host", "evil.example"),
        (403, ..) => ask(&real).header("origin", "http://evil.example"),
        (415, ..) => plain(&real).bearer(TOKEN),
        (413, ..) => ask(&real).body(&vec![b' '; 70_000]),
        (400, "post", _) => ask(&real).body(b"{\"nonsense\":1}"),
        (400, _, "/api/v1/series") => ask("/api/v1/series?span=year"),
        (400, "get", "/api/v1/images") => ask("/api/v1/images?sort=colour"),
        (400, _, "/api/v1/events" | "/api/v1/events/stream") => ask(&format!("{path}?after=x")),
        (400, ..) | (404, _, "/api/v1/pulls/{id}" | "/ca.pem") => ask(&real),
        (404, ..) => ask(&format!("{path}?image=library/absent")),
        (409, "delete", "/api/v1/images") => ask("/api/v1/images?image=demo"),
        (503, _, "/api/v1/events/stream") => {
            for _ in 0..64 {
                open.push(ask(path).stream().await);
            }
            ask(path)
        }
        (503, "post", "/api/v1/pulls") => {
            upstream.hangs();
            for number in 0..100 {
                let image = json!({ "image": format!("library/never-{number}") });
                assert_eq!(post(proxy, path, &image).bearer(TOKEN).await.status, 202);
            }
            ask(path).body(b"{\"image\":\"library/one-more\"}")
        }
        _ => return None,
    })
}

#[tokio::test]
async fn queued_pull_uses_the_configuration_after_a_reload() {
    let upstream = Upstream::start().await;
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    for tag in ["a", "b", "c", "d", "e"] {
        upstream.push("library/demo", tag, Image::with_layers(&[tag]));
    }
    let setup = Setup::over(&upstream);
    let proxy = setup.clone().start().await;
    let pull = |tag: &str| {
        let image = format!("demo:{tag}");
        post(
            &proxy,
            "/api/v1/pulls",
            &json!({ "image": image, "platforms": ["all"] }),
        )
    };
    for tag in ["a", "b", "c", "d"] {
        assert_eq!(pull(tag).await.status, 202);
    }
    let are_running = |reply: &Reply| {
        let pulls = reply.json();
        let states = pulls["pulls"].as_array().unwrap().iter();
        states.filter(|pull| pull["state"] == "fetching").count() == 4
    };
    proxy
        .until("the pulls", |proxy| proxy.admin("/api/v1/pulls"), are_running)
        .await;
    assert_eq!(pull("e").await.json()["state"], "waiting");
    setup
        .clone()
        .file("ifnewer.toml", &setup.default_keys("policy = \"never\"").toml());
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    gate.release();
    let has_ended = |reply: &Reply| matches!(reply.json()["state"].as_str(), Some("done" | "failed"));
    for (id, state) in [(1, "done"), (5, "failed")] {
        let path = format!("/api/v1/pulls/{id}");
        let reply = proxy
            .until("the end", |proxy| proxy.admin(&path), has_ended)
            .await;
        assert_eq!(reply.json()["state"], state, "{reply:#?}");
    }
}
