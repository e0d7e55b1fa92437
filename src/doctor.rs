//! `ifnewer doctor`: checks that clients use the cache.
//!
//! A misconfigured client bypasses the cache without an error. The checks cover every such misconfiguration; the last one
//! pulls an image and searches for the pull in the cache's log.
//!
//! * `cache`: listener, readiness, upstreams and shared storage. * `host`: disk, file descriptors, clock, environment of the process,
//!   files written by `setup`.
//! * `docker`: configuration of dockerd, in the file and in effect, and its trust. * `containerd`: its files.
//! * `canary`: the test pull. * `http_probe`: one HTTP request over TCP, TLS or a unix socket.
//!
//! Each check is ok, failed or skipped, and prints one line: what, where, and what to do. No check changes anything.

mod cache;
mod canary;
mod containerd;
mod docker;
mod host;
mod http_probe;
#[cfg(test)]
mod tests;

use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use http::StatusCode;
use serde_json::{Value, json};

use self::http_probe::Target;
use crate::config::{Admin, Config};
use crate::setup::{CacheEndpoint, Client, Options as SetupOptions, RootFs, SetupError};

/// Maximum of the exit code, because larger ones are confused with signals.
const FAILED_MAX: usize = 100;

/// Options of the checks.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address at which clients reach the cache, if different from the configuration.
    pub address: Option<String>,
    /// The certificate authority, if not that of this cache.
    pub ca: Option<PathBuf>,
    /// The image to pull.
    pub canary: String,
    /// Docker socket, below the root.
    pub docker: PathBuf,
}

/// Result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Passed.
    Ok,
    /// Failed.
    Failed,
    /// Skipped.
    Skipped,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// One check with its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Name of the check.
    pub name: String,
    /// The result.
    pub state: State,
    /// The finding, with its location.
    pub found: String,
    /// The remedy; empty if none is needed.
    pub remedy: String,
}

impl Check {
    fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            state: State::Ok,
            found: found.into(),
            remedy: String::new(),
        }
    }

    fn failed(name: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            state: State::Failed,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn skipped(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            state: State::Skipped,
            found: why.into(),
            remedy: String::new(),
        }
    }
}

/// All checks, in dependency order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report(pub Vec<Check>);

impl Report {
    /// Number of failed checks.
    pub fn failed(&self) -> usize {
        self.0.iter().filter(|check| check.state == State::Failed).count()
    }

    /// Exit code: the number of failed checks.
    pub fn exit_code(&self) -> u8 {
        u8::try_from(self.failed().min(FAILED_MAX)).unwrap_or(u8::MAX)
    }

    /// The report as JSON.
    pub fn json(&self) -> Value {
        let checks = self.0.iter().map(|check| {
            json!({
                "name": check.name,
                "state": check.state.name(),
                "found": check.found,
                "remedy": check.remedy,
            })
        });
        json!({ "failed": self.failed(), "checks": checks.collect::<Vec<_>>() })
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for check in &self.0 {
            let state = match check.state {
                State::Failed => "FAILED",
                other => other.name(),
            };
            write!(f, "{state:<8} {:<18} {}", check.name, check.found)?;
            if !check.remedy.is_empty() {
                write!(f, "; {}", check.remedy)?;
            }
            writeln!(f)?;
        }
        let count = |state| self.0.iter().filter(|check| check.state == state).count();
        writeln!(
            f,
            "{} ok, {} failed, {} skipped",
            count(State::Ok),
            count(State::Failed),
            count(State::Skipped)
        )
    }
}

/// Context of all checks.
struct CheckContext<'a> {
    config: &'a Config,
    options: &'a Options,
    root: &'a RootFs,
    /// The endpoint for a client on this host.
    endpoint: Result<CacheEndpoint, SetupError>,
    now: SystemTime,
}

/// Requests `/readyz` from the running cache: `ifnewer healthcheck`, for images without a shell.
pub async fn check_ready(admin: &Admin) -> io::Result<()> {
    let mut host = String::new();
    let target =
        Target::admin(admin, &mut host).ok_or_else(|| io::Error::other("the admin listener is disabled"))?;
    match http_probe::get(target, "/readyz").await?.status {
        StatusCode::OK => Ok(()),
        status => Err(io::Error::other(format!("status {status}"))),
    }
}

/// Runs all checks.
pub async fn examine(config: &Config, options: &Options, root: &RootFs, now: SystemTime) -> Report {
    let setup = SetupOptions {
        client: Client::Docker,
        address: options.address.clone(),
        ca: options.ca.clone(),
        by_proxy: false,
        force: false,
    };
    let context = CheckContext {
        config,
        options,
        root,
        endpoint: CacheEndpoint::from_config(config, &setup),
        now,
    };
    let mut report = Report::default();
    report.0.extend(cache::listeners(&context).await);
    report.0.push(cache::ready(&context).await);
    report.0.extend(cache::upstreams(&context).await);
    report.0.extend(cache::shared_storage(&context).await);
    report.0.push(host::disk(&context));
    report.0.push(host::descriptors(&context));
    report.0.push(host::variables(&context));
    report.0.push(host::clock(&context).await);
    report.0.extend(host::setups(&context));
    report.0.extend(containerd::examine(&context));
    report.0.extend(docker::examine(&context).await);
    report
}
