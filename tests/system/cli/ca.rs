//! `ifnewer ca`: rotation, export and installation beside the running program.

use crate::proxy::{Proxy, Setup};
use crate::registry::Upstream;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

async fn run(setup: &Setup, words: &[&str]) -> (Option<i32>, String, String) {
    let config = setup.folder().join("ifnewer.toml");
    let arguments: Vec<&str> = words
        .iter()
        .copied()
        .chain(["--config", config.to_str().unwrap()])
        .collect();
    let mut program = setup.run(&arguments);
    let code = program.exit().await;
    (code, program.stdout(), program.stderr())
}

#[tokio::test]
async fn ca_export_contains_the_certificate_and_no_key() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let setup = proxy.setup();
    let (code, out, _) = run(setup, &["ca", "export"]).await;
    assert_eq!((code, out.as_str()), (Some(0), proxy.ca_pem().as_str()));

    // Also if both are in one file.
    let certs = setup.folder().join("certs");
    let key = fs::read_to_string(certs.join("ca.key")).unwrap();
    fs::write(certs.join("ca.pem"), key + &proxy.ca_pem()).unwrap();
    let file = setup.folder().join("out.pem");
    let (code, ..) = run(setup, &["ca", "export", "--out", file.to_str().unwrap()]).await;
    assert_eq!(code, Some(0));
    let text = fs::read_to_string(file).unwrap();
    assert!(
        text.contains("BEGIN CERTIFICATE") && !text.contains("PRIVATE"),
        "{text}"
    );
}

#[tokio::test]
async fn rotated_ca_takes_effect_on_reload_and_old_one_is_kept() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let certs = proxy.setup().folder().join("certs");
    let old = proxy.ca_pem();
    let old_key = fs::read(certs.join("ca.key")).unwrap();
    assert_eq!(proxy.get("/v2/").tls(&old, &["http/1.1"]).await.status, 200);

    // A cache that runs as another user must be able to read its key afterwards.
    let user = rustix::process::geteuid().is_root().then_some(65_534);
    for name in ["ca.key", "ca.pem", "server.key", "server.pem"] {
        std::os::unix::fs::chown(certs.join(name), user, user).unwrap();
    }
    let (code, out, stderr) = run(proxy.setup(), &["ca", "rotate"]).await;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(out.contains("ca install") && out.contains("kill -HUP"), "{out}");
    let new = proxy.ca_pem();
    assert_ne!(new, old);
    assert_eq!(proxy.get("/v2/").tls(&old, &["http/1.1"]).await.status, 200);

    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    assert_eq!(proxy.get("/v2/").tls(&new, &["http/1.1"]).await.status, 200);

    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&certs.join("ca.key")), 0o600);
    if let Some(user) = user {
        assert_eq!(fs::metadata(certs.join("ca.key")).unwrap().uid(), user);
    }
    let kept: Vec<_> = fs::read_dir(&certs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let kept = kept.iter().find(|path| path.is_dir()).unwrap();
    assert_eq!(mode(kept), 0o700);
    assert_eq!(fs::read(kept.join("ca.key")).unwrap(), old_key);
    assert_eq!(fs::read_to_string(kept.join("ca.pem")).unwrap(), old);
    assert!(!certs.join("new").exists());
}

#[tokio::test]
async fn ca_commands_fail_without_a_ca() {
    let setup = Setup::empty();
    setup.file("ifnewer.toml", &setup.toml());
    for words in [["ca", "rotate"], ["ca", "export"]] {
        let (code, _, stderr) = run(&setup, &words).await;
        assert_eq!(code, Some(1));
        assert!(
            stderr.contains("creates the certificate authority at its first start"),
            "{stderr}"
        );
    }
}
