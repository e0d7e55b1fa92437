//! buildkitd: `buildkitd.toml`. It sends `?ns=` to a mirror, as containerd does, so one mirror serves every registry.

use toml::Value;

use super::{Context, Place, Plan, Scheme, SetupError, Text, edit_toml, without_userinfo};

const CONFIG: &str = "/etc/buildkit/buildkitd.toml";
const AUTHORITY: &str = "/etc/buildkit/ifnewer-ca.crt";

pub(in crate::setup) fn plan(context: Context<'_>) -> Result<Plan, SetupError> {
    let endpoint = context.endpoint;
    let mut plan = Plan::default();
    let mut text = context.text(CONFIG)?;
    let cache = endpoint.host_port();
    for upstream in &endpoint.upstreams {
        text = with(&text, &upstream.name, "mirrors", vec![&*cache].into())?;
        if upstream.plain_http {
            text = with(&text, &upstream.name, "http", true.into())?;
        }
    }
    match (endpoint.scheme, &endpoint.ca) {
        (Scheme::Http, _) => text = with(&text, &cache, "http", true.into())?,
        (Scheme::Https, Some(_)) => text = with(&text, &cache, "ca", vec![AUTHORITY].into())?,
        (Scheme::Https, None) => {}
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
    let is_set = current == Some(&value) || current.and_then(begins_with) == Some(true);
    let settings = edit_toml::one(key, value);
    match current {
        Some(_) if is_set => Ok(text.clone()),
        Some(current) => Err(text.conflict(
            format!(
                "[registry.\"{name}\"] already has {key} = {}",
                without_userinfo(&current.to_string())
            ),
            edit_toml::by_hand(&section, &settings),
        )),
        None => edit_toml::set(text, &section, &settings, Place::Last),
    }
}
