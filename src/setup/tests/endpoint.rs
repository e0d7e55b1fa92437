//! Endpoints derived from configuration and options.

use super::*;

fn config(toml: &str) -> Config {
    Config::read(toml, Path::new("/etc/ifnewer/ifnewer.toml")).unwrap()
}

fn find_endpoint(toml: &str, options: &Options) -> Result<CacheEndpoint, SetupError> {
    CacheEndpoint::from_config(&config(toml), options)
}

fn at(client: Client, address: &str) -> Options {
    Options {
        address: Some(address.to_owned()),
        ..options(client)
    }
}

#[test]
fn the_address_is_the_one_listened_on() {
    for (listen, client, url) in [
        ("", Client::Docker, "http://127.0.0.1:5000"),
        (
            "registry = [\"0.0.0.0:5000\"]",
            Client::Docker,
            "http://127.0.0.1:5000",
        ),
        ("registry = [\"[::]:5000\"]", Client::Docker, "http://[::1]:5000"),
        (
            "registry = [\"[::1]:1\", \"127.0.0.1:2\"]",
            Client::Podman,
            "http://127.0.0.1:2",
        ),
        (
            "registry = [\"10.0.0.5:1\", \"127.0.0.1:2\"]\nplain_http = \"any\"",
            Client::Dind,
            "http://10.0.0.5:1",
        ),
    ] {
        let found = find_endpoint(&format!("[listen]\n{listen}"), &options(client)).unwrap();
        assert_eq!(found.url(), url, "{listen}");
        assert_eq!(found.upstreams.len(), crate::config::WELL_KNOWN.len());
    }
}

#[test]
fn what_cannot_be_known_is_asked_for() {
    for (listen, client, part) in [
        ("registry = [\"127.0.0.1:0\"]", Client::Docker, "--address"),
        ("", Client::Dind, "inside a container"),
        (
            "registry = [\"0.0.0.0:5000\"]",
            Client::GitlabRunner,
            "172.17.0.1:5000",
        ),
        ("registry = [\"[::1]:5000\"]", Client::Containerd, "IPv6"),
    ] {
        let told = find_endpoint(&format!("[listen]\n{listen}"), &options(client))
            .unwrap_err()
            .to_string();
        assert!(told.contains(part), "{told}");
    }
    let told = find_endpoint("", &at(Client::Dind, "localhost:5000"))
        .unwrap_err()
        .to_string();
    assert!(told.contains("inside a container"), "{told}");
}

#[test]
fn an_address_given_is_read_strictly() {
    let tls = |address: &str| {
        let mut options = at(Client::Docker, address);
        options.ca = Some(PathBuf::from("/nowhere/ca.pem"));
        find_endpoint("", &options)
    };
    for wrong in [
        "cache",
        "cache:",
        "cache:0",
        "cache:99999",
        "ftp://cache:1",
        "https://cache/v2",
        "https://u:p@cache:1",
        "u@cache:1",
        "",
        ":5000",
        "https://cache?x=1",
        "https://cache:99999",
        "cache:1#x",
        "cache:1/v2",
        "ca che:1",
        "cache\":1",
    ] {
        assert!(matches!(tls(wrong), Err(SetupError::Address(_))), "{wrong}");
    }
    let told = tls("cache.example.org:5000").unwrap_err();
    assert!(matches!(told, SetupError::NoCa(_)), "{told}");
}

#[test]
fn another_host_needs_its_authority() {
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    let key = "-----BEGIN PRIVATE KEY-----\nBBBB\n-----END PRIVATE KEY-----\n";
    std::fs::write(&ca, format!("{key}{CA}")).unwrap();
    for (address, url) in [
        ("Cache.Example.org:5000", "https://cache.example.org:5000"),
        ("https://cache.example.org", "https://cache.example.org:443"),
        ("10.0.0.5:5000", "https://10.0.0.5:5000"),
    ] {
        let mut options = at(Client::Docker, address);
        options.ca = Some(ca.clone());
        let found = find_endpoint("", &options).unwrap();
        assert_eq!(found.url(), url);
        assert_eq!(found.ca.unwrap().pem(), CA, "no key is handed on");
    }
    let plain = find_endpoint(
        "[listen]\nplain_http = \"any\"",
        &at(Client::Docker, "10.0.0.5:5000"),
    )
    .unwrap();
    assert_eq!((plain.url().as_str(), plain.ca), ("http://10.0.0.5:5000", None));
}

#[test]
fn docker_on_loopback_needs_ca_only_over_ipv6() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.pem"), CA).unwrap();
    let tls = format!("[tls]\nfolder = {:?}", folder.path().to_str().unwrap());
    for (address, needs) in [
        ("https://127.0.0.1:1", false),
        ("https://[::1]:1", true),
        ("http://[::1]:1", false),
    ] {
        let found = find_endpoint(&tls, &at(Client::Docker, address)).unwrap();
        assert_eq!(found.ca.is_some(), needs, "{address}");
    }
}

#[test]
fn name_missing_from_certificate_gives_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.pem"), CA).unwrap();
    let tls = format!(
        "[tls]\nfolder = {:?}\nnames = [\"known\"]",
        folder.path().to_str().unwrap()
    );
    let warnings = |address: &str| {
        find_endpoint(&tls, &at(Client::Docker, address))
            .unwrap()
            .warnings
    };
    assert!(warnings("known:5000").is_empty());
    assert!(warnings("unknown:5000")[0].contains("names = [\"unknown\"]"));
}
