//! `repository_prefix`: an upstream behind a project of another registry, as with Harbor, ECR, Artifact Registry and
//! GitLab.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};

const THERE: &str = "hub-proxy/eu/library/app";

/// docker.io, available below a project of this registry.
async fn below(harbor: &Upstream) -> Proxy {
    Setup::over(harbor)
        .upstream_keys("docker.io", "repository_prefix = \"hub-proxy/eu\"")
        .start()
        .await
}

#[tokio::test]
async fn r15_a_repository_prefix_stands_before_every_name_upstream() {
    let harbor = Upstream::start().await;
    harbor.requires_token();
    harbor.makes_public(THERE);
    let image = harbor.push(THERE, "latest", Image::with_layers(&["one", "two"]));
    let proxy = below(&harbor).await;

    proxy.pull("library/app", "latest", &image).await;
    // Docker Hub's short name.
    proxy.pull("app", "latest", &image).await.is_hit();
    proxy.pull("library/app", &image.digest, &image).await.is_hit();
    for list in ["tags/list?n=1", &format!("referrers/{}", image.digest)] {
        let reply = proxy.get(&format!("/v2/library/app/{list}")).await;
        assert_eq!(reply.status, 200, "{reply:#?}");
    }
    for seen in harbor.requests() {
        if seen.path == "/token" {
            let query = seen.query.unwrap_or_default();
            assert!(query.contains(&format!("repository:{THERE}:pull")), "{query}");
        } else {
            assert!(seen.path.starts_with(&format!("/v2/{THERE}/")), "{}", seen.path);
        }
    }
    harbor.refuses();
    proxy.pull("app", "latest", &image).await.is_stale();
}

#[tokio::test]
async fn r15_a_list_has_the_clients_name_and_leads_back_to_it() {
    let harbor = Upstream::start().await;
    for tag in ["1", "2", "3"] {
        harbor.push(THERE, tag, Image::with_layers(&["one"]));
    }
    let proxy = below(&harbor).await;
    // A client with a pull grant gets the list in an outage.
    assert_eq!(proxy.manifest("library/app", "1").await.status, 200);
    for _ in 0..2 {
        let page = proxy.get("/v2/library/app/tags/list?n=2").await;
        assert_eq!(page.json()["name"], "library/app", "{page:#?}");
        assert_eq!(
            page.header("link"),
            Some("</v2/library/app/tags/list?n=2&last=2>; rel=\"next\"")
        );
        // Then from the stored list.
        harbor.refuses();
    }
}

#[tokio::test]
async fn challenge_names_prefixed_repository_also_in_outage() {
    let harbor = Upstream::start().await;
    harbor.requires_token();
    harbor.push(THERE, "latest", Image::with_layers(&["one"]));
    let proxy = below(&harbor).await;
    let scope = format!("scope=\"repository:{THERE}:pull\"");
    for _ in 0..2 {
        let reply = proxy.manifest("library/app", "latest").await;
        reply.is_refused(401);
        let challenge = reply.header("www-authenticate").unwrap();
        assert!(challenge.contains(&scope), "{challenge}");
        harbor.refuses();
    }
    let reply = proxy.manifest("team/other", "latest").await;
    let challenge = reply.header("www-authenticate").unwrap();
    assert!(
        challenge.contains("repository:hub-proxy/eu/team/other:pull"),
        "{challenge}"
    );
}

#[tokio::test]
async fn push_below_repository_prefix_is_denied_with_reason() {
    let harbor = Upstream::start().await;
    let setup = Setup::over(&harbor)
        .also("ghcr.io", &harbor)
        .upstream_keys("ghcr.io", "repository_prefix = \"ghcr-proxy\"");
    let proxy = setup.start().await;
    for (method, path) in [
        (
            "POST",
            "/v2/team/demo/blobs/uploads/?mount=sha256:0&from=team/other",
        ),
        ("PUT", "/v2/team/demo/manifests/1"),
        ("DELETE", "/v2/team/demo/manifests/1"),
        ("GET", "/v2/team/demo/blobs/uploads/7"),
        ("GET", "/v2/_catalog"),
    ] {
        let ask = proxy.ask(method, path).tls(&proxy.ca_pem(), &["http/1.1"]);
        let reply = ask.server_name("ghcr.io").unchecked().await;
        assert_eq!(
            (reply.status, reply.code().as_str()),
            (405, "UNSUPPORTED"),
            "{method} {path}"
        );
        assert!(
            reply.message().contains("repository_prefix"),
            "{}",
            reply.message()
        );
    }
    assert_eq!(harbor.requests().len(), 0);
}

#[tokio::test]
async fn r15_each_url_has_its_own_repository_prefix() {
    let (harbor, hub) = (Upstream::start().await, Upstream::start().await);
    let mirrored = harbor.push("hub-proxy/library/app", "1", Image::with_layers(&["one"]));
    let other = hub.push("library/app", "2", Image::with_layers(&["two"]));
    let keys = format!(
        "url = [\"{}\", \"{}\"]\nrepository_prefix = [\"hub-proxy\", \"\"]",
        harbor.url(),
        hub.url()
    );
    let proxy = Setup::empty().upstream("docker.io", &keys).start().await;
    proxy.pull("library/app", "1", &mirrored).await;
    assert_eq!(hub.requests().len(), 0);
    proxy.pull("library/app", "2", &other).await;
    proxy
        .get(&manifest_path("library/app", "3"))
        .await
        .is_refused(404);
}
