//! dockerd: `daemon.json`, and the certificate authority in `certs.d`. On a host, and inside a container.

use std::path::Path;

use serde_json::Value;

use super::Refused;
use super::json::Object;
use super::plan::{Files, Plan};
use super::text::Text;
use super::way::Way;

const DAEMON: &str = "/etc/docker/daemon.json";
const MIRRORS: &str = "registry-mirrors";

/// Where the files for a dockerd in a container lie on the host, to be mounted.
const INSIDE: &str = "/etc/ifnewer/dind";

pub(super) fn plan(way: &Way, force: bool, files: &dyn Files) -> Result<Plan, Refused> {
    let mut plan = Plan::default();
    let path = Path::new(DAEMON);
    let text = Text::read(path, files.read(path)?)?;
    plan.file(path, daemon(path, &text, way, force)?.into_bytes());
    authority(&mut plan, way, "/etc/docker");
    plan.note("Docker mirrors Docker Hub only; for other registries: `ifnewer setup docker --proxy`, or the image name \
               with the cache in front (docs/clients.md)");
    plan.notes.extend(way.warnings.iter().cloned());
    Ok(plan)
}

/// For a dockerd in a container: files to be mounted into it.
pub(super) fn plan_inside(way: &Way, files: &dyn Files) -> Result<Plan, Refused> {
    let mut plan = inside(way, files)?;
    let mounts: Vec<String> = mounts(way)
        .into_iter()
        .map(|mount| format!("--volume {mount}"))
        .collect();
    let mounts = mounts.join(" ");
    plan.by_hand(format!(
        "start each inner daemon with the files mounted: docker run --privileged {mounts} docker:dind"
    ));
    if way.authority.is_none() {
        plan.by_hand(format!(
            "or without a file: docker run --privileged docker:dind --registry-mirror {}; in .gitlab-ci.yml: \
             services: [{{ name: \"docker:dind\", command: [\"--registry-mirror\", \"{}\"] }}]",
            way.url(),
            way.url()
        ));
    }
    Ok(plan)
}

/// The files that a dockerd in a container needs, on the host.
pub(super) fn inside(way: &Way, files: &dyn Files) -> Result<Plan, Refused> {
    let mut plan = Plan::default();
    let path = Path::new(INSIDE).join("daemon.json");
    let text = Text::read(&path, files.read(&path)?)?;
    plan.file(path.clone(), daemon(&path, &text, way, false)?.into_bytes());
    authority(&mut plan, way, INSIDE);
    plan.notes.extend(way.warnings.iter().cloned());
    Ok(plan)
}

/// How those files come into the container. One by one: dockerd writes a key of its own beside them.
pub(super) fn mounts(way: &Way) -> Vec<String> {
    let mut mounts = vec![format!("{INSIDE}/daemon.json:{DAEMON}:ro")];
    if way.authority.is_some() {
        mounts.push(format!("{INSIDE}/certs.d:/etc/docker/certs.d:ro"));
    }
    mounts
}

/// dockerd trusts what lies in a folder named after host and port.
fn authority(plan: &mut Plan, way: &Way, folder: &str) {
    if let Some(authority) = &way.authority {
        plan.file(
            format!("{folder}/certs.d/{}/ca.crt", way.place()),
            authority.pem(),
        );
    }
}

/// `daemon.json` with us as mirror.
fn daemon(path: &Path, text: &Text, way: &Way, force: bool) -> Result<Text, Refused> {
    let object = Object::read(path, text)?;
    let url = Value::String(way.url());
    let Some(source) = object.source(MIRRORS) else {
        return object.with(MIRRORS, &format!("[{url}]"));
    };
    let Some(mirrors) = object.get(MIRRORS).and_then(|value| {
        let strings = |list: &Vec<Value>| list.iter().map(|item| item.as_str().map(str::to_owned)).collect();
        value.as_array().and_then(strings)
    }) else {
        return Err(Refused::Conflict {
            path: path.to_owned(),
            what: format!("\"{MIRRORS}\" is {source}, not a list of URLs"),
            remedy: "Mend it first.".to_owned(),
        });
    };
    let mirrors: Vec<String> = mirrors;
    if mirrors
        .iter()
        .any(|mirror| mirror.trim_end_matches('/') == way.url())
    {
        return Ok(text.clone());
    }
    if !mirrors.is_empty() && !force {
        return Err(Refused::Conflict {
            path: path.to_owned(),
            what: format!("\"{MIRRORS}\" already names {}", mirrors.join(", ")),
            remedy: format!(
                "With --force, {} goes before it and it stays as the next one to be tried.",
                way.url()
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
