//! `ifnewer setup`: configures container clients to use the cache, and undoes it.
//!
//! The changes are planned from the current files without writing (`plan`). Applying them saves the current files,
//! so that undoing restores them byte for byte (`apply`). A file that cannot be parsed or that has conflicting
//! mirrors is reported and not changed.
//!
//! * `endpoint`: address, scheme and CA that the client needs. * `clients`: the desired files of each client.
//! * `edit`: edits of JSON and TOML that keep the rest of a file. * `root_fs`: files below a root.
//! * `plan`: the desired files. * `apply`: the plan compared with the current files, applying and undoing.
//! * `journal`: the undo journal.
//!
//! Not included: installing a client, restarting a service (only dockerd gets SIGHUP, which is harmless), and checking
//! that the mirror is used (`doctor`).

mod apply;
mod clients;
mod edit;
mod endpoint;
mod journal;
mod plan;
mod root_fs;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use crate::config::Config;

pub use apply::{Applied, Job};
pub(crate) use clients::containerd::{REFERRERS_SINCE, Release};
pub use endpoint::{CaBundle, CacheEndpoint, Registry, Scheme};
pub use journal::FileState;
pub use plan::{DesiredFile, FileSource, Plan};
pub use root_fs::RootFs;

/// A supported container client.
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

    /// Whether it runs in containers, where loopback is not this host.
    fn is_in_containers(self) -> bool {
        matches!(self, Self::GitlabRunner | Self::Dind)
    }

    /// Whether it accepts a mirror with an IPv6 address. containerd's TOML parser rejects `]` in a quoted key (1.6),
    /// and podman refuses such a location.
    fn takes_ipv6(self) -> bool {
        matches!(self, Self::Docker | Self::Dind | Self::GitlabRunner)
    }
}

/// Options of a setup.
#[derive(Clone, Debug)]
pub struct Options {
    /// The client.
    pub client: Client,
    /// The address at which the client reaches the cache, if different from the configuration: `host:port` or a URL.
    pub address: Option<String>,
    /// The certificate authority to trust, if not that of this cache.
    pub ca: Option<PathBuf>,
    /// Uses `HTTPS_PROXY` instead of mirrors.
    pub by_proxy: bool,
    /// Overrides conflicts that name this flag.
    pub force: bool,
}

/// Error of a setup. Nothing was written unless the error says so.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A file could not be read or written.
    #[error("{action} {}: {error}{}", path.display(), as_root(error))]
    File {
        /// The action.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// A file cannot be parsed.
    #[error("{}:{line}: {detail}; correct the file first; nothing was written", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The line, starting at 1.
        line: usize,
        /// The problem.
        detail: String,
    },
    /// The client has a conflicting configuration, or the undo journal is unusable.
    #[error("{}: {what}; nothing was written. {remedy}", path.display())]
    Conflict {
        /// The file.
        path: PathBuf,
        /// The conflict.
        what: String,
        /// The remedy.
        remedy: String,
    },
    /// The address for the client cannot be determined.
    #[error("{0}")]
    Address(String),
    /// The client needs the CA, and there is none.
    #[error("{0}")]
    NoCa(String),
    /// A written file was modified since.
    #[error(
        "{} was modified after `ifnewer {job}` wrote it; nothing was done. Revert the modification, or use --force \
         to overwrite it:\n{difference}",
        path.display()
    )]
    Changed {
        /// The command that wrote it.
        job: String,
        /// The file.
        path: PathBuf,
        /// A unified diff from the written to the current content.
        difference: String,
    },
    /// There is nothing to undo.
    #[error("`ifnewer {0}` was not applied on this host, so there is nothing to undo")]
    NothingToUndo(String),
    /// A symbolic link leads out of the root or to nothing.
    #[error("{} is a symbolic link out of --root or to a missing file; nothing was written", .0.display())]
    OutsideRoot(PathBuf),
    /// Another setup is running.
    #[error("another `ifnewer setup` or `ifnewer ca` is running ({} is locked); try again", .0.display())]
    Locked(PathBuf),
    /// The combination is not supported.
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
    /// The conversion of an I/O error.
    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::File { action, path, error }
    }

    fn unreadable(path: &Path, line: usize, detail: impl Into<String>) -> Self {
        Self::Unreadable {
            path: path.to_owned(),
            line,
            detail: detail.into(),
        }
    }

    fn conflict(path: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Conflict {
            path: path.to_owned(),
            what: what.into(),
            remedy: remedy.into(),
        }
    }
}

/// Plans the changes, given the current files.
fn plan_for(endpoint: &CacheEndpoint, options: &Options, files: &dyn FileSource) -> Result<Plan, SetupError> {
    let context = plan::Context {
        endpoint,
        files,
        force: options.force,
    };
    let mut plan = match options.client {
        client if options.by_proxy => clients::proxy::plan(client, context),
        Client::Docker => clients::docker::plan(context),
        Client::Containerd => clients::containerd::plan(context),
        Client::K3s => clients::k3s::plan(context),
        Client::Podman => clients::podman::plan(context),
        Client::Buildkit => clients::buildkit::plan(context),
        Client::GitlabRunner => clients::gitlab::plan(context),
        Client::Dind => clients::docker::plan_inside(context),
    }?;
    plan.notes.extend(endpoint.warnings.iter().cloned());
    Ok(plan)
}

/// Renders the changes, with the error if there is one. With an error, the text shows a host without configuration.
pub fn show(config: &Config, options: &Options, root: &RootFs) -> (String, Option<SetupError>) {
    let endpoint = match CacheEndpoint::from_config(config, options) {
        Ok(endpoint) => endpoint,
        Err(refused) => return (String::new(), Some(refused)),
    };
    let shown = |files: &dyn FileSource| {
        let plan = plan_for(&endpoint, options, files)?;
        Ok(plan::render(&plan, files))
    };
    let job = Job::setup(options.client);
    let here = job.baseline(root).and_then(|files| shown(&files));
    here.unwrap_or_else(|refused| {
        let fresh = shown(&plan::EmptyFs).map(|(text, _)| text);
        (fresh.unwrap_or_default(), Some(refused))
    })
}

/// Applies the changes and saves the current files.
pub fn apply(config: &Config, options: &Options, root: &RootFs) -> Result<Applied, SetupError> {
    let endpoint = CacheEndpoint::from_config(config, options)?;
    let job = Job::setup(options.client);
    job.apply(root, options.force, &|files| plan_for(&endpoint, options, files))
}

/// Restores the saved files.
pub fn undo(client: Client, force: bool, root: &RootFs) -> Result<Applied, SetupError> {
    Job::setup(client).undo(root, force)
}
