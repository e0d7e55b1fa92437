//! What is in effect, for `ifnewer check`: every fact in words that can be searched for in the configuration.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use bytesize::ByteSize;

use super::{Access, Admin, Config, LogFormat, Plain, Proxy, UpstreamConfig};
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
        let plain = match config.listen.plain {
            Plain::Loopback => "plain HTTP from loopback",
            Plain::Any => "plain HTTP from anywhere",
            Plain::Nobody => "TLS only",
        };
        writeln!(f, "data      {}", config.data.display())?;
        writeln!(f, "registry  {} ({plain})", addresses.join(", "))?;
        match &config.listen.admin {
            Admin::Off => writeln!(f, "admin     off")?,
            Admin::Tcp(address) => writeln!(f, "admin     {address}")?,
            Admin::Unix(path) => writeln!(f, "admin     unix:{}", path.display())?,
        }
        if !config.tunnels.is_empty() {
            let tunnels: Vec<String> = config.tunnels.iter().map(ToString::to_string).collect();
            writeln!(f, "tunnels   {}", tunnels.join(", "))?;
        }
        if let Some(entry) = &config.entry {
            let lists = match entry.allows.len() {
                0 => "each may pull everything".to_owned(),
                1 => "1 list of what they may pull".to_owned(),
                lists => format!("{lists} lists of what they may pull"),
            };
            let cas = match entry.client_roots.len() {
                0 => String::new(),
                cas => format!("certificates of {cas} CAs, "),
            };
            writeln!(f, "access    {} users, {cas}{lists}", entry.users.len())?;
        }
        match &config.tls.own {
            Some(own) => writeln!(f, "tls       {}", own.certificate.display())?,
            None => writeln!(
                f,
                "tls       made by ourselves in {}",
                config.tls.folder.display()
            )?,
        }
        let (size, free) = (
            ByteSize(config.store.bytes_max),
            ByteSize(config.store.free_bytes_min),
        );
        writeln!(f, "store     {size}, {free} left free")?;
        let format = match config.log.format {
            LogFormat::Human => "human",
            LogFormat::Json => "json",
        };
        writeln!(f, "log       {}, {format}", config.log.level)?;
        writeln!(
            f,
            "\nupstreams (a client that names none means {})",
            config.default_upstream
        )?;
        for upstream in &config.upstreams {
            write_upstream(f, upstream, config.rules.otherwise(&upstream.name))?;
        }
        let rules: Vec<_> = config.rules.names().collect();
        if !rules.is_empty() {
            writeln!(f, "\nrules (the first match wins)")?;
        }
        for rule in rules {
            writeln!(f, "  {rule}")?;
        }
        Ok(())
    }
}

fn write_upstream(f: &mut Formatter<'_>, upstream: &UpstreamConfig, rule: &EffectivePolicy) -> fmt::Result {
    let urls: Vec<_> = upstream.urls.iter().map(ToString::to_string).collect();
    write!(f, "  {}  {}", upstream.name, urls.join(", "))?;
    match (upstream.access, &upstream.credential) {
        (Access::Proven, _) => {}
        (Access::Shared, None) => f.write_str(", shared")?,
        (Access::Shared, Some(credential)) => write!(f, ", shared, as {credential}")?,
    }
    if let Some(realm) = &upstream.local_tokens {
        write!(f, ", local tokens for {realm}")?;
    }
    match &upstream.proxy {
        Proxy::Environment => {}
        Proxy::None => f.write_str(", no proxy")?,
        Proxy::Url(url) => write!(f, ", through {url}")?,
    }
    let stale = rule.stale.map_or_else(|| "forever".to_owned(), in_words);
    writeln!(
        f,
        ": {}, fresh {}, stale {stale}, budget {}, absent {}, grant {}, offline_grant {}",
        rule.policy,
        in_words(rule.fresh),
        in_words(rule.budget),
        rule.absent.name(),
        in_words(rule.grant),
        in_words(rule.offline_grant),
    )
}

fn in_words(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}
