//! containerd's files, where there are some: it passes a file by that it cannot read, with one line in its log.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{Check, Patient};
use crate::setup::Files;

const CONFIG: &str = "/etc/containerd/config.toml";
const HOSTS: &str = "/etc/containerd/certs.d";

pub(super) fn examine(patient: &Patient<'_>) -> Vec<Check> {
    const NAME: &str = "containerd";
    let root = patient.root;
    let config = match root.read(Path::new(CONFIG)) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => Vec::new(),
        Err(refused) => return vec![Check::failed(NAME, refused.to_string(), "")],
    };
    let used = root.place(Path::new("/run/containerd/containerd.sock")).exists();
    if !root.place(Path::new(HOSTS)).exists() && !String::from_utf8_lossy(&config).contains("config_path") {
        let why = if used {
            "containerd runs here, and nothing tells it of mirrors (Docker's own containerd needs none; for the \
             kubelet: ifnewer setup containerd)"
        } else {
            "no containerd here"
        };
        return vec![Check::skipped(NAME, why)];
    }
    let folder = match config_path(&config) {
        Ok(folder) => folder,
        Err((found, remedy)) => return vec![Check::failed(NAME, found, remedy)],
    };
    vec![hosts(patient, &folder)]
}

/// The folder of `hosts.toml` files. Without `config_path` the kubelet reads none; nerdctl reads the usual one.
fn config_path(config: &[u8]) -> Result<PathBuf, (String, &'static str)> {
    let text = String::from_utf8_lossy(config);
    let root: Table = toml::from_str(&text).map_err(|error| {
        (
            format!("{CONFIG}: {}", error.message()),
            "containerd does not start with it; mend it",
        )
    })?;
    let plugins = root.get("plugins").and_then(Value::as_table);
    let registry = plugins
        .into_iter()
        .flat_map(Table::values)
        .filter_map(|plugin| plugin.get("registry"));
    let mut paths = registry.filter_map(|registry| registry.get("config_path")?.as_str());
    match paths.find(|path| !path.is_empty()) {
        Some(path) if path.contains(':') => Err((
            format!(
                "{CONFIG}: config_path names several folders ({path}), of which containerd 2.2 reads none"
            ),
            "leave one of them",
        )),
        Some(path) => Ok(PathBuf::from(path)),
        None => Err((
            format!("{CONFIG} has no config_path, so that the kubelet reads no hosts.toml"),
            "ifnewer setup containerd --apply",
        )),
    }
}

/// How many registries name us, and whether a file would be passed by.
fn hosts(patient: &Patient<'_>, folder: &Path) -> Check {
    const NAME: &str = "containerd";
    let names = patient
        .config
        .upstreams
        .iter()
        .map(|upstream| &*upstream.name)
        .chain(Some("_default"));
    let mut ours = 0;
    for name in names {
        let path = folder.join(name).join("hosts.toml");
        let Ok(Some(bytes)) = patient.root.read(&path) else {
            continue;
        };
        let text = String::from_utf8_lossy(&bytes);
        let table: Table = match toml::from_str(&text) {
            Ok(table) => table,
            Err(error) => {
                return Check::failed(
                    NAME,
                    format!("{}: {}", path.display(), error.message()),
                    "containerd passes the mirror by; mend it",
                );
            }
        };
        let hosts = table.get("host").and_then(Value::as_table);
        let hosts: Vec<&str> = hosts
            .into_iter()
            .flat_map(Table::keys)
            .map(String::as_str)
            .collect();
        if let Some(host) = hosts.iter().find(|host| host.contains('[')) {
            return Check::failed(
                NAME,
                format!("{}: containerd 1.6 cannot read the key {host}", path.display()),
                "name the cache by a name or an IPv4 address",
            );
        }
        ours += usize::from(hosts.iter().any(|host| patient.is_ours(host)));
    }
    if ours == 0 {
        return Check::failed(
            NAME,
            format!("no hosts.toml in {} names this cache", folder.display()),
            "ifnewer setup containerd --apply",
        );
    }
    Check::ok(
        NAME,
        format!("{ours} registries in {} name this cache", folder.display()),
    )
}
