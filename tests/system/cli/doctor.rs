//! `ifnewer doctor` against the running program and a scripted Docker daemon.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

const WELL_KNOWN: [&str; 7] = [
    "ghcr.io",
    "quay.io",
    "registry.k8s.io",
    "gcr.io",
    "public.ecr.aws",
    "mcr.microsoft.com",
    "registry.gitlab.com",
];

/// The program, with its ports in its configuration file.
struct Host {
    proxy: Proxy,
    root: PathBuf,
}

impl Host {
    async fn over(upstream: &Upstream) -> Host {
        // The disk of the machine is not tested.
        let mut setup = Setup::over(upstream).tail("[store]\nfree = \"1 MiB\"");
        for name in WELL_KNOWN {
            setup = setup.upstream(name, "enabled = false");
        }
        let proxy = setup.start().await;
        let root = proxy.setup().folder().join("root");
        fs::create_dir_all(root.join("var/run")).unwrap();
        Host { proxy, root }
    }

    /// Exit code and report, as JSON.
    async fn doctor(&self, further: &[&str]) -> (Option<i32>, Value) {
        let (listen, admin) = (
            self.proxy.registry_address().to_string(),
            self.proxy.admin_address().to_string(),
        );
        let config = self.proxy.setup().folder().join("ifnewer.toml");
        let mut words = vec!["doctor", "--json", "--listen", &listen, "--admin", &admin];
        words.extend([
            "--root",
            self.root.to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
        ]);
        words.extend(further);
        let mut program = self.proxy.setup().run(&words);
        let code = program.exit().await;
        let said = program.stdout();
        (
            code,
            serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}{}", program.stderr())),
        )
    }

    /// A Docker daemon with these mirrors. Its pull of hello-world uses the mirror or bypasses it.
    fn docker(&self, mirrors: &[String], through: bool) -> Arc<Mutex<Vec<String>>> {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let listener = UnixListener::bind(self.root.join("var/run/docker.sock")).unwrap();
        let info = json!({ "ServerVersion": "0", "RegistryConfig": { "Mirrors": mirrors } }).to_string();
        let pull = self.proxy.get(&manifest_path("library/hello-world", "latest"));
        let mut pull = through.then_some(pull);
        let log = Arc::clone(&asked);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (reader, mut writer) = stream.split();
                let mut lines = BufReader::new(reader).lines();
                let first = lines.next_line().await.unwrap().unwrap();
                while lines
                    .next_line()
                    .await
                    .unwrap()
                    .is_some_and(|line| !line.is_empty())
                {}
                let (status, body) = if first.starts_with("GET /info ") {
                    ("200 OK", info.clone())
                } else if first.starts_with("POST /images/create?") {
                    if let Some(pull) = pull.take() {
                        assert_eq!(pull.await.status, 200);
                    }
                    (
                        "200 OK",
                        "{\"status\":\"Pulling\"}\r\n{\"status\":\"Done\"}\r\n".to_owned(),
                    )
                } else if first.starts_with("DELETE ") {
                    ("200 OK", "[]".to_owned())
                } else {
                    ("404 Not Found", "{\"message\":\"No such image\"}".to_owned())
                };
                log.lock()
                    .unwrap()
                    .push(first.rsplit_once(' ').unwrap().0.to_owned());
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                writer
                    .write_all(format!("{head}{body}").as_bytes())
                    .await
                    .unwrap();
            }
        });
        asked
    }
}

fn check<'a>(told: &'a Value, name: &str) -> &'a Value {
    let mut checks = told["checks"].as_array().unwrap().iter();
    checks
        .find(|check| check["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {told:#}"))
}

fn state<'a>(told: &'a Value, name: &str) -> &'a str {
    check(told, name)["state"].as_str().unwrap()
}

#[tokio::test]
async fn a_daemon_that_pulls_through_us_is_green() {
    let upstream = Upstream::start().await;
    upstream.push("library/hello-world", "latest", Image::with_layers(&["hello"]));
    let host = Host::over(&upstream).await;
    let asked = host.docker(&[format!("http://{}/", host.proxy.registry_address())], true);
    let (code, told) = host.doctor(&[]).await;
    assert_eq!(code, Some(0), "{told:#}");
    for name in [
        "listener",
        "listener-tls",
        "ready",
        "upstream docker.io",
        "descriptors",
        "docker",
        "canary",
    ] {
        assert_eq!(state(&told, name), "ok", "{told:#}");
    }
    assert!(
        check(&told, "canary")["found"]
            .as_str()
            .unwrap()
            .contains("route mirror"),
        "{told:#}"
    );
    let asked = asked.lock().unwrap().clone();
    assert_eq!(
        asked.last().unwrap(),
        "DELETE /images/docker.io/library/hello-world:latest",
        "it was not there"
    );
}

#[tokio::test]
async fn a_daemon_that_pulls_past_us_is_found_out() {
    let upstream = Upstream::start().await;
    upstream.push("library/hello-world", "latest", Image::with_layers(&["hello"]));
    let host = Host::over(&upstream).await;
    let _asked = host.docker(&["https://mirror.example.org/".to_owned()], false);
    let (code, told) = host.doctor(&[]).await;
    assert_eq!(code, Some(2), "{told:#}");
    assert!(
        check(&told, "docker")["found"]
            .as_str()
            .unwrap()
            .contains("mirror.example.org")
    );
    assert!(
        check(&told, "docker")["remedy"]
            .as_str()
            .unwrap()
            .contains("setup docker --apply")
    );
    assert!(
        check(&told, "canary")["found"]
            .as_str()
            .unwrap()
            .contains("NOT through this cache")
    );
}

#[tokio::test]
async fn without_a_daemon_it_says_that_nothing_was_proven() {
    let upstream = Upstream::start().await;
    let host = Host::over(&upstream).await;
    let (code, told) = host.doctor(&[]).await;
    assert_eq!(code, Some(0), "{told:#}");
    assert_eq!(state(&told, "canary"), "skipped");
    assert!(
        check(&told, "canary")["found"]
            .as_str()
            .unwrap()
            .contains("NOT proven"),
        "{told:#}"
    );
}

/// containerd 2.3 with the hosts.toml of an earlier release. Running `setup` as advised resolves the finding.
#[tokio::test]
async fn m05_doctor_and_setup_agree_on_referrers() {
    let upstream = Upstream::start().await;
    let host = Host::over(&upstream).await;
    let containerd = host.root.join("etc/containerd");
    let address = host.proxy.registry_address().to_string();
    let folder = containerd.join("certs.d/docker.io");
    fs::create_dir_all(&folder).unwrap();
    fs::write(containerd.join("config.toml"), "version = 4\n").unwrap();
    let hosts = format!("[host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
    fs::write(folder.join("hosts.toml"), hosts).unwrap();
    let found = |told: &Value| check(told, "containerd")["found"].as_str().unwrap().to_owned();

    let (_, told) = host.doctor(&[]).await;
    assert!(found(&told).contains("config_path"), "{told:#}");
    let root = host.root.to_str().unwrap();
    let config = host.proxy.setup().folder().join("ifnewer.toml");
    let config = config.to_str().unwrap();
    let words = [
        "setup",
        "containerd",
        "--address",
        &address,
        "--root",
        root,
        "--config",
        config,
    ];
    let setup = |last: &'static str| [&words[..], &[last]].concat();
    assert_eq!(host.proxy.setup().run(&setup("--apply")).exit().await, Some(0));
    let (_, told) = host.doctor(&[]).await;
    assert_eq!(state(&told, "containerd"), "ok", "{told:#}");

    let written = fs::read_to_string(folder.join("hosts.toml")).unwrap();
    let earlier = written.replace(", \"referrers\"", "");
    assert_ne!(written, earlier);
    fs::write(folder.join("hosts.toml"), &earlier).unwrap();
    let (_, told) = host.doctor(&[]).await;
    assert!(
        found(&told).contains("lacks the capability referrers"),
        "{told:#}"
    );
    fs::write(containerd.join("config.toml"), written_by_2(&containerd)).unwrap();
    fs::write(folder.join("hosts.toml"), &written).unwrap();
    let (_, told) = host.doctor(&[]).await;
    assert_eq!(
        state(&told, "containerd"),
        "ok",
        "the release is unknown: {told:#}"
    );
}

/// The configuration as an older release parses it.
fn written_by_2(containerd: &std::path::Path) -> String {
    fs::read_to_string(containerd.join("config.toml"))
        .unwrap()
        .replace("version = 4", "version = 2")
}

#[tokio::test]
async fn each_thing_that_is_wrong_is_counted() {
    let upstream = Upstream::start().await;
    let host = Host::over(&upstream).await;
    upstream.refuses();
    let wrong = "config_path = \"/a:/b\"\n";
    let config = format!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n{wrong}");
    fs::create_dir_all(host.root.join("etc/containerd")).unwrap();
    fs::create_dir_all(host.root.join("etc/docker")).unwrap();
    fs::write(host.root.join("etc/containerd/config.toml"), config).unwrap();
    fs::write(host.root.join("etc/docker/daemon.json"), "{").unwrap();
    let (code, told) = host.doctor(&["--ca", "/nowhere/ca.pem"]).await;
    let failed: Vec<&str> = told["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|check| check["state"] == "failed")
        .map(|check| check["name"].as_str().unwrap())
        .collect();
    assert!(failed.contains(&"upstream docker.io"), "{failed:?}");
    assert!(failed.contains(&"containerd"), "{failed:?}");
    assert!(failed.contains(&"docker-file"), "{failed:?}");
    assert!(failed.contains(&"docker"), "{failed:?}");
    assert_eq!(code, Some(i32::try_from(failed.len()).unwrap()), "{told:#}");
    assert_eq!(told["failed"], failed.len());
}
