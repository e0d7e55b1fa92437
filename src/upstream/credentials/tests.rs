//! Credential files and helpers: present, changing and failing.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use parking_lot::Mutex;

use super::*;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn repository(name: &str) -> Repository {
    name.parse().unwrap()
}

/// `user` for a credential, `program < server` for a helper, or `nothing`.
fn found(config: &str, of: &[&str], name: &str) -> String {
    match DockerConfig::read(config)
        .unwrap()
        .find(&names(of), Some(&repository(name)))
    {
        Match::Credential(credential) => credential.username().to_owned(),
        Match::Helper { helper, server } => format!("{helper} < {server}"),
        Match::Nothing => "nothing".to_owned(),
    }
}

#[test]
fn longest_docker_config_key_wins() {
    // host: h, host/team: t, host/team/app: a; and Docker Hub as docker writes it.
    let config = r#"{"auths": {
        "registry.example.com": {"auth": "aDpw"},
        "registry.example.com/team": {"auth": "dDpw"},
        "registry.example.com/team/app": {"auth": "YTpw"},
        "https://index.docker.io/v1/": {"auth": "aHViOnA="},
        "https://Other.example.com:5000/v2/": {"username": "o", "password": "p"},
        "empty.example.com": {}, "colon.example.com": {"auth": "Og=="}
    }, "credHelpers": {"registry.example.com/aws": "ecr-login"}}"#;
    for (host, name, expected) in [
        ("registry.example.com", "team/app", "a"),
        ("registry.example.com", "team/app/deep", "a"),
        ("registry.example.com", "team/application", "t"),
        ("registry.example.com", "team", "t"),
        ("registry.example.com", "teams/app", "h"),
        (
            "registry.example.com",
            "aws/app",
            "docker-credential-ecr-login < registry.example.com/aws",
        ),
        ("docker.io", "library/alpine", "hub"),
        ("other.example.com:5000", "x", "o"),
        ("empty.example.com", "x", "nothing"),
        ("colon.example.com", "x", "nothing"),
        ("unknown.example.com", "x", "nothing"),
    ] {
        assert_eq!(found(config, &[host], name), expected, "{host}/{name}");
    }
    // Under any of the upstream's names, the image name's first.
    assert_eq!(found(config, &["mirror", "registry.example.com"], "x"), "h");
}

#[test]
fn default_helper_is_used_without_a_match() {
    let config = r#"{"auths": {"https://known.example.com": {}, "own.example.com": {"auth": "aDpw"}},
        "credsStore": "pass", "credHelpers": {"gcr.io": "gcloud"}}"#;
    for (host, expected) in [
        ("own.example.com", "h"),
        ("gcr.io", "docker-credential-gcloud < gcr.io"),
        (
            "known.example.com",
            "docker-credential-pass < https://known.example.com",
        ),
        ("new.example.com", "docker-credential-pass < new.example.com"),
        (
            "docker.io",
            "docker-credential-pass < https://index.docker.io/v1/",
        ),
    ] {
        assert_eq!(found(config, &[host], "a/b"), expected, "{host}");
    }
}

#[test]
fn identity_token_is_recognized() {
    let config = r#"{"auths": {"a.example.com": {"auth": "PHRva2VuPjo=", "identitytoken": "refresh"}}}"#;
    let config = DockerConfig::read(config).unwrap();
    let Match::Credential(credential) = config.find(&names(&["a.example.com"]), None) else {
        panic!("there is one")
    };
    assert!(credential.is_identity_token());
    assert_eq!(credential.password(), "refresh");
}

/// A script as a program file.
fn program(folder: &Path, script: &str) -> String {
    let path = folder.join("docker-credential-test");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn helper_gets_registry_on_stdin_and_output_is_limited() {
    let folder = tempfile::tempdir().unwrap();
    let run = |script: &str| helper::run(program(folder.path(), script), "reg.example.com".to_owned());
    let output = run(
        r#"read server; test "$1" = get && printf '{"ServerURL":"x","Username":"AWS","Secret":"%s"}' "$server""#,
    );
    let credential = output.await.unwrap().unwrap();
    assert_eq!(
        (credential.username(), credential.password()),
        ("AWS", "reg.example.com")
    );

    let nothing = run("echo credentials not found in native keychain; exit 1")
        .await
        .unwrap();
    assert!(nothing.is_none());
    for (script, why) in [
        ("echo no session; exit 1", "no session"),
        (r#"echo '{"Secret":"canary"}'; exit 1"#, "it failed"),
        ("echo canary", "its output is not a credential"),
        (
            "head -c 100000 /dev/zero",
            "its output is longer than 65536 bytes",
        ),
        ("exit 3", "it failed"),
    ] {
        let error = run(script).await.unwrap_err();
        assert_eq!(error, why, "{script}");
    }
    let missing = helper::run("docker-credential-that-is-not-there".to_owned(), String::new()).await;
    assert!(missing.unwrap_err().starts_with("cannot run it"));
}

/// Helpers with scripted output, the last one repeated, and the number of runs.
fn scripted(outputs: &[Result<&'static str, &'static str>]) -> (Helpers, Arc<Mutex<usize>>) {
    let (asked, outputs) = (Arc::new(Mutex::new(0)), outputs.to_vec());
    let count = Arc::clone(&asked);
    let run_helper = move |_, _| {
        let mut count = count.lock();
        let response = outputs.get(*count).or(outputs.last()).copied().unwrap();
        *count += 1;
        let response = match response {
            Ok("") => Ok(None),
            Ok(secret) => Ok(Some(UpstreamCredential::new("robot", secret))),
            Err(error) => Err(error.to_owned()),
        };
        Box::pin(async move { response }) as helper::HelperFuture
    };
    (Helpers::with_runner(Box::new(run_helper)), asked)
}

async fn get(helpers: &Helpers) -> Result<String, CredentialUnavailable> {
    let credential = helpers.get(&"test".parse().unwrap(), "reg").await?;
    Ok(credential.map_or_else(String::new, |credential| credential.password().to_owned()))
}

#[tokio::test(start_paused = true)]
async fn helper_runs_again_before_credential_expires() {
    let (helpers, asked) = scripted(&[Ok("one"), Ok("two"), Err("no session"), Ok("three")]);
    for _ in 0..3 {
        assert_eq!(get(&helpers).await.unwrap(), "one");
    }
    tokio::time::advance(Duration::from_secs(1801)).await;
    assert_eq!(get(&helpers).await.unwrap(), "two");
    // The credential stays while the helper fails, and the helper does not run for every request.
    tokio::time::advance(Duration::from_secs(1801)).await;
    for _ in 0..3 {
        assert_eq!(get(&helpers).await.unwrap(), "two");
    }
    assert_eq!(*asked.lock(), 3);
    tokio::time::advance(Duration::from_secs(31)).await;
    assert_eq!(get(&helpers).await.unwrap(), "three");
}

#[tokio::test(start_paused = true)]
async fn rejected_credential_runs_helper_once_more() {
    let (helpers, asked) = scripted(&[Ok("one"), Ok("two"), Ok("two")]);
    let refused = helpers
        .get(&"test".parse().unwrap(), "reg")
        .await
        .unwrap()
        .unwrap();
    helpers.check_soon(&refused);
    assert_eq!(get(&helpers).await.unwrap(), "two");
    let refused = helpers
        .get(&"test".parse().unwrap(), "reg")
        .await
        .unwrap()
        .unwrap();
    helpers.check_soon(&refused);
    for _ in 0..3 {
        assert_eq!(get(&helpers).await.unwrap(), "two");
    }
    assert_eq!(*asked.lock(), 2);
}

#[tokio::test(start_paused = true)]
async fn helper_failure_differs_from_no_credential() {
    let (failing, _) = scripted(&[Err("no session")]);
    assert_eq!(get(&failing).await, Err(CredentialUnavailable));
    let (empty, _) = scripted(&[Ok("")]);
    assert_eq!(get(&empty).await.unwrap(), "");
}

#[tokio::test]
async fn changed_password_file_reloads_missing_one_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("password");
    std::fs::write(&path, "one\n").unwrap();
    let source = CredentialSource::PasswordFile {
        username: "robot".to_owned(),
        path: path.clone(),
    };
    let own = CredentialProvider::new(source, Names::new("reg.example.com", Vec::new(), None));
    let one = own.current(None).await.unwrap().unwrap();
    assert_eq!(one.password(), "one");
    assert!(own.renewed(None, &one).await.is_none(), "nothing changed");
    std::fs::write(&path, "another").unwrap();
    let two = own.renewed(None, &one).await.unwrap();
    assert_eq!(two.password(), "another");
    assert_ne!(one.principal(), two.principal(), "tokens are not shared");
    std::fs::remove_file(&path).unwrap();
    assert!(own.renewed(None, &two).await.is_none());
    assert_eq!(own.current(None).await.unwrap().unwrap().password(), "another");
}

#[test]
fn helper_name_rejects_paths_and_options() {
    for name in ["ecr-login", "docker-credential-ecr-login", "gcr", "a.b_c"] {
        assert!(name.parse::<HelperName>().is_ok(), "{name}");
    }
    for name in ["", "../x", "/bin/x", "a b", "a;b", "docker-credential-"] {
        assert!(name.parse::<HelperName>().is_err(), "{name}");
    }
}

#[test]
fn r15_prefixed_upstream_uses_outer_registrys_credential() {
    let elsewhere: Origin = "https://1.dkr.ecr.eu-west-1.amazonaws.com".parse().unwrap();
    let hosts = || vec!["index.docker.io".to_owned()];
    let plain = Names::new("docker.io", hosts(), Some(&elsewhere));
    assert_eq!(plain.server, "https://index.docker.io/v1/");
    let elsewhere = elsewhere.with_repository_prefix("hub".parse().unwrap());
    let below = Names::new("docker.io", hosts(), Some(&elsewhere));
    assert_eq!(below.server, "1.dkr.ecr.eu-west-1.amazonaws.com");
    assert_eq!(below.all.first(), Some(&below.server));
}
