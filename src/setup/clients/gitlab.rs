//! GitLab Runner's docker executor. The host's daemon pulls the job images (`setup docker`). The docker:dind services
//! run their own daemons, into which `volumes` of `config.toml` mounts a `daemon.json`.

use std::path::Path;

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use crate::setup::SetupError;
use crate::setup::clients::docker;
use crate::setup::edit::text::Text;
use crate::setup::edit::toml as edit_toml;
use crate::setup::endpoint::CacheEndpoint;
use crate::setup::plan::{FileSource, Plan};

const CONFIG: &str = "/etc/gitlab-runner/config.toml";

pub(in crate::setup) fn plan(endpoint: &CacheEndpoint, files: &dyn FileSource) -> Result<Plan, SetupError> {
    let mut plan = docker::inside(endpoint, files)?;
    let mounts = docker::mounts(endpoint);
    let path = Path::new(CONFIG);
    match files.read(path)? {
        None => {
            let list: Vec<String> = mounts.iter().map(|mount| format!("{mount:?}")).collect();
            plan.by_hand(format!(
                "{CONFIG} does not exist here; on the host of the runner, add to each [runners.docker]: volumes = [\"/cache\", {}]",
                list.join(", ")
            ));
        }
        Some(bytes) => {
            let text = Text::read(path, Some(bytes))?;
            plan.file(path, with_mounts(path, &text, &mounts)?.into_bytes());
            plan.note("GitLab Runner reloads its config.toml automatically");
        }
    }
    plan.note("this host's daemon pulls the images of the jobs; run ifnewer setup docker for it");
    Ok(plan)
}

fn with_mounts(path: &Path, text: &Text, mounts: &[String]) -> Result<Text, SetupError> {
    let by_hand = |detail: &str| SetupError::Conflict {
        path: path.to_owned(),
        what: detail.to_owned(),
        remedy: format!("Add by hand to `volumes` in [runners.docker]: {mounts:?}"),
    };
    let root = edit_toml::read(path, text)?;
    let runners = root
        .get("runners")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let mut edited = text.clone();
    let mut is_docker = false;
    for (position, runner) in runners.iter().enumerate() {
        let executor = runner.get("executor").and_then(Value::as_str).unwrap_or_default();
        if !executor.starts_with("docker") || !runner.get("docker").is_some_and(Value::is_table) {
            continue;
        }
        is_docker = true;
        edited = with_volumes(&edited, position, mounts)
            .ok_or_else(|| by_hand("the TOML layout does not permit an automatic edit"))?;
    }
    if is_docker {
        Ok(edited)
    } else {
        Err(by_hand("has no [[runners]] with a docker executor"))
    }
}

/// Adds the mounts to the `volumes` of one runner. `None` if the layout of the file does not permit it.
fn with_volumes(text: &Text, runner: usize, mounts: &[String]) -> Option<Text> {
    let root: Table = toml::from_str(&text.body).ok()?;
    let docker = root.get("runners")?.get(runner)?.get("docker")?.as_table()?;
    let current: Vec<Value> = match docker.get("volumes") {
        Some(volumes) => volumes.as_array()?.clone(),
        None => Vec::new(),
    };
    let missing = mounts.iter().map(|mount| Value::String(mount.clone()));
    let missing: Vec<Value> = missing.filter(|mount| !current.contains(mount)).collect();
    if missing.is_empty() {
        return Some(text.clone());
    }
    let mut meant = root.clone();
    let table = meant
        .get_mut("runners")?
        .get_mut(runner)?
        .get_mut("docker")?
        .as_table_mut()?;
    let all = current.into_iter().chain(missing.iter().cloned()).collect();
    table.insert("volumes".to_owned(), Value::Array(all));

    let list: Vec<String> = missing.iter().map(ToString::to_string).collect();
    let list = list.join(", ");
    let candidates = match end_of_volumes(&text.body, runner) {
        Some((end, is_open)) => {
            let (until, rest) = text.body.split_at_checked(end)?;
            let comma = if is_open { ", " } else { "" };
            vec![text.with(format!(
                "{}{comma}{list}{rest}",
                until.trim_end_matches([' ', '\t'])
            ))]
        }
        None => edit_toml::after_headers(text, &["runners", "docker"], &format!("volumes = [{list}]\n")),
    };
    candidates
        .into_iter()
        .find(|edited| toml::from_str::<Table>(&edited.body).is_ok_and(|got| got == meant))
}

/// Insertion position in a runner's `volumes`: the end of the last element, and whether a comma is needed.
fn end_of_volumes(body: &str, runner: usize) -> Option<(usize, bool)> {
    let root = DeTable::parse(body).ok()?;
    let DeValue::Array(runners) = root.get_ref().get("runners")?.get_ref() else {
        return None;
    };
    let DeValue::Table(runner) = runners.get(runner)?.get_ref() else {
        return None;
    };
    let DeValue::Table(docker) = runner.get("docker")?.get_ref() else {
        return None;
    };
    let volumes = docker.get("volumes")?;
    let DeValue::Array(items) = volumes.get_ref() else {
        return None;
    };
    match items.last() {
        Some(last) => Some((last.span().end, true)),
        None => Some((volumes.span().start + 1, false)),
    }
}
