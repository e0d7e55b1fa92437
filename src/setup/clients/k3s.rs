//! k3s: `registries.yaml`, from which k3s generates containerd's files. It has no folder for additional files, and
//! YAML is not edited here: a file with other content is reported.

use std::fmt::Write as _;
use std::path::Path;

use crate::setup::SetupError;
use crate::setup::edit::text::Text;
use crate::setup::endpoint::{CacheEndpoint, Registry};
use crate::setup::plan::{FileSource, Plan};

const REGISTRIES: &str = "/etc/rancher/k3s/registries.yaml";
const AUTHORITY: &str = "/etc/rancher/k3s/ifnewer-ca.crt";

pub(in crate::setup) fn plan(endpoint: &CacheEndpoint, files: &dyn FileSource) -> Result<Plan, SetupError> {
    let mut plan = Plan::default();
    let path = Path::new(REGISTRIES);
    let text = Text::read(path, files.read(path)?)?;
    let desired = registries(endpoint);
    if !text.is_blank() && text.body.replace("\r\n", "\n").trim() != desired.trim() {
        return Err(SetupError::Conflict {
            path: path.to_owned(),
            what: "exists with other content; YAML is not merged automatically".to_owned(),
            remedy: format!("Merge by hand:\n{desired}"),
        });
    }
    let bytes = if text.is_blank() { text.with(desired) } else { text };
    plan.file(path, bytes.into_bytes());
    if let Some(authority) = &endpoint.ca {
        plan.file(AUTHORITY, authority.pem());
    }
    plan.by_hand(
        "restart k3s on this node: systemctl restart k3s, or k3s-agent; running pods are not affected",
    );
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

fn registries(endpoint: &CacheEndpoint) -> String {
    let mut text = String::from("mirrors:\n");
    for Registry { name, plain_http } in &endpoint.upstreams {
        let _ = write!(
            text,
            "  \"{name}\":\n    endpoint:\n      - \"{}\"\n",
            endpoint.url()
        );
        // k3s adds the registry itself as the last endpoint, over HTTPS.
        if *plain_http {
            let _ = writeln!(text, "      - \"http://{name}\"");
        }
    }
    if endpoint.ca.is_some() {
        let _ = write!(
            text,
            "configs:\n  \"{}\":\n    tls:\n      ca_file: \"{AUTHORITY}\"\n",
            endpoint.host_port()
        );
    }
    text
}
