//! Configuration builder: free ports and a temporary folder, plus the settings of the test.

use super::{Program, Proxy};
use crate::registry::Upstream;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// Builder of a configuration.
#[derive(Clone)]
pub struct Setup {
    folder: Arc<TempDir>,
    top: String,
    listen: String,
    default: String,
    tls: String,
    prefetch: bool,
    upstreams: Vec<(String, String)>,
    tail: String,
    environment: Vec<(String, String)>,
    starter: Vec<String>,
}

impl Setup {
    /// docker.io is this upstream.
    pub fn over(upstream: &Upstream) -> Setup {
        Setup::empty().also("docker.io", upstream)
    }

    /// Only the well-known upstreams, which no test may reach.
    pub fn empty() -> Setup {
        Setup {
            folder: Arc::new(tempfile::tempdir().unwrap()),
            top: String::new(),
            listen: String::new(),
            default: String::new(),
            tls: String::new(),
            prefetch: false,
            upstreams: Vec::new(),
            tail: String::new(),
            environment: Vec::new(),
            starter: Vec::new(),
        }
    }

    /// A further upstream under this name.
    pub fn also(mut self, name: &str, upstream: &Upstream) -> Setup {
        let mut keys = format!("url = \"{}\"\n", upstream.url());
        if upstream.url().starts_with("https") {
            let file = self.folder.path().join(format!("{name}.ca.pem"));
            std::fs::write(&file, upstream.ca_pem()).unwrap();
            writeln!(keys, "ca_file = {file:?}").unwrap();
        }
        self.upstreams.push((name.to_owned(), keys));
        self
    }

    /// A further upstream with these keys and nothing else.
    pub fn upstream(mut self, name: &str, keys: &str) -> Setup {
        self.upstreams.push((name.to_owned(), format!("{keys}\n")));
        self
    }

    /// The same folder with the upstreams of another configuration.
    pub fn with_upstreams_of(mut self, other: &Setup) -> Setup {
        self.upstreams.clone_from(&other.upstreams);
        self
    }

    /// Without the upstream of this name.
    pub fn without(mut self, name: &str) -> Setup {
        self.upstreams.retain(|(held, _)| held != name);
        self
    }

    /// Further keys of an existing upstream.
    pub fn upstream_keys(mut self, name: &str, keys: &str) -> Setup {
        let (_, held) = self.upstreams.iter_mut().find(|(held, _)| held == name).unwrap();
        writeln!(held, "{keys}").unwrap();
        self
    }

    /// Keys of `[default]`.
    pub fn default_keys(mut self, keys: &str) -> Setup {
        writeln!(self.default, "{keys}").unwrap();
        self
    }

    /// Clears `[default]`.
    pub fn without_defaults(mut self) -> Setup {
        self.default.clear();
        self
    }

    /// With prefetch. It is off by default, so that a test sees only its own requests.
    pub fn prefetching(mut self) -> Setup {
        self.prefetch = true;
        self
    }

    /// Keys of `[listen]`.
    pub fn listen_keys(mut self, keys: &str) -> Setup {
        writeln!(self.listen, "{keys}").unwrap();
        self
    }

    /// This `[tls]` section instead of the usual one.
    pub fn tls(mut self, section: &str) -> Setup {
        section.clone_into(&mut self.tls);
        self
    }

    /// Text appended to the configuration: `[[rule]]`, `[connect]`.
    pub fn tail(mut self, text: &str) -> Setup {
        writeln!(self.tail, "{text}").unwrap();
        self
    }

    /// An environment variable.
    pub fn environment(mut self, name: &str, value: &str) -> Setup {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts `serve` through this command, to which its own is appended.
    #[allow(dead_code, reason = "tests/crash uses it")]
    pub fn through(mut self, starter: &[&str]) -> Setup {
        self.starter = starter.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// A file beside the configuration; its path.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// The folder of this configuration.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The file of a cached blob.
    pub fn kept_blob(&self, digest: &str) -> Option<PathBuf> {
        let hex = digest.split(':').nth(1).unwrap();
        let mut files = files_below(&self.data().join("blobs")).into_iter();
        files.find(|path| path.file_name().is_some_and(|name| name == hex))
    }

    /// Whether the file of a repository has this digest.
    pub fn has_member(&self, digest: &str) -> bool {
        let mut files = files_below(&self.data().join("seen")).into_iter();
        files.any(|path| {
            let lines = std::fs::read(path).unwrap_or_default();
            String::from_utf8_lossy(&lines).contains(digest)
        })
    }

    /// The text of the configuration file.
    pub fn toml(&self) -> String {
        let folder = self.folder.path();
        let mut text = format!(
            "data = {:?}\n{}\n[listen]\n{}",
            self.data(),
            self.top,
            self.listen
        );
        for key in ["registry = [\"127.0.0.1:0\"]", "admin = \"127.0.0.1:0\""] {
            let name = key.split(' ').next().unwrap();
            // `admin_token_file` is not `admin`, whose default is a fixed port.
            if !self
                .listen
                .lines()
                .any(|line| line.split([' ', '=']).next() == Some(name))
            {
                writeln!(text, "{key}").unwrap();
            }
        }
        let tls = if self.tls.is_empty() {
            format!("[tls]\nfolder = {:?}", folder.join("certs"))
        } else {
            self.tls.clone()
        };
        writeln!(
            text,
            "{tls}\n[default]\nprefetch = {}\n{}",
            self.prefetch, self.default
        )
        .unwrap();
        for (name, keys) in &self.upstreams {
            writeln!(text, "[upstream.\"{name}\"]\n{keys}").unwrap();
        }
        text + &self.tail
    }

    /// Starts the program and waits until it responds.
    pub async fn start(self) -> Proxy {
        let program = self.serve();
        let registry = program.announced("registry listening on ").await;
        let admin = program.announced("admin listening on ").await;
        Proxy {
            program,
            registry,
            admin,
            setup: self,
        }
    }

    /// Starts `serve` and does not wait.
    pub fn serve(&self) -> Program {
        let config = self.file("ifnewer.toml", &self.toml());
        let starter: Vec<&str> = self.starter.iter().map(String::as_str).collect();
        Program::start_by(
            &starter,
            &["serve", "--config", config.to_str().unwrap()],
            self.folder.path(),
            &self.environment,
        )
    }

    /// Runs any command of the program with this configuration's folder as home.
    pub fn run(&self, arguments: &[&str]) -> Program {
        Program::start(arguments, self.folder.path(), &self.environment)
    }
}

/// Every file below a folder.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().path())
        .flat_map(|path| {
            if path.is_dir() {
                files_below(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
