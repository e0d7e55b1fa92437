//! `ifnewer ca`: export, installation and rotation of the certificate authority.
//!
//! The private key never leaves its folder: only certificates are read and written elsewhere. Trust stores are changed
//! with the same undo mechanism as clients' files in `setup`.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::clock::Clock;
use crate::config::{Config, Tls};
use crate::server::tls::{ServerTls, TlsError};
use crate::setup::{
    Applied, CaBundle, CacheEndpoint, Client, DesiredFile, FileSource, Job, Options, Plan, RootFs, SetupError,
};

/// A trust store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TrustStore {
    /// The system bundle of this host: Debian, Alpine or RHEL
    System,
    /// dockerd, for the cache's address only: `/etc/docker/certs.d`
    Docker,
    /// containerd, for the cache's address only: `/etc/containerd/certs.d`
    Containerd,
}

/// Error of a rotation.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// There is no CA yet.
    #[error("{} does not exist; `ifnewer` creates the certificate authority at its first start", .0.display())]
    NoCa(PathBuf),
    /// The new CA could not be created. The old one stays in place.
    #[error("failed to create a new certificate authority: {0}; nothing was changed")]
    Generate(#[from] TlsError),
    /// A file could not be saved or replaced.
    #[error("failed to {action} {}: {error}; run `ifnewer ca rotate` again, which starts over", path.display())]
    File {
        /// The action.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        error: std::io::Error,
    },
}

/// Order of replacement. The CA certificate, which clients trust, is last: until it is replaced, a repeated rotation
/// starts over and loses nothing.
const FILES: [&str; 4] = ["server.key", "server.pem", "ca.key", "ca.pem"];

/// The current CA certificate as PEM. If the operator configured a server certificate, the CA still issues
/// certificates for intercepted registry names.
pub fn export(config: &Config) -> Result<CaBundle, SetupError> {
    CaBundle::read(&config.tls.folder.join("ca.pem"))
}

/// Installs the CA in `store`.
pub fn install(
    config: &Config,
    store: TrustStore,
    options: &InstallOptions,
    root: &RootFs,
) -> Result<Applied, SetupError> {
    let ca = match &options.ca {
        Some(path) => CaBundle::read(path)?,
        None => export(config)?,
    };
    let path = match store {
        TrustStore::System => os_trust_store(root)?.folder().join("ifnewer.crt"),
        TrustStore::Docker | TrustStore::Containerd => {
            let client = if store == TrustStore::Docker {
                Client::Docker
            } else {
                Client::Containerd
            };
            let endpoint = CacheEndpoint::from_config(
                config,
                &Options {
                    client,
                    address: options.address.clone(),
                    ca: options.ca.clone(),
                    by_proxy: false,
                    force: options.force,
                },
            )?;
            Path::new("/etc")
                .join(client.name())
                .join("certs.d")
                .join(endpoint.host_port())
                .join("ca.crt")
        }
    };
    let mut applied = job(store).apply(root, options.force, &|files: &dyn FileSource| {
        let differs = files
            .read(&path)?
            .is_some_and(|installed| installed != ca.pem().as_bytes());
        if differs && !options.force {
            return Err(SetupError::Conflict {
                path: root.resolve(&path),
                what: "contains another certificate".to_owned(),
                remedy: "Use --force to replace it; `ifnewer ca uninstall` restores it.".to_owned(),
            });
        }
        let bytes = ca.pem().as_bytes().to_vec();
        let files = vec![DesiredFile {
            path: path.clone(),
            bytes,
        }];
        Ok(Plan {
            files,
            ..Plan::default()
        })
    })?;
    if store == TrustStore::System && !applied.changed.is_empty() {
        update_os_trust_store(root, false, &mut applied);
        applied.by_hand.push(
            "restart the programs that must trust it, because each reads the trust store at its start \
             (systemctl restart docker)"
                .to_owned(),
        );
    }
    Ok(applied)
}

/// Removes the CA from `store`.
pub fn uninstall(store: TrustStore, force: bool, root: &RootFs) -> Result<Applied, SetupError> {
    let mut applied = job(store).undo(root, force)?;
    applied.by_hand.clear();
    if store == TrustStore::System {
        update_os_trust_store(root, true, &mut applied);
    }
    Ok(applied)
}

/// Options of an installation.
#[derive(Clone, Debug, Default)]
pub struct InstallOptions {
    /// The address at which the client reaches the cache, if different from the configuration.
    pub address: Option<String>,
    /// The certificate authority, if not that of this cache.
    pub ca: Option<PathBuf>,
    /// Replaces an existing certificate.
    pub force: bool,
}

/// Creates a new CA and server certificate. Returns the folder with the old files.
pub fn rotate(config: &Config, clock: Clock) -> Result<PathBuf, RotateError> {
    let folder = &config.tls.folder;
    if !folder.join("ca.key").exists() {
        return Err(RotateError::NoCa(folder.join("ca.pem")));
    }
    let new = folder.join("new");
    remove_dir(&new)?;
    let addresses: Vec<IpAddr> = config
        .listen
        .registry
        .iter()
        .map(std::net::SocketAddr::ip)
        .collect();
    let tls = Tls {
        folder: new.clone(),
        names: config.tls.names.clone(),
        constrained: config.tls.constrained,
        certificate: None,
    };
    ServerTls::prepare(&tls, &addresses, config.hosts(), &[], clock)?;
    let old = folder.join(format!("old-{}", stamp(clock.now())));
    create_dir(&old)?;
    for name in FILES {
        let (from, to) = (folder.join(name), old.join(name));
        // A hard link preserves mode and owner, and needs no space.
        if from.exists() && !to.exists() {
            fs::hard_link(&from, &to)
                .or_else(|_| fs::copy(&from, &to).map(drop))
                .map_err(|error| RotateError::File {
                    action: "save a copy of",
                    path: from,
                    error,
                })?;
        }
    }
    for name in FILES {
        let (from, to) = (new.join(name), folder.join(name));
        copy_owner(&to, &from)
            .and_then(|()| fs::rename(&from, &to))
            .map_err(|error| RotateError::File {
                action: "replace",
                path: to,
                error,
            })?;
    }
    remove_dir(&new)?;
    Ok(old)
}

/// Copies the owner, because the cache usually runs as another user than the operator and must read its key.
fn copy_owner(current: &Path, new: &Path) -> std::io::Result<()> {
    let new_owner = fs::metadata(new)?;
    let Ok(current) = fs::metadata(current) else {
        return Ok(());
    };
    if (current.uid(), current.gid()) == (new_owner.uid(), new_owner.gid()) {
        return Ok(());
    }
    chown(new, Some(current.uid()), Some(current.gid()))
}

/// Instructions after a rotation.
#[derive(Debug)]
pub struct RotateReport<'a> {
    /// The folder with the old files.
    pub old: &'a Path,
}

impl Display for RotateReport<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "created a new certificate authority and server certificate; the old ones are in {}",
            self.old.display()
        )?;
        writeln!(
            f,
            "to do: reload the running ifnewer: systemctl reload ifnewer, or kill -HUP"
        )?;
        writeln!(
            f,
            "to do: on each host whose clients trust the old one, repeat `ifnewer ca install` or \
             `ifnewer setup <client> --apply`. Until then the clients reject the certificate and bypass the cache"
        )?;
        writeln!(
            f,
            "note: to revert, copy the old files over the new ones and reload"
        )
    }
}

/// `20261121T075100Z`
fn stamp(now: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(now).to_string();
    text.chars().filter(char::is_ascii_alphanumeric).collect()
}

fn create_dir(folder: &Path) -> Result<(), RotateError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    created.map_err(|error| RotateError::File {
        action: "create",
        path: folder.to_owned(),
        error,
    })
}

fn remove_dir(folder: &Path) -> Result<(), RotateError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(RotateError::File {
            action: "empty",
            path: folder.to_owned(),
            error,
        }),
        _ => Ok(()),
    }
}

fn job(store: TrustStore) -> Job {
    match store {
        TrustStore::System => Job::named("ca-system", "ca install"),
        TrustStore::Docker => Job::named("ca-docker", "ca install --into docker"),
        TrustStore::Containerd => Job::named("ca-containerd", "ca install --into containerd"),
    }
}

/// The CA bundle of an operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OsTrustStore {
    /// Debian, Ubuntu, Alpine.
    Debian,
    /// RHEL, Fedora and their derivatives.
    RedHat,
}

impl OsTrustStore {
    fn folder(self) -> &'static Path {
        Path::new(match self {
            Self::Debian => "/usr/local/share/ca-certificates",
            Self::RedHat => "/etc/pki/ca-trust/source/anchors",
        })
    }

    /// The command that rebuilds the bundle. Without `--fresh`, Debian's keeps removed certificates.
    fn command(self, removed: bool) -> &'static [&'static str] {
        match (self, removed) {
            (Self::Debian, false) => &["update-ca-certificates"],
            (Self::Debian, true) => &["update-ca-certificates", "--fresh"],
            (Self::RedHat, _) => &["update-ca-trust", "extract"],
        }
    }
}

fn os_trust_store(root: &RootFs) -> Result<OsTrustStore, SetupError> {
    let has = |path: &str| root.resolve(Path::new(path)).exists();
    let debian = has("/usr/sbin/update-ca-certificates");
    let red_hat = has("/usr/bin/update-ca-trust") || has("/etc/pki/ca-trust/source/anchors");
    match (debian, red_hat) {
        (true, false) => Ok(OsTrustStore::Debian),
        (false, true) => Ok(OsTrustStore::RedHat),
        (true, true) => Err(SetupError::Unsupported(
            "this system has both update-ca-certificates and update-ca-trust; install the output of \
             `ifnewer ca export` with one of them by hand"
                .to_owned(),
        )),
        (false, false) => Err(SetupError::Unsupported(
            "no trust store found: neither update-ca-certificates (package ca-certificates) nor \
             update-ca-trust is installed"
                .to_owned(),
        )),
    }
}

fn update_os_trust_store(root: &RootFs, removed: bool, applied: &mut Applied) {
    let Ok(system) = os_trust_store(root) else { return };
    let args = system.command(removed);
    let line = args.join(" ");
    if !root.is_real() {
        applied.by_hand.push(format!("run {line} inside the image"));
        return;
    }
    let ran = args
        .split_first()
        .map(|(program, arguments)| Command::new(program).args(arguments).output());
    match ran {
        Some(Ok(output)) if output.status.success() => applied.notified.push(format!("ran {line}")),
        Some(Ok(output)) => {
            let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            applied
                .by_hand
                .push(format!("run {line} (it failed: {}; {stderr})", output.status));
        }
        Some(Err(error)) => applied
            .by_hand
            .push(format!("run {line} (it could not be started: {error})")),
        None => {}
    }
}
