//! containerd: a `hosts.toml` for each registry, and `config_path`, without which the CRI plugin reads none of them.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::setup::SetupError;
use crate::setup::edit::text::Text;
use crate::setup::edit::toml as edit_toml;
use crate::setup::endpoint::{CacheEndpoint, Registry};
use crate::setup::plan::{FileSource, Plan};

const CONFIG: &str = "/etc/containerd/config.toml";
const HOSTS: &str = "/etc/containerd/certs.d";
const AUTHORITY: &str = "/etc/containerd/ifnewer-ca.crt";

/// The default `config_path` since containerd 2.2.0, which reads neither of its folders.
const HOSTS_BY_DEFAULT: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";

/// Section of the CRI plugin's registries, by the version of the file.
const REGISTRY_OF_2: &[&str] = &["plugins", "io.containerd.grpc.v1.cri", "registry"];
const REGISTRY_OF_3: &[&str] = &["plugins", "io.containerd.cri.v1.images", "registry"];

/// A containerd release, as far as its configuration depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Release(u32, u32);

/// The first release with the capability `referrers`. Earlier ones skip a whole hosts.toml that names it.
pub(crate) const REFERRERS_SINCE: Release = Release(2, 2);

impl Release {
    /// Parses the output of `containerd --version`: `containerd github.com/containerd/containerd/v2 v2.3.0 1c4457e`.
    pub(crate) fn read(printed: &str) -> Option<Self> {
        printed.split_whitespace().find_map(|word| {
            let mut numbers = word.trim_start_matches('v').split('.');
            let major = numbers.next()?.parse().ok()?;
            Some(Self(major, numbers.next()?.parse().ok()?))
        })
    }

    /// The first release that wrote a configuration of this version.
    fn of_configuration(version: i64) -> Option<Self> {
        match version {
            3 => Some(Self(2, 0)),
            4 => Some(Self(2, 3)),
            _ => None,
        }
    }

    /// The installed release as printed by the program, or the oldest one that its configuration allows.
    pub(crate) fn find(files: &dyn FileSource, config: &Table) -> Option<Self> {
        let printed = files.version_of("containerd");
        let configured = config.get("version").and_then(Value::as_integer);
        printed
            .and_then(|printed| Self::read(&printed))
            .max(configured.and_then(Self::of_configuration))
    }
}

pub(in crate::setup) fn plan(
    endpoint: &CacheEndpoint,
    force: bool,
    files: &dyn FileSource,
) -> Result<Plan, SetupError> {
    let mut plan = Plan::default();
    let config = Path::new(CONFIG);
    let text = Text::read(config, files.read(config)?)?;
    let release = Release::find(files, &edit_toml::read(config, &text)?);
    let (edited, hosts) = config_path(config, &text)?;
    if edited != text {
        plan.by_hand(
            "restart containerd once, because it reads `config_path` at its start: systemctl restart containerd. \
                      Later changes of hosts.toml need no restart",
        );
        if text.body.contains(HOSTS_BY_DEFAULT) {
            plan.note(
                "config_path named two folders, and containerd 2.2.0 reads neither; certificates in \
                 /etc/docker/certs.d are no longer read",
            );
        }
    }
    plan.file(config, edited.into_bytes());
    if let Some(authority) = &endpoint.ca {
        plan.file(AUTHORITY, authority.pem());
    }
    for upstream in &endpoint.upstreams {
        let path = hosts.join(&*upstream.name).join("hosts.toml");
        let text = Text::read(&path, files.read(&path)?)?;
        let host = Host::new(endpoint, release);
        let edited = host.in_file(&path, &text, upstream, force)?;
        plan.file(path, edited.into_bytes());
    }
    plan.note("ctr ignores config_path and needs --hosts-dir; nerdctl and the kubelet read it");
    if release.is_none() {
        plan.note(
            "the release of containerd is unknown; for 2.2 or newer, add \"referrers\" to `capabilities`. \
             Otherwise requests for signatures bypass the cache",
        );
    }
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

/// The configuration with a folder for `hosts.toml`, and that folder.
fn config_path(path: &Path, text: &Text) -> Result<(Text, PathBuf), SetupError> {
    let conflict = |what: String, remedy: &str| SetupError::Conflict {
        path: path.to_owned(),
        what,
        remedy: remedy.to_owned(),
    };
    if text.is_blank() {
        let fresh = format!(
            "version = 2\n\n{}\nconfig_path = \"{HOSTS}\"\n",
            edit_toml::header(REGISTRY_OF_2)
        );
        return Ok((text.with(fresh), PathBuf::from(HOSTS)));
    }
    let root = edit_toml::read(path, text)?;
    let section = match root.get("version").and_then(Value::as_integer) {
        Some(2) => REGISTRY_OF_2,
        // Version 4 has the same plugin names.
        Some(3 | 4) => REGISTRY_OF_3,
        other => {
            let version = other.map_or("no version, which means 1".to_owned(), |version| {
                format!("version {version}")
            });
            return Err(conflict(
                format!("has {version}; hosts.toml is supported in versions 2, 3 and 4"),
                "Migrate it first: containerd config migrate",
            ));
        }
    };
    let registry = edit_toml::table(&root, section);
    // `containerd config default` of 1.x writes both as empty sections, which are harmless.
    let is_used = |name: &str| {
        let section = registry.and_then(|registry| registry.get(name)?.as_table());
        section.is_some_and(|section| !section.is_empty())
    };
    if is_used("mirrors") || is_used("configs") {
        return Err(conflict(
            "has registry.mirrors or registry.configs, with which containerd rejects config_path".to_owned(),
            "Move them into hosts.toml files first; containerd's docs/hosts.md says how.",
        ));
    }
    let hosts = Value::String(HOSTS.to_owned());
    let edited = match registry
        .and_then(|registry| registry.get("config_path"))
        .map(Value::as_str)
    {
        Some(Some("" | HOSTS_BY_DEFAULT)) => edit_toml::replace(text, section, "config_path", &hosts),
        Some(Some(folders)) if folders.contains(':') => {
            return Err(conflict(
                format!(
                    "config_path names several folders ({folders}), and containerd 2.2.0 reads none of them"
                ),
                "Keep one of them, an absolute path.",
            ));
        }
        Some(Some(folder)) if folder.starts_with('/') => return Ok((text.clone(), PathBuf::from(folder))),
        Some(other) => {
            return Err(conflict(
                format!("config_path is {}", other.unwrap_or("not a string")),
                "Set it to one absolute path.",
            ));
        }
        None => edit_toml::set(text, section, "config_path", &hosts),
    };
    let edited = edited.ok_or_else(|| {
        conflict(
            "the TOML layout does not permit an automatic edit".to_owned(),
            &format!(
                "Add by hand: {}  config_path = \"{HOSTS}\"",
                edit_toml::header(section)
            ),
        )
    })?;
    Ok((edited, PathBuf::from(HOSTS)))
}

/// The cache as a host in a `hosts.toml`.
struct Host {
    url: String,
    settings: Table,
}

impl Host {
    /// The settings for this release of containerd; for an unknown one, those that every release accepts.
    fn new(endpoint: &CacheEndpoint, release: Option<Release>) -> Self {
        let knows_referrers = release >= Some(REFERRERS_SINCE);
        let capabilities = ["pull", "resolve"]
            .into_iter()
            .chain(knows_referrers.then_some("referrers"));
        let capabilities = capabilities.map(|name| Value::String(name.to_owned())).collect();
        let mut settings = Table::new();
        settings.insert("capabilities".to_owned(), Value::Array(capabilities));
        if endpoint.ca.is_some() {
            settings.insert("ca".to_owned(), Value::String(AUTHORITY.to_owned()));
        }
        Self {
            url: endpoint.url(),
            settings,
        }
    }

    /// Whether a section differs only in capabilities written for another release.
    fn differs_by_release(&self, section: &Table) -> bool {
        let mut same = section.clone();
        let capabilities = same.insert("capabilities".to_owned(), Value::Array(Vec::new()));
        let mut ours = self.settings.clone();
        ours.insert("capabilities".to_owned(), Value::Array(Vec::new()));
        let is_ours = |name: &Value| matches!(name.as_str(), Some("pull" | "resolve" | "referrers"));
        let all_ours =
            capabilities.is_some_and(|list| list.as_array().is_some_and(|list| list.iter().all(is_ours)));
        all_ours && same == ours
    }

    /// The `hosts.toml` of one registry with the cache as its first host.
    fn in_file(
        &self,
        path: &Path,
        text: &Text,
        upstream: &Registry,
        force: bool,
    ) -> Result<Text, SetupError> {
        let section = ["host", self.url.as_str()];
        let header = edit_toml::header(&section);
        if text.is_blank() {
            return Ok(text.with(format!(
                "server = \"{}\"\n\n{header}\n{}",
                server(upstream),
                self.settings
            )));
        }
        let root = edit_toml::read(path, text)?;
        let conflict = |what: &str, remedy: String| SetupError::Conflict {
            path: path.to_owned(),
            what: what.to_owned(),
            remedy,
        };
        let by_hand = || {
            let settings = self.settings.to_string().trim_end().replace('\n', ", ");
            format!("Add by hand: {header} with {settings}")
        };
        let hosts = match root.get("host") {
            None => None,
            Some(Value::Table(hosts)) => Some(hosts),
            Some(_) => {
                return Err(conflict(
                    "`host` is not a section",
                    "Correct the file first.".to_owned(),
                ));
            }
        };
        let unedited = || conflict("the TOML layout does not permit an automatic edit", by_hand());
        match hosts.and_then(|hosts| hosts.get(&self.url)).map(Value::as_table) {
            None => {}
            Some(Some(current)) if *current == self.settings => return Ok(text.clone()),
            Some(Some(current)) if self.differs_by_release(current) => {
                let capabilities = self.settings.get("capabilities").ok_or_else(unedited)?;
                return edit_toml::replace(text, &section, "capabilities", capabilities).ok_or_else(unedited);
            }
            Some(_) => {
                return Err(conflict(
                    &format!("already has {header} with other settings"),
                    by_hand(),
                ));
            }
        }
        let others = hosts.into_iter().flat_map(Table::keys);
        let others: Vec<&str> = others.map(String::as_str).collect();
        if !others.is_empty() && !force {
            return Err(conflict(
                &format!("already names {}", others.join(", ")),
                format!(
                    "Use --force to put {} before it; it is then tried next.",
                    self.url
                ),
            ));
        }
        edit_toml::add(text, &section, &self.settings, Some("host")).ok_or_else(unedited)
    }
}

/// The registry itself, as the fallback host.
fn server(upstream: &Registry) -> String {
    match &*upstream.name {
        "docker.io" => "https://registry-1.docker.io".to_owned(),
        name if upstream.plain_http => format!("http://{name}"),
        name => format!("https://{name}"),
    }
}
