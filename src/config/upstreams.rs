//! Sections `[upstream."name"]`, over the well-known upstreams.

use std::sync::Arc;

use super::diagnostic::{Checked, Origin, Report, Subject};
use super::document::Document;
use super::files;
use super::limits::check_connect_timeout;
use super::schema::{PolicyKeys, Section, Upstream};
use super::setting::{Table, both};
use super::upstream::{AuthMode, Credential, UpstreamConfig, Url, WELL_KNOWN, WellKnown};
use super::value::ValueError;
use super::{address, validate};
use crate::oci::Repository;
use crate::policy::rules::PolicyOverrides;

/// Parsed upstream with its locations, for checks across sections.
pub(super) struct ParsedUpstream {
    pub(super) name: Arc<str>,
    /// Its section.
    pub(super) section: Subject,
    /// Its key `local_tokens`.
    pub(super) token_service: Subject,
    pub(super) is_disabled: bool,
    pub(super) policy: PolicyKeys,
    pub(super) changes: PolicyOverrides,
    pub(super) hosts: Vec<(Subject, String)>,
    pub(super) urls: Vec<(Subject, String)>,
    /// `None`: disabled, or invalid and reported.
    pub(super) config: Option<UpstreamConfig>,
}

/// Well-known upstreams with the file's overrides, then the others in the order of the file.
pub(super) fn read_all(document: &Document<'_>, report: &mut Report<'_>) -> Vec<ParsedUpstream> {
    let known = WELL_KNOWN.iter().map(|known| {
        let of_file = document.upstreams.iter().find(|table| table.name == known.name);
        let untouched = || Table::new(Section::Upstream, known.name, Origin::Default);
        of_file.cloned().unwrap_or_else(untouched)
    });
    let others = document.upstreams.iter();
    let others = others.filter(|table| well_known(&table.name).is_none()).cloned();
    let configured: Vec<_> = known.chain(others).map(|table| read(&table, report)).collect();
    validate::check_hosts_unique(&configured, report);
    configured
}

fn well_known(name: &str) -> Option<&'static WellKnown> {
    WELL_KNOWN.iter().find(|known| known.name == name)
}

fn read(table: &Table<'_>, report: &mut Report<'_>) -> ParsedUpstream {
    let name: Arc<str> = Arc::from(table.name.as_str());
    let keys = Upstream::read(table, report);
    let policy = PolicyKeys::read(table, report);
    let checked_name = check_name(table, report);
    let urls = urls(&keys, &name, report);
    let hosts = hosts(&keys, &name);
    let config = config(&keys, &name, &urls, &hosts, report);
    let enabled = keys.enabled.get();
    ParsedUpstream {
        name,
        section: table.subject(),
        token_service: keys.local_tokens.subject,
        is_disabled: matches!(enabled, Ok(false)),
        changes: policy.overrides().unwrap_or_default(),
        policy,
        hosts: hosts.unwrap_or_default(),
        urls: urls.unwrap_or_default(),
        config: config
            .ok()
            .filter(|_| checked_name.is_ok() && matches!(enabled, Ok(true))),
    }
}

type Located = Vec<(Subject, String)>;

fn config(
    keys: &Upstream,
    name: &Arc<str>,
    urls: &Checked<Located>,
    hosts: &Checked<Located>,
    report: &mut Report<'_>,
) -> Checked<UpstreamConfig> {
    let prefixes = repository_prefixes(keys, urls.as_ref().map_or(0, Vec::len), report);
    let credential = credential(keys, report);
    let local_tokens = local_tokens(keys, report);
    let roots = files::roots(&keys.ca_file, report);
    let client_certificate = files::client_certificate(keys, report);
    check_connect_timeout(keys, report);
    let (urls, hosts) = (urls.clone()?, hosts.clone()?);
    // The well-known token hosts apply only to the well-known URL.
    let known = well_known(name).filter(|known| urls.iter().all(|(_, url)| url == known.url));
    let mut token_hosts: Vec<String> = keys.token_hosts.get()?.values();
    token_hosts.extend(
        known
            .into_iter()
            .flat_map(|known| known.token_hosts)
            .map(ToString::to_string),
    );
    let urls = std::iter::zip(urls, prefixes?).map(|((_, address), repository_prefix)| Url {
        address,
        repository_prefix,
    });
    Ok(UpstreamConfig {
        name: Arc::clone(name),
        urls: urls.collect(),
        hosts: hosts.into_iter().map(|(_, host)| host).collect(),
        auth: keys.auth.get()?,
        local_tokens: local_tokens?,
        credential: credential?,
        token_hosts,
        roots: roots?,
        client_certificate: client_certificate?,
        redirects: keys.redirects.get()?.values(),
        proxy: keys.proxy.get()?,
        connect_timeout: keys.connect_timeout.get()?.into(),
        first_byte_timeout: keys.first_byte_timeout.get()?.into(),
    })
}

/// An upstream name must look like a host. Otherwise an image's first component is part of the repository name.
fn check_name(table: &Table<'_>, report: &mut Report<'_>) -> Checked<()> {
    let name = table.name.as_str();
    let error = match address::host(name) {
        Ok(_) if name.contains(['.', ':']) || name == "localhost" => return Ok(()),
        Ok(_) => ValueError::new(
            format!("`{name}` looks like a repository name"),
            "use a host name with a dot or a port, as in image names",
        ),
        Err(error) => error,
    };
    Err(report.emit(&table.subject(), error.message, error.help))
}

fn urls(keys: &Upstream, name: &str, report: &mut Report<'_>) -> Checked<Located> {
    let url = &keys.url;
    if !url.is_set {
        let default =
            well_known(name).map_or_else(|| format!("https://{name}"), |known| known.url.to_owned());
        return Ok(vec![(url.subject.as_default(), default)]);
    }
    let urls: Located = url.get()?.located();
    if urls.is_empty() {
        let help = "remove the key to use https:// and the upstream's name";
        return Err(report.emit(&url.subject, "an empty list of URLs", help));
    }
    for (index, (subject, url)) in urls.iter().enumerate() {
        if urls.iter().take(index).any(|(_, earlier)| earlier == url) {
            report.emit(subject, format!("`{url}` is listed twice"), "");
        }
    }
    Ok(urls)
}

/// Repository prefix of each URL: one for all URLs, or one per URL.
fn repository_prefixes(
    keys: &Upstream,
    urls: usize,
    report: &mut Report<'_>,
) -> Checked<Vec<Option<Repository>>> {
    let prefixes: Vec<Option<Repository>> = keys.repository_prefix.get()?.values();
    match prefixes.as_slice() {
        // The URL errors are already reported.
        _ if urls == 0 || !keys.repository_prefix.is_set => Ok(vec![None; urls]),
        [one] => Ok(vec![one.clone(); urls]),
        each if each.len() == urls => Ok(prefixes),
        other => {
            let message = format!("{} prefixes for {urls} URLs", other.len());
            let help = "write one for all of them, or one for each in the order of `url`: \"\" for none";
            Err(report.emit(&keys.repository_prefix.subject, message, help))
        }
    }
}

fn hosts(keys: &Upstream, name: &str) -> Checked<Located> {
    if keys.hosts.is_set {
        return Ok(keys.hosts.get()?.located());
    }
    let hosts = well_known(name).into_iter().flat_map(|known| known.hosts);
    let default = keys.hosts.subject.as_default();
    Ok(hosts.map(|&host| (default.clone(), host.to_owned())).collect())
}

/// The cache's credential, from at most one of three sources.
fn credential(keys: &Upstream, report: &mut Report<'_>) -> Checked<Option<Credential>> {
    let (username, helper, auth) = (
        keys.username.get()?,
        keys.credential_helper.get()?,
        keys.auth.get()?,
    );
    let [password_file, docker_config] = [&keys.password_file, &keys.docker_config];
    password_file.get()?;
    docker_config.get()?;
    let user = [keys.username.set(), password_file.set()];
    let others = [docker_config.set(), keys.credential_helper.set()];
    let given: Vec<&Subject> = user.into_iter().chain(others).flatten().collect();
    let (Some(first), Some(last)) = (given.first(), given.last()) else {
        return Ok(None);
    };
    let is_user = user.iter().any(Option::is_some);
    if usize::from(is_user) + others.iter().flatten().count() > 1 {
        let names: Vec<_> = given.iter().map(|subject| subject.name()).collect();
        let message = format!("several credentials for one upstream: {}", names.join(", "));
        let help = "keep one of: `username` with `password_file`, `docker_config`, `credential_helper`";
        return Err(report.emit(last, message, help));
    }
    both(&keys.username, password_file, "", report)?;
    if auth != AuthMode::Shared {
        let message =
            "a credential of the cache would make this upstream's private images readable by every client";
        let help = "if every client that reaches the listener may read them, add auth = \"shared\"; otherwise remove \
                    the credential, and clients use their own";
        return Err(report.emit(first, message, help));
    }
    let user = username.zip(files::password_file(password_file, report)?);
    let user = user.map(|(username, file)| Credential::Password {
        username: username.into(),
        file,
    });
    let docker = files::docker_config(docker_config, report)?.map(Credential::DockerConfig);
    Ok(user.or(docker).or(helper.map(Credential::Helper)))
}

fn local_tokens(keys: &Upstream, report: &mut Report<'_>) -> Checked<Option<String>> {
    let (realm, auth) = (keys.local_tokens.get()?, keys.auth.get()?);
    if realm.is_some() && auth == AuthMode::Shared {
        let message = "with auth = \"shared\" no client needs a token";
        return Err(report.emit(&keys.local_tokens.subject, message, "remove one of the two"));
    }
    Ok(realm.map(Into::into))
}
