//! Interception by `HTTPS_PROXY`: a systemd drop-in for the client's service. Unlike mirrors, it covers every registry
//! and has no fallback.

use std::path::{Path, PathBuf};

use super::{Client, Context, Object, Plan, SetupError, Text, docker};

pub(in crate::setup) fn plan(client: Client, context: Context<'_>) -> Result<Plan, SetupError> {
    // CONNECT uses plain HTTP where allowed, because every client supports that.
    let url = context.endpoint.url();
    let unit = client.name();
    if matches!(client, Client::Podman | Client::GitlabRunner | Client::Dind) {
        return Err(SetupError::Unsupported(format!(
            "--proxy writes a drop-in for a systemd unit, and {unit} is not a systemd service; set HTTPS_PROXY={url} in \
             its environment"
        )));
    }
    let folder = PathBuf::from(format!("/etc/systemd/system/{unit}.service.d"));
    // The name sorts after most others.
    let ours = folder.join("90-ifnewer.conf");
    if !context.force {
        check_drop_ins(&folder, &ours, context)?;
        if client == Client::Docker {
            check_daemon(context)?;
        }
    }
    let mut plan = Plan::default();
    plan.file(
        ours,
        format!(
            "# Written by `ifnewer setup --proxy`; --undo removes it.\n[Service]\nEnvironment=\"HTTPS_PROXY={url}\"\n\
             Environment=\"NO_PROXY=localhost,127.0.0.0/8,::1\"\n"
        ),
    );
    plan.by_hand(
        "install the CA on this host, because the proxy issues certificates for each registry: \
         ifnewer ca install",
    );
    plan.by_hand(format!(
        "restart the service, because it reads its environment at its start: systemctl daemon-reload && systemctl restart \
         {unit}"
    ));
    Ok(plan)
}

/// Reports another proxy of the same unit. Replacing it could remove the only route to the network.
fn check_drop_ins(folder: &Path, ours: &Path, context: Context<'_>) -> Result<(), SetupError> {
    for path in context
        .files
        .list(folder)?
        .into_iter()
        .filter(|path| path != ours)
    {
        let text = context.text(path)?;
        // The line itself is not printed, because it may contain credentials.
        for (number, line) in (1..).zip(text.body.lines().map(str::trim)) {
            let what = if line.starts_with("EnvironmentFile") {
                "sets EnvironmentFile, which can set HTTPS_PROXY"
            } else if line.starts_with("Environment") && line.to_ascii_uppercase().contains("HTTPS_PROXY=") {
                "sets HTTPS_PROXY"
            } else {
                continue;
            };
            return Err(other_proxy(&text, &format!("line {number} {what}")));
        }
    }
    Ok(())
}

fn check_daemon(context: Context<'_>) -> Result<(), SetupError> {
    let text = context.text(docker::DAEMON)?;
    match Object::read(&text)?.get("proxies") {
        Some(_) => Err(other_proxy(
            &text,
            "has \"proxies\", which takes precedence over the environment",
        )),
        None => Ok(()),
    }
}

fn other_proxy(text: &Text, what: &str) -> SetupError {
    text.conflict(
        what,
        "If this network needs that proxy, set it in ifnewer (`proxy` of the upstreams) and remove it here. Use \
         --force to add ours nevertheless.",
    )
}
