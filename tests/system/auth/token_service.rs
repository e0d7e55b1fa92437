//! Registries with a token service: token reuse, scopes, and realms on other hosts.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream};
use tokio::task::JoinSet;

async fn public() -> (Upstream, Image) {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("library/demo");
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    (upstream, image)
}

#[tokio::test]
async fn one_token_serves_a_whole_pull_and_the_next_one() {
    let (upstream, image) = public().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();

    let tokens = upstream.token_requests();
    assert_eq!(tokens.len(), 1, "{tokens:#?}");
    let query = tokens[0]
        .query
        .as_deref()
        .unwrap()
        .replace("%3A", ":")
        .replace("%2F", "/");
    assert!(
        query.contains("service=scripted") && query.contains("scope=repository:library/demo:pull"),
        "{query}"
    );
    assert!(!tokens[0].authorized(), "nobody's token needs no credential");
}

#[tokio::test]
async fn known_token_is_sent_with_first_request() {
    let (upstream, image) = public().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert_eq!(upstream.requests().len(), 1, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn a_token_without_an_expiry_is_taken() {
    let (upstream, image) = public().await;
    upstream.omits_expires_in();
    Proxy::over(&upstream)
        .await
        .pull("library/demo", "latest", &image)
        .await;
}

#[tokio::test]
async fn a_token_called_access_token_is_taken() {
    let (upstream, image) = public().await;
    upstream.names_it_access_token();
    Proxy::over(&upstream)
        .await
        .pull("library/demo", "latest", &image)
        .await;
}

#[tokio::test]
async fn a_token_that_expired_early_is_replaced() {
    let (upstream, image) = public().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.expires_tokens();

    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert_eq!(upstream.token_requests().len(), 2);
}

#[tokio::test]
async fn credential_is_sent_to_realm_and_tokens_are_not_shared() {
    let (upstream, _) = public().await;
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let proxy = Proxy::over(&upstream).await;

    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.basic("alice", "a-secret"))
        .await;
    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.basic("bob", "b-secret"))
        .await;
    let tokens = upstream.token_requests();
    assert_eq!(tokens.len(), 2, "{tokens:#?}");
    assert!(tokens.iter().all(crate::registry::Seen::authorized));
    assert_ne!(
        tokens[0].header("authorization"),
        tokens[1].header("authorization")
    );
}

#[tokio::test]
async fn a_wrong_password_is_refused_with_the_registrys_challenge() {
    let (upstream, _) = public().await;
    upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let proxy = Proxy::over(&upstream).await;
    let reply = proxy.manifest("acme/app", "1").basic("alice", "guess").await;
    reply.is_refused(401);
    assert!(
        reply
            .header("www-authenticate")
            .unwrap()
            .starts_with("Bearer realm="),
        "{reply:#?}"
    );
}

#[tokio::test]
async fn many_clients_at_once_cost_one_token() {
    let (upstream, image) = public().await;
    let gate = upstream.holds_answers(|seen| seen.path == "/token");
    let proxy = Proxy::over(&upstream).await;
    let mut clients = JoinSet::new();
    for tag in ["latest", "a", "b", "c", "d", "e", "f", "g"] {
        upstream.push("library/demo", tag, image.clone());
        clients.spawn(proxy.manifest("library/demo", tag).into_reply());
    }
    upstream
        .until("all to be challenged", |seen| {
            seen.iter().filter(|seen| seen.path != "/token").count() >= 8
        })
        .await;
    gate.reached().await;
    gate.release();
    for reply in clients.join_all().await {
        reply.is_image(&image);
    }
    assert_eq!(upstream.token_requests().len(), 1);
}

#[tokio::test]
async fn realm_on_another_host_gets_no_credential() {
    let (upstream, _) = public().await;
    upstream.lets("alice", "a-secret", "*");
    upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let proxy = Proxy::over(&upstream).await;
    for realm in [
        "http://169.254.169.254/token",
        "https://tokens.elsewhere.invalid/token",
        "http://127.0.0.1:1@tokens.elsewhere.invalid/token",
        "file:///etc/passwd",
        "",
        "/token",
    ] {
        upstream.names_realm(realm);
        let reply = proxy.manifest("acme/app", "1").basic("alice", "a-secret").await;
        assert!(matches!(reply.status, 401 | 502..=504), "{realm}: {reply:#?}");
    }
}

#[tokio::test]
async fn realm_on_a_token_hosts_entry_gets_credential() {
    let (upstream, _) = public().await;
    upstream.lets("alice", "a-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    // Another host by name, in an IP scope that a registry may not redirect to.
    let port = upstream.address().port();
    upstream.names_realm(&format!("http://0.0.0.0:{port}/token"));
    let ask = |proxy: &Proxy| proxy.manifest("acme/app", "1").basic("alice", "a-secret");
    for (hosts, is_trusted) in [
        ("[]".to_owned(), false),
        ("[\"0.0.0.0\"]".to_owned(), false),
        (format!("[\"0.0.0.0:{port}\"]"), true),
    ] {
        upstream.clear_log();
        let setup = Setup::over(&upstream).upstream_keys("docker.io", &format!("token_hosts = {hosts}"));
        let proxy = setup.start().await;
        if is_trusted {
            ask(&proxy).await.is_image(&image);
            assert!(upstream.token_requests()[0].authorized());
        } else {
            ask(&proxy).await.is_refused(401);
            assert_eq!(upstream.token_requests().len(), 0);
            proxy.program().says("add it to `token_hosts`").await;
        }
    }
}

#[tokio::test]
async fn public_repository_stays_public_for_new_tokens() {
    let (upstream, image) = public().await;
    upstream.lets("alice", "a-secret", "acme/app");
    let proxy = Setup::over(&upstream)
        .default_keys("max_age = \"1h\"")
        .start()
        .await;
    let first = upstream.token_for("alice");
    proxy
        .pull_with("library/demo", "latest", &image, |ask| ask.bearer(&first))
        .await;
    // A fresh tag is not revalidated for clients with a grant, or if the repository is public.
    let asked_by_a_new_client = |proxy: &Proxy| {
        proxy
            .manifest("library/demo", "latest")
            .bearer(&upstream.token_for("alice"))
    };
    proxy
        .until("the repository is public", asked_by_a_new_client, |reply| {
            reply.cache_status().contains("fresh")
        })
        .await;

    upstream.refuses();
    let token = upstream.token_for("bob");
    proxy
        .pull_with("library/demo", "latest", &image, |ask| ask.bearer(&token))
        .await;
}

#[tokio::test]
async fn private_repository_is_probed_anonymously_once() {
    let (upstream, _) = public().await;
    upstream.lets("alice", "a-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    let proxy = Proxy::over(&upstream).await;
    for _ in 0..3 {
        let token = upstream.token_for("alice");
        proxy
            .pull_with("acme/app", "1", &image, |ask| ask.bearer(&token))
            .await;
    }
    upstream
        .until("a question without a credential", |seen| {
            seen.iter().any(|seen| seen.path == "/token")
        })
        .await;
    assert_eq!(
        upstream.token_requests().len(),
        1,
        "{:#?}",
        upstream.token_requests()
    );

    upstream.refuses();
    let strangers = upstream.token_for("bob");
    proxy
        .manifest("acme/app", "1")
        .bearer(&strangers)
        .await
        .is_unreachable();
}
