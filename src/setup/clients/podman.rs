//! podman, CRI-O, skopeo and buildah: a separate file in `registries.conf.d` with the cache as mirror of each
//! registry.
//!
//! These clients do not tell a mirror which registry they mean, so each mirror location ends with the registry's name.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml::Value;

use super::{CacheEndpoint, Context, Plan, Registry, Scheme, SetupError, Text, edit_toml};

const MAIN: &str = "/etc/containers/registries.conf";
const FURTHER: &str = "/etc/containers/registries.conf.d";
const OURS: &str = "/etc/containers/registries.conf.d/50-ifnewer.conf";

pub(in crate::setup) fn plan(context: Context<'_>) -> Result<Plan, SetupError> {
    let endpoint = context.endpoint;
    let (main, ours) = (PathBuf::from(MAIN), Path::new(OURS));
    let further = context.files.list(Path::new(FURTHER))?;
    let is_read = |path: &PathBuf| path.extension().is_some_and(|ext| ext == "conf") && path != ours;
    for path in [main].into_iter().chain(further.into_iter().filter(is_read)) {
        check_other_file(&context.text(path)?, context)?;
    }
    let mut plan = Plan::default();
    let desired = registries(endpoint);
    let current = context.files.read(ours)?;
    if !context.force && current.is_some_and(|current| current != desired.as_bytes()) {
        let remedy = "Use --force to replace it; --undo restores it.";
        return Err(SetupError::conflict(ours, "exists with other content", remedy));
    }
    plan.file(ours, desired);
    plan.ca(
        endpoint,
        format!("/etc/containers/certs.d/{}/ca.crt", endpoint.host_port()),
    );
    plan.note(
        "podman, skopeo and buildah read the file at each start; reload a running CRI-O: systemctl reload crio",
    );
    Ok(plan)
}

/// Rejects an existing file that conflicts with the one to write. Of two sections for one prefix, the last one read
/// replaces the other completely. If a file has version 1 of the format, podman accepts no other file.
fn check_other_file(text: &Text, context: Context<'_>) -> Result<(), SetupError> {
    let root = edit_toml::read(text)?;
    if root.contains_key("registries") {
        return Err(text.conflict(
            "uses version 1 of the format ([registries.…]), with which podman accepts no other file",
            "Convert it to version 2 first: man containers-registries.conf",
        ));
    }
    let registries = root.get("registry").and_then(Value::as_array);
    for registry in registries.into_iter().flatten() {
        let text_of = |key: &str| registry.get(key).and_then(Value::as_str);
        let prefix = text_of("prefix")
            .or_else(|| text_of("location"))
            .unwrap_or_default();
        let is_ours = context
            .endpoint
            .upstreams
            .iter()
            .any(|upstream| *upstream.name == *prefix);
        if is_ours && !context.force {
            return Err(text.conflict(
                format!(
                    "already has a [[registry]] for {prefix}; of two, podman uses only the one in the last file"
                ),
                format!(
                    "Add a [[registry.mirror]] there (location = \"{}/{prefix}\") and disable the others, or use \
                     --force to write {OURS} anyway.",
                    context.endpoint.host_port()
                ),
            ));
        }
    }
    Ok(())
}

fn registries(endpoint: &CacheEndpoint) -> String {
    let mut text =
        String::from("# Written by `ifnewer setup podman`; `ifnewer setup podman --undo` removes it.\n");
    let cache = endpoint.host_port();
    let insecure = |is_http: bool| if is_http { "insecure = true\n" } else { "" };
    for Registry { name, plain_http } in &endpoint.upstreams {
        let _ = write!(
            text,
            "\n[[registry]]\nprefix = \"{name}\"\nlocation = \"{name}\"\n{}\n[[registry.mirror]]\n\
             location = \"{cache}/{name}\"\n{}",
            insecure(*plain_http),
            insecure(endpoint.scheme == Scheme::Http)
        );
    }
    text
}
