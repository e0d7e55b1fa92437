//! `ifnewer demo`: the whole story on this machine alone, without network, daemon or configuration.
//!
//! A scripted registry and a real ifnewer with TLS are started on loopback, in a folder that is removed afterwards. Then
//! it plays: a cold pull, the same again, a tag that moves, a rate limit, a private image, a registry that dies. Each
//! line says what the client got, what that cost upstream, and why; and each is checked. A wrong line is exit code 1.
//!
//! * `registry`: the scripted upstream. * `client`: pulls as a client does. * `story`: the lines.

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

/// Why the demonstration could not be summary. That a line of it is wrong is told by [`Summary`].
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The system refused something.
    #[error("the demo cannot be set up: {0}")]
    Io(#[from] io::Error),
    /// The cache under demonstration did not come up.
    #[error("ifnewer did not start: {0}")]
    NotStarted(String),
    /// Its admin listener did not answer.
    #[error(transparent)]
    Ask(#[from] ClientError),
    /// The client cannot be set up.
    #[error("the demo's client cannot be set up: {0}")]
    Client(String),
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Lines.
    pub lines: usize,
    /// Those that were not as they should be.
    pub wrong: usize,
}

/// Plays the story to `out`. With `stay`, leaves the page up until `stay` is fulfilled.
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
            "\nthe page is at http://{}/ ; press Ctrl-C to end",
            cache.admin
        )?;
        // Dropped or fulfilled: both mean the end.
        let _ = stay.await;
    }
    cache.end();
    Ok(summary)
}

/// Removed at the end.
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

/// The cache under demonstration: this program once more, as a process of its own.
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
            return Err(DemoError::NotStarted("it has no standard output".to_owned()));
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

    /// Ends it as a service manager does.
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

/// Everything lies beside the configuration's file.
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
