//! Checks of the host: disk, file descriptors, clock, environment of the running process, and files written by
//! `setup`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;
use clap::ValueEnum;
use rustls_pki_types::CertificateDer;

use super::http_probe::{self, Target};
use super::{Check, CheckContext};
use crate::setup::{Client, FileState, Job};

/// Maximum clock skew; a larger one breaks certificates and tokens.
const SKEW_MAX: Duration = Duration::from_secs(300);

/// File descriptors needed besides connections and downloads: index, listeners, log.
const DESCRIPTORS_RESERVED: u64 = 128;

pub(super) fn disk(context: &CheckContext<'_>) -> Check {
    const NAME: &str = "disk";
    let data = &context.config.data;
    let required = context.config.store.free_bytes_min;
    let stats = match rustix::fs::statvfs(data) {
        Ok(stats) => stats,
        Err(error) => {
            return Check::failed(
                NAME,
                format!("{}: {error}", data.display()),
                "start ifnewer once; if the service has settings of its own (IFNEWER_DATA in its unit), use the same \
                 for this command",
            );
        }
    };
    let free = stats.f_bavail.saturating_mul(stats.f_frsize);
    if stats.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Check::failed(
            NAME,
            format!("{} is read-only", data.display()),
            "make it writable; until then nothing new is cached",
        );
    }
    if free < required {
        return Check::failed(
            NAME,
            format!(
                "{} has {} free, less than store.free ({})",
                data.display(),
                ByteSize(free),
                ByteSize(required)
            ),
            "free space; until then nothing new is cached, and pulls are forwarded",
        );
    }
    // File systems without inode counts report 0 of 0.
    if stats.f_files > 0 && stats.f_favail < 10_000 {
        return Check::failed(
            NAME,
            format!("{} has {} inodes left", data.display(), stats.f_favail),
            "remove small files there, because each blob needs an inode",
        );
    }
    Check::ok(NAME, format!("{} has {} free", data.display(), ByteSize(free)))
}

/// The process that locks the data folder.
fn process(context: &CheckContext<'_>) -> Option<u32> {
    let text = fs::read_to_string(context.config.data.join("LOCK")).ok()?;
    let pid: u32 = text.trim().parse().ok()?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    (name.trim() == "ifnewer").then_some(pid)
}

pub(super) fn descriptors(context: &CheckContext<'_>) -> Check {
    const NAME: &str = "descriptors";
    let Some(pid) = process(context) else {
        return Check::skipped(
            NAME,
            format!("{}/LOCK names no running ifnewer", context.config.data.display()),
        );
    };
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let Some(limit) = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()) else {
        return Check::skipped(NAME, format!("/proc/{pid}/limits cannot be read"));
    };
    let limits = &context.config.limits;
    let needed = limits.connections_max as u64 + limits.downloads_max as u64 + DESCRIPTORS_RESERVED;
    if limit < needed {
        return Check::failed(
            NAME,
            format!("process {pid} may open {limit} files, fewer than the {needed} that its limits allow"),
            format!(
                "raise LimitNOFILE= of its unit to {}, or lower limits.connections_max",
                needed.next_power_of_two()
            ),
        );
    }
    let open = fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count).ok();
    let open = open.map(|open| format!(", {open} open")).unwrap_or_default();
    Check::ok(NAME, format!("process {pid} may open {limit} files{open}"))
}

/// Detects a proxy that points to the cache itself, which would be a loop.
pub(super) fn variables(context: &CheckContext<'_>) -> Check {
    const NAME: &str = "proxy-variables";
    let environment = process(context).and_then(|pid| fs::read(format!("/proc/{pid}/environ")).ok());
    let Some(environment) = environment else {
        return Check::skipped(
            NAME,
            "the environment of the running ifnewer cannot be read; run this as its user or as root",
        );
    };
    let text = String::from_utf8_lossy(&environment);
    let proxies: Vec<(&str, &str)> = text
        .split('\0')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(name, _)| {
            let name = name.to_ascii_uppercase();
            matches!(name.as_str(), "HTTPS_PROXY" | "HTTP_PROXY" | "ALL_PROXY")
        })
        .filter(|(_, value)| !value.is_empty())
        .collect();
    for (name, value) in &proxies {
        if context.is_ours(value) {
            return Check::failed(
                NAME,
                format!("the running ifnewer has {name}={value}, which is its own address"),
                "remove the variable there; it is for clients",
            );
        }
    }
    if proxies.is_empty() {
        return Check::ok(NAME, "the environment of the running ifnewer sets no proxy");
    }
    let settings: Vec<String> = proxies
        .iter()
        .map(|(name, value)| format!("{name}={}", without_password(value)))
        .collect();
    Check::ok(NAME, format!("the running ifnewer uses {}", settings.join(", ")))
}

pub(super) fn without_password(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://…@{host}"),
        (None, Some((_, host))) => format!("…@{host}"),
        _ => url.to_owned(),
    }
}

/// Compares the clock with the `Date` of the default upstream.
pub(super) async fn clock(context: &CheckContext<'_>) -> Check {
    const NAME: &str = "clock";
    let upstream = context.config.upstream(&context.config.default_upstream);
    let url = upstream
        .and_then(|upstream| upstream.urls.first())
        .and_then(|url| url.address.parse::<http::Uri>().ok());
    let Some((url, host)) = url.as_ref().and_then(|url| Some((url, url.host()?))) else {
        return Check::skipped(NAME, "there is no default upstream");
    };
    let roots: Vec<CertificateDer<'static>> = rustls_native_certs::load_native_certs().certs;
    let reply = if url.scheme_str() == Some("http") {
        http_probe::get(Target::Plain(host, url.port_u16().unwrap_or(80)), "/v2/").await
    } else {
        http_probe::get(Target::Tls(host, url.port_u16().unwrap_or(443), &roots), "/v2/").await
    };
    let date = match &reply {
        Ok(reply) => reply.headers.get(http::header::DATE),
        Err(error) => return Check::skipped(NAME, format!("{host} is not reachable directly: {error}")),
    };
    let Some(upstream_time) = date.and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok())
    else {
        return Check::skipped(NAME, format!("{host} sent no Date header"));
    };
    let skew = match context.now.duration_since(upstream_time) {
        Ok(ahead) => ahead,
        Err(error) => error.duration(),
    };
    if skew > SKEW_MAX {
        return Check::failed(
            NAME,
            format!("{} s off the clock of {host}", skew.as_secs()),
            "set the clock (timedatectl), because certificates and tokens depend on it",
        );
    }
    Check::ok(NAME, format!("{} s off the clock of {host}", skew.as_secs()))
}

/// Checks that files written by `setup` are unmodified.
pub(super) fn setups(context: &CheckContext<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    for &client in Client::value_variants() {
        let name = format!("setup {}", client.name());
        let states = match Job::setup(client).states(context.root) {
            Ok(Some(states)) => states,
            Ok(None) => continue,
            Err(refused) => {
                checks.push(Check::failed(name, refused.to_string(), ""));
                continue;
            }
        };
        let changed: Vec<String> = states
            .iter()
            .filter(|(_, state)| *state != FileState::AsWritten)
            .map(|(path, state)| describe(path, *state))
            .collect();
        let paths: Vec<String> = states
            .iter()
            .map(|(path, _)| path.display().to_string())
            .collect();
        checks.push(if changed.is_empty() {
            Check::ok(name, format!("unmodified: {}", paths.join(", ")))
        } else {
            Check::failed(
                name,
                changed.join(", "),
                format!(
                    "run ifnewer setup {0} --apply to write it again, or ifnewer setup {0} --undo",
                    client.name()
                ),
            )
        });
    }
    checks
}

fn describe(path: &Path, state: FileState) -> String {
    match state {
        FileState::AsBefore => format!("{} was restored to its original content", path.display()),
        FileState::AsWritten | FileState::Changed => format!("{} was modified", path.display()),
    }
}
