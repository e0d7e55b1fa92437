//! Users of the cache's own, in front of everything.

use crate::proxy::{Proxy, Setup, blob_path};
use crate::upstream::{Image, Upstream};

/// bcrypt of `a-secret` and of `b-secret`.
const USERS: &str = "alice:$2b$06$abcdefghijklmnopqrstuuzx4/bUczer6TArCP6.5xzNhL3yJOkfi
ci-1:$2b$06$abcdefghijklmnopqrstuubh0fPesfgl8pv0ZIX4.BfC.zsViz85u
";

/// Alice may pull everything, the `ci-` users what is below `open/`; the cache reads with a credential of its own.
async fn guarded() -> (Upstream, Image, Proxy) {
    let upstream = Upstream::start().await;
    upstream.requires_basic("service", "s-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    upstream.push("open/app", "1", image.clone());
    let setup = Setup::over(&upstream);
    let (password, users) = (setup.file("password", "s-secret"), setup.file("users", USERS));
    let keys = format!("access = \"shared\"\nusername = \"service\"\npassword_file = {password:?}");
    let setup = setup.upstream_keys("docker.io", &keys).tail(&format!(
        "[access]\nhtpasswd = {users:?}\n[[allow]]\nwho = \"alice\"\nimages = \"docker.io/*\"\n\
         [[allow]]\nwho = \"ci-*\"\nimages = \"docker.io/open/*\""
    ));
    (upstream, image, setup.start().await)
}

#[tokio::test]
async fn nothing_is_answered_without_a_user_and_no_upstream_is_asked() {
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
            // The upstream's own credential is none of ours.
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
async fn a_user_pulls_what_its_list_allows_and_its_password_goes_no_further() {
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
    // Nor by the upstream's own name, where the header is the upstream's.
    let by_name = proxy.manifest("acme/app", "1").basic("alice", "a-secret");
    by_name
        .header("host", "docker.io")
        .unchecked()
        .await
        .is_refused(403);
}
