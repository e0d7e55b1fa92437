//! Checks of containerd's files, if present. containerd skips a file that it cannot parse, with one line in its log.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{Check, CheckContext};
use crate::setup::{FileSource, REFERRERS_SINCE, Release};

const CONFIG: &str = "/etc/containerd/config.toml";
const HOSTS: &str = "/etc/containerd/certs.d";

pub(super) fn examine(context: &CheckContext<'_>) -> Vec<Check> {
    const NAME: &str = "containerd";
    let root = context.root;
    let config = match root.read(Path::new(CONFIG)) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => Vec::new(),
        Err(refused) => return vec![Check::failed(NAME, refused.to_string(), "")],
    };
    let used = root
        .resolve(Path::new("/run/containerd/containerd.sock"))
        .exists();
    if !root.resolve(Path::new(HOSTS)).exists() && !String::from_utf8_lossy(&config).contains("config_path") {
        let why = if used {
            "containerd runs here without mirrors (Docker's own containerd needs none; for the kubelet, run \
             ifnewer setup containerd)"
        } else {
            "containerd is not installed"
        };
        return vec![Check::skipped(NAME, why)];
    }
    let checked = parse(&config).and_then(|config| {
        let knows_referrers = Release::find(root, &config).map(|release| release >= REFERRERS_SINCE);
        Ok(hosts(context, &config_path(&config)?, knows_referrers))
    });
    vec![checked.unwrap_or_else(|(found, remedy)| Check::failed(NAME, found, remedy))]
}

fn parse(config: &[u8]) -> Result<Table, (String, &'static str)> {
    toml::from_str(&String::from_utf8_lossy(config)).map_err(|error: toml::de::Error| {
        (
            format!("{CONFIG}: {}", error.message()),
            "containerd does not start with this file; correct it",
        )
    })
}

/// The folder of `hosts.toml` files. Without `config_path` the kubelet uses none; nerdctl uses the default.
fn config_path(root: &Table) -> Result<PathBuf, (String, &'static str)> {
    let plugins = root.get("plugins").and_then(Value::as_table);
    let registry = plugins
        .into_iter()
        .flat_map(Table::values)
        .filter_map(|plugin| plugin.get("registry"));
    let mut paths = registry.filter_map(|registry| registry.get("config_path")?.as_str());
    match paths.find(|path| !path.is_empty()) {
        Some(path) if path.contains(':') => Err((
            format!(
                "{CONFIG}: config_path names several folders ({path}), and containerd 2.2.0 reads none of them"
            ),
            "keep one of them; if they are containerd's default, run ifnewer setup containerd --apply",
        )),
        Some(path) => Ok(PathBuf::from(path)),
        None => Err((
            format!("{CONFIG} has no config_path, so the kubelet reads no hosts.toml"),
            "run ifnewer setup containerd --apply",
        )),
    }
}

/// Counts the registries that name the cache, and finds files that containerd would skip. `knows_referrers`: whether
/// this containerd release supports the capability `referrers`, if its release is known.
fn hosts(context: &CheckContext<'_>, folder: &Path, knows_referrers: Option<bool>) -> Check {
    const NAME: &str = "containerd";
    let names = context
        .config
        .upstreams
        .iter()
        .map(|upstream| &*upstream.name)
        .chain(Some("_default"));
    let mut ours = 0;
    for name in names {
        let path = folder.join(name).join("hosts.toml");
        let Ok(Some(bytes)) = context.root.read(&path) else {
            continue;
        };
        let text = String::from_utf8_lossy(&bytes);
        let table: Table = match toml::from_str(&text) {
            Ok(table) => table,
            Err(error) => {
                return Check::failed(
                    NAME,
                    format!("{}: {}", path.display(), error.message()),
                    "containerd ignores this mirror; correct the file",
                );
            }
        };
        let hosts = table.get("host").and_then(Value::as_table);
        let hosts: Vec<(&String, &Value)> = hosts.into_iter().flatten().collect();
        if let Some((host, _)) = hosts.iter().find(|(host, _)| host.contains('[')) {
            return Check::failed(
                NAME,
                format!("{}: containerd 1.6 cannot read the key {host}", path.display()),
                "use a name or an IPv4 address for the cache",
            );
        }
        let Some((_, host)) = hosts.iter().find(|(host, _)| context.is_ours(host)) else {
            continue;
        };
        ours += 1;
        let referrers = host
            .get("capabilities")
            .and_then(Value::as_array)
            .map(|list| list.iter().any(|name| name.as_str() == Some("referrers")));
        let objection = match (knows_referrers, referrers) {
            (Some(true), Some(false)) => {
                "lacks the capability referrers: requests for signatures bypass the cache"
            }
            (Some(false), Some(true)) => {
                "has the capability referrers, which containerd before 2.2 does not support: it ignores the file"
            }
            _ => continue,
        };
        return Check::failed(
            NAME,
            format!("{} {objection}", path.display()),
            "run ifnewer setup containerd --apply",
        );
    }
    if ours == 0 {
        return Check::failed(
            NAME,
            format!("no hosts.toml in {} names this cache", folder.display()),
            "run ifnewer setup containerd --apply",
        );
    }
    Check::ok(
        NAME,
        format!("{ours} registries in {} name this cache", folder.display()),
    )
}
