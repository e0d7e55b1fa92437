//! `ifnewer ca`: our certificate authority handed out, trusted and replaced.
//!
//! The key never leaves its folder: what is handed out is read as certificates and written as such. InstallOptions stores are
//! changed as `setup` changes clients' files, so that it can be taken back.

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

/// Who is to trust us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TrustStore {
    /// Everything on this host that uses the system's list: Debian's and Alpine's, or RHEL's.
    System,
    /// dockerd, for our address alone: `/etc/docker/certs.d`.
    Docker,
    /// containerd, for our address alone: `/etc/containerd/certs.d`.
    Containerd,
}

/// Why a new authority was not made.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// There is none yet.
    #[error("{}: there is no certificate authority yet; it is made when `ifnewer` first starts", .0.display())]
    NoCa(PathBuf),
    /// The new one could not be made. The old one is in place.
    #[error("nothing was changed: {0}")]
    Generate(#[from] TlsError),
    /// A file could not be kept or put into its place.
    #[error("cannot {action} {}: {error}; run `ifnewer ca rotate` again, which begins anew", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        error: std::io::Error,
    },
}

/// In the order in which new ones take their places. The certificate that clients trust is last: as long as it is
/// the old one, doing it again begins anew and loses nothing.
const FILES: [&str; 4] = ["server.key", "server.pem", "ca.key", "ca.pem"];

/// The certificate authority in use, as PEM. With a certificate of the operator's own, it still vouches for the
/// registries' names that clients come by.
pub fn export(config: &Config) -> Result<CaBundle, SetupError> {
    CaBundle::read(&config.tls.folder.join("ca.pem"))
}

/// Lets `store` trust us.
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

/// Takes that back.
pub fn uninstall(store: TrustStore, force: bool, root: &RootFs) -> Result<Applied, SetupError> {
    let mut applied = job(store).undo(root, force)?;
    applied.by_hand.clear();
    if store == TrustStore::System {
        update_os_trust_store(root, true, &mut applied);
    }
    Ok(applied)
}

/// Whom to trust, and how.
#[derive(Clone, Debug, Default)]
pub struct InstallOptions {
    /// Where the client reaches us, if not as the configuration says.
    pub address: Option<String>,
    /// The certificate authority, if not our own.
    pub ca: Option<PathBuf>,
    /// Goes over objections.
    pub force: bool,
}

/// Makes a new authority and a new server certificate. Returns the folder where the old ones are kept.
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
        // A link keeps mode and owner, and needs no room.
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

/// The cache seldom runs as who rotates, and has to read its key.
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

/// What an operator has to know after `rotate`.
#[derive(Debug)]
pub struct RotateReport<'a> {
    /// Where the old files are.
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

/// A system's list of trusted authorities.
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

    /// What makes the list anew; without `--fresh`, Debian's leaves what was removed.
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
