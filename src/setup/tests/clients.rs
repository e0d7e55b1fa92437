//! Planned files of each client: on a fresh host, beside existing files, and repeated.

use clap::ValueEnum;

use super::*;

fn planned(client: Client, endpoint: &CacheEndpoint, held: &MemoryFs) -> Plan {
    plan_for(endpoint, &options(client), held)
        .unwrap_or_else(|refused| panic!("{}: {refused}", client.name()))
}

fn refused(client: Client, held: &MemoryFs) -> SetupError {
    plan_for(&local(), &options(client), held).unwrap_err()
}

#[test]
fn what_is_already_so_stays_so() {
    let runner = MemoryFs::with(
        "/etc/gitlab-runner/config.toml",
        "[[runners]]\nexecutor = \"docker\"\n[runners.docker]\nimage = \"a\"\n",
    );
    for &client in Client::value_variants() {
        for endpoint in [local(), remote()] {
            let held = if client == Client::GitlabRunner {
                &runner
            } else {
                &MemoryFs::default()
            };
            let first = planned(client, &endpoint, held);
            let after = carried_out(held, &first);
            let second = planned(client, &endpoint, &after);
            assert_eq!(
                carried_out(&after, &second).files,
                after.files,
                "{}",
                client.name()
            );
        }
    }
}

#[test]
fn docker_gets_a_mirror() {
    let plan = planned(Client::Docker, &local(), &MemoryFs::default());
    assert_eq!(
        text(&plan, "/etc/docker/daemon.json"),
        "{\n  \"registry-mirrors\": [\"http://127.0.0.1:5000\"]\n}\n"
    );
    assert_eq!(plan.files.len(), 1, "loopback needs no certificate");

    let plan = planned(Client::Docker, &remote(), &MemoryFs::default());
    assert!(text(&plan, "/etc/docker/daemon.json").contains("https://cache.example.org:5000"));
    assert_eq!(
        text(&plan, "/etc/docker/certs.d/cache.example.org:5000/ca.crt"),
        CA
    );
}

#[test]
fn docker_keeps_what_is_there() {
    let before = "{\r\n\t\"log-level\": \"warn\",\r\n\t\"bip\": \"10.1.0.1/24\"\r\n}";
    let plan = planned(
        Client::Docker,
        &local(),
        &MemoryFs::with("/etc/docker/daemon.json", before),
    );
    assert_eq!(
        text(&plan, "/etc/docker/daemon.json"),
        "{\r\n\t\"registry-mirrors\": [\"http://127.0.0.1:5000\"],\r\n\t\"log-level\": \"warn\",\r\n\t\"bip\": \
         \"10.1.0.1/24\"\r\n}"
    );
    let slash = r#"{"registry-mirrors":["http://127.0.0.1:5000/"]}"#;
    let plan = planned(
        Client::Docker,
        &local(),
        &MemoryFs::with("/etc/docker/daemon.json", slash),
    );
    assert_eq!(
        text(&plan, "/etc/docker/daemon.json"),
        slash,
        "the same mirror in dockerd's own spelling"
    );
}

/// dockerd parses strict JSON, so that the operator must hear of comments.
#[test]
fn docker_comments_are_kept_and_reported() {
    let before = "{\n  \"log-level\": \"warn\" // for now\n}\n";
    let held = MemoryFs::with("/etc/docker/daemon.json", before);
    let plan = planned(Client::Docker, &local(), &held);
    assert_eq!(
        text(&plan, "/etc/docker/daemon.json"),
        "{\n  \"registry-mirrors\": [\"http://127.0.0.1:5000\"],\n  \"log-level\": \"warn\" // for now\n}\n"
    );
    assert!(
        plan.notes[0].starts_with("/etc/docker/daemon.json:2 has a comment"),
        "{plan:?}"
    );
}

#[test]
fn docker_with_another_mirror_is_asked_about() {
    let held = MemoryFs::with(
        "/etc/docker/daemon.json",
        "{\"registry-mirrors\": [\n  \"https://m\"\n]}",
    );
    let told = refused(Client::Docker, &held).to_string();
    for part in ["https://m", "--force", "nothing was written"] {
        assert!(told.contains(part), "{told}");
    }
    let plan = plan_for(&local(), &forced(Client::Docker), &held).unwrap();
    assert_eq!(
        text(&plan, "/etc/docker/daemon.json"),
        "{\"registry-mirrors\": [\n  \"http://127.0.0.1:5000\",\n  \"https://m\"\n]}"
    );
    for wrong in [r#"{"registry-mirrors": "x"}"#, r#"{"registry-mirrors": [1]}"#] {
        let held = MemoryFs::with("/etc/docker/daemon.json", wrong);
        assert!(
            conflict(&refused(Client::Docker, &held)).contains("not a list"),
            "{wrong}"
        );
    }
}

#[test]
fn containerd_gets_a_file_for_each_registry() {
    let plan = planned(Client::Containerd, &local(), &MemoryFs::default());
    assert_eq!(
        text(&plan, "/etc/containerd/config.toml"),
        "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n"
    );
    assert_eq!(
        text(&plan, "/etc/containerd/certs.d/docker.io/hosts.toml"),
        "server = \"https://registry-1.docker.io\"\n\n[host.\"http://127.0.0.1:5000\"]\ncapabilities = [\"pull\", \
         \"resolve\"]\n"
    );
    assert!(text(&plan, "/etc/containerd/certs.d/ghcr.io/hosts.toml").contains("https://ghcr.io"));

    let plan = planned(Client::Containerd, &remote(), &MemoryFs::default());
    let hosts = text(&plan, "/etc/containerd/certs.d/ghcr.io/hosts.toml");
    assert!(
        hosts.contains("ca = \"/etc/containerd/ifnewer-ca.crt\""),
        "{hosts}"
    );
    assert_eq!(text(&plan, "/etc/containerd/ifnewer-ca.crt"), CA);
}

#[test]
fn containerd_keeps_what_is_there() {
    let config = "# mine\nversion = 3\nroot = \"/r\"\n\n[plugins.'io.containerd.cri.v1.images'.registry]\n  # none yet\n";
    let hosts = "# as the vendor ships it\nserver = \"https://ghcr.io\"";
    let held = MemoryFs::with("/etc/containerd/config.toml", config)
        .and("/etc/containerd/certs.d/ghcr.io/hosts.toml", hosts);
    let plan = planned(Client::Containerd, &local(), &held);
    assert_eq!(
        text(&plan, "/etc/containerd/config.toml"),
        "# mine\nversion = 3\nroot = \"/r\"\n\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \
         \"/etc/containerd/certs.d\"\n  # none yet\n"
    );
    let hosts = text(&plan, "/etc/containerd/certs.d/ghcr.io/hosts.toml");
    assert!(
        hosts.starts_with("# as the vendor ships it\nserver = \"https://ghcr.io\"\n\n[host."),
        "{hosts}"
    );
}

#[test]
fn containerds_own_folder_is_used() {
    let config =
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/opt/hosts\"\n";
    let held = MemoryFs::with("/etc/containerd/config.toml", config);
    let plan = planned(Client::Containerd, &local(), &held);
    assert_eq!(text(&plan, "/etc/containerd/config.toml"), config);
    assert!(plan.by_hand.is_empty(), "nothing to restart");
    assert!(text(&plan, "/opt/hosts/docker.io/hosts.toml").contains("127.0.0.1:5000"));
}

/// Defaults of `containerd config default`: 1.6, 2.1, 2.3.
#[test]
fn m04_each_default_configuration_gets_its_config_path() {
    let of_1 = "version = 2\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\".registry]\n    config_path = \"\"\n\n    \
                [plugins.\"io.containerd.grpc.v1.cri\".registry.configs]\n\n    \
                [plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors]\n";
    let of_2 = |version: u8, value: &str| {
        format!(
            "version = {version}\n[plugins]\n  [plugins.'io.containerd.cri.v1.images'.registry]\n    config_path = '{value}'\n"
        )
    };
    let usual = "/etc/containerd/certs.d";
    for config in [
        of_1.to_owned(),
        of_2(3, ""),
        of_2(4, ""),
        of_2(4, "/etc/containerd/certs.d:/etc/docker/certs.d"),
        "version = 4\n".to_owned(),
    ] {
        let held = MemoryFs::with("/etc/containerd/config.toml", &config);
        let plan = planned(Client::Containerd, &local(), &held);
        let edited = text(&plan, "/etc/containerd/config.toml");
        assert_eq!(edited.matches(usual).count(), 1, "{edited}");
        assert!(edited.contains(&format!("config_path = \"{usual}\"")), "{edited}");
        assert!(!edited.contains(':'), "{edited}");
        let again = planned(Client::Containerd, &local(), &carried_out(&held, &plan));
        assert_eq!(text(&again, "/etc/containerd/config.toml"), edited);
    }
}

/// containerd 1.6 to 2.1 skip a whole hosts.toml with an unknown capability.
#[test]
fn m05_referrers_capability_by_containerd_release() {
    let config = |version: u8| format!("version = {version}\n");
    let both = "capabilities = [\"pull\", \"resolve\"]\n";
    let three = "capabilities = [\"pull\", \"resolve\", \"referrers\"]\n";
    for (printed, version, capabilities) in [
        (None, 2, both),
        (None, 3, both),
        (None, 4, three),
        (
            Some("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1"),
            2,
            both,
        ),
        (Some("containerd containerd.io v1.7.27 05044ec0"), 2, both),
        (
            Some("containerd github.com/containerd/containerd/v2 v2.1.5 fcd43222d6b"),
            3,
            both,
        ),
        (
            Some("containerd github.com/containerd/containerd/v2 2.2.0 1c4457e00fac"),
            2,
            three,
        ),
        (
            Some("containerd github.com/containerd/containerd/v2 v2.10.1 1c4457e00fac"),
            3,
            three,
        ),
        (Some("no version at all"), 4, three),
    ] {
        let mut held = MemoryFs::with("/etc/containerd/config.toml", &config(version));
        held.version = printed;
        let plan = planned(Client::Containerd, &local(), &held);
        let path = "/etc/containerd/certs.d/ghcr.io/hosts.toml";
        assert!(
            text(&plan, path).ends_with(capabilities),
            "{printed:?}: {}",
            text(&plan, path)
        );
        let unknown = plan.notes.iter().any(|note| note.contains("referrers"));
        assert_eq!(unknown, printed.is_none() && version == 2, "{printed:?}");

        // A file written for an earlier release is updated, and vice versa.
        for former in [both, three] {
            let hosts =
                format!("server = \"s\"\n\n[host.\"http://127.0.0.1:5000\"] # the cache\n{former}# end\n");
            let mut held = MemoryFs::with("/etc/containerd/config.toml", &config(version)).and(path, &hosts);
            held.version = printed;
            let plan = planned(Client::Containerd, &local(), &held);
            assert_eq!(text(&plan, path), hosts.replace(former, capabilities));
        }
    }
}

#[test]
fn k7_registry_with_port_keeps_name_and_scheme() {
    let mut endpoint = local();
    endpoint.upstreams = vec![
        https("tls.example:5000"),
        Registry {
            name: "plain.example:5000".into(),
            plain_http: true,
        },
    ];
    let all = |client| {
        let plan = plan_for(&endpoint, &options(client), &MemoryFs::default()).unwrap();
        let files = plan.files.iter().map(|file| {
            let text = String::from_utf8(file.bytes.clone()).unwrap();
            format!("# {}\n{text}", file.path.display())
        });
        files.collect::<String>()
    };
    let containerd = all(Client::Containerd);
    for part in [
        "certs.d/tls.example:5000/hosts.toml\nserver = \"https://tls.example:5000\"",
        "certs.d/plain.example:5000/hosts.toml\nserver = \"http://plain.example:5000\"",
    ] {
        assert!(containerd.contains(part), "{containerd}");
    }
    let podman = all(Client::Podman);
    for part in [
        "location = \"tls.example:5000\"\n\n[[registry.mirror]]\nlocation = \"127.0.0.1:5000/tls.example:5000\"",
        "location = \"plain.example:5000\"\ninsecure = true\n\n[[registry.mirror]]",
    ] {
        assert!(podman.contains(part), "{podman}");
    }
    let buildkit: toml::Table = toml::from_str(&all(Client::Buildkit)).unwrap();
    let http = |name: &str| buildkit["registry"][name].get("http").cloned();
    assert_eq!(http("tls.example:5000"), None);
    assert_eq!(http("plain.example:5000"), Some(toml::Value::Boolean(true)));
    let k3s = all(Client::K3s);
    assert!(
        k3s.contains("- \"http://127.0.0.1:5000\"\n      - \"http://plain.example:5000\""),
        "{k3s}"
    );
    assert!(!k3s.contains("- \"http://tls"), "{k3s}");
}

#[test]
fn conflicting_containerd_config_is_not_changed() {
    let registry = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n";
    for (config, part) in [
        ("root = \"/r\"\n".to_owned(), "version"),
        ("version = 1\n".to_owned(), "version"),
        (format!("{registry}config_path = \"/a:/b\"\n"), "several folders"),
        (format!("{registry}config_path = \"a\"\n"), "config_path is a"),
        (
            format!(
                "{registry}[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = []\n"
            ),
            "registry.mirrors",
        ),
        ("version = 5\n".to_owned(), "versions 2, 3 and 4"),
        (
            "version = 2\nplugins = { x = { } }\n".to_owned(),
            "automatic edit",
        ),
    ] {
        let held = MemoryFs::with("/etc/containerd/config.toml", &config);
        let told = refused(Client::Containerd, &held);
        assert!(conflict(&told).contains(part), "{config}: {told}");
    }
    let held = MemoryFs::with("/etc/containerd/config.toml", "version = 2\n[x\n");
    let told = refused(Client::Containerd, &held);
    assert!(matches!(told, SetupError::Unreadable { line: 2, .. }), "{told}");
}

#[test]
fn containerd_with_another_host_is_asked_about() {
    let path = "/etc/containerd/certs.d/ghcr.io/hosts.toml";
    let held = MemoryFs::with(
        path,
        "server = \"s\"\n\n[host.\"https://other\"]\n  capabilities = [\"pull\"]\n",
    );
    assert!(conflict(&refused(Client::Containerd, &held)).contains("https://other"));
    let plan = plan_for(&local(), &forced(Client::Containerd), &held).unwrap();
    let hosts = text(&plan, path);
    assert!(
        hosts.find("127.0.0.1").unwrap() < hosts.find("https://other").unwrap(),
        "{hosts}"
    );

    let held = MemoryFs::with(
        path,
        "[host.\"http://127.0.0.1:5000\"]\ncapabilities = [\"push\"]\n",
    );
    assert!(conflict(&refused(Client::Containerd, &held)).contains("other settings"));
}

#[test]
fn k3s_gets_its_file_or_is_asked_about() {
    let plan = planned(Client::K3s, &remote(), &MemoryFs::default());
    assert_eq!(
        text(&plan, "/etc/rancher/k3s/registries.yaml"),
        "mirrors:\n  \"docker.io\":\n    endpoint:\n      - \"https://cache.example.org:5000\"\n  \"ghcr.io\":\n    \
         endpoint:\n      - \"https://cache.example.org:5000\"\nconfigs:\n  \"cache.example.org:5000\":\n    tls:\n      \
         ca_file: \"/etc/rancher/k3s/ifnewer-ca.crt\"\n"
    );
    let held = MemoryFs::with("/etc/rancher/k3s/registries.yaml", "mirrors:\n  docker.io: {}\n");
    let told = refused(Client::K3s, &held).to_string();
    assert!(
        told.contains("not merged") && told.contains("endpoint:"),
        "{told}"
    );
}

#[test]
fn podman_gets_a_file_of_ours() {
    let plan = planned(Client::Podman, &local(), &MemoryFs::default());
    let conf = text(&plan, "/etc/containers/registries.conf.d/50-ifnewer.conf");
    let root: toml::Table = toml::from_str(conf).unwrap();
    let second = &root["registry"][1];
    assert_eq!(second["prefix"].as_str(), Some("ghcr.io"));
    assert_eq!(
        second["mirror"][0]["location"].as_str(),
        Some("127.0.0.1:5000/ghcr.io")
    );
    assert_eq!(second["mirror"][0]["insecure"].as_bool(), Some(true));

    let plan = planned(Client::Podman, &remote(), &MemoryFs::default());
    assert!(!text(&plan, "/etc/containers/registries.conf.d/50-ifnewer.conf").contains("insecure"));
    assert_eq!(
        text(&plan, "/etc/containers/certs.d/cache.example.org:5000/ca.crt"),
        CA
    );
}

#[test]
fn conflicting_podman_registry_is_reported() {
    let theirs = "[[registry]]\nlocation = \"ghcr.io\"\n";
    let held = MemoryFs::with("/etc/containers/registries.conf.d/99-mine.conf", theirs);
    let told = refused(Client::Podman, &held).to_string();
    assert!(
        told.contains("99-mine.conf") && told.contains("127.0.0.1:5000/ghcr.io"),
        "{told}"
    );
    plan_for(&local(), &forced(Client::Podman), &held).unwrap();

    let unrelated =
        "unqualified-search-registries = [\"docker.io\"]\n[[registry]]\nlocation = \"example.org\"\n";
    planned(
        Client::Podman,
        &local(),
        &MemoryFs::with("/etc/containers/registries.conf", unrelated),
    );

    let first = "[registries.search]\nregistries = ['docker.io']\n";
    let held = MemoryFs::with("/etc/containers/registries.conf", first);
    assert!(conflict(&refused(Client::Podman, &held)).contains("version 1"));
    assert!(
        plan_for(&local(), &forced(Client::Podman), &held).is_err(),
        "podman would not start"
    );
}

#[test]
fn buildkit_is_merged() {
    let plan = planned(Client::Buildkit, &local(), &MemoryFs::default());
    let root: toml::Table = toml::from_str(text(&plan, "/etc/buildkit/buildkitd.toml")).unwrap();
    assert_eq!(
        root["registry"]["ghcr.io"]["mirrors"][0].as_str(),
        Some("127.0.0.1:5000")
    );
    assert_eq!(root["registry"]["127.0.0.1:5000"]["http"].as_bool(), Some(true));

    let before =
        "# mine\ndebug = true\n[registry.\"docker.io\"]\n  insecure = false # no\n[worker.oci]\ngc = true";
    let held = MemoryFs::with("/etc/buildkit/buildkitd.toml", before);
    let plan = planned(Client::Buildkit, &remote(), &held);
    let after = text(&plan, "/etc/buildkit/buildkitd.toml");
    assert!(
        after.starts_with(
            "# mine\ndebug = true\n[registry.\"docker.io\"]\n  insecure = false # no\n  mirrors = \
             [\"cache.example.org:5000\"]\n[worker.oci]\ngc = true\n"
        ),
        "{after}"
    );
    assert!(
        after.contains("ca = [\"/etc/buildkit/ifnewer-ca.crt\"]"),
        "{after}"
    );

    let held = MemoryFs::with(
        "/etc/buildkit/buildkitd.toml",
        "[registry.\"ghcr.io\"]\nmirrors = [\"m\"]\n",
    );
    assert!(conflict(&refused(Client::Buildkit, &held)).contains("already has mirrors"));
}

#[test]
fn every_docker_runner_gets_the_mounts() {
    let path = "/etc/gitlab-runner/config.toml";
    let before = r#"concurrent = 4

[[runners]]
  name = "one"
  token = "secret"
  executor = "docker"
  [runners.docker]
    image = "alpine"
    volumes = ["/cache", "/a:/b"] # ours
[[runners]]
  name = "two"
  executor = "shell"
[[runners]]
  name = "three"
  executor = "docker+machine"
  [runners.docker]
    image = "alpine"
[[runners]]
  name = "four"
  executor = "docker"
  [runners.docker]
    volumes = [
      "/cache",
    ]
"#;
    let plan = planned(Client::GitlabRunner, &remote(), &MemoryFs::with(path, before));
    let after = text(&plan, path);
    let mount = "\"/etc/ifnewer/dind/daemon.json:/etc/docker/daemon.json:ro\", \
                 \"/etc/ifnewer/dind/certs.d:/etc/docker/certs.d:ro\"";
    let meant = before
        .replace("\"/a:/b\"]", &format!("\"/a:/b\", {mount}]"))
        .replace(
            "image = \"alpine\"\n[[runners]]\n  name = \"four\"",
            &format!("image = \"alpine\"\n    volumes = [{mount}]\n[[runners]]\n  name = \"four\""),
        )
        .replace("      \"/cache\",\n", &format!("      \"/cache\", {mount},\n"));
    assert_eq!(after, meant);
    assert!(text(&plan, "/etc/ifnewer/dind/daemon.json").contains("https://cache.example.org:5000"));

    let shell = "[[runners]]\nexecutor = \"shell\"\n";
    assert!(
        conflict(&refused(Client::GitlabRunner, &MemoryFs::with(path, shell))).contains("no [[runners]]")
    );
    let none = planned(Client::GitlabRunner, &remote(), &MemoryFs::default());
    assert!(none.by_hand[0].contains("volumes = [\"/cache\", "), "{none:?}");
}

#[test]
fn a_daemon_in_a_container_gets_files_to_mount() {
    let plan = planned(Client::Dind, &remote(), &MemoryFs::default());
    assert!(text(&plan, "/etc/ifnewer/dind/daemon.json").contains("https://cache.example.org:5000"));
    assert_eq!(
        text(&plan, "/etc/ifnewer/dind/certs.d/cache.example.org:5000/ca.crt"),
        CA
    );
    assert!(plan.by_hand[0].contains("--volume /etc/ifnewer/dind/daemon.json:/etc/docker/daemon.json:ro"));
}

fn by_proxy(client: Client, held: &MemoryFs) -> Result<Plan, SetupError> {
    let options = Options {
        by_proxy: true,
        ..options(client)
    };
    plan_for(&local(), &options, held)
}

#[test]
fn a_proxy_is_a_drop_in_of_the_unit() {
    let plan = by_proxy(Client::Docker, &MemoryFs::default()).unwrap();
    let conf = text(&plan, "/etc/systemd/system/docker.service.d/90-ifnewer.conf");
    assert!(
        conf.contains("\nEnvironment=\"HTTPS_PROXY=http://127.0.0.1:5000\"\n"),
        "{conf}"
    );
    assert!(
        plan.by_hand
            .iter()
            .any(|line| line.contains("ifnewer ca install"))
    );
    assert!(
        plan.by_hand
            .iter()
            .any(|line| line.contains("systemctl restart docker"))
    );
    for client in [Client::Podman, Client::Dind, Client::GitlabRunner] {
        assert!(matches!(
            by_proxy(client, &MemoryFs::default()),
            Err(SetupError::Unsupported(_))
        ));
    }
}

#[test]
fn conflicting_proxy_is_reported_without_password() {
    let path = "/etc/systemd/system/docker.service.d/http-proxy.conf";
    for line in [
        "Environment=\"HTTPS_PROXY=http://ann:s3cret@proxy:3128\"",
        "Environment=HTTPS_PROXY=ann:s3cret@proxy:3128",
        "Environment=\"TOKEN=s3cret\" \"HTTPS_PROXY=http://proxy:3128\"",
        "EnvironmentFile=/etc/s3cret",
    ] {
        let held = MemoryFs::with(path, &format!("[Service]\n{line}\n"));
        let told = by_proxy(Client::Docker, &held).unwrap_err().to_string();
        assert!(told.contains("http-proxy.conf: line 2 sets "), "{told}");
        assert!(told.contains("HTTPS_PROXY") && !told.contains("s3cret"), "{told}");
    }
    let held = MemoryFs::with(
        "/etc/docker/daemon.json",
        r#"{"proxies":{"https-proxy":"http://p"}}"#,
    );
    assert!(conflict(&by_proxy(Client::Docker, &held).unwrap_err()).contains("proxies"));
}
