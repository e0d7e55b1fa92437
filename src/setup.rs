//! `ifnewer setup`: makes a container client use this cache, and takes that back.
//!
//! What would be written is worked out from what is there, without writing ([`plan`]); carrying it out keeps what was
//! there, byte for byte, so that undoing is exact ([`apply`]). A file that cannot be read, or that already says something
//! else about mirrors, is reported and left alone: nothing is guessed and nothing is written by halves.
//!
//! * `way`: the address, the scheme and the certificate authority that the client needs.
//! * `docker`, `containerd`, `k3s`, `podman`, `buildkit`, `gitlab`, `proxy`: what each client's files should say.
//! * `text`, `json`, `toml_text`: edits that leave the rest of a file alone. * `disk`: the files below a root.
//! * `record`: what was written and what was there before. * `before`: a plan against that. * `apply`: carrying out and
//!   undoing. * `show`: in words.
//!
//! Deliberately not here: installing a client, restarting a service (only dockerd is told, by SIGHUP, which costs
//! nothing), and whether the mirror is then used (`doctor`).

mod apply;
mod baseline;
mod clients;
mod edit;
mod endpoint;
mod plan;
mod root_fs;
#[cfg(test)]
mod tests;
mod undo;

use std::io;
use std::path::{Path, PathBuf};

use crate::config::Config;

pub use apply::{Applied, Job};
pub(crate) use clients::containerd::{REFERRERS_SINCE, Release};
pub use endpoint::{CaBundle, CacheEndpoint, Registry, Scheme};
pub use plan::{DesiredFile, FileSource, Plan};
pub use root_fs::RootFs;
pub use undo::FileState;

/// A client that can be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Client {
    /// dockerd on this host: `/etc/docker/daemon.json`.
    Docker,
    /// containerd on this host, for the kubelet, nerdctl and ctr: `hosts.toml`.
    Containerd,
    /// k3s on this host: `registries.yaml`.
    K3s,
    /// podman, CRI-O, skopeo and buildah on this host: `registries.conf.d`.
    Podman,
    /// buildkitd, also inside a buildx builder: `buildkitd.toml`.
    Buildkit,
    /// GitLab Runner's docker executor, for the docker:dind services of its jobs: `config.toml`.
    GitlabRunner,
    /// dockerd inside a container (docker:dind).
    Dind,
}

impl Client {
    /// Every client, in the order in which they are told of.
    pub const ALL: [Self; 7] = [
        Self::Docker,
        Self::Containerd,
        Self::K3s,
        Self::Podman,
        Self::Buildkit,
        Self::GitlabRunner,
        Self::Dind,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Containerd => "containerd",
            Self::K3s => "k3s",
            Self::Podman => "podman",
            Self::Buildkit => "buildkit",
            Self::GitlabRunner => "gitlab-runner",
            Self::Dind => "dind",
        }
    }

    /// Whether it runs in containers, where this host's loopback addresses are not this host.
    fn is_in_containers(self) -> bool {
        matches!(self, Self::GitlabRunner | Self::Dind)
    }

    /// Whether it can be told of a mirror that is an IPv6 address. containerd's TOML parser rejects `]` in a quoted key
    /// (1.6), and podman refuses such a location.
    fn takes_ipv6(self) -> bool {
        matches!(self, Self::Docker | Self::Dind | Self::GitlabRunner)
    }
}

/// What to set up, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which client.
    pub client: Client,
    /// Where the client reaches us, if not as the configuration says: `host:port` or a URL.
    pub address: Option<String>,
    /// The certificate authority to trust, if not our own.
    pub ca: Option<PathBuf>,
    /// By `HTTPS_PROXY` instead of mirrors.
    pub by_proxy: bool,
    /// Goes over objections that name this flag.
    pub force: bool,
}

/// Why nothing was done. The operator's to mend; nothing was written unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A file could not be read or written.
    #[error("{action} {}: {error}{}", path.display(), as_root(error))]
    File {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        error: io::Error,
    },
    /// A file that is not what its name says.
    #[error("{}:{line}: {detail}; mend it first, nothing was written", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        detail: String,
    },
    /// The client is already told something else.
    #[error("{}: {what}; nothing was written. {remedy}", path.display())]
    Conflict {
        /// The file that says so.
        path: PathBuf,
        /// What it says.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// How the client should reach us is not known.
    #[error("{0}")]
    Address(String),
    /// The client needs our certificate authority, and there is none.
    #[error("{0}")]
    NoCa(String),
    /// What was set up was changed since.
    #[error(
        "{} was changed since `ifnewer {job}` wrote it; nothing was done. Take the change back, or use --force \
         to lose it:\n{difference}",
        path.display()
    )]
    Changed {
        /// What had written it.
        job: String,
        /// The file.
        path: PathBuf,
        /// A unified diff, from what was written to what is there.
        difference: String,
    },
    /// There is nothing to undo.
    #[error("`ifnewer {0}` has changed nothing here, so there is nothing to undo")]
    NothingToUndo(String),
    /// The record of what was done cannot be used.
    #[error("{}: {detail}; what was there before is beside it, under the digest of its bytes", path.display())]
    BadRecord {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A link leads out of the root, or nowhere.
    #[error("{} is a link that leads out of --root or nowhere; nothing was written", path.display())]
    OutsideRoot {
        /// The link.
        path: PathBuf,
    },
    /// Another setup is at work.
    #[error("another `ifnewer setup` or `ifnewer ca` is at work here ({}); try again", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// This client cannot be set up so.
    #[error("{0}")]
    Unsupported(String),
}

fn as_root(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run it as root",
        _ => "",
    }
}

impl SetupError {
    fn file(action: &'static str, path: &Path, error: io::Error) -> Self {
        Self::File {
            action,
            path: path.to_owned(),
            error,
        }
    }
}

/// What would be written for `options`, given what `files` hold.
pub fn plan(config: &Config, options: &Options, files: &dyn FileSource) -> Result<Plan, SetupError> {
    let endpoint = CacheEndpoint::from_config(config, options)?;
    plan_for(&endpoint, options, files)
}

fn plan_for(endpoint: &CacheEndpoint, options: &Options, files: &dyn FileSource) -> Result<Plan, SetupError> {
    if options.by_proxy {
        return clients::proxy::plan(options.client, endpoint, options.force, files);
    }
    match options.client {
        Client::Docker => clients::docker::plan(endpoint, options.force, files),
        Client::Containerd => clients::containerd::plan(endpoint, options.force, files),
        Client::K3s => clients::k3s::plan(endpoint, files),
        Client::Podman => clients::podman::plan(endpoint, options.force, files),
        Client::Buildkit => clients::buildkit::plan(endpoint, files),
        Client::GitlabRunner => clients::gitlab::plan(endpoint, files),
        Client::Dind => clients::docker::plan_inside(endpoint, files),
    }
}

/// Shows what would be written: the text, and the objection there was to it. Then the text is as on a fresh host.
pub fn show(config: &Config, options: &Options, root: &RootFs) -> (String, Option<SetupError>) {
    let job = Job::setup(options.client);
    let planned = CacheEndpoint::from_config(config, options).map(|endpoint| {
        let here = job.baseline(root).and_then(|files| {
            let plan = plan_for(&endpoint, options, &files)?;
            Ok(plan::render(&plan, &files))
        });
        here.unwrap_or_else(|refused| {
            let fresh = plan_for(&endpoint, options, &plan::EmptyFs);
            let text = fresh
                .map(|plan| plan::render(&plan, &plan::EmptyFs).0)
                .unwrap_or_default();
            (text, Some(refused))
        })
    });
    planned.unwrap_or_else(|refused| (String::new(), Some(refused)))
}

/// Writes it, keeping what was there.
pub fn apply(config: &Config, options: &Options, root: &RootFs) -> Result<Applied, SetupError> {
    let endpoint = CacheEndpoint::from_config(config, options)?;
    let job = Job::setup(options.client);
    job.apply(root, options.force, &|files| plan_for(&endpoint, options, files))
}

/// Puts back what was there before.
pub fn undo(client: Client, force: bool, root: &RootFs) -> Result<Applied, SetupError> {
    Job::setup(client).undo(root, force)
}
