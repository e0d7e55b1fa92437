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
    #[error("{}: there is no certificate authority yet; it is made when `ifnewer` first starts", .0.display())]
    NoCa(PathBuf),
    /// The new CA could not be created. The old one stays in place.
    #[error("nothing was changed: {0}")]
    Generate(#[from] TlsError),
    /// A file could not be saved or replaced.
    #[error("cannot {action} {}: {error}; run `ifnewer ca rotate` again, which begins anew", path.display())]
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
        let differs = files.read(&path)?.is_some_and(|held| held != ca.pem().as_bytes());
        if differs && !options.force {
            return Err(SetupError::Conflict {
                path: root.resolve(&path),
                what: "another certificate is there".to_owned(),
                remedy: "With --force it is replaced; `ifnewer ca uninstall` brings it back.".to_owned(),
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
            "restart what should trust it now: a running program keeps the list it read at its start \
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
                    action: "keep",
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
                action: "put in its place",
                path: to,
                error,
            })?;
    }
    remove_dir(&new)?;
    Ok(old)
}

/// Copies the owner, because the cache usually runs as another user than the operator and must read its key.
fn copy_owner(held: &Path, new: &Path) -> std::io::Result<()> {
    let new_owner = fs::metadata(new)?;
    let Ok(held) = fs::metadata(held) else {
        return Ok(());
    };
    if (held.uid(), held.gid()) == (new_owner.uid(), new_owner.gid()) {
        return Ok(());
    }
    chown(new, Some(held.uid()), Some(held.gid()))
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
            "made a new certificate authority and server certificate; the old ones: {}",
            self.old.display()
        )?;
        writeln!(
            f,
            "now by hand: reload the running ifnewer: kill -HUP, or systemctl reload ifnewer"
        )?;
        writeln!(
            f,
            "now by hand: on each host whose clients verify TLS with it, again what was done there: `ifnewer ca install` \
             or `ifnewer setup <client> --apply`. Until then they refuse our certificate and go past the cache"
        )?;
        writeln!(
            f,
            "note: to go back, copy the old files over the new ones and reload"
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
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| RotateError::File {
        action: "make",
        path: folder.to_owned(),
        error,
    })
}

fn remove_dir(folder: &Path) -> Result<(), RotateError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(RotateError::File {
            action: "clear",
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
    /// RHEL, Fedora and their kin.
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
    ///
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
            "this system has both update-ca-certificates and update-ca-trust; use the right one by hand, with the \
             output of `ifnewer ca export`"
                .to_owned(),
        )),
        (false, false) => Err(SetupError::Unsupported(
            "no trust store is known here: neither update-ca-certificates (install ca-certificates) nor \
             update-ca-trust"
                .to_owned(),
        )),
    }
}

fn update_os_trust_store(root: &RootFs, removed: bool, applied: &mut Applied) {
    let Ok(system) = os_trust_store(root) else { return };
    let args = system.command(removed);
    let line = args.join(" ");
    if !root.is_real() {
        applied.by_hand.push(format!("{line}, inside the image"));
        return;
    }
    let ran = args
        .split_first()
        .map(|(program, arguments)| Command::new(program).args(arguments).output());
    match ran {
        Some(Ok(output)) if output.status.success() => applied.notified.push(format!("ran {line}")),
        Some(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            applied
                .by_hand
                .push(format!("{line} (it failed: {}; {said})", output.status));
        }
        Some(Err(error)) => applied
            .by_hand
            .push(format!("{line} (it could not be run: {error})")),
        None => {}
    }
}
