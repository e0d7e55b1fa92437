//! `ifnewer doctor`: is the mirror really used? A client that is not configured right says nothing and goes past the cache;
//! this looks at every place where that happens, and in the end pulls an image and looks for it in our own log.
//!
//! * `cache`: our listener, our readiness, the upstreams. * `host`: disk, descriptors, clock, the process' variables, the
//!   files that `setup` wrote. * `docker`: dockerd's configuration, in the file and in effect; its trust.
//! * `canary`: the pull that must appear in our own log.
//! * `containerd`: its files. * `wire`: one HTTP request, over TCP, TLS or a unix socket.
//!
//! Each check ends as ok, failed or skipped, in one line: what, where, what to do. Nothing is mended here.

mod cache;
mod canary;
mod containerd;
mod docker;
mod host;
mod http_probe;
#[cfg(test)]
mod tests;

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::config::Config;
use crate::setup::{CacheEndpoint, Client, Options as SetupOptions, RootFs, SetupError};

/// An exit code counts no further, so that it is not taken for a signal's.
const FAILED_MAX: usize = 100;

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where clients reach us, if not as the configuration says.
    pub address: Option<String>,
    /// The certificate authority, if not our own.
    pub ca: Option<PathBuf>,
    /// The image to pull.
    pub canary: String,
    /// Docker's socket, below the root.
    pub docker: PathBuf,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Ok,
    /// Not as it should be.
    Failed,
    /// Not looked at.
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

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What is looked at.
    pub name: String,
    /// How it ended.
    pub state: State,
    /// What was found, and where.
    pub found: String,
    /// What to do about it; empty where nothing is to be done.
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

/// All checks, in the order in which one depends on the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report(pub Vec<Check>);

impl Report {
    /// How many failed.
    pub fn failed(&self) -> usize {
        self.0.iter().filter(|check| check.state == State::Failed).count()
    }

    /// The exit code: how many failed.
    pub fn exit_code(&self) -> u8 {
        u8::try_from(self.failed().min(FAILED_MAX)).unwrap_or(u8::MAX)
    }

    /// For programs.
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

/// What every check may look at.
struct CheckContext<'a> {
    config: &'a Config,
    options: &'a Options,
    root: &'a RootFs,
    /// How a client on this host reaches us.
    endpoint: Result<CacheEndpoint, SetupError>,
    now: SystemTime,
}

/// Looks at everything.
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
    report.0.push(host::disk(&context));
    report.0.push(host::descriptors(&context));
    report.0.push(host::variables(&context));
    report.0.push(host::clock(&context).await);
    report.0.extend(host::setups(&context));
    report.0.extend(containerd::examine(&context));
    report.0.extend(docker::examine(&context).await);
    report
}
