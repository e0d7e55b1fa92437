//! Redirects of clients to the bucket: which, for how long, and to which host.

use std::time::Duration;

use serde::Deserialize;

use super::{check_transport, words};
use crate::config::diagnostic::{Checked, Report};
use crate::config::schema::Shared;
use crate::shared::{RedirectMode, RedirectSettings, forwards_credential};
use crate::upstream::Origin;

/// Longest validity of a URL: a download may begin until its end.
const TTL_MAX: Duration = Duration::from_secs(60 * 60);

/// Which requests are redirected.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub(in crate::config) enum RedirectChoice {
    Never,
    Uncached,
    Always,
}

/// The redirects, and the endpoint for clients if it is another one. `hosts`: the names by which clients reach this cache.
pub(super) fn read(
    keys: &Shared,
    endpoint: &Origin,
    hosts: &[&str],
    report: &mut Report<'_>,
) -> Checked<(RedirectSettings, Option<Origin>)> {
    let mode = match keys.redirect.get()? {
        RedirectChoice::Never => RedirectMode::Never,
        RedirectChoice::Uncached => RedirectMode::Uncached,
        RedirectChoice::Always => RedirectMode::Always,
    };
    let valid: Duration = keys.redirect_ttl.get()?.into();
    if valid > TTL_MAX {
        let message = format!("{} is too long: anyone who has the URL can use it", words(valid));
        return Err(report.emit(&keys.redirect_ttl.subject, message, "write \"1h\" or less"));
    }
    let for_clients = match keys.redirect_endpoint.get()? {
        Some(_) if mode == RedirectMode::Never => {
            let message = "`redirect_endpoint` without `redirect`";
            let help = r#"add redirect = "uncached" or "always", or remove it"#;
            return Err(report.emit(&keys.redirect_endpoint.subject, message, help));
        }
        Some(url) => match String::from(url).parse::<Origin>() {
            Ok(origin) => Some(check_transport(
                origin,
                &keys.redirect_endpoint.subject,
                keys,
                report,
            )?),
            Err(error) => return Err(report.emit(&keys.redirect_endpoint.subject, error.to_string(), "")),
        },
        None => None,
    };
    let host = for_clients.as_ref().unwrap_or(endpoint).host();
    if mode != RedirectMode::Never
        && let Some(name) = hosts
            .iter()
            .find(|name| forwards_credential(without_port(name), host))
    {
        let message = format!(
            "clients reach this cache as {name}, and would send their credential to {host} too: its name is the same or below"
        );
        let help = "name the storage differently for clients with `redirect_endpoint`";
        return Err(report.emit(&keys.redirect.subject, message, help));
    }
    let host = host.into();
    Ok((RedirectSettings { mode, valid, host }, for_clients))
}

fn without_port(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(name, _)| name)
}
