//! Client configuration snippets with the address of the cache.

use std::net::IpAddr;

use maud::{Markup, html};

use super::super::Admin;

/// The registry address for a client that opened this page under `host`.
pub(super) fn address(admin: &Admin, host: &str) -> String {
    let first = admin.registry_addresses.first();
    let Some(first) = first else {
        return "127.0.0.1:5000".to_owned();
    };
    if !first.ip().is_unspecified() {
        return first.to_string();
    }
    // If the listener accepts every address, it accepts that of the page too.
    let name = host.rsplit_once(':').map_or(host, |(name, port)| {
        if port.bytes().all(|c| c.is_ascii_digit()) {
            name
        } else {
            host
        }
    });
    format!("{name}:{}", first.port())
}

pub(super) fn section(address: &str, has_own_ca: bool) -> Markup {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let is_loopback = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>()
        .is_ok_and(|ip| ip.is_loopback());
    let url = if is_loopback {
        format!("http://{address}")
    } else {
        format!("https://{address}")
    };
    let ca = if is_loopback {
        ""
    } else {
        "\n  ca = \"/etc/ifnewer/ca.pem\""
    };
    let insecure = if is_loopback { "\ninsecure = true" } else { "" };
    html! {
        section #setup aria-labelledby="setup-title" {
            h2 #setup-title { "Set up a client" }
            p.dim {
                "On this machine, " code { "ifnewer setup docker --apply" } " configures Docker (or containerd, k3s, podman, buildkit, gitlab-runner, dind), and "
                code { "ifnewer doctor" } " checks that the cache is used. By hand:"
            }
            (snippet("Docker", "/etc/docker/daemon.json, then: systemctl reload docker. Docker mirrors only Docker Hub.", &format!("{{ \"registry-mirrors\": [\"{url}\"] }}"), true))
            (snippet("containerd, Kubernetes", "/etc/containerd/certs.d/_default/hosts.toml; for every registry, without a restart if config_path names certs.d. For containerd 2.2 and newer, add \"referrers\" to the capabilities.", &format!("[host.\"{url}\"]\n  capabilities = [\"pull\", \"resolve\"]{ca}"), false))
            (snippet("Podman, CRI-O, Skopeo", "/etc/containers/registries.conf.d/ifnewer.conf; one block for each registry.", &format!("[[registry]]\nprefix = \"docker.io\"\nlocation = \"docker.io\"\n[[registry.mirror]]\nlocation = \"{address}/docker.io\"{insecure}"), false))
            (snippet("GitLab Runner with Docker in Docker", "in config.toml of the runner, because the nested daemon does not inherit the mirror of its host.", &format!("[[runners.docker.services]]\n  name = \"docker:dind\"\n  command = [\"--registry-mirror\", \"{url}\"]"), false))
            (snippet("Other clients", "the first path component names the registry.", &format!("docker pull {address}/ghcr.io/org/image:tag"), false))
            @if has_own_ca {
                p {
                    "For TLS without a warning: " a.button.quiet href="/ca.pem" download { "Download the CA" }
                    " and install it with " code { "ifnewer ca install" } ", or copy it to /usr/local/share/ca-certificates and run update-ca-certificates."
                }
            }
        }
    }
}

fn snippet(name: &str, location: &str, text: &str, is_open: bool) -> Markup {
    html! {
        details open[is_open] {
            summary { (name) }
            p.dim { (location) }
            pre tabindex="0" { code { (text) } }
        }
    }
}
