//! buildkitd: `buildkitd.toml`. It says `?ns=` to a mirror, as containerd does, so one mirror serves every registry.

use std::path::Path;

use toml::{Table, Value};

use super::Refused;
use super::plan::{Files, Plan};
use super::text::Text;
use super::toml_text;
use super::way::{Scheme, Way};

const CONFIG: &str = "/etc/buildkit/buildkitd.toml";
const AUTHORITY: &str = "/etc/buildkit/ifnewer-ca.crt";

pub(super) fn plan(way: &Way, files: &dyn Files) -> Result<Plan, Refused> {
    let mut plan = Plan::default();
    let path = Path::new(CONFIG);
    let mut text = Text::read(path, files.read(path)?)?;
    toml_text::read(path, &text)?;
    let mirrors = Value::Array(vec![Value::String(way.place())]);
    for upstream in &way.upstreams {
        text = with(path, &text, &upstream.name, ("mirrors", &mirrors))?;
        if upstream.plain_http {
            text = with(path, &text, &upstream.name, ("http", &Value::Boolean(true)))?;
        }
    }
    let authority = Value::Array(vec![Value::String(AUTHORITY.to_owned())]);
    match (way.scheme, &way.authority) {
        (Scheme::Http, _) => text = with(path, &text, &way.place(), ("http", &Value::Boolean(true)))?,
        (Scheme::Https, Some(_)) => text = with(path, &text, &way.place(), ("ca", &authority))?,
        (Scheme::Https, None) => {}
    }
    if let Some(authority) = &way.authority {
        plan.file(AUTHORITY, authority.pem());
    }
    plan.file(path, text.into_bytes());
    plan.by_hand(format!(
        "restart buildkitd; for a builder of buildx, make it anew: docker buildx create --driver-opt network=host \
         --buildkitd-config {CONFIG}"
    ));
    plan.notes.extend(way.warnings.iter().cloned());
    Ok(plan)
}

/// `[registry."name"] key = value`, unless it is so already.
fn with(path: &Path, text: &Text, name: &str, (key, value): (&str, &Value)) -> Result<Text, Refused> {
    let conflict = |what: String, remedy: String| Refused::Conflict {
        path: path.to_owned(),
        what,
        remedy,
    };
    let by_hand = || {
        format!(
            "Add by hand: {}  {key} = {value}",
            toml_text::header(&["registry", name])
        )
    };
    let root = toml_text::read(path, text)?;
    let held = toml_text::table(&root, &["registry", name]).and_then(|table: &Table| table.get(key));
    match held {
        Some(held) if held == value || names(held, value) => Ok(text.clone()),
        Some(held) => Err(conflict(
            format!("[registry.\"{name}\"] already has {key} = {held}"),
            by_hand(),
        )),
        None => toml_text::set(text, &["registry", name], key, value).ok_or_else(|| {
            conflict(
                "it is written in a way that cannot be added to by machine".to_owned(),
                by_hand(),
            )
        }),
    }
}

/// Whether a list begins with what the other list holds.
fn names(held: &Value, wanted: &Value) -> bool {
    match (held.as_array(), wanted.as_array()) {
        (Some(held), Some(wanted)) => held.starts_with(wanted),
        _ => false,
    }
}
