//! A registry that redirects to another one, which needs its own token.

use crate::proxy::{Proxy, Setup, blob_path, manifest_path};
use crate::registry::{Image, Seen, Upstream};

const REPOSITORY: &str = "team/app";

/// A front-end that redirects every request to `registry`, which has the content and needs a token.
async fn redirecting(status: u16, to: &Upstream) -> Upstream {
    let front = Upstream::start().await;
    front.redirects_all_to(status, &to.url());
    front
}

async fn private() -> (Upstream, Image) {
    let registry = Upstream::start().await;
    registry.requires_token();
    registry.lets("amy", "pw", REPOSITORY);
    let image = registry.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    (registry, image)
}

fn manifests(seen: &Seen) -> bool {
    seen.path.contains("/manifests/")
}

#[tokio::test]
async fn r08_another_port_of_the_host_is_asked_with_its_own_token() {
    for status in [301, 302, 307, 308] {
        let (registry, image) = private().await;
        let front = redirecting(status, &registry).await;
        let proxy = Proxy::over(&front).await;
        for method in ["HEAD", "GET"] {
            let path = manifest_path(REPOSITORY, "latest");
            proxy.ask(method, &path).basic("amy", "pw").await.is_image(&image);
        }
        for blob in &image.blobs {
            let path = blob_path(REPOSITORY, &blob.digest);
            proxy.get(&path).basic("amy", "pw").await.is_blob(blob);
        }
        assert_eq!(registry.token_requests().len(), 1);
        let shown = |seen: &Seen| {
            seen.header("authorization")
                .is_some_and(|shown| shown.starts_with("Bearer"))
        };
        assert!(
            !front.requests().iter().any(shown),
            "the token is the other registry's"
        );

        // Unchanged: one HEAD at each, with a token at once.
        front.clear_log();
        registry.clear_log();
        let reply = proxy.manifest(REPOSITORY, "latest").basic("amy", "pw").await;
        reply.is_image(&image).is_unchanged();
        assert_eq!((front.requests().len(), registry.requests().len()), (1, 1));

        // An expired token of the other registry is replaced.
        registry.expires_tokens();
        proxy
            .manifest(REPOSITORY, "latest")
            .basic("amy", "pw")
            .await
            .is_image(&image);
        // Its 200 is a grant for an outage, and its denial revokes it.
        registry.refuses();
        proxy
            .manifest(REPOSITORY, "latest")
            .basic("amy", "pw")
            .await
            .is_image(&image)
            .is_stale();
        registry.recovers();
        registry.revokes("amy");
        proxy
            .manifest(REPOSITORY, "latest")
            .basic("amy", "pw")
            .await
            .is_refused(401);
        registry.refuses();
        proxy
            .manifest(REPOSITORY, "latest")
            .basic("amy", "pw")
            .await
            .is_unreachable();
    }
}

#[tokio::test]
async fn r08_a_denial_shows_the_challenge_of_the_other_registry() {
    let (registry, _) = private().await;
    let front = redirecting(307, &registry).await;
    let proxy = Proxy::over(&front).await;
    for ask in [
        proxy.manifest(REPOSITORY, "latest"),
        proxy.manifest(REPOSITORY, "latest").basic("eve", "pw"),
        proxy.manifest(REPOSITORY, "latest").bearer("nonsense"),
    ] {
        let reply = ask.await;
        reply.is_refused(401);
        let challenge = reply.header("www-authenticate").unwrap();
        assert!(challenge.contains(&registry.url()), "{challenge}");
        assert!(!challenge.contains("error="), "{challenge}");
    }
    let token = registry.token_for("amy");
    let reply = proxy.manifest(REPOSITORY, "latest").bearer(&token).await;
    assert_eq!(reply.status, 200, "{reply:#?}");
}

#[tokio::test]
async fn no_token_is_sent_to_untrusted_redirected_registry() {
    let (registry, image) = private().await;
    let front = Upstream::start().await;
    let other = registry.url().replace("127.0.0.1", "localhost");
    front.redirects_all_to(307, &other);
    registry.names_realm(&format!("{other}/token"));
    let host = other.strip_prefix("http://").unwrap();
    for trusted in [false, true] {
        let mut setup = Setup::over(&front);
        if trusted {
            setup = setup.upstream_keys("docker.io", &format!("token_hosts = [\"{host}\"]"));
        }
        let proxy = setup.start().await;
        let reply = proxy.manifest(REPOSITORY, "latest").basic("amy", "pw").await;
        if trusted {
            reply.is_image(&image);
        } else {
            assert_ne!(reply.status, 200, "{reply:#?}");
            assert_eq!(registry.token_requests().len(), 0);
            assert!(
                registry
                    .requests()
                    .iter()
                    .filter(|seen| manifests(seen))
                    .all(|seen| !seen.authorized())
            );
            proxy.program().says("add it to `token_hosts`").await;
        }
    }
}
