//! Checks across upstreams: unique host names, no request loop, existing references.

use std::net::SocketAddr;
use std::sync::Arc;

use http::Uri;

use super::address::is_same_host;
use super::diagnostic::{Origin, Report};
use super::parsers::{ParseError, nearest};
use super::upstream::ParsedUpstream;

/// Host names must be unique, otherwise a client's credential could be sent to the wrong upstream.
pub(super) fn check_hosts_unique(configured: &[ParsedUpstream], report: &mut Report<'_>) {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    let existing = configured.iter().filter(|upstream| !upstream.is_disabled());
    for upstream in existing.clone() {
        if let Some((name, _)) = seen.iter().find(|(name, _)| is_same_host(name, &upstream.name)) {
            let message = format!("`{}` and `{name}` are one registry", upstream.name);
            let help = "443 is the default port: keep one of the two sections".to_owned();
            let path = format!("upstream.\"{}\"", upstream.name);
            report.emit(&upstream.table.at, path, message, Some(help));
        }
        seen.push((&upstream.name, &upstream.name));
    }
    for upstream in existing.clone() {
        for (at, host) in &upstream.hosts {
            if let Some((_, owner)) = seen.iter().find(|(name, _)| is_same_host(name, host)) {
                let other = existing.clone().find(|upstream| &*upstream.name == *owner);
                let (at, message) = match (at, other) {
                    // The host is a default of a well-known upstream, so the error is reported at the other section.
                    (Origin::Default, Some(other)) => (
                        &other.table.at,
                        format!("`{host}` is a host of the upstream `{}`", upstream.name),
                    ),
                    _ => (at, format!("`{host}` already means the upstream `{owner}`")),
                };
                let help = "host names must be unique: remove it from one of the two upstreams".to_owned();
                report.emit(at, upstream.table.path("hosts"), message, Some(help));
            }
            seen.push((host, &upstream.name));
        }
    }
    check_token_hosts_unique(existing, &seen, report);
}

/// Hosts of intercepted token services must be unique too; one may equal its own upstream's host.
fn check_token_hosts_unique<'a>(
    existing: impl Iterator<Item = &'a ParsedUpstream>,
    taken: &[(&str, &str)],
    report: &mut Report<'_>,
) {
    const KEY: &str = "local_tokens";
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for upstream in existing {
        let Some(host) = upstream.token_host() else {
            continue;
        };
        let others = |(_, owner): &&(&str, &str)| *owner != &*upstream.name;
        if let Some((_, owner)) = taken
            .iter()
            .chain(&seen)
            .filter(others)
            .find(|(name, _)| is_same_host(name, host))
        {
            let message = format!("`{host}` already means the upstream `{owner}`");
            let help = "use a token service of this upstream alone, or remove the key".to_owned();
            report.emit(
                upstream.table.at(KEY),
                upstream.table.path(KEY),
                message,
                Some(help),
            );
        }
        seen.push((host, &upstream.name));
    }
}

/// Rejects an upstream at the cache's own address, which would cause a request loop.
pub(super) fn check_no_loop(
    configured: &[ParsedUpstream],
    listening: &[SocketAddr],
    report: &mut Report<'_>,
) {
    for upstream in configured {
        for (at, url) in &upstream.urls {
            let address = url.parse::<Uri>().ok().and_then(|uri| {
                let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
                let host = if host == "localhost" { "127.0.0.1" } else { host };
                let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") {
                    443
                } else {
                    80
                });
                Some(SocketAddr::new(host.parse().ok()?, port))
            });
            let is_ours = |address: SocketAddr| {
                listening.iter().any(|own| {
                    let covers =
                        own.ip() == address.ip() || (own.ip().is_unspecified() && address.ip().is_loopback());
                    covers && own.port() == address.port()
                })
            };
            if address.is_some_and(is_ours) {
                let message = format!("`{url}` is an address of this cache: requests would loop");
                report.emit(
                    at,
                    upstream.table.path("url"),
                    message,
                    Some("write the address of the registry".to_owned()),
                );
            }
        }
    }
}

/// Finds an upstream by exact name.
pub(super) fn find(name: &str, configured: &[ParsedUpstream]) -> Result<Arc<str>, ParseError> {
    if let Some(found) = configured.iter().find(|upstream| &*upstream.name == name) {
        return if found.is_disabled() {
            let help = Some(format!("remove enabled = false from [upstream.\"{name}\"]"));
            Err(ParseError {
                message: format!("the upstream `{name}` is disabled"),
                help,
            })
        } else {
            Ok(Arc::clone(&found.name))
        };
    }
    let existing = || configured.iter().filter(|upstream| !upstream.is_disabled());
    let by_host = existing().find(|upstream| upstream.hosts.iter().any(|(_, host)| host == name));
    let help = match (by_host, nearest(name, existing().map(|upstream| &*upstream.name))) {
        (Some(upstream), _) => format!("its name is `{}`", upstream.name),
        (None, Some(nearest)) => format!("did you mean `{nearest}`?"),
        (None, None) => format!("add a section [upstream.\"{name}\"]"),
    };
    Err(ParseError {
        message: format!("the upstream `{name}` is not configured"),
        help: Some(help),
    })
}
