//! containerd: a `hosts.toml` for each registry, and `config_path`, without which the CRI plugin reads none of them.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Refused;
use super::plan::{Files, Plan};
use super::text::Text;
use super::toml_text;
use super::way::Way;

const CONFIG: &str = "/etc/containerd/config.toml";
const HOSTS: &str = "/etc/containerd/certs.d";
const AUTHORITY: &str = "/etc/containerd/ifnewer-ca.crt";

/// Where the registries of the CRI plugin are configured, by the version of the file.
const REGISTRY_OF_2: &[&str] = &["plugins", "io.containerd.grpc.v1.cri", "registry"];
const REGISTRY_OF_3: &[&str] = &["plugins", "io.containerd.cri.v1.images", "registry"];

pub(super) fn plan(way: &Way, force: bool, files: &dyn Files) -> Result<Plan, Refused> {
    let mut plan = Plan::default();
    let config = Path::new(CONFIG);
    let text = Text::read(config, files.read(config)?)?;
    let (edited, hosts) = config_path(config, &text)?;
    if edited != text {
        plan.by_hand(
            "restart containerd once, for `config_path`: systemctl restart containerd. Later changes of \
                      hosts.toml need none",
        );
    }
    plan.file(config, edited.into_bytes());
    if let Some(authority) = &way.authority {
        plan.file(AUTHORITY, authority.pem());
    }
    for upstream in &way.upstreams {
        let path = hosts.join(&**upstream).join("hosts.toml");
        let text = Text::read(&path, files.read(&path)?)?;
        let edited = host(&path, &text, upstream, way, force)?;
        plan.file(path, edited.into_bytes());
    }
    plan.note("ctr does not read config_path: give it --hosts-dir. nerdctl and the kubelet do");
    plan.notes.extend(way.warnings.iter().cloned());
    Ok(plan)
}

/// The configuration with a folder for `hosts.toml`, and which folder that is.
fn config_path(path: &Path, text: &Text) -> Result<(Text, PathBuf), Refused> {
    let conflict = |what: String, remedy: &str| Refused::Conflict {
        path: path.to_owned(),
        what,
        remedy: remedy.to_owned(),
    };
    if text.is_blank() {
        let fresh = format!(
            "version = 2\n\n{}\nconfig_path = \"{HOSTS}\"\n",
            toml_text::header(REGISTRY_OF_2)
        );
        return Ok((text.with(fresh), PathBuf::from(HOSTS)));
    }
    let root = toml_text::read(path, text)?;
    let section = match root.get("version").and_then(Value::as_integer) {
        Some(2) => REGISTRY_OF_2,
        Some(3) => REGISTRY_OF_3,
        other => {
            let version = other.map_or("no version, which means 1".to_owned(), |version| {
                format!("version {version}")
            });
            return Err(conflict(
                format!("it has {version}; hosts.toml is known in versions 2 and 3"),
                "Bring it up to date first: containerd config migrate",
            ));
        }
    };
    let registry = toml_text::table(&root, section);
    match registry
        .and_then(|registry| registry.get("config_path"))
        .map(Value::as_str)
    {
        Some(Some(folders)) if folders.contains(':') => Err(conflict(
            format!("config_path names several folders ({folders}), of which containerd 2.2 reads none"),
            "Leave one of them, an absolute path.",
        )),
        Some(Some(folder)) if folder.starts_with('/') => Ok((text.clone(), PathBuf::from(folder))),
        Some(Some("")) => Err(conflict(
            "config_path is empty, so that no hosts.toml is read".to_owned(),
            "Delete that line, or write config_path = \"/etc/containerd/certs.d\" in its place.",
        )),
        Some(other) => Err(conflict(
            format!("config_path is {}", other.unwrap_or("no text")),
            "Make it one absolute path.",
        )),
        None if registry
            .is_some_and(|registry| registry.contains_key("mirrors") || registry.contains_key("configs")) =>
        {
            Err(conflict(
                "it has registry.mirrors or registry.configs, beside which containerd refuses config_path"
                    .to_owned(),
                "Move them into hosts.toml files first; containerd's docs/hosts.md says how.",
            ))
        }
        None => match toml_text::set(text, section, "config_path", &Value::String(HOSTS.to_owned())) {
            Some(edited) => Ok((edited, PathBuf::from(HOSTS))),
            None => Err(conflict(
                "it is written in a way that cannot be added to by machine".to_owned(),
                &format!(
                    "Add by hand: {}  config_path = \"{HOSTS}\"",
                    toml_text::header(section)
                ),
            )),
        },
    }
}

/// The `hosts.toml` of one registry with us as its first host.
fn host(path: &Path, text: &Text, upstream: &str, way: &Way, force: bool) -> Result<Text, Refused> {
    let url = way.url();
    let mut ours = Table::new();
    let capabilities = ["pull", "resolve"].map(|name| Value::String(name.to_owned()));
    ours.insert("capabilities".to_owned(), Value::Array(capabilities.to_vec()));
    if way.authority.is_some() {
        ours.insert("ca".to_owned(), Value::String(AUTHORITY.to_owned()));
    }
    if text.is_blank() {
        let section = toml_text::header(&["host", &url]);
        return Ok(text.with(format!("server = \"{}\"\n\n{section}\n{ours}", server(upstream))));
    }
    let root = toml_text::read(path, text)?;
    let conflict = |what: String, remedy: String| Refused::Conflict {
        path: path.to_owned(),
        what,
        remedy,
    };
    let hosts = match root.get("host") {
        None => None,
        Some(Value::Table(hosts)) => Some(hosts),
        Some(_) => {
            return Err(conflict(
                "`host` is not a section".to_owned(),
                "Mend it first.".to_owned(),
            ));
        }
    };
    if let Some(held) = hosts.and_then(|hosts| hosts.get(&url)) {
        return if held.as_table() == Some(&ours) {
            Ok(text.clone())
        } else {
            Err(conflict(
                format!("[host.\"{url}\"] is there with other settings"),
                format!(
                    "It should say: {}",
                    ours.to_string().trim_end().replace('\n', ", ")
                ),
            ))
        };
    }
    let others: Vec<&str> = hosts
        .into_iter()
        .flat_map(Table::keys)
        .map(String::as_str)
        .collect();
    if !others.is_empty() && !force {
        return Err(conflict(
            format!("it already names {}", others.join(", ")),
            format!("With --force, {url} goes before it and it stays as the next one to be tried."),
        ));
    }
    toml_text::add(text, &["host", &url], &ours, Some("host")).ok_or_else(|| {
        conflict(
            "it is written in a way that cannot be added to by machine".to_owned(),
            format!(
                "Add by hand: [host.\"{url}\"] with {}",
                ours.to_string().trim_end().replace('\n', ", ")
            ),
        )
    })
}

/// Where the registry itself is, for what we cannot answer.
fn server(upstream: &str) -> String {
    match upstream {
        "docker.io" => "https://registry-1.docker.io".to_owned(),
        other => format!("https://{other}"),
    }
}
