//! From tables of known keys to the configuration: one reader per section, and the checks that need several.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use super::document::Document;
use super::fault::{At, Report, Told};
use super::keys::Section;
use super::names;
use super::table::Table;
use super::upstream::{self, Configured};
use super::value;
use super::{Admin, Config, Listen, Log, OwnCertificate, Sources, StoreSize, Tls};
use crate::policy::rules::{EffectivePolicy, ImagePattern, PolicyOverrides, Rules};

/// The name of a folder of certificates that nobody has named.
pub(super) const CERTIFICATES: &str = "certs";

/// The whole configuration. Every section is read before the first failure counts, so that all faults are told.
pub(super) fn build(
    document: &Document,
    sources: &Sources<'_>,
    report: &mut Report<'_>,
) -> Result<Config, Told> {
    let top = document.fixed(Section::Top);
    let data = top
        .text_if_set(report, "data", &value::PATH)
        .map(|path| match path {
            Some(path) => report.resolve(top.at("data"), path),
            None => sources.data.clone(),
        });
    let listen = listen(&document.fixed(Section::Listen), report);
    let tls = tls(
        &document.fixed(Section::Tls),
        certificates(sources, data.as_ref().ok()),
        report,
    );
    let store = store(&document.fixed(Section::Store), report);
    let log = log(&document.fixed(Section::Log), report);
    let limits = super::limits::read(&document.fixed(Section::Limits), report);
    let tunnels = document
        .fixed(Section::Connect)
        .list(report, "tunnel", &value::TUNNEL);

    let default = default_rule(&document.fixed(Section::Default), report);
    let configured = upstream::read_all(document, report);
    if let Ok(listen) = &listen {
        names::refuse_loops(&configured, &listen.registry, report);
    }
    let plain = listen.as_ref().ok().map(|listen| listen.plain);
    let entry = super::entry::read(document, plain, &configured, report);
    let default_upstream = default_upstream(&top, &configured, report);
    let rules = rules(document, default, &configured, report);
    let upstreams = configured
        .into_iter()
        .filter_map(Configured::into_config)
        .collect();
    Ok(Config {
        data: data?,
        default_upstream: default_upstream?,
        listen: listen?,
        entry: entry?,
        tls: tls?,
        tunnels: tunnels?.into_iter().map(|(_, tunnel)| tunnel).collect(),
        store: store?,
        upstreams,
        rules: rules?,
        log: log?,
        limits: limits?,
    })
}

fn listen(table: &Table, report: &mut Report<'_>) -> Result<Listen, Told> {
    let registry = table.list(report, "registry", &value::ADDRESS);
    let trusted = table.list(report, "proxy_protocol_from", &value::NETWORK);
    let plain = table.text(report, "plain", &value::PLAIN);
    let admin = table.text(report, "admin", &value::ADMIN);
    let token = table.text_if_set(report, "admin_token_file", &value::PATH);
    let admin_token_file =
        token.map(|path| path.map(|path| report.resolve(table.entry_at("admin_token_file"), path)));
    let registry = registry?;
    if registry.is_empty() {
        let message = "without an address no client can reach the cache";
        report.tell(
            table.at("registry"),
            table.path("registry"),
            message,
            Some(r#"write ["127.0.0.1:5000"]"#.to_owned()),
        );
    }
    let (mut seen, mut sockets): (Vec<SocketAddr>, Vec<PathBuf>) = (Vec::new(), Vec::new());
    for (at, address) in registry {
        let twice = match address {
            value::Address::Tcp(address) => {
                // Port 0 is another port each time.
                let twice = address.port() != 0 && seen.contains(&address);
                seen.push(address);
                twice.then(|| address.to_string())
            }
            value::Address::Unix(path) => {
                let twice = sockets
                    .contains(&path)
                    .then(|| format!("unix:{}", path.display()));
                sockets.push(path);
                twice
            }
        };
        if let Some(twice) = twice {
            let message = format!("`{twice}` stands here twice");
            report.tell(&at, table.path("registry"), message, None);
        }
    }
    let admin = admin?;
    if let Admin::Tcp(address) = admin
        && address.port() != 0
        && seen.contains(&address)
    {
        let message = format!("`{address}` is an address of the registry already");
        let help = "the admin API has an address of its own; clients must not reach it".to_owned();
        report.tell(table.at("admin"), table.path("admin"), message, Some(help));
    }
    Ok(Listen {
        registry: seen,
        sockets,
        proxy_protocol_from: trusted?.into_iter().map(|(_, network)| network).collect(),
        plain: plain?,
        admin,
        admin_token_file: admin_token_file?,
    })
}

/// The folder of certificates where none is named: beside the file, and without a file the one place that does not
/// depend on where the program is started, unless a folder is meant for them there.
pub(super) fn certificates(sources: &Sources<'_>, data: Option<&PathBuf>) -> Option<PathBuf> {
    let is_without_file = sources.origin.as_os_str().is_empty();
    let in_data = || data.map(|data| data.join(CERTIFICATES));
    is_without_file
        .then(|| sources.certificates_here.clone().or_else(in_data))
        .flatten()
}

fn tls(table: &Table, certificates: Option<PathBuf>, report: &mut Report<'_>) -> Result<Tls, Told> {
    let path = |key: &str, report: &mut Report<'_>| {
        let path = table.text_if_set(report, key, &value::PATH)?;
        Ok(path.map(|path| report.resolve(table.entry_at(key), path)))
    };
    let folder = path("folder", report);
    let certificate = path("certificate", report);
    let key = path("key", report);
    let names = table.list(report, "names", &value::CERTIFICATE_NAME);
    let constrained = table.switch(report, "constrained");
    let own = match (certificate?, key?) {
        (Some(certificate), Some(key)) => Some(OwnCertificate { certificate, key }),
        (None, None) => None,
        (certificate, _) => {
            let (given, missing) = if certificate.is_some() {
                ("certificate", "key")
            } else {
                ("key", "certificate")
            };
            let message = format!("`{given}` without `{missing}`");
            return Err(report.tell(
                table.at(given),
                table.path(given),
                message,
                Some(format!("add `{missing}`")),
            ));
        }
    };
    let folder = folder?.ok_or(Told)?;
    let is_named = table.is_given("folder");
    let folder = certificates.filter(|_| !is_named).unwrap_or(folder);
    Ok(Tls {
        folder,
        names: names?.into_iter().map(|(_, name)| name).collect(),
        constrained: constrained?,
        own,
    })
}

fn store(table: &Table, report: &mut Report<'_>) -> Result<StoreSize, Told> {
    let bytes_max = table.text(report, "size", &value::STORE_SIZE);
    let free_bytes_min = table.text(report, "free", &value::SIZE);
    let scrub_rate = table.text(report, "scrub", &value::RATE);
    Ok(StoreSize {
        bytes_max: bytes_max?,
        free_bytes_min: free_bytes_min?,
        scrub_rate: scrub_rate?,
    })
}

fn log(table: &Table, report: &mut Report<'_>) -> Result<Log, Told> {
    let level = table.text(report, "level", &value::LOG_LEVEL);
    let format = table.text(report, "format", &value::LOG_FORMAT);
    Ok(Log {
        level: level?,
        format: format?,
    })
}

fn default_rule(table: &Table, report: &mut Report<'_>) -> Result<EffectivePolicy, Told> {
    let policy = table.text(report, "policy", &value::POLICY);
    let fresh = table.text(report, "fresh", &value::DURATION);
    let stale = table.text(report, "stale", &value::STALENESS);
    let budget = table.text(report, "budget", &value::TIMEOUT);
    let absent = table.text(report, "absent", &value::ABSENT);
    let grant = table.text(report, "grant", &value::DURATION);
    let offline_grant = table.text(report, "offline_grant", &value::DURATION);
    let prefetch = table.switch(report, "prefetch");
    let rule = EffectivePolicy {
        name: Arc::from("default"),
        policy: policy?,
        fresh: fresh?,
        stale: stale?.limit(),
        budget: budget?,
        absent: absent?,
        grant: grant?,
        offline_grant: offline_grant?,
        prefetch: prefetch?,
    };
    refuse_longer_grant(table, &rule, report);
    Ok(rule)
}

/// What an upstream's section or a `[[rule]]` changes.
pub(super) fn changes(table: &Table, report: &mut Report<'_>) -> Result<PolicyOverrides, Told> {
    let policy = table.text_if_set(report, "policy", &value::POLICY);
    let fresh = table.text_if_set(report, "fresh", &value::DURATION);
    let stale = table.text_if_set(report, "stale", &value::STALENESS);
    let budget = table.text_if_set(report, "budget", &value::TIMEOUT);
    let absent = table.text_if_set(report, "absent", &value::ABSENT);
    let grant = table.text_if_set(report, "grant", &value::DURATION);
    let offline_grant = table.text_if_set(report, "offline_grant", &value::DURATION);
    let prefetch = table.switch_if_set(report, "prefetch");
    Ok(PolicyOverrides {
        policy: policy?,
        fresh: fresh?,
        stale: stale?,
        budget: budget?,
        absent: absent?,
        grant: grant?,
        offline_grant: offline_grant?,
        prefetch: prefetch?,
    })
}

/// A right that outlives an outage's limit would make that limit a false promise.
fn refuse_longer_grant(table: &Table, rule: &EffectivePolicy, report: &mut Report<'_>) {
    if rule.grant > rule.offline_grant {
        let key = if table.is_given("grant") {
            "grant"
        } else {
            "offline_grant"
        };
        let message = format!(
            "`grant` ({}) is longer than `offline_grant` ({})",
            humantime::format_duration(rule.grant),
            humantime::format_duration(rule.offline_grant)
        );
        let help =
            "a right holds at least as long in an outage: make `offline_grant` the longer one".to_owned();
        report.tell(table.at(key), table.path(key), message, Some(help));
    }
}

fn default_upstream(
    top: &Table,
    configured: &[Configured],
    report: &mut Report<'_>,
) -> Result<Arc<str>, Told> {
    let name = top.text(report, "default_upstream", &value::HOST)?;
    names::find(&name, configured).map_err(|wrong| {
        report.tell(
            top.at("default_upstream"),
            "default_upstream",
            wrong.message,
            wrong.help,
        )
    })
}

fn rules(
    document: &Document,
    default: Result<EffectivePolicy, Told>,
    configured: &[Configured],
    report: &mut Report<'_>,
) -> Result<Rules, Told> {
    let mut seen: Vec<(String, String)> = Vec::new();
    let mut read = Vec::new();
    for table in &document.rules {
        let changes = changes(table, report);
        let Ok(images) = table.list_if_set(report, "images", &value::PATTERN, true) else {
            continue;
        };
        let images = images.unwrap_or_default();
        if images.is_empty() {
            let help = r#"name them, as in images = ["ghcr.io/acme/*"]"#.to_owned();
            report.tell(
                table.at("images"),
                table.path("images"),
                "a rule without images never holds",
                Some(help),
            );
        }
        for (at, pattern) in &images {
            refuse_idle_pattern(table, at, pattern, configured, &seen, report);
            seen.push((pattern.to_string(), table.name.clone()));
        }
        if let Ok(changes) = changes {
            read.push((images.into_iter().map(|(_, pattern)| pattern).collect(), changes));
        }
    }
    let default = default?;
    let changes_grant =
        |upstream: &&Configured| upstream.changes.grant.is_some() || upstream.changes.offline_grant.is_some();
    for upstream in configured.iter().filter(changes_grant) {
        refuse_longer_grant(
            &upstream.table,
            &default.changed(Arc::from(""), &upstream.changes),
            report,
        );
    }
    let upstreams = configured
        .iter()
        .map(|upstream| (Arc::clone(&upstream.name), upstream.changes));
    let rules = Rules::new(default, upstreams, read);
    rules.map_err(|error| report.tell(&At::Default, "rule", error.to_string(), None))
}

/// A glob that can never be the first to match is a mistake: it looks as if it did something.
fn refuse_idle_pattern(
    table: &Table,
    at: &At,
    pattern: &ImagePattern,
    configured: &[Configured],
    seen: &[(String, String)],
    report: &mut Report<'_>,
) {
    if let Some(upstream) = pattern.upstream()
        && let Err(wrong) = names::find(upstream, configured)
    {
        report.tell(at, table.path("images"), wrong.message, wrong.help);
    }
    if let Some((_, rule)) = seen.iter().find(|(earlier, _)| *earlier == pattern.as_str()) {
        let message = format!("never reached: `{pattern}` stands already in rule {rule}");
        report.tell(
            at,
            table.path("images"),
            message,
            Some("the first match wins; leave one out".to_owned()),
        );
    }
}
