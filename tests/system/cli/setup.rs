//! `ifnewer setup` with another root folder in place of `/`.

use crate::proxy::{Setup, files_below};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// A host with typical client configuration.
struct Host {
    setup: Setup,
    root: PathBuf,
}

impl Host {
    fn new() -> Host {
        let setup = Setup::empty();
        let root = setup.folder().join("root");
        fs::create_dir(&root).unwrap();
        fs::create_dir(setup.folder().join("certs")).unwrap();
        let certificate = "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n";
        fs::write(setup.folder().join("certs/ca.pem"), certificate).unwrap();
        setup.file(
            "ifnewer.toml",
            "[listen]\nregistry = [\"127.0.0.1:5000\"]\n[tls]\nfolder = \"certs\"\nnames = [\"cache.example.org\"]\n",
        );
        Host { setup, root }
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Its configuration files by path, without the program's own state.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let files = files_below(&self.root.join("etc")).into_iter();
        files
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect()
    }

    /// Runs `ifnewer <words> --root …`. Returns exit code, standard output and standard error.
    async fn run(&self, words: &str) -> (Option<i32>, String, String) {
        let config = self.setup.folder().join("ifnewer.toml");
        let mut arguments: Vec<&str> = words.split(' ').collect();
        arguments.extend(["--root", self.root.to_str().unwrap()]);
        arguments.extend(["--config", config.to_str().unwrap()]);
        let mut program = self.setup.run(&arguments);
        let code = program.exit().await;
        (code, program.stdout(), program.stderr())
    }

    async fn succeeds(&self, words: &str) -> String {
        let (code, stdout, stderr) = self.run(words).await;
        assert_eq!(code, Some(0), "{words}: {stderr}");
        stdout
    }
}

/// Paths below the root and their contents.
type Files = &'static [(&'static str, &'static str)];

/// Each client with realistic files, including comments and unusual line endings, and the file that names the cache
/// afterwards.
const CLIENTS: &[(&str, Files, &str)] = &[
    (
        "docker",
        &[(
            "etc/docker/daemon.json",
            "{ // ours\r\n  \"log-level\": \"warn\"\r\n}",
        )],
        "etc/docker/daemon.json",
    ),
    (
        "containerd",
        &[
            ("etc/containerd/config.toml", "version = 2 # ours\n"),
            (
                "etc/containerd/certs.d/ghcr.io/hosts.toml",
                "server = \"https://ghcr.io\"",
            ),
        ],
        "etc/containerd/certs.d/ghcr.io/hosts.toml",
    ),
    ("k3s", &[], "etc/rancher/k3s/registries.yaml"),
    (
        "podman",
        &[(
            "etc/containers/registries.conf",
            "unqualified-search-registries = [\"docker.io\"]\n",
        )],
        "etc/containers/registries.conf.d/50-ifnewer.conf",
    ),
    (
        "buildkit",
        &[("etc/buildkit/buildkitd.toml", "# mine\ndebug = true")],
        "etc/buildkit/buildkitd.toml",
    ),
    (
        "gitlab-runner",
        &[(
            "etc/gitlab-runner/config.toml",
            "[[runners]]\nexecutor = \"docker\"\n[runners.docker]\nvolumes = [\"/cache\"] # one\n",
        )],
        "etc/ifnewer/dind/daemon.json",
    ),
    ("dind", &[], "etc/ifnewer/dind/daemon.json"),
];

#[tokio::test]
async fn setup_of_every_client_is_undone_byte_for_byte() {
    for (client, files, names_us) in CLIENTS {
        for address in ["", " --address https://cache.example.org:5443"] {
            let in_containers = matches!(*client, "dind" | "gitlab-runner");
            if address.is_empty() && in_containers {
                continue;
            }
            let host = Host::new();
            for (path, text) in *files {
                host.put(path, text);
            }
            let before = host.files();
            let place = if address.is_empty() {
                "127.0.0.1:5000"
            } else {
                "cache.example.org:5443"
            };

            let shown = host.succeeds(&format!("setup {client}{address}")).await;
            assert!(shown.contains(place), "{client}: {shown}");
            assert_eq!(host.files(), before, "{client}: showing writes nothing");

            host.succeeds(&format!("setup {client} --apply{address}")).await;
            let text = fs::read_to_string(host.root.join(names_us)).unwrap();
            assert!(text.contains(place), "{client}: {text}");
            let after = host.files();
            let again = host.succeeds(&format!("setup {client} --apply{address}")).await;
            assert!(again.starts_with("nothing to do"), "{client}: {again}");
            assert_eq!(host.files(), after, "{client}");

            host.succeeds(&format!("setup {client} --undo")).await;
            assert_eq!(host.files(), before, "{client}");
        }
    }
}

#[tokio::test]
async fn setup_reports_unreadable_line_and_writes_nothing() {
    let host = Host::new();
    host.put("etc/docker/daemon.json", "{\n  \"a\": 1,\n}");
    let before = host.files();
    for words in ["setup docker", "setup docker --apply"] {
        let (code, stdout, stderr) = host.run(words).await;
        assert_eq!(code, Some(1), "{words}");
        assert!(
            stderr.contains("etc/docker/daemon.json:3:") && stderr.contains("nothing was written"),
            "{stderr}"
        );
        assert_eq!(
            stdout.contains("registry-mirrors"),
            words == "setup docker",
            "the snippet to merge by hand"
        );
    }
    assert_eq!(host.files(), before);
    assert!(!host.root.join("var").exists());
}

#[tokio::test]
async fn wrong_usage_ends_with_2_and_nothing_to_undo_with_1() {
    let host = Host::new();
    for words in ["setup", "setup nobody", "setup docker --apply --undo"] {
        assert_eq!(host.run(words).await.0, Some(2), "{words}");
    }
    let (code, _, stderr) = host.run("setup docker --undo").await;
    assert_eq!(code, Some(1));
    assert!(stderr.contains("nothing to undo"), "{stderr}");
}

#[tokio::test]
async fn ca_is_installed_and_removed_in_each_trust_store() {
    let stores: [(&str, &str, &str); 4] = [
        (
            "",
            "usr/sbin/update-ca-certificates",
            "usr/local/share/ca-certificates/ifnewer.crt",
        ),
        (
            "",
            "etc/pki/ca-trust/source/anchors/other.pem",
            "etc/pki/ca-trust/source/anchors/ifnewer.crt",
        ),
        (
            " --into docker --address cache.example.org:5443",
            "etc/hosts",
            "etc/docker/certs.d/cache.example.org:5443/ca.crt",
        ),
        (
            " --into containerd --address cache.example.org:5443",
            "etc/hosts",
            "etc/containerd/certs.d/cache.example.org:5443/ca.crt",
        ),
    ];
    for (into, there, lands) in stores {
        let host = Host::new();
        host.put(there, "");
        let before = files_below(&host.root);
        let done = host.succeeds(&format!("ca install{into}")).await;
        assert!(done.contains(lands), "{done}");
        let installed = fs::read_to_string(host.root.join(lands)).unwrap();
        assert!(installed.starts_with("-----BEGIN CERTIFICATE-----") && !installed.contains("KEY"));
        let again = host.succeeds(&format!("ca install{into}")).await;
        assert!(again.starts_with("nothing to do"), "{again}");
        host.succeeds(&format!("ca uninstall{into}")).await;
        assert_eq!(files_below(&host.root), before, "{lands}");
    }
    let nowhere = Host::new();
    let (code, _, stderr) = nowhere.run("ca install").await;
    assert_eq!(code, Some(1));
    assert!(stderr.contains("no trust store found"), "{stderr}");
}
