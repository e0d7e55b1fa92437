//! podman, CRI-O, skopeo and buildah: a separate file in `registries.conf.d` with the cache as mirror of each
//! registry.
//!
//! These clients do not tell a mirror which registry they mean, so each mirror location ends with the registry's name.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::setup::SetupError;
use crate::setup::edit::text::Text;
use crate::setup::edit::toml as edit_toml;
use crate::setup::endpoint::{CacheEndpoint, Registry, Scheme};
use crate::setup::plan::{FileSource, Plan};

const MAIN: &str = "/etc/containers/registries.conf";
const FURTHER: &str = "/etc/containers/registries.conf.d";
const OURS: &str = "/etc/containers/registries.conf.d/50-ifnewer.conf";

pub(in crate::setup) fn plan(
    endpoint: &CacheEndpoint,
    force: bool,
    files: &dyn FileSource,
) -> Result<Plan, SetupError> {
    let mut others: Vec<PathBuf> = files.list(Path::new(FURTHER))?;
    others.retain(|path| {
        path.extension().is_some_and(|extension| extension == "conf") && path != Path::new(OURS)
    });
    others.insert(0, PathBuf::from(MAIN));
    for path in others {
        if let Some(bytes) = files.read(&path)? {
            let text = Text::read(&path, Some(bytes))?;
            objections(&path, &edit_toml::read(&path, &text)?, endpoint, force)?;
        }
    }
    let mut plan = Plan::default();
    let ours = Path::new(OURS);
    let desired = registries(endpoint);
    match files.read(ours)? {
        Some(current) if current != desired.as_bytes() && !force => {
            return Err(SetupError::Conflict {
                path: ours.to_owned(),
                what: "exists with other content".to_owned(),
                remedy: "Use --force to replace it; --undo restores it.".to_owned(),
            });
        }
        _ => plan.file(ours, desired),
    }
    if let Some(authority) = &endpoint.ca {
        plan.file(
            format!("/etc/containers/certs.d/{}/ca.crt", endpoint.host_port()),
            authority.pem(),
        );
    }
    plan.note(
        "podman, skopeo and buildah read the file at each start; reload a running CRI-O: systemctl reload crio",
    );
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

/// Rejects an existing file that conflicts with the one to write. Of two sections for one prefix, the last one read
/// replaces the other completely. If a file has version 1 of the format, podman accepts no other file.
fn objections(path: &Path, root: &Table, endpoint: &CacheEndpoint, force: bool) -> Result<(), SetupError> {
    if root.contains_key("registries") {
        return Err(SetupError::Conflict {
            path: path.to_owned(),
            what: "uses version 1 of the format ([registries.…]), with which podman accepts no other file"
                .to_owned(),
            remedy: "Convert it to version 2 first: man containers-registries.conf".to_owned(),
        });
    }
    let registries = root.get("registry").and_then(Value::as_array);
    for registry in registries.into_iter().flatten() {
        let text = |key: &str| registry.get(key).and_then(Value::as_str);
        let prefix = text("prefix").or_else(|| text("location")).unwrap_or_default();
        if !force
            && endpoint
                .upstreams
                .iter()
                .any(|upstream| *upstream.name == *prefix)
        {
            return Err(SetupError::Conflict {
                path: path.to_owned(),
                what: format!(
                    "already has a [[registry]] for {prefix}; of two, podman uses only the one in the last file"
                ),
                remedy: format!(
                    "Add a [[registry.mirror]] there (location = \"{}/{prefix}\") and disable the others, or \
                     use --force to write {OURS} anyway.",
                    endpoint.host_port()
                ),
            });
        }
    }
    Ok(())
}

fn registries(endpoint: &CacheEndpoint) -> String {
    let mut text =
        String::from("# Written by `ifnewer setup podman`; `ifnewer setup podman --undo` removes it.\n");
    for Registry { name, plain_http } in &endpoint.upstreams {
        let insecure = if *plain_http { "insecure = true\n" } else { "" };
        let _ = write!(
            text,
            "\n[[registry]]\nprefix = \"{name}\"\nlocation = \"{name}\"\n{insecure}\n[[registry.mirror]]\n\
             location = \"{}/{name}\"\n",
            endpoint.host_port()
        );
        if endpoint.scheme == Scheme::Http {
            text.push_str("insecure = true\n");
        }
    }
    text
}
