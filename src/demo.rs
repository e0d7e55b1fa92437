//! `ifnewer demo`: a demonstration on this machine, without network, daemon or configuration.
//!
//! It starts a scripted registry and an ifnewer process with TLS on loopback, in a temporary folder. The scenario
//! covers a cold pull, a repeated pull, a moved tag, a rate limit, a private image and an outage. Each step prints the
//! response, the upstream traffic and the reason, and verifies them. A failed step gives exit code 1.
//!
//! * `registry`: the scripted upstream. * `client`: a pulling client. * `scenario`: the steps.

mod client;
mod registry;
mod scenario;

use std::io::{self, BufRead as _, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::oneshot;

use crate::admin::client::{Client as AdminClient, ClientError};
use crate::config;
use registry::Registry;

/// Error that prevents the demo. Failed steps are reported in [`Summary`].
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// An operating system call failed.
    #[error("failed to set up the demo: {0}")]
    Io(#[from] io::Error),
    /// The cache did not start.
    #[error("ifnewer did not start: {0}")]
    NotStarted(String),
    /// The admin API did not respond.
    #[error(transparent)]
    Admin(#[from] ClientError),
    /// The client cannot be created.
    #[error("failed to create the client of the demo: {0}")]
    Client(String),
}

/// Result of the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of steps.
    pub lines: usize,
    /// Number of failed steps.
    pub wrong: usize,
}

/// Runs the demo with output to `out`. With `stay`, keeps the admin page running until `stay` resolves.
pub async fn run(
    program: PathBuf,
    folder: PathBuf,
    colour: bool,
    out: &mut dyn Write,
    stay: Option<oneshot::Receiver<()>>,
) -> Result<Summary, DemoError> {
    let folder = TempFolder::create(folder)?;
    let registry = Registry::start().await?;
    let mut cache = Cache::start(program, &folder, registry.address()).await?;
    let admin = AdminClient::new(config::Admin::Tcp(cache.admin), None);
    let ca = std::fs::read(folder.0.join("certs/ca.pem"))?;
    let summary = scenario::run(&registry, cache.registry, &ca, &admin, colour, out).await?;
    if let Some(stay) = stay {
        writeln!(
            out,
            "\nadmin page: http://{}/ (press Ctrl-C to stop)",
            cache.admin
        )?;
        // Both a dropped and a resolved sender end the demo.
        let _ = stay.await;
    }
    cache.end();
    Ok(summary)
}

/// A folder that is removed when dropped.
struct TempFolder(PathBuf);

impl TempFolder {
    fn create(path: PathBuf) -> io::Result<Self> {
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The process of the cache, stopped when dropped.
struct Cache {
    child: Child,
    registry: SocketAddr,
    admin: SocketAddr,
}

impl Cache {
    async fn start(program: PathBuf, folder: &TempFolder, upstream: SocketAddr) -> Result<Self, DemoError> {
        let file = folder.0.join("ifnewer.toml");
        std::fs::write(&file, configuration(upstream))?;
        let mut child = Command::new(program)
            .args(["serve", "--config"])
            .arg(&file)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.0.join("log"))?)
            .spawn()?;
        let Some(stdout) = child.stdout.take() else {
            return Err(DemoError::NotStarted("no standard output".to_owned()));
        };
        let announced = tokio::task::spawn_blocking(move || {
            let mut found = (None, None);
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(address) = line.strip_prefix("registry listening on ") {
                    found.0 = address.parse().ok();
                } else if let Some(address) = line.strip_prefix("admin listening on ") {
                    found.1 = address.parse().ok();
                }
                if let (Some(registry), Some(admin)) = found {
                    return Some((registry, admin));
                }
            }
            None
        });
        let Ok(Some((registry, admin))) = announced.await else {
            let log = std::fs::read_to_string(folder.0.join("log")).unwrap_or_default();
            return Err(DemoError::NotStarted(log));
        };
        Ok(Self {
            child,
            registry,
            admin,
        })
    }

    /// Stops it with SIGTERM, as a service manager does.
    fn end(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All paths are relative to the configuration file.
fn configuration(upstream: SocketAddr) -> String {
    format!(
        "data = \"data\"\n\
         default_upstream = \"{name}\"\n\
         [listen]\nregistry = [\"127.0.0.1:0\"]\nadmin = \"127.0.0.1:0\"\n\
         [tls]\nfolder = \"certs\"\n\
         [default]\nprefetch = false\n\
         [upstream.\"{name}\"]\nurl = \"http://{upstream}\"\nproxy = \"none\"\n",
        name = scenario::UPSTREAM,
    )
}
