//! Builds the configuration from tables: one reader per section, and checks across sections.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use super::diagnostic::{Origin, Report, Reported};
use super::document::Document;
use super::parsers;
use super::schema::Section;
use super::table::Table;
use super::upstream::{self, ParsedUpstream};
use super::validate;
use super::{Admin, Config, Listen, Log, ServerCertificate, Sources, StoreLimits, Tls};
use crate::policy::Policy;
use crate::policy::min_age::{AgeLimit, AgeOverrides};
use crate::policy::refresh::{RefreshOverrides, RefreshPolicy};
use crate::policy::rules::{EffectivePolicy, ImagePattern, PolicyOverrides, Rules};

/// Default name of the certificate directory.
pub(super) const CERTIFICATES: &str = "certs";

/// Builds the configuration. All sections are read before returning an error, so that all errors are reported.
pub(super) fn load(
    document: &Document,
    sources: &Sources<'_>,
    report: &mut Report<'_>,
) -> Result<Config, Reported> {
    let top = document.fixed(Section::Top);
    let data = top
        .text_if_set(report, "data", &parsers::PATH)
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
        .list(report, "tunnel", &parsers::TUNNEL);

    let default = default_rule(&document.fixed(Section::Default), report);
    let configured = upstream::read_all(document, report);
    if let Ok(listen) = &listen {
        validate::check_no_loop(&configured, &listen.registry, report);
    }
    let plain_http = listen.as_ref().ok().map(|listen| listen.plain_http);
    let access = super::access::read(document, plain_http, &configured, report);
    let default_upstream = default_upstream(&top, &configured, report);
    let rules = rules(document, default, &configured, report);
    let upstreams = configured
        .into_iter()
        .filter_map(ParsedUpstream::into_config)
        .collect();
    Ok(Config {
        data: data?,
        default_upstream: default_upstream?,
        listen: listen?,
        access: access?,
        tls: tls?,
        tunnels: tunnels?.into_iter().map(|(_, tunnel)| tunnel).collect(),
        store: store?,
        upstreams,
        rules: rules?,
        log: log?,
        limits: limits?,
    })
}

fn listen(table: &Table, report: &mut Report<'_>) -> Result<Listen, Reported> {
    let registry = table.list(report, "registry", &parsers::ADDRESS);
    let trusted = table.list(report, "proxy_protocol_from", &parsers::NETWORK);
    let plain_http = table.text(report, "plain_http", &parsers::PLAIN_HTTP);
    let admin = table.text(report, "admin", &parsers::ADMIN);
    let token = table.text_if_set(report, "admin_token_file", &parsers::PATH);
    let admin_token_file =
        token.map(|path| path.map(|path| report.resolve(table.entry_at("admin_token_file"), path)));
    let registry = registry?;
    if registry.is_empty() {
        let message = "without an address no client can reach the cache";
        report.emit(
            table.at("registry"),
            table.path("registry"),
            message,
            Some(r#"write ["127.0.0.1:5000"]"#.to_owned()),
        );
    }
    let (mut seen, mut sockets): (Vec<SocketAddr>, Vec<PathBuf>) = (Vec::new(), Vec::new());
    for (at, address) in registry {
        let twice = match address {
            parsers::Address::Tcp(address) => {
                // Each use of port 0 binds another port.
                let twice = address.port() != 0 && seen.contains(&address);
                seen.push(address);
                twice.then(|| address.to_string())
            }
            parsers::Address::Unix(path) => {
                let twice = sockets
                    .contains(&path)
                    .then(|| format!("unix:{}", path.display()));
                sockets.push(path);
                twice
            }
        };
        if let Some(twice) = twice {
            let message = format!("`{twice}` is listed twice");
            report.emit(&at, table.path("registry"), message, None);
        }
    }
    let admin = admin?;
    if let Admin::Tcp(address) = admin
        && address.port() != 0
        && seen.contains(&address)
    {
        let message = format!("`{address}` is already an address of the registry");
        let help = "the admin API needs another address that clients cannot reach".to_owned();
        report.emit(table.at("admin"), table.path("admin"), message, Some(help));
    }
    Ok(Listen {
        registry: seen,
        sockets,
        proxy_protocol_from: trusted?.into_iter().map(|(_, network)| network).collect(),
        plain_http: plain_http?,
        admin,
        admin_token_file: admin_token_file?,
    })
}

/// Default certificate directory without a configuration file: `certs` in the working directory if that is usable, else in
/// the cache directory, which does not depend on the working directory. `None` with a file: then it is beside the file.
pub(super) fn certificates(sources: &Sources<'_>, data: Option<&PathBuf>) -> Option<PathBuf> {
    let is_without_file = sources.origin.as_os_str().is_empty();
    let in_data = || data.map(|data| data.join(CERTIFICATES));
    is_without_file
        .then(|| sources.working_dir_certs.clone().or_else(in_data))
        .flatten()
}

fn tls(table: &Table, certificates: Option<PathBuf>, report: &mut Report<'_>) -> Result<Tls, Reported> {
    let path = |key: &str, report: &mut Report<'_>| {
        let path = table.text_if_set(report, key, &parsers::PATH)?;
        Ok(path.map(|path| report.resolve(table.entry_at(key), path)))
    };
    let folder = path("folder", report);
    let certificate = path("certificate", report);
    let key = path("key", report);
    let names = table.list(report, "names", &parsers::CERTIFICATE_NAME);
    let constrained = table.bool(report, "constrained");
    let server_certificate = match (certificate?, key?) {
        (Some(certificate), Some(key)) => Some(ServerCertificate { certificate, key }),
        (None, None) => None,
        (certificate, _) => {
            let (given, missing) = if certificate.is_some() {
                ("certificate", "key")
            } else {
                ("key", "certificate")
            };
            let message = format!("`{given}` without `{missing}`");
            return Err(report.emit(
                table.at(given),
                table.path(given),
                message,
                Some(format!("add `{missing}`")),
            ));
        }
    };
    let folder = folder?.ok_or(Reported)?;
    let is_named = table.is_set("folder");
    let folder = certificates.filter(|_| !is_named).unwrap_or(folder);
    Ok(Tls {
        folder,
        names: names?.into_iter().map(|(_, name)| name).collect(),
        constrained: constrained?,
        certificate: server_certificate,
    })
}

fn store(table: &Table, report: &mut Report<'_>) -> Result<StoreLimits, Reported> {
    let bytes_max = table.text(report, "size", &parsers::STORE_SIZE);
    let free_bytes_min = table.text(report, "free", &parsers::SIZE);
    let scrub_rate = table.text(report, "scrub", &parsers::RATE);
    Ok(StoreLimits {
        bytes_max: bytes_max?,
        free_bytes_min: free_bytes_min?,
        scrub_rate: scrub_rate?,
    })
}

fn log(table: &Table, report: &mut Report<'_>) -> Result<Log, Reported> {
    let level = table.text(report, "level", &parsers::LOG_LEVEL);
    let format = table.text(report, "format", &parsers::LOG_FORMAT);
    Ok(Log {
        level: level?,
        format: format?,
    })
}

fn default_rule(table: &Table, report: &mut Report<'_>) -> Result<EffectivePolicy, Reported> {
    let policy = table.text(report, "policy", &parsers::POLICY);
    let max_age = table.text(report, "max_age", &parsers::DURATION);
    let stale_if_error = table.text(report, "stale_if_error", &parsers::STALE_LIMIT);
    let revalidate_timeout = table.text(report, "revalidate_timeout", &parsers::TIMEOUT);
    let on_not_found = table.text(report, "on_not_found", &parsers::ON_NOT_FOUND);
    let grant_ttl = table.text(report, "grant_ttl", &parsers::DURATION);
    let grant_ttl_offline = table.text(report, "grant_ttl_offline", &parsers::DURATION);
    let prefetch = table.bool(report, "prefetch");
    let refresh = table.text(report, "refresh", &parsers::REFRESH);
    let refresh_used_within = table.text(report, "refresh_used_within", &parsers::DURATION);
    let refresh_quota_floor = table.text(report, "refresh_quota_floor", &parsers::QUOTA_FLOOR);
    let min_age = table.text(report, "min_age", &parsers::MIN_AGE);
    let on_unknown_age = table.text(report, "on_unknown_age", &parsers::ON_UNKNOWN_AGE);
    let trust_created = table.bool(report, "trust_created");
    let by_digest = table.bool(report, "min_age_by_digest");
    let rule = EffectivePolicy {
        name: Arc::from("default"),
        policy: policy?,
        max_age: max_age?,
        stale_if_error: stale_if_error?.limit(),
        revalidate_timeout: revalidate_timeout?,
        on_not_found: on_not_found?,
        grant_ttl: grant_ttl?,
        grant_ttl_offline: grant_ttl_offline?,
        prefetch: prefetch?,
        refresh: RefreshPolicy {
            interval: refresh?.interval(),
            used_within: refresh_used_within?,
            quota_floor: refresh_quota_floor?,
        },
        age_limit: AgeLimit {
            min_age: min_age?,
            on_unknown_age: on_unknown_age?,
            trust_created: trust_created?,
            by_digest: by_digest?,
        },
    };
    check_grant_ttls(table, &rule, report);
    check_refresh(table, &rule, report);
    check_min_age(table, &rule, report);
    Ok(rule)
}

/// Overrides of an upstream's section or a `[[rule]]`.
pub(super) fn changes(table: &Table, report: &mut Report<'_>) -> Result<PolicyOverrides, Reported> {
    let policy = table.text_if_set(report, "policy", &parsers::POLICY);
    let max_age = table.text_if_set(report, "max_age", &parsers::DURATION);
    let stale_if_error = table.text_if_set(report, "stale_if_error", &parsers::STALE_LIMIT);
    let revalidate_timeout = table.text_if_set(report, "revalidate_timeout", &parsers::TIMEOUT);
    let on_not_found = table.text_if_set(report, "on_not_found", &parsers::ON_NOT_FOUND);
    let grant_ttl = table.text_if_set(report, "grant_ttl", &parsers::DURATION);
    let grant_ttl_offline = table.text_if_set(report, "grant_ttl_offline", &parsers::DURATION);
    let prefetch = table.bool_if_set(report, "prefetch");
    let refresh = table.text_if_set(report, "refresh", &parsers::REFRESH);
    let refresh_used_within = table.text_if_set(report, "refresh_used_within", &parsers::DURATION);
    let refresh_quota_floor = table.text_if_set(report, "refresh_quota_floor", &parsers::QUOTA_FLOOR);
    let min_age = table.text_if_set(report, "min_age", &parsers::MIN_AGE);
    let on_unknown_age = table.text_if_set(report, "on_unknown_age", &parsers::ON_UNKNOWN_AGE);
    let trust_created = table.bool_if_set(report, "trust_created");
    let by_digest = table.bool_if_set(report, "min_age_by_digest");
    Ok(PolicyOverrides {
        policy: policy?,
        max_age: max_age?,
        stale_if_error: stale_if_error?,
        revalidate_timeout: revalidate_timeout?,
        on_not_found: on_not_found?,
        grant_ttl: grant_ttl?,
        grant_ttl_offline: grant_ttl_offline?,
        prefetch: prefetch?,
        refresh: RefreshOverrides {
            interval: refresh?,
            used_within: refresh_used_within?,
            quota_floor: refresh_quota_floor?,
        },
        age_limit: AgeOverrides {
            min_age: min_age?,
            on_unknown_age: on_unknown_age?,
            trust_created: trust_created?,
            by_digest: by_digest?,
        },
    })
}

/// Rejects a minimum age that a section turns on under the policy `never`, where no age can become known. `rule`: the
/// effective policy of the section.
fn check_min_age(table: &Table, rule: &EffectivePolicy, report: &mut Report<'_>) {
    if table.is_set("min_age") && rule.age_limit.is_on() && rule.policy == Policy::Never {
        let message = "`min_age` with policy = \"never\", which forbids the requests that show an age";
        let help = "write min_age = \"0s\", or another policy".to_owned();
        report.emit(table.at("min_age"), table.path("min_age"), message, Some(help));
    }
}

/// Rejects a minimum age by digest in a rule that applies to no pull by digest.
fn check_by_digest(
    table: &Table,
    images: &[ImagePattern],
    changes: &PolicyOverrides,
    report: &mut Report<'_>,
) {
    if changes.age_limit.by_digest == Some(true) && images.iter().all(ImagePattern::has_tag) {
        let message = "`min_age_by_digest` for globs with a tag, which apply to no pull by digest";
        let help = "remove the tag from a glob, or set it in another rule".to_owned();
        let key = "min_age_by_digest";
        report.emit(table.at(key), table.path(key), message, Some(help));
    }
}

/// Rejects refreshes that a section turns on and that can never happen. `rule`: the effective policy of the section.
fn check_refresh(table: &Table, rule: &EffectivePolicy, report: &mut Report<'_>) {
    let Some(interval) = rule.refresh.interval else {
        return;
    };
    if table.is_set("refresh") && rule.policy == Policy::Never {
        let message = "`refresh` with policy = \"never\", which forbids requests to the registry";
        let help = "write refresh = \"off\", or another policy".to_owned();
        report.emit(table.at("refresh"), table.path("refresh"), message, Some(help));
    }
    let keys = ["refresh_used_within", "refresh"];
    let Some(key) = keys.into_iter().find(|key| table.is_set(key)) else {
        return;
    };
    if rule.refresh.used_within < interval {
        let message = format!(
            "`refresh_used_within` ({}) is shorter than `refresh` ({}): a tag would be out of use before its refresh",
            humantime::format_duration(rule.refresh.used_within),
            humantime::format_duration(interval)
        );
        let help = "increase `refresh_used_within`, or refresh more often".to_owned();
        report.emit(table.at(key), table.path(key), message, Some(help));
    }
}

/// A grant must last at least as long in an outage, otherwise `grant_ttl` would exceed its offline limit.
fn check_grant_ttls(table: &Table, rule: &EffectivePolicy, report: &mut Report<'_>) {
    if rule.grant_ttl > rule.grant_ttl_offline {
        let key = if table.is_set("grant_ttl") {
            "grant_ttl"
        } else {
            "grant_ttl_offline"
        };
        let message = format!(
            "`grant_ttl` ({}) is longer than `grant_ttl_offline` ({})",
            humantime::format_duration(rule.grant_ttl),
            humantime::format_duration(rule.grant_ttl_offline)
        );
        let help = "a grant must last at least as long in an outage: increase `grant_ttl_offline`".to_owned();
        report.emit(table.at(key), table.path(key), message, Some(help));
    }
}

fn default_upstream(
    top: &Table,
    configured: &[ParsedUpstream],
    report: &mut Report<'_>,
) -> Result<Arc<str>, Reported> {
    let name = top.text(report, "default_upstream", &parsers::HOST)?;
    validate::find(&name, configured).map_err(|error| {
        report.emit(
            top.at("default_upstream"),
            "default_upstream",
            error.message,
            error.help,
        )
    })
}

fn rules(
    document: &Document,
    default: Result<EffectivePolicy, Reported>,
    configured: &[ParsedUpstream],
    report: &mut Report<'_>,
) -> Result<Rules, Reported> {
    let mut seen: Vec<(String, String)> = Vec::new();
    let mut read = Vec::new();
    for table in &document.rules {
        let changes = changes(table, report);
        let Ok(images) = table.list_if_set(report, "images", &parsers::PATTERN, true) else {
            continue;
        };
        let images = images.unwrap_or_default();
        if images.is_empty() {
            let help = r#"add them, as in images = ["ghcr.io/acme/*"]"#.to_owned();
            report.emit(
                table.at("images"),
                table.path("images"),
                "a rule without images never applies",
                Some(help),
            );
        }
        for (at, pattern) in &images {
            check_pattern_reachable(table, at, pattern, configured, &seen, report);
            seen.push((pattern.to_string(), table.name.clone()));
        }
        if let Ok(changes) = changes {
            let globs: Vec<ImagePattern> = images.iter().map(|(_, pattern)| pattern.clone()).collect();
            check_by_digest(table, &globs, &changes, report);
            if let Ok(default) = &default {
                let base = policy_of(default, &images, configured);
                let policy = base.with_overrides(Arc::from(""), &changes);
                check_refresh(table, &policy, report);
                check_min_age(table, &policy, report);
            }
            read.push((images.into_iter().map(|(_, pattern)| pattern).collect(), changes));
        }
    }
    let default = default?;
    for upstream in configured {
        let policy = default.with_overrides(Arc::from(""), &upstream.changes);
        check_refresh(&upstream.table, &policy, report);
        check_min_age(&upstream.table, &policy, report);
    }
    let changes_grant = |upstream: &&ParsedUpstream| {
        upstream.changes.grant_ttl.is_some() || upstream.changes.grant_ttl_offline.is_some()
    };
    for upstream in configured.iter().filter(changes_grant) {
        check_grant_ttls(
            &upstream.table,
            &default.with_overrides(Arc::from(""), &upstream.changes),
            report,
        );
    }
    let upstreams = configured
        .iter()
        .map(|upstream| (Arc::clone(&upstream.name), upstream.changes));
    let rules = Rules::new(default, upstreams, read);
    rules.map_err(|error| report.emit(&Origin::Default, "rule", error.to_string(), None))
}

/// The policy that a rule for these images overrides: of their upstream, if all name one, else the default.
fn policy_of(
    default: &EffectivePolicy,
    images: &[(Origin, ImagePattern)],
    configured: &[ParsedUpstream],
) -> EffectivePolicy {
    let mut names = images.iter().map(|(_, pattern)| pattern.upstream());
    let first = names.next().flatten();
    let only = first.filter(|first| names.all(|name| name == Some(first)));
    let upstream = configured
        .iter()
        .find(|upstream| only.is_some_and(|only| only == &*upstream.name));
    match upstream {
        Some(upstream) => default.with_overrides(Arc::from(""), &upstream.changes),
        None => default.clone(),
    }
}

/// Rejects a glob that can never be the first match.
fn check_pattern_reachable(
    table: &Table,
    at: &Origin,
    pattern: &ImagePattern,
    configured: &[ParsedUpstream],
    seen: &[(String, String)],
    report: &mut Report<'_>,
) {
    if let Some(upstream) = pattern.upstream()
        && let Err(error) = validate::find(upstream, configured)
    {
        report.emit(at, table.path("images"), error.message, error.help);
    }
    if let Some((_, rule)) = seen.iter().find(|(earlier, _)| *earlier == pattern.as_str()) {
        let message = format!("never reached: `{pattern}` is already in rule {rule}");
        report.emit(
            at,
            table.path("images"),
            message,
            Some("the first matching rule applies; remove one of them".to_owned()),
        );
    }
}
