//! Interception by `HTTPS_PROXY`: a systemd drop-in for the client's service. Unlike mirrors, it covers every registry
//! and has no fallback.

use std::path::{Path, PathBuf};

use crate::setup::edit::json::Object;
use crate::setup::edit::text::Text;
use crate::setup::endpoint::{CacheEndpoint, Scheme};
use crate::setup::plan::{FileSource, Plan};
use crate::setup::{Client, SetupError};

/// Name of the drop-in, which sorts after most others.
const UNITS: &str = "/etc/systemd/system";
const NAME: &str = "90-ifnewer.conf";

pub(in crate::setup) fn plan(
    client: Client,
    endpoint: &CacheEndpoint,
    force: bool,
    files: &dyn FileSource,
) -> Result<Plan, SetupError> {
    let unit = match client {
        Client::Docker => "docker",
        Client::Containerd => "containerd",
        Client::K3s => "k3s",
        Client::Buildkit => "buildkit",
        Client::Podman | Client::GitlabRunner | Client::Dind => {
            return Err(SetupError::Unsupported(format!(
                "--proxy writes a drop-in for a systemd unit, and {} is not a systemd service; set HTTPS_PROXY={} in \
                 its environment",
                client.name(),
                url(endpoint)
            )));
        }
    };
    let folder = PathBuf::from(format!("{UNITS}/{unit}.service.d"));
    let ours = folder.join(NAME);
    if !force {
        objections(&folder, &ours, files)?;
        if client == Client::Docker {
            objection_of_daemon(files)?;
        }
    }
    let mut plan = Plan::default();
    plan.file(ours, drop_in(endpoint));
    plan.by_hand(
        "install the CA on this host, because the proxy issues certificates for each registry: \
                  ifnewer ca install",
    );
    plan.by_hand(format!(
        "restart the service, because it reads its environment at its start: systemctl daemon-reload && systemctl restart \
         {unit}"
    ));
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

/// The proxy URL. CONNECT uses plain HTTP where allowed, because every client supports that.
fn url(endpoint: &CacheEndpoint) -> String {
    match endpoint.scheme {
        Scheme::Http => format!("http://{}", endpoint.host_port()),
        Scheme::Https => format!("https://{}", endpoint.host_port()),
    }
}

fn drop_in(endpoint: &CacheEndpoint) -> String {
    let url = url(endpoint);
    format!(
        "# Written by `ifnewer setup --proxy`; --undo removes it.\n[Service]\nEnvironment=\"HTTPS_PROXY={url}\"\n\
         Environment=\"NO_PROXY=localhost,127.0.0.0/8,::1\"\n"
    )
}

/// Reports another proxy of the same unit. Replacing it could remove the only route to the network.
fn objections(folder: &Path, ours: &Path, files: &dyn FileSource) -> Result<(), SetupError> {
    for path in files.list(folder)? {
        if path == ours {
            continue;
        }
        let Some(bytes) = files.read(&path)? else { continue };
        let text = Text::read(&path, Some(bytes))?;
        for line in text.body.lines().map(str::trim) {
            let sets = line.starts_with("Environment") && line.to_ascii_uppercase().contains("HTTPS_PROXY=");
            if sets || line.starts_with("EnvironmentFile") {
                return Err(another(&path, &format!("sets {}", without_password(line))));
            }
        }
    }
    Ok(())
}

fn objection_of_daemon(files: &dyn FileSource) -> Result<(), SetupError> {
    let path = Path::new("/etc/docker/daemon.json");
    let text = Text::read(path, files.read(path)?)?;
    match Object::read(path, &text)?.get("proxies") {
        Some(_) => Err(another(
            path,
            "has \"proxies\", which takes precedence over the environment",
        )),
        None => Ok(()),
    }
}

fn another(path: &Path, what: &str) -> SetupError {
    SetupError::Conflict {
        path: path.to_owned(),
        what: what.to_owned(),
        remedy: "If this network needs that proxy, set it in ifnewer (`proxy` of the upstreams) and remove it here. Use \
                 --force to add ours nevertheless."
            .to_owned(),
    }
}

/// Hides `user:password@` of a proxy URL.
fn without_password(line: &str) -> String {
    match (line.find("://"), line.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => {
            let (head, tail) = (line.get(..scheme + 3), line.get(at..));
            format!("{}…{}", head.unwrap_or_default(), tail.unwrap_or_default())
        }
        _ => line.to_owned(),
    }
}
