//! containerd: a `hosts.toml` for each registry, and `config_path`, without which the CRI plugin reads none of them.

use std::path::PathBuf;

use toml::{Table, Value};

use super::{CacheEndpoint, Context, FileSource, Place, Plan, Registry, SetupError, Text, edit_toml};

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

pub(in crate::setup) fn plan(context: Context<'_>) -> Result<Plan, SetupError> {
    let endpoint = context.endpoint;
    let mut plan = Plan::default();
    let text = context.text(CONFIG)?;
    let release = Release::find(context.files, &edit_toml::read(&text)?);
    let (edited, hosts) = with_config_path(&text)?;
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
    plan.edited(edited);
    plan.ca(endpoint, AUTHORITY);
    let host = Host::new(endpoint, release);
    for upstream in &endpoint.upstreams {
        let text = context.text(hosts.join(&*upstream.name).join("hosts.toml"))?;
        plan.edited(host.in_file(&text, upstream, context.force)?);
    }
    plan.note("ctr ignores config_path and needs --hosts-dir; nerdctl and the kubelet read it");
    if release.is_none() {
        plan.note(
            "the release of containerd is unknown; for 2.2 or newer, add \"referrers\" to `capabilities`. \
             Otherwise requests for signatures bypass the cache",
        );
    }
    Ok(plan)
}

/// The configuration with a folder for `hosts.toml`, and that folder.
fn with_config_path(text: &Text) -> Result<(Text, PathBuf), SetupError> {
    let root = edit_toml::read(text)?;
    let (section, text) = match root.get("version").and_then(Value::as_integer) {
        None if text.is_blank() => (REGISTRY_OF_2, &text.with("version = 2\n".to_owned())),
        Some(2) => (REGISTRY_OF_2, text),
        // Version 4 has the same plugin names.
        Some(3 | 4) => (REGISTRY_OF_3, text),
        other => {
            let version = other.map_or("no version, which means 1".to_owned(), |version| {
                format!("version {version}")
            });
            return Err(text.conflict(
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
        return Err(text.conflict(
            "has registry.mirrors or registry.configs, with which containerd rejects config_path",
            "Move them into hosts.toml files first; containerd's docs/hosts.md says how.",
        ));
    }
    let current = registry.and_then(|registry| registry.get("config_path"));
    match current.map(Value::as_str) {
        None | Some(Some("" | HOSTS_BY_DEFAULT)) => {
            let settings = edit_toml::one("config_path", HOSTS);
            let edited = edit_toml::set(text, section, &settings, Place::Last)?;
            Ok((edited, PathBuf::from(HOSTS)))
        }
        Some(Some(folders)) if folders.contains(':') => Err(text.conflict(
            format!("config_path names several folders ({folders}), and containerd 2.2.0 reads none of them"),
            "Keep one of them, an absolute path.",
        )),
        Some(Some(folder)) if folder.starts_with('/') => Ok((text.clone(), PathBuf::from(folder))),
        Some(other) => Err(text.conflict(
            format!("config_path is {}", other.unwrap_or("not a string")),
            "Set it to one absolute path.",
        )),
    }
}

/// The cache as a host in a `hosts.toml`.
struct Host {
    url: String,
    settings: Table,
}

impl Host {
    /// The settings for this release of containerd; for an unknown one, those that every release accepts.
    fn new(endpoint: &CacheEndpoint, release: Option<Release>) -> Self {
        let mut capabilities = vec!["pull", "resolve"];
        capabilities.extend((release >= Some(REFERRERS_SINCE)).then_some("referrers"));
        let mut settings = edit_toml::one("capabilities", capabilities);
        if endpoint.ca.is_some() {
            settings.insert("ca".to_owned(), Value::from(AUTHORITY));
        }
        Self {
            url: endpoint.url(),
            settings,
        }
    }

    /// Whether a section differs at most in capabilities written for another release.
    fn is_same(&self, section: &Table) -> bool {
        let mut same = section.clone();
        let ours = self.settings.get("capabilities").cloned();
        let theirs = ours.and_then(|ours| same.insert("capabilities".to_owned(), ours));
        let is_known = |name: &Value| matches!(name.as_str(), Some("pull" | "resolve" | "referrers"));
        let theirs = theirs.as_ref().and_then(Value::as_array);
        same == self.settings && theirs.is_some_and(|list| list.iter().all(is_known))
    }

    /// The `hosts.toml` of one registry with the cache as its first host.
    fn in_file(&self, text: &Text, upstream: &Registry, force: bool) -> Result<Text, SetupError> {
        let section = ["host", self.url.as_str()];
        if text.is_blank() {
            let server = text.with(format!("server = \"{}\"\n", server(upstream)));
            return edit_toml::set(&server, &section, &self.settings, Place::First);
        }
        let root = edit_toml::read(text)?;
        let hosts = match root.get("host") {
            None => &Table::new(),
            Some(Value::Table(hosts)) => hosts,
            Some(_) => return Err(text.conflict("`host` is not a section", "Correct the file first.")),
        };
        if let Some(current) = hosts.get(&self.url) {
            if !current.as_table().is_some_and(|current| self.is_same(current)) {
                let what = format!("already has {} with other settings", edit_toml::header(&section));
                return Err(text.conflict(what, edit_toml::by_hand(&section, &self.settings)));
            }
        } else if !hosts.is_empty() && !force {
            let others: Vec<&str> = hosts.keys().map(String::as_str).collect();
            return Err(text.other_mirrors("", &others, &self.url));
        }
        edit_toml::set(text, &section, &self.settings, Place::First)
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
