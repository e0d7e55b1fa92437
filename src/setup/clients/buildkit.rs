//! buildkitd: `buildkitd.toml`. It sends `?ns=` to a mirror, as containerd does, so one mirror serves every registry.

use toml::{Table, Value};

use crate::setup::SetupError;
use crate::setup::edit::Text;
use crate::setup::edit::toml::{self as edit_toml, Place};
use crate::setup::endpoint::Scheme;
use crate::setup::plan::{Context, Plan};

const CONFIG: &str = "/etc/buildkit/buildkitd.toml";
const AUTHORITY: &str = "/etc/buildkit/ifnewer-ca.crt";

pub(in crate::setup) fn plan(context: Context<'_>) -> Result<Plan, SetupError> {
    let endpoint = context.endpoint;
    let mut plan = Plan::default();
    let mut text = context.text(CONFIG)?;
    let cache = endpoint.host_port();
    let mut settings = Vec::new();
    for upstream in &endpoint.upstreams {
        settings.push((&*upstream.name, "mirrors", Value::from(vec![&*cache])));
        settings.extend(
            upstream
                .plain_http
                .then_some((&*upstream.name, "http", Value::from(true))),
        );
    }
    match (endpoint.scheme, &endpoint.ca) {
        (Scheme::Http, _) => settings.push((&cache, "http", Value::from(true))),
        (Scheme::Https, Some(_)) => settings.push((&cache, "ca", Value::from(vec![AUTHORITY]))),
        (Scheme::Https, None) => {}
    }
    for (name, key, value) in settings {
        text = with(&text, name, key, value)?;
    }
    plan.ca(endpoint, AUTHORITY);
    plan.edited(text);
    plan.by_hand(format!(
        "restart buildkitd; recreate a builder of buildx: docker buildx create --driver-opt network=host \
         --buildkitd-config {CONFIG}"
    ));
    Ok(plan)
}

/// Sets `[registry."name"] key = value`, unless it is set already, or is a list that begins with it.
fn with(text: &Text, name: &str, key: &str, value: Value) -> Result<Text, SetupError> {
    let section = ["registry", name];
    let root = edit_toml::read(text)?;
    let current = edit_toml::table(&root, &section).and_then(|table| table.get(key));
    let begins_with = |current: &Value| Some(current.as_array()?.starts_with(value.as_array()?));
    match current {
        Some(current) if *current == value || begins_with(current) == Some(true) => Ok(text.clone()),
        Some(current) => {
            let what = format!("[registry.\"{name}\"] already has {key} = {current}");
            let settings = Table::from_iter([(key.to_owned(), value)]);
            Err(text.conflict(what, edit_toml::by_hand(&section, &settings)))
        }
        None => edit_toml::set(
            text,
            &section,
            &Table::from_iter([(key.to_owned(), value)]),
            Place::Last,
        ),
    }
}
