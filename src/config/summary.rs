//! Summary of the effective settings, for `ifnewer check`, in terms of the configuration keys.

use std::fmt::{self, Display, Formatter};

use bytesize::ByteSize;

use super::policy::words;
use super::{Admin, AuthMode, Config, LogFormat, PlainHttp, Proxy, UpstreamConfig};
use crate::policy::rules::EffectivePolicy;

/// Prints the effective configuration, without secrets.
pub struct Summary<'a>(pub(super) &'a Config);

impl Display for Summary<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let config = self.0;
        let sockets = config.listen.sockets.iter();
        let sockets = sockets.map(|path| format!("unix:{}", path.display()));
        let addresses: Vec<String> = config
            .listen
            .registry
            .iter()
            .map(ToString::to_string)
            .chain(sockets)
            .collect();
        let plain_http = match config.listen.plain_http {
            PlainHttp::Loopback => "plain HTTP from loopback",
            PlainHttp::Any => "plain HTTP from anywhere",
            PlainHttp::Off => "TLS only",
        };
        writeln!(f, "data      {}", config.data.display())?;
        writeln!(f, "registry  {} ({plain_http})", addresses.join(", "))?;
        match &config.listen.admin {
            Admin::Off => writeln!(f, "admin     off")?,
            Admin::Tcp(address) => writeln!(f, "admin     {address}")?,
            Admin::Unix(path) => writeln!(f, "admin     unix:{}", path.display())?,
        }
        if !config.tunnels.is_empty() {
            let tunnels: Vec<String> = config.tunnels.iter().map(ToString::to_string).collect();
            writeln!(f, "tunnels   {}", tunnels.join(", "))?;
        }
        if let Some(access) = &config.access {
            let lists = match access.allows.len() {
                0 => "each may pull every image".to_owned(),
                1 => "1 allow list".to_owned(),
                lists => format!("{lists} allow lists"),
            };
            let cas = match access.client_roots.len() {
                0 => String::new(),
                cas => format!("certificates of {cas} CAs, "),
            };
            writeln!(f, "access    {} users, {cas}{lists}", access.users.len())?;
        }
        match &config.tls.certificate {
            Some(own) => writeln!(f, "tls       {}", own.certificate.display())?,
            None => writeln!(f, "tls       generated in {}", config.tls.folder.display())?,
        }
        let (size, free) = (
            ByteSize(config.store.bytes_max),
            ByteSize(config.store.free_bytes_min),
        );
        writeln!(f, "store     {size}, {free} kept free")?;
        if let Some(shared) = &config.shared {
            let bucket = &shared.bucket;
            let use_of = if shared.write {
                "read and written"
            } else {
                "read only"
            };
            writeln!(
                f,
                "shared    {} at {}, {use_of}, {}",
                bucket.name(),
                bucket.endpoint,
                bucket.credential.source()
            )?;
        }
        let format = match config.log.format {
            LogFormat::Human => "human",
            LogFormat::Json => "json",
        };
        writeln!(f, "log       {}, {format}", config.log.level)?;
        writeln!(f, "\nupstreams (default: {})", config.default_upstream)?;
        for upstream in &config.upstreams {
            write_upstream(f, upstream, config.rules.default_for(&upstream.name))?;
        }
        let rules: Vec<_> = config.rules.names().collect();
        if !rules.is_empty() {
            writeln!(f, "\nrules (the first match applies)")?;
        }
        for rule in rules {
            writeln!(f, "  {rule}")?;
        }
        let unwatched = config.rules.unwatched();
        if !unwatched.is_empty() {
            writeln!(
                f,
                "\nwarning   `min_age` without `refresh`: new digests are seen, and age, only from the next pull on"
            )?;
        }
        for policy in unwatched {
            writeln!(f, "  {policy}")?;
        }
        Ok(())
    }
}

fn write_upstream(f: &mut Formatter<'_>, upstream: &UpstreamConfig, rule: &EffectivePolicy) -> fmt::Result {
    let urls: Vec<_> = upstream.urls.iter().map(ToString::to_string).collect();
    write!(f, "  {}  {}", upstream.name, urls.join(", "))?;
    match (upstream.auth, &upstream.credential) {
        (AuthMode::PerClient, _) => {}
        (AuthMode::Shared, None) => f.write_str(", shared")?,
        (AuthMode::Shared, Some(credential)) => write!(f, ", shared, as {credential}")?,
    }
    if let Some(realm) = &upstream.local_tokens {
        write!(f, ", local tokens for {realm}")?;
    }
    match &upstream.proxy {
        Proxy::Environment => {}
        Proxy::None => f.write_str(", no proxy")?,
        Proxy::Url(url) => write!(f, ", through {url}")?,
    }
    let stale_if_error = rule
        .stale_if_error
        .map_or_else(|| "forever".to_owned(), |limit| words(limit).to_string());
    write!(
        f,
        ": {}, max_age {}, stale_if_error {stale_if_error}, revalidate_timeout {}, on_not_found {}, grant_ttl {}, grant_ttl_offline {}",
        rule.policy,
        words(rule.max_age),
        words(rule.revalidate_timeout),
        rule.on_not_found.name(),
        words(rule.grant_ttl),
        words(rule.grant_ttl_offline),
    )?;
    if rule.age_limit.is_on() {
        write!(
            f,
            ", min_age {}, on_unknown_age {}",
            words(rule.age_limit.min_age),
            rule.age_limit.on_unknown_age.name()
        )?;
        if rule.age_limit.by_digest {
            f.write_str(", also by digest")?;
        }
    }
    if let Some(interval) = rule.scheduled_refresh().interval {
        write!(f, ", refresh {}", words(interval))?;
    }
    writeln!(f)
}
