//! buildkitd: `buildkitd.toml`. It sends `?ns=` to a mirror, as containerd does, so one mirror serves every registry.

use std::path::Path;

use toml::{Table, Value};

use crate::setup::SetupError;
use crate::setup::edit::text::Text;
use crate::setup::edit::toml as edit_toml;
use crate::setup::endpoint::{CacheEndpoint, Scheme};
use crate::setup::plan::{FileSource, Plan};

const CONFIG: &str = "/etc/buildkit/buildkitd.toml";
const AUTHORITY: &str = "/etc/buildkit/ifnewer-ca.crt";

pub(in crate::setup) fn plan(endpoint: &CacheEndpoint, files: &dyn FileSource) -> Result<Plan, SetupError> {
    let mut plan = Plan::default();
    let path = Path::new(CONFIG);
    let mut text = Text::read(path, files.read(path)?)?;
    edit_toml::read(path, &text)?;
    let mirrors = Value::Array(vec![Value::String(endpoint.host_port())]);
    for upstream in &endpoint.upstreams {
        text = with(path, &text, &upstream.name, ("mirrors", &mirrors))?;
        if upstream.plain_http {
            text = with(path, &text, &upstream.name, ("http", &Value::Boolean(true)))?;
        }
    }
    let authority = Value::Array(vec![Value::String(AUTHORITY.to_owned())]);
    match (endpoint.scheme, &endpoint.ca) {
        (Scheme::Http, _) => {
            text = with(
                path,
                &text,
                &endpoint.host_port(),
                ("http", &Value::Boolean(true)),
            )?;
        }
        (Scheme::Https, Some(_)) => text = with(path, &text, &endpoint.host_port(), ("ca", &authority))?,
        (Scheme::Https, None) => {}
    }
    if let Some(authority) = &endpoint.ca {
        plan.file(AUTHORITY, authority.pem());
    }
    plan.file(path, text.into_bytes());
    plan.by_hand(format!(
        "restart buildkitd; recreate a builder of buildx: docker buildx create --driver-opt network=host \
         --buildkitd-config {CONFIG}"
    ));
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

/// Sets `[registry."name"] key = value`, unless it is set already.
fn with(path: &Path, text: &Text, name: &str, (key, value): (&str, &Value)) -> Result<Text, SetupError> {
    let conflict = |what: String, remedy: String| SetupError::Conflict {
        path: path.to_owned(),
        what,
        remedy,
    };
    let by_hand = || {
        format!(
            "Add by hand: {}  {key} = {value}",
            edit_toml::header(&["registry", name])
        )
    };
    let root = edit_toml::read(path, text)?;
    let current = edit_toml::table(&root, &["registry", name]).and_then(|table: &Table| table.get(key));
    match current {
        Some(current) if current == value || names(current, value) => Ok(text.clone()),
        Some(current) => Err(conflict(
            format!("[registry.\"{name}\"] already has {key} = {current}"),
            by_hand(),
        )),
        None => edit_toml::set(text, &["registry", name], key, value).ok_or_else(|| {
            conflict(
                "the TOML layout does not permit an automatic edit".to_owned(),
                by_hand(),
            )
        }),
    }
}

/// Whether a list begins with the elements of another.
fn names(current: &Value, desired: &Value) -> bool {
    match (current.as_array(), desired.as_array()) {
        (Some(current), Some(desired)) => current.starts_with(desired),
        _ => false,
    }
}
