//! With `auth = "shared"` the cache uses its own upstream credential, from a file, Docker's configuration or a
//! helper.

use std::os::unix::fs::PermissionsExt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::proxy::Setup;
use crate::registry::{Image, Upstream};

/// A credential helper in `PATH` that records its input and prints the content of `answer`.
fn with_helper(setup: Setup, answer: &str) -> Setup {
    let folder = setup.folder().to_owned();
    let script = format!(
        "#!/bin/sh\n{{ echo \"$@\"; cat; echo; env; }} >> {folder}/told\ncat {folder}/answer\n",
        folder = folder.display()
    );
    let program = setup.file("docker-credential-test", &script);
    std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755)).unwrap();
    setup.file("answer", answer);
    setup.environment("PATH", &format!("{}:/usr/bin:/bin", folder.display()))
}

fn answer(user: &str, secret: &str) -> String {
    format!(r#"{{"ServerURL":"x","Username":"{user}","Secret":"{secret}"}}"#)
}

#[tokio::test]
async fn credential_helper_runs_again_after_registry_denial() {
    let upstream = Upstream::start().await;
    upstream.requires_basic("AWS", "first-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let setup = with_helper(Setup::over(&upstream), &answer("AWS", "first-secret"));
    let setup = setup.upstream_keys("docker.io", "auth = \"shared\"\ncredential_helper = \"test\"");
    let proxy = setup.start().await;
    proxy.pull("acme/app", "1", &image).await;
    proxy.pull("acme/app", "1", &image).await.is_unchanged();

    // The old credential expired, as with ECR after twelve hours.
    upstream.requires_basic("AWS", "second-secret");
    proxy.setup().file("answer", &answer("AWS", "second-secret"));
    proxy.pull("acme/app", "1", &image).await.is_unchanged();

    let told = std::fs::read_to_string(proxy.setup().folder().join("told")).unwrap();
    assert_eq!(
        told.matches("get\nhttps://index.docker.io/v1/\n").count(),
        2,
        "{told}"
    );
    assert!(!told.contains("secret"), "{told}");
    let log = proxy.program().stdout() + &proxy.program().stderr();
    assert!(!log.contains("-secret"), "{log}");
}

#[tokio::test]
async fn a_helper_that_fails_leaves_what_is_held_and_says_so() {
    let upstream = Upstream::start().await;
    upstream.requires_basic("AWS", "a-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["x"]));
    let setup = with_helper(Setup::over(&upstream), &answer("AWS", "a-secret"));
    let setup = setup.upstream_keys("docker.io", "auth = \"shared\"\ncredential_helper = \"test\"");
    let proxy = setup.start().await;
    proxy.pull("acme/app", "1", &image).await;

    proxy.setup().file("answer", "no session, log in again");
    let proxy = proxy.restart().await;
    let reply = proxy.pull("acme/app", "1", &image).await;
    assert!(
        reply.is_stale().cache_status().contains("cache-credential"),
        "{reply:#?}"
    );
    let missing = proxy.manifest("acme/app", "2").await;
    assert!(missing.message().contains("own credential"), "{missing:#?}");
}

#[tokio::test]
async fn docker_config_credentials_are_chosen_per_repository() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("one", "one-secret", "team/one");
    upstream.lets("two", "two-secret", "team/two");
    upstream.makes_public("open/app");
    let images = ["team/one", "team/two", "open/app"]
        .map(|name| (name, upstream.push(name, "1", Image::with_layers(&[name]))));
    let auth = |user: &str| BASE64_STANDARD.encode(format!("{user}:{user}-secret"));
    let host = upstream.address();
    let setup = Setup::over(&upstream);
    let config = format!(
        r#"{{"auths": {{"{host}/team/one": {{"auth": "{}"}}, "docker.io/team/two": {{"auth": "{}"}}}}}}"#,
        auth("one"),
        auth("two")
    );
    let path = setup.file("config.json", &config);
    let keys = format!("auth = \"shared\"\ndocker_config = {path:?}");
    let proxy = setup.upstream_keys("docker.io", &keys).start().await;
    for (name, image) in &images {
        proxy.pull(name, "1", image).await;
    }
    proxy.manifest("team/three", "1").await.is_refused(403);
}
