//! Clients without a grant: their responses are not cached for others, and do not reveal what is cached.

use crate::proxy::{Ask, Proxy, Reply, blob_path, manifest_path};
use crate::registry::{Front, Image, OCI_INDEX, OCI_MANIFEST, Seen, Upstream};

const APP: &str = "acme/app";

/// Alice may read `acme/app` and `acme/two`. A signature refers to the image, by the API and by the tag.
struct Private {
    upstream: Upstream,
    image: Image,
    signature: Image,
}

impl Private {
    async fn start() -> Private {
        let upstream = Upstream::start().await;
        upstream.requires_token();
        upstream.lets("alice", "a-secret", APP);
        upstream.lets("alice", "a-secret", "acme/two");
        let image = upstream.push(APP, "1", Image::with_layers(&["private bytes"]));
        upstream.push("acme/two", "1", Image::with_layers(&["others"]));
        let signature = Image::attached_to(&image, "application/signature", b"signed");
        let signature = upstream.push(APP, &referrers_tag(&image.digest), signature);
        Private {
            upstream,
            image,
            signature,
        }
    }

    /// The content that alice pulled and listed.
    async fn warm(&self, proxy: &Proxy) -> Vec<(String, Reply)> {
        proxy.pull_with(APP, "1", &self.image, alice).await;
        let mut warm = Vec::new();
        for path in [
            format!("/v2/{APP}/referrers/{}", self.image.digest),
            format!("/v2/{APP}/tags/list"),
            manifest_path(APP, &referrers_tag(&self.image.digest)),
        ] {
            let reply = alice(proxy.get(&path)).await;
            assert_eq!(reply.status, 200, "{reply:#?}");
            warm.push((path, reply));
        }
        warm
    }
}

fn referrers_tag(subject: &str) -> String {
    subject.replace(':', "-")
}

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

fn nobody(ask: Ask) -> Ask {
    ask
}

fn with_a_made_up_token(ask: Ask) -> Ask {
    ask.bearer("made-up")
}

fn is_alices(seen: &Seen) -> bool {
    seen.header("authorization")
        .is_some_and(|shown| shown.contains("token-alice"))
}

fn is_for_a_list(seen: &Seen) -> bool {
    seen.path.contains("/referrers/") || seen.path.ends_with("/tags/list")
}

async fn is_as_before(proxy: &Proxy, warm: &[(String, Reply)], case: &str) {
    for (path, before) in warm {
        let reply = alice(proxy.get(path)).await;
        assert_eq!(reply.body, before.body, "{case}: {path}: {reply:#?}");
    }
}

#[tokio::test]
async fn r01_a_list_given_to_a_stranger_is_not_kept_for_others() {
    let empty =
        format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[],"name":"{APP}","tags":[]}}"#);
    let many = vec![format!("\"{}\"", "x".repeat(100)); 10_000].join(",");
    let long = format!(r#"{{"name":"{APP}","manifests":[],"tags":[{many}]}}"#);
    for body in [empty, long] {
        let private = Private::start().await;
        let upstream = &private.upstream;
        let proxy = Proxy::over(upstream).await;
        let warm = private.warm(&proxy).await;
        let front = Front::new(200, OCI_INDEX, body.as_bytes());
        upstream.is_fronted(|seen| !is_alices(seen) && is_for_a_list(seen), &front);
        let case = format!("{} bytes", body.len());
        for dress in [nobody, with_a_made_up_token] {
            for (path, _) in &warm[..2] {
                let passed_on = dress(proxy.get(path)).await;
                assert_eq!(passed_on.body, body, "{case}: {path}");
            }
        }
        // With a grant, referrers are not revalidated.
        upstream.clear_log();
        is_as_before(&proxy, &warm, &case).await;
        assert!(!upstream.requests().iter().any(|seen| seen.path == warm[0].0));
        for dress in [nobody, with_a_made_up_token] {
            for (path, _) in &warm[..2] {
                dress(proxy.get(path)).await;
            }
        }
        proxy.has_turned(3).await;
        upstream.refuses();
        is_as_before(&proxy, &warm, &case).await;
        is_as_before(&proxy.restart().await, &warm, &case).await;
    }
}

#[tokio::test]
async fn r01_a_list_before_any_proof_of_a_right_is_passed_on() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let list = "/v2/library/demo/tags/list";
    assert_eq!(proxy.get(list).await.status, 200);
    proxy.pull("library/demo", "1", &image).await;
    upstream.refuses();
    proxy.get(list).await.is_unreachable();
}

#[tokio::test]
async fn r01_a_referrers_tag_redirected_for_a_stranger_is_not_kept() {
    let private = Private::start().await;
    let (upstream, elsewhere) = (&private.upstream, Upstream::start().await);
    let placeholder = Image::with_layers(&["placeholder"]);
    let front = Front::new(200, OCI_MANIFEST, &placeholder.manifest)
        .header("docker-content-digest", &placeholder.digest);
    elsewhere.is_fronted(|_| true, &front);
    let proxy = Proxy::over(upstream).await;
    let warm = private.warm(&proxy).await;
    let login = Front::redirect(302, &format!("{}/login/{{reference}}", elsewhere.url()));
    upstream.is_fronted(|seen| !is_alices(seen), &login);
    let (tag, signed) = &warm[2];
    signed.is_image(&private.signature);
    for ask in [proxy.head(tag), proxy.get(tag), proxy.head(tag), proxy.get(tag)] {
        ask.await.is_image(&placeholder);
    }
    is_as_before(&proxy, &warm, "up").await;
    // The redirect does not make the repository public.
    let by_digest = proxy.manifest(APP, &private.image.digest).await;
    assert_ne!(by_digest.status, 200, "{by_digest:#?}");
    upstream.refuses();
    is_as_before(&proxy, &warm, "outage").await;
}

/// Pairs of paths: one of cached content, one of content that does not exist.
fn pairs(private: &Private) -> Vec<[String; 2]> {
    let (cached, absent) = (&private.image, Image::with_layers(&["nobody has this"]));
    let blob = |image: &Image| blob_path(APP, &image.layer(0).digest);
    let referrers = |digest: &str| format!("/v2/{APP}/referrers/{digest}");
    let tags = |repository: &str| format!("/v2/{repository}/tags/list");
    let manifest = |reference: &str| manifest_path(APP, reference);
    vec![
        [manifest("1"), manifest("2")],
        [manifest(&cached.digest), manifest(&absent.digest)],
        [blob(cached), blob(&absent)],
        [tags(APP), tags("acme/two")],
        [referrers(&cached.digest), referrers(&absent.digest)],
        [
            manifest(&referrers_tag(&cached.digest)),
            manifest(&referrers_tag(&absent.digest)),
        ],
    ]
}

/// The reply without the requested names.
fn look(reply: &Reply) -> (u16, String, usize, Option<String>) {
    let body = String::from_utf8_lossy(&reply.body);
    let code = (!body.is_empty()).then(|| reply.code());
    let words = body.split_whitespace().count();
    (reply.status, reply.cache_status().to_owned(), words, code)
}

#[tokio::test]
async fn r01_under_never_a_stranger_sees_no_difference() {
    let private = Private::start().await;
    let proxy = Proxy::over(&private.upstream).await;
    private.warm(&proxy).await;
    let never = proxy.setup().clone().default_keys("policy = \"never\"");
    let proxy = proxy.restart_as(never).await;
    private.upstream.clear_log();
    for [cached, absent] in pairs(&private) {
        assert_eq!(alice(proxy.get(&cached)).await.status, 200, "{cached}");
        for dress in [nobody, with_a_made_up_token] {
            for method in ["GET", "HEAD"] {
                let of_cached = dress(proxy.ask(method, &cached)).await;
                let of_absent = dress(proxy.ask(method, &absent)).await;
                assert!(matches!(of_cached.status, 401 | 404), "{of_cached:#?}");
                assert_eq!(look(&of_cached), look(&of_absent), "{method} {cached}");
            }
        }
    }
    assert_eq!(private.upstream.requests().len(), 0);
}

#[tokio::test]
async fn r01_in_an_outage_a_stranger_sees_no_kept_list() {
    let private = Private::start().await;
    let (upstream, proxy) = (&private.upstream, Proxy::over(&private.upstream).await);
    let warm = private.warm(&proxy).await;
    upstream.drops_requests();
    // Until the cache notices the outage: alice then gets her list without an upstream request.
    let (list, _) = &warm[1];
    proxy
        .until(
            "the outage to be known",
            |proxy| {
                upstream.clear_log();
                alice(proxy.get(list))
            },
            |reply| reply.status == 200 && upstream.requests().is_empty(),
        )
        .await;
    let mut seen = Vec::new();
    for repository in [APP, "acme/two"] {
        upstream.clear_log();
        let path = format!("/v2/{repository}/tags/list");
        let reply = with_a_made_up_token(proxy.get(&path)).await;
        let is_asked = upstream.requests().iter().any(|seen| seen.path == path);
        seen.push((look(&reply), is_asked));
    }
    assert_eq!(seen[0], seen[1]);
}
