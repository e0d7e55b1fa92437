//! dockerd: `daemon.json` and the CA in `certs.d`, on a host or in a container.

use serde_json::Value;

use super::{CacheEndpoint, Context, Object, Plan, SetupError, Text, without_userinfo};

/// Configuration that dockerd reloads on SIGHUP.
pub(in crate::setup) const DAEMON: &str = "/etc/docker/daemon.json";
pub(in crate::setup) const MIRRORS: &str = "registry-mirrors";

/// Folder on the host for files that are mounted into a dockerd container.
const INSIDE: &str = "/etc/ifnewer/dind";

pub(in crate::setup) fn plan(context: Context<'_>) -> Result<Plan, SetupError> {
    let mut plan = Plan::default();
    daemon(&mut plan, "/etc/docker", context)?;
    plan.note(
        "Docker mirrors only Docker Hub; for other registries use `ifnewer setup docker --proxy`, or image names \
         that begin with the address of the cache (docs/clients.md)",
    );
    Ok(plan)
}

/// Plan for a dockerd in a container: files to mount.
pub(in crate::setup) fn plan_inside(context: Context<'_>) -> Result<Plan, SetupError> {
    let endpoint = context.endpoint;
    let mut plan = inside(context)?;
    let mounts = mounts(endpoint).join(" --volume ");
    plan.by_hand(format!(
        "start each inner daemon with these mounts: docker run --privileged --volume {mounts} docker:dind"
    ));
    if endpoint.ca.is_none() {
        plan.by_hand(format!(
            "or without a file: docker run --privileged docker:dind --registry-mirror {0}; in .gitlab-ci.yml: \
             services: [{{ name: \"docker:dind\", command: [\"--registry-mirror\", \"{0}\"] }}]",
            endpoint.url()
        ));
    }
    Ok(plan)
}

/// The files that a dockerd in a container needs.
pub(in crate::setup) fn inside(context: Context<'_>) -> Result<Plan, SetupError> {
    let mut plan = Plan::default();
    let force = false;
    daemon(&mut plan, INSIDE, Context { force, ..context })?;
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

/// `daemon.json` with the cache as mirror, and the CA, which dockerd trusts in a folder named after host and port.
fn daemon(plan: &mut Plan, folder: &str, context: Context<'_>) -> Result<(), SetupError> {
    let endpoint = context.endpoint;
    let text = context.text(format!("{folder}/daemon.json"))?;
    let object = Object::read(&text)?;
    if let Some(line) = object.comment {
        plan.note(format!(
            "{}:{line} has a comment, and dockerd does not start with comments; remove them",
            text.path.display()
        ));
    }
    plan.edited(with_mirror(&text, &object, &endpoint.url(), context.force)?);
    plan.ca(
        endpoint,
        format!("{folder}/certs.d/{}/ca.crt", endpoint.host_port()),
    );
    Ok(())
}

fn with_mirror(text: &Text, object: &Object<'_>, url: &str, force: bool) -> Result<Text, SetupError> {
    let Some(current) = object.get(MIRRORS) else {
        return object.with_first(MIRRORS, url);
    };
    let mirrors: Option<Vec<&str>> = current
        .as_array()
        .and_then(|list| list.iter().map(Value::as_str).collect());
    let Some(mirrors) = mirrors else {
        let current = without_userinfo(&current.to_string());
        let what = format!("\"{MIRRORS}\" is {current}, not a list of URLs");
        return Err(text.conflict(what, "Correct the file first."));
    };
    if mirrors.iter().any(|mirror| mirror.trim_end_matches('/') == url) {
        return Ok(text.clone());
    }
    if !mirrors.is_empty() && !force {
        return Err(text.other_mirrors(&format!("\"{MIRRORS}\" "), &mirrors, url));
    }
    object.with_first(MIRRORS, url)
}
