//! k3s: `registries.yaml`, from which k3s generates containerd's files. It has no folder for additional files, and
//! YAML is not edited here: a file with other content is reported.

use std::fmt::Write as _;

use super::{CacheEndpoint, Context, Plan, Registry, SetupError};

const REGISTRIES: &str = "/etc/rancher/k3s/registries.yaml";
const AUTHORITY: &str = "/etc/rancher/k3s/ifnewer-ca.crt";

pub(in crate::setup) fn plan(context: Context<'_>) -> Result<Plan, SetupError> {
    let endpoint = context.endpoint;
    let mut plan = Plan::default();
    let text = context.text(REGISTRIES)?;
    let desired = registries(endpoint);
    if text.is_blank() {
        plan.edited(text.with(desired));
    } else if text.body.trim() == desired.trim() {
        plan.edited(text);
    } else {
        return Err(text.conflict(
            "exists with other content; YAML is not merged automatically",
            format!("Merge by hand:\n{desired}"),
        ));
    }
    plan.ca(endpoint, AUTHORITY);
    plan.by_hand(
        "restart k3s on this node: systemctl restart k3s, or k3s-agent; running pods are not affected",
    );
    Ok(plan)
}

fn registries(endpoint: &CacheEndpoint) -> String {
    let mut text = String::from("mirrors:\n");
    let url = endpoint.url();
    for Registry { name, plain_http } in &endpoint.upstreams {
        let _ = write!(text, "  \"{name}\":\n    endpoint:\n      - \"{url}\"\n");
        // k3s adds the registry itself as the last endpoint, over HTTPS.
        if *plain_http {
            let _ = writeln!(text, "      - \"http://{name}\"");
        }
    }
    if endpoint.ca.is_some() {
        let cache = endpoint.host_port();
        let _ = write!(
            text,
            "configs:\n  \"{cache}\":\n    tls:\n      ca_file: \"{AUTHORITY}\"\n"
        );
    }
    text
}
