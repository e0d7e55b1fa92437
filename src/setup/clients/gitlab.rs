//! GitLab Runner's docker executor. The host's daemon pulls the job images (`setup docker`). The docker:dind services
//! run their own daemons, into which `volumes` of `config.toml` mounts a `daemon.json`.

use toml::Value;

use super::{Context, Place, Plan, SetupError, Text, docker, edit_toml};

const CONFIG: &str = "/etc/gitlab-runner/config.toml";

pub(in crate::setup) fn plan(context: Context<'_>) -> Result<Plan, SetupError> {
    let mut plan = docker::inside(context)?;
    let mounts: Vec<Value> = docker::mounts(context.endpoint)
        .into_iter()
        .map(Value::from)
        .collect();
    if context.files.read(CONFIG.as_ref())?.is_some() {
        plan.edited(with_mounts(context.text(CONFIG)?, &mounts)?);
        plan.note("GitLab Runner reloads its config.toml automatically");
    } else {
        let volumes = Value::Array([Value::from("/cache")].into_iter().chain(mounts).collect());
        plan.by_hand(format!(
            "{CONFIG} does not exist here; on the host of the runner, add to each [runners.docker]: volumes = {volumes}"
        ));
    }
    plan.note("this host's daemon pulls the images of the jobs; run ifnewer setup docker for it");
    Ok(plan)
}

fn with_mounts(mut text: Text, mounts: &[Value]) -> Result<Text, SetupError> {
    let by_hand = |text: &Text, what: &str| {
        let mounts = Value::Array(mounts.to_vec());
        text.conflict(
            what,
            format!("Add by hand to `volumes` in [runners.docker]: {mounts}"),
        )
    };
    let root = edit_toml::read(&text)?;
    let runners = root.get("runners").and_then(Value::as_array).map(Vec::as_slice);
    let mut is_docker = false;
    for (position, runner) in runners.unwrap_or_default().iter().enumerate() {
        let executor = runner.get("executor").and_then(Value::as_str);
        let docker = runner.get("docker").and_then(Value::as_table);
        let Some(docker) = docker.filter(|_| executor.is_some_and(|name| name.starts_with("docker"))) else {
            continue;
        };
        is_docker = true;
        let none = Value::Array(Vec::new());
        let volumes = docker.get("volumes").unwrap_or(&none).as_array();
        let edited = volumes.and_then(|volumes| {
            let missing = mounts.iter().filter(|mount| !volumes.contains(mount));
            let volumes: Vec<_> = volumes.iter().chain(missing).cloned().collect();
            let section = ["runners", &position.to_string(), "docker"];
            edit_toml::try_set(&text, &section, &edit_toml::one("volumes", volumes), Place::Last)
        });
        text = edited.ok_or_else(|| by_hand(&text, "the TOML layout does not permit an automatic edit"))?;
    }
    if is_docker {
        Ok(text)
    } else {
        Err(by_hand(&text, "has no [[runners]] with a docker executor"))
    }
}
