//! dockerd: `daemon.json` and the CA in `certs.d`, on a host or in a container.

use std::path::Path;

use serde_json::Value;

use crate::setup::SetupError;
use crate::setup::edit::json::Object;
use crate::setup::edit::text::Text;
use crate::setup::endpoint::CacheEndpoint;
use crate::setup::plan::{FileSource, Plan};

const DAEMON: &str = "/etc/docker/daemon.json";
const MIRRORS: &str = "registry-mirrors";

/// Folder on the host for files that are mounted into a dockerd container.
const INSIDE: &str = "/etc/ifnewer/dind";

pub(in crate::setup) fn plan(
    endpoint: &CacheEndpoint,
    force: bool,
    files: &dyn FileSource,
) -> Result<Plan, SetupError> {
    let mut plan = Plan::default();
    let path = Path::new(DAEMON);
    let text = Text::read(path, files.read(path)?)?;
    plan.file(path, daemon(path, &text, endpoint, force)?.into_bytes());
    authority(&mut plan, endpoint, "/etc/docker");
    plan.note("Docker mirrors only Docker Hub; for other registries use `ifnewer setup docker --proxy`, or image names \
               that begin with the address of the cache (docs/clients.md)");
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

/// Plan for a dockerd in a container: files to mount.
pub(in crate::setup) fn plan_inside(
    endpoint: &CacheEndpoint,
    files: &dyn FileSource,
) -> Result<Plan, SetupError> {
    let mut plan = inside(endpoint, files)?;
    let mounts: Vec<String> = mounts(endpoint)
        .into_iter()
        .map(|mount| format!("--volume {mount}"))
        .collect();
    let mounts = mounts.join(" ");
    plan.by_hand(format!(
        "start each inner daemon with these mounts: docker run --privileged {mounts} docker:dind"
    ));
    if endpoint.ca.is_none() {
        plan.by_hand(format!(
            "or without a file: docker run --privileged docker:dind --registry-mirror {}; in .gitlab-ci.yml: \
             services: [{{ name: \"docker:dind\", command: [\"--registry-mirror\", \"{}\"] }}]",
            endpoint.url(),
            endpoint.url()
        ));
    }
    Ok(plan)
}

/// The files that a dockerd in a container needs.
pub(in crate::setup) fn inside(endpoint: &CacheEndpoint, files: &dyn FileSource) -> Result<Plan, SetupError> {
    let mut plan = Plan::default();
    let path = Path::new(INSIDE).join("daemon.json");
    let text = Text::read(&path, files.read(&path)?)?;
    plan.file(path.clone(), daemon(&path, &text, endpoint, false)?.into_bytes());
    authority(&mut plan, endpoint, INSIDE);
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

/// The mounts of those files. Each is mounted separately, because dockerd writes a key beside them.
pub(in crate::setup) fn mounts(endpoint: &CacheEndpoint) -> Vec<String> {
    let mut mounts = vec![format!("{INSIDE}/daemon.json:{DAEMON}:ro")];
    if endpoint.ca.is_some() {
        mounts.push(format!("{INSIDE}/certs.d:/etc/docker/certs.d:ro"));
    }
    mounts
}

/// dockerd trusts the CA in a folder named after host and port.
fn authority(plan: &mut Plan, endpoint: &CacheEndpoint, folder: &str) {
    if let Some(authority) = &endpoint.ca {
        plan.file(
            format!("{folder}/certs.d/{}/ca.crt", endpoint.host_port()),
            authority.pem(),
        );
    }
}

/// `daemon.json` with the cache as mirror.
fn daemon(path: &Path, text: &Text, endpoint: &CacheEndpoint, force: bool) -> Result<Text, SetupError> {
    let object = Object::read(path, text)?;
    let url = Value::String(endpoint.url());
    let Some(source) = object.source(MIRRORS) else {
        return object.with(MIRRORS, &format!("[{url}]"));
    };
    let Some(mirrors) = object.get(MIRRORS).and_then(|value| {
        let strings = |list: &Vec<Value>| list.iter().map(|item| item.as_str().map(str::to_owned)).collect();
        value.as_array().and_then(strings)
    }) else {
        return Err(SetupError::Conflict {
            path: path.to_owned(),
            what: format!("\"{MIRRORS}\" is {source}, not a list of URLs"),
            remedy: "Correct the file first.".to_owned(),
        });
    };
    let mirrors: Vec<String> = mirrors;
    if mirrors
        .iter()
        .any(|mirror| mirror.trim_end_matches('/') == endpoint.url())
    {
        return Ok(text.clone());
    }
    if !mirrors.is_empty() && !force {
        return Err(SetupError::Conflict {
            path: path.to_owned(),
            what: format!("\"{MIRRORS}\" already names {}", mirrors.join(", ")),
            remedy: format!(
                "Use --force to put {} before it; it is then tried next.",
                endpoint.url()
            ),
        });
    }
    let rest = source.trim_start_matches('[');
    if mirrors.is_empty() {
        object.with(MIRRORS, &format!("[{url}]"))
    } else {
        let blank = rest
            .get(..rest.len() - rest.trim_start().len())
            .unwrap_or_default();
        let gap = if blank.is_empty() { " " } else { blank };
        object.with(MIRRORS, &format!("[{blank}{url},{gap}{}", rest.trim_start()))
    }
}
