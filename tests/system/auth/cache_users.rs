//! Users of the cache: passwords, allow lists and what reaches the upstream.

use crate::proxy::{Ask, Authority, Proxy, Setup, blob_path, manifest_path, raw};
use crate::registry::{Image, Upstream};

/// Users alice and ci-1: bcrypt of `a-secret` and of `b-secret`.
pub const USERS: &str = "alice:$2b$06$abcdefghijklmnopqrstuuzx4/bUczer6TArCP6.5xzNhL3yJOkfi
ci-1:$2b$06$abcdefghijklmnopqrstuubh0fPesfgl8pv0ZIX4.BfC.zsViz85u
";

/// Alice may pull everything, the `ci-` users only below `open/`. The cache has its own upstream credential.
async fn guarded() -> (Upstream, Image, Proxy) {
    let upstream = Upstream::start().await;
    upstream.requires_basic("service", "s-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    upstream.push("open/app", "1", image.clone());
    let setup = Setup::over(&upstream);
    let (password, users) = (setup.file("password", "s-secret"), setup.file("users", USERS));
    let keys = format!("auth = \"shared\"\nusername = \"service\"\npassword_file = {password:?}");
    let setup = setup.upstream_keys("docker.io", &keys).tail(&format!(
        "[access]\nhtpasswd = {users:?}\n[[allow]]\nusers = \"alice\"\nimages = \"docker.io/*\"\n\
         [[allow]]\nusers = \"ci-*\"\nimages = \"docker.io/open/*\""
    ));
    (upstream, image, setup.start().await)
}

#[tokio::test]
async fn request_without_cache_user_reaches_no_upstream() {
    let (upstream, image, proxy) = guarded().await;
    for path in [
        "/v2/",
        "/v2/acme/app/manifests/1",
        "/v2/acme/app/tags/list",
        &blob_path("acme/app", &image.layer(0).digest),
    ] {
        for ask in [
            proxy.get(path),
            proxy.head(path),
            proxy.get(path).basic("alice", "guess"),
            proxy.get(path).basic("nobody", "a-secret"),
            // A credential of the upstream is not one of the cache.
            proxy.get(path).basic("service", "s-secret"),
            proxy.get(path).bearer("token"),
        ] {
            let reply = ask.unchecked().await;
            assert_eq!(reply.status, 401, "{reply:#?}");
            assert_eq!(reply.header("www-authenticate"), Some("Basic realm=\"ifnewer\""));
        }
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn allow_list_limits_user_and_password_is_not_forwarded() {
    let (upstream, image, proxy) = guarded().await;
    assert_eq!(proxy.get("/v2/").basic("alice", "a-secret").await.status, 200);
    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.basic("alice", "a-secret"))
        .await;
    proxy
        .pull_with("open/app", "1", &image, |ask| ask.basic("ci-1", "b-secret"))
        .await;
    for repository in ["acme/app", "acme/unknown"] {
        let reply = proxy.manifest(repository, "1").basic("ci-1", "b-secret").await;
        reply.is_refused(403);
        assert_eq!(reply.code(), "DENIED");
    }
    let held = proxy
        .blob("acme/app", &image.layer(0).digest)
        .basic("ci-1", "b-secret")
        .await;
    held.is_refused(403);
    let alice = "Basic YWxpY2U6YS1zZWNyZXQ=";
    assert!(
        upstream
            .requests()
            .iter()
            .all(|seen| seen.header("authorization") != Some(alice))
    );
    // Also under the upstream's host, where the header belongs to the upstream.
    let by_name = proxy.manifest("acme/app", "1").basic("alice", "a-secret");
    by_name
        .header("host", "docker.io")
        .unchecked()
        .await
        .is_refused(403);
}

#[tokio::test]
async fn cache_user_is_anonymous_upstream_with_per_client_auth() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("open/app");
    // Another user of that name and password.
    upstream.lets("alice", "a-secret", "acme/app");
    let image = upstream.push("open/app", "1", Image::with_layers(&["public bytes"]));
    upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    let setup = Setup::over(&upstream);
    let (users, authority) = (setup.file("users", USERS), Authority::new("clients"));
    let ca = setup.file("clients.pem", authority.pem());
    let access = format!("[access]\nhtpasswd = {users:?}\nclient_ca = {ca:?}");
    let proxy = setup.tail(&access).start().await;
    let (ca, identity) = (proxy.ca_pem(), authority.client("node-7"));
    let user = |ask: Ask| ask.basic("alice", "a-secret");
    let holder = |ask: Ask| user(ask.tls(&ca, &[]).identity(&identity));
    for dress in [&user as &dyn Fn(Ask) -> Ask, &holder] {
        proxy.pull_with("open/app", "1", &image, dress).await;
        dress(proxy.manifest("acme/app", "1")).await.is_refused(401);
    }
    let seen = upstream.requests();
    assert!(!seen.is_empty());
    let basic = |seen: &crate::registry::Seen| seen.header("authorization")?.strip_prefix("Basic ").map(drop);
    assert!(seen.iter().all(|seen| basic(seen).is_none()), "{seen:#?}");
}

/// Through `HTTPS_PROXY`, as one user of the cache and one of the registry.
fn through(ask: Ask, proxy: &Proxy, (user, password): (&str, &str)) -> Ask {
    ask.tls(&proxy.ca_pem(), &["h2"])
        .through_connect("docker.io:443")
        .proxy_basic(user, password)
}

#[tokio::test]
async fn connect_uses_proxy_authorization_for_cache_password() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("robot", "up-secret", "*");
    let image = upstream.push("open/app", "1", Image::with_layers(&["private bytes"]));
    upstream.push("acme/app", "1", image.clone());
    let setup = Setup::over(&upstream);
    let users = setup.file("users", USERS);
    let proxy = setup
        .tail(&format!(
            "[access]\nhtpasswd = {users:?}\n[[allow]]\nusers = \"ci-*\"\nimages = \"docker.io/open/*\"\n[log]\nlevel = \"trace\""
        ))
        .start()
        .await;
    let as_ci = |ask: Ask| through(ask, &proxy, ("ci-1", "b-secret"));
    let dressed = |ask: Ask| as_ci(ask).basic("robot", "up-secret");
    proxy.pull_with("open/app", "1", &image, dressed).await;
    // A cache user has no grant at the registry, whose challenge reaches the client.
    let stranger = as_ci(proxy.manifest("open/app", "1")).await;
    assert!(
        stranger
            .header("www-authenticate")
            .unwrap()
            .starts_with("Bearer ")
    );
    // Allow lists apply to every route, and to pushes.
    let ask = dressed(proxy.manifest("acme/app", "1")).await;
    assert_eq!((ask.status, ask.code().as_str()), (403, "DENIED"));
    let push = proxy.ask("PUT", &manifest_path("acme/app", "2")).body(b"{}");
    dressed(push).await.is_refused(403);
    // A login is forwarded with the registry's headers and without those for the cache.
    let login = dressed(proxy.get("/v2/")).header("proxy-authorization", "Basic bm9uZTpvdXJz");
    login.unchecked().await;

    for seen in upstream.requests() {
        assert_eq!(seen.header("proxy-authorization"), None, "{seen:#?}");
    }
    let log = proxy.program().stderr();
    for secret in ["b-secret", "Y2ktMTpiLXNlY3JldA", "up-secret"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

/// Paths requested at the registry, without the API check.
fn requested_paths(upstream: &Upstream) -> Vec<String> {
    let paths = upstream.requests().into_iter().map(|seen| seen.path);
    paths.filter(|path| path != "/v2/").collect()
}

#[tokio::test]
async fn t19_no_spelling_of_a_path_is_a_way_around_a_users_list() {
    let (upstream, image, proxy) = guarded().await;
    let as_ci = |ask: Ask| through(ask, &proxy, ("ci-1", "b-secret")).unchecked();
    let layer = &image.layer(0).digest;
    for path in [
        "/v2/acme/app/manifests%2F1",
        &format!("/v2/acme/app/blobs%2F{layer}"),
        "/v2/acme/app%2Fmanifests/1",
        "/v2/acme%2Fapp/manifests/1",
        "/v2/acme/app/%6danifests/1",
        "/v2/acme/app/manifests/%31",
        "/v2/acme/app/manifests/1%3Fx",
        "/v2/acme/app/tags%2Flist",
        "/v2%2Facme/app/manifests/1",
        "/%762/acme/app/manifests/1",
        "/%25762/acme/app/manifests/1",
        "/V2/acme/app/manifests/1",
        "//v2/acme/app/manifests/1",
        "/v2//acme/app/manifests/1",
        "/v2/open/app/blobs/uploads/%2e%2e/x",
        "/v2/acme/app/manifests;x/1",
        "/v2;x/acme/app/manifests/1",
    ] {
        for method in ["GET", "PUT", "POST"] {
            let reply = as_ci(proxy.ask(method, path)).await;
            assert_eq!(
                (reply.status, reply.code().as_str()),
                (400, "NAME_INVALID"),
                "{method} {path}"
            );
            // At the cache's own address too.
            let reply = proxy
                .ask(method, path)
                .basic("ci-1", "b-secret")
                .unchecked()
                .await;
            assert_eq!((reply.status, reply.code().as_str()), (400, "NAME_INVALID"));
        }
    }
    // Paths whose repository cannot be extracted, or that use an extension endpoint.
    for path in ["/v2/acme/app/unknown/1", "/v2/acme/app/_trust/tuf/root.json"] {
        as_ci(proxy.get(path)).await.is_refused(403);
    }
    assert!(
        requested_paths(&upstream).is_empty(),
        "{:#?}",
        requested_paths(&upstream)
    );
    // Paths outside of the registry API are not restricted.
    for path in ["/healthz", "/a%2Fb//c", "/v20/x", "/v2/open/app/_trust/x"] {
        as_ci(proxy.get(path)).await;
        assert_eq!(requested_paths(&upstream).last().map(String::as_str), Some(path));
    }
}

#[tokio::test]
async fn t19_a_blob_is_mounted_only_from_where_the_users_list_allows() {
    let (upstream, image, proxy) = guarded().await;
    let as_ci = |ask: Ask| through(ask, &proxy, ("ci-1", "b-secret")).unchecked();
    let layer = &image.layer(0).digest;
    let uploads = "/v2/open/app/blobs/uploads/";
    for from in [
        "from=acme/app",
        "from=acme%2Fapp",
        "%66rom=acme%2fapp",
        "from=open/app&from=acme/app",
        "from=open/app;from=acme/app",
        "From=acme/app",
    ] {
        let reply = as_ci(proxy.ask("POST", &format!("{uploads}?mount={layer}&{from}"))).await;
        assert_eq!(
            (reply.status, reply.code().as_str()),
            (403, "DENIED"),
            "{from}: {reply:#?}"
        );
    }
    for from in ["from=%zz", "from=acme%2F%2Fapp"] {
        let reply = as_ci(proxy.ask("POST", &format!("{uploads}?mount={layer}&{from}"))).await;
        assert_eq!(reply.status, 400, "{from}: {reply:#?}");
    }
    assert!(
        requested_paths(&upstream).is_empty(),
        "{:#?}",
        requested_paths(&upstream)
    );
    let own = as_ci(proxy.ask("POST", &format!("{uploads}?mount={layer}&from=open/other"))).await;
    assert!(!matches!(own.status, 400 | 403), "{own:#?}");
    assert_eq!(requested_paths(&upstream), [uploads]);
}

#[tokio::test]
async fn connect_requires_proxy_authentication_first() {
    let (upstream, _, proxy) = guarded().await;
    // ci-1 and alice with a wrong password, and a right one in the registry's header.
    for line in [
        "",
        "Proxy-Authorization: Basic Y2ktMTp3cm9uZw==\r\n",
        "Proxy-Authorization: Bearer b-secret\r\n",
        "Authorization: Basic Y2ktMTpiLXNlY3JldA==\r\n",
    ] {
        for target in ["docker.io:443", "evil.example:443", "127.0.0.1:22"] {
            let head =
                format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n{line}\r\n");
            let reply = raw(proxy.registry_address(), head.as_bytes()).await;
            assert_eq!(reply.status(), Some(407), "{line}: {}", reply.text);
            let text = reply.text.to_lowercase();
            assert!(
                text.contains("proxy-authenticate: basic realm=\"ifnewer\""),
                "{text}"
            );
            assert!(!text.contains("www-authenticate"), "{text}");
        }
    }
    let known = "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\nConnection: close\r\n\
                 Proxy-Authorization: Basic Y2ktMTpiLXNlY3JldA==\r\n\r\n";
    let reply = raw(proxy.registry_address(), known.as_bytes()).await;
    assert_eq!(reply.status(), Some(403), "{}", reply.text);
    assert_eq!(upstream.connections(), 0);
}
