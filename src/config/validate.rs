//! Checks across upstreams: unique host names, no request loop, existing references.

use std::net::SocketAddr;
use std::sync::Arc;

use http::Uri;

use super::UpstreamConfig;
use super::address::is_same_host;
use super::diagnostic::{Checked, Origin, Report, Subject};
use super::upstreams::ParsedUpstream;
use super::value::nearest;

/// Host names, each with the upstream that it means.
#[derive(Default)]
struct Hosts<'a>(Vec<(&'a str, &'a ParsedUpstream)>);

impl<'a> Hosts<'a> {
    /// The upstream that a host means already, if any of these.
    fn owner(&self, host: &str, is_other: impl Fn(&ParsedUpstream) -> bool) -> Option<&'a ParsedUpstream> {
        let mut known = self.0.iter().filter(|(_, owner)| is_other(owner));
        known
            .find(|(name, _)| is_same_host(name, host))
            .map(|(_, owner)| *owner)
    }
}

/// Host names must be unique, otherwise a client's credential could be sent to the wrong upstream. Those of intercepted
/// token services must be unique too; one may equal its own upstream's host.
pub(super) fn check_hosts_unique(configured: &[ParsedUpstream], report: &mut Report<'_>) {
    let mut hosts = Hosts::default();
    let existing = || configured.iter().filter(|upstream| !upstream.is_disabled);
    for upstream in existing() {
        let name = &*upstream.name;
        if let Some(owner) = hosts.owner(name, |_| true) {
            let message = format!("`{name}` and `{}` are one registry", owner.name);
            let help = "443 is the default port: keep one of the two sections";
            report.emit(&upstream.section, message, help);
        }
        hosts.0.push((name, upstream));
    }
    for upstream in existing() {
        for (subject, host) in &upstream.hosts {
            if let Some(owner) = hosts.owner(host, |_| true) {
                let (name, other) = (&upstream.name, &owner.name);
                let (subject, message) = match subject.origin {
                    // The host is a default of a well-known upstream, so the error is reported at the other section.
                    Origin::Default => (
                        &owner.section,
                        format!("`{host}` is a host of the upstream `{name}`"),
                    ),
                    _ => (subject, format!("`{host}` already means the upstream `{other}`")),
                };
                let help = "host names must be unique: remove it from one of the two upstreams";
                report.emit(subject, message, help);
            }
            hosts.0.push((host, upstream));
        }
    }
    for upstream in existing() {
        let Some(host) = upstream.config.as_ref().and_then(UpstreamConfig::token_host) else {
            continue;
        };
        if let Some(owner) = hosts.owner(host, |owner| owner.name != upstream.name) {
            let message = format!("`{host}` already means the upstream `{}`", owner.name);
            let help = "use a token service of this upstream alone, or remove the key";
            report.emit(&upstream.token_service, message, help);
        }
        hosts.0.push((host, upstream));
    }
}

/// Rejects an upstream at the cache's own address, which would cause a request loop.
pub(super) fn check_no_loop(
    configured: &[ParsedUpstream],
    listening: &[SocketAddr],
    report: &mut Report<'_>,
) {
    for upstream in configured {
        for (subject, url) in &upstream.urls {
            let covers = |own: &SocketAddr, address: SocketAddr| {
                let is_here = own.ip().is_unspecified() && address.ip().is_loopback();
                (own.ip() == address.ip() || is_here) && own.port() == address.port()
            };
            let is_ours = |address| listening.iter().any(|own| covers(own, address));
            if address_of(url).is_some_and(is_ours) {
                let message = format!("`{url}` is an address of this cache: requests would loop");
                report.emit(subject, message, "write the address of the registry");
            }
        }
    }
}

/// Address in a URL; `None`: another host name.
fn address_of(url: &str) -> Option<SocketAddr> {
    let uri: Uri = url.parse().ok()?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    let host = if host == "localhost" { "127.0.0.1" } else { host };
    let default_port = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    Some(SocketAddr::new(
        host.parse().ok()?,
        uri.port_u16().unwrap_or(default_port),
    ))
}

/// Finds an upstream by exact name. A name that is not found is reported.
pub(super) fn find(
    name: &str,
    subject: &Subject,
    configured: &[ParsedUpstream],
    report: &mut Report<'_>,
) -> Checked<Arc<str>> {
    if let Some(found) = configured.iter().find(|upstream| &*upstream.name == name) {
        if found.is_disabled {
            let help = format!("remove enabled = false from [upstream.\"{name}\"]");
            return Err(report.emit(subject, format!("the upstream `{name}` is disabled"), help));
        }
        return Ok(Arc::clone(&found.name));
    }
    let existing = || configured.iter().filter(|upstream| !upstream.is_disabled);
    let by_host = existing().find(|upstream| upstream.hosts.iter().any(|(_, host)| host == name));
    let help = match (by_host, nearest(name, existing().map(|upstream| &*upstream.name))) {
        (Some(upstream), _) => format!("its name is `{}`", upstream.name),
        (None, Some(nearest)) => format!("did you mean `{nearest}`?"),
        (None, None) => format!("add a section [upstream.\"{name}\"]"),
    };
    Err(report.emit(subject, format!("the upstream `{name}` is not configured"), help))
}
