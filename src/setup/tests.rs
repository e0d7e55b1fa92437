#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

mod applied;
mod clients;
mod edit;
mod endpoint;
mod failures;
mod secrets;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::plan::Plan;
use super::*;

/// A placeholder CA; only its bytes matter.
const CA: &str = "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n";

/// Files in memory.
#[derive(Default)]
struct MemoryFs {
    files: BTreeMap<PathBuf, Vec<u8>>,
    /// Version output of the client's program.
    version: Option<&'static str>,
}

impl MemoryFs {
    fn with(path: &str, text: &str) -> Self {
        Self::default().and(path, text)
    }

    fn and(mut self, path: &str, text: &str) -> Self {
        self.files.insert(PathBuf::from(path), text.as_bytes().to_vec());
        self
    }
}

impl FileSource for MemoryFs {
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        Ok(self.files.get(path).cloned())
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, SetupError> {
        let held = self.files.keys().filter(|path| path.parent() == Some(folder));
        Ok(held.cloned().collect())
    }

    fn version_of(&self, _program: &str) -> Option<String> {
        self.version.map(str::to_owned)
    }
}

fn options(client: Client) -> Options {
    Options {
        client,
        address: None,
        ca: None,
        by_proxy: false,
        force: false,
    }
}

fn forced(client: Client) -> Options {
    Options {
        force: true,
        ..options(client)
    }
}

fn https(name: &str) -> Registry {
    Registry {
        name: name.into(),
        plain_http: false,
    }
}

/// Plain HTTP on loopback, with two upstreams.
fn local() -> CacheEndpoint {
    CacheEndpoint {
        scheme: Scheme::Http,
        host: "127.0.0.1".to_owned(),
        port: 5000,
        ca: None,
        upstreams: ["docker.io", "ghcr.io"].map(https).to_vec(),
        warnings: Vec::new(),
    }
}

/// TLS on another host, with its CA.
fn remote() -> CacheEndpoint {
    CacheEndpoint {
        scheme: Scheme::Https,
        host: "cache.example.org".to_owned(),
        ca: CaBundle::of(CA.as_bytes()),
        ..local()
    }
}

fn text<'a>(plan: &'a Plan, path: &str) -> &'a str {
    let wanted = plan.files.iter().find(|wanted| wanted.path == Path::new(path));
    let wanted = wanted.unwrap_or_else(|| panic!("no {path} in {plan:#?}"));
    std::str::from_utf8(&wanted.bytes).unwrap()
}

/// The files after a plan, as input of another plan.
fn carried_out(held: &MemoryFs, plan: &Plan) -> MemoryFs {
    let mut after = MemoryFs {
        files: held.files.clone(),
        version: held.version,
    };
    for wanted in &plan.files {
        after.files.insert(wanted.path.clone(), wanted.bytes.clone());
    }
    after
}

fn conflict(refused: &SetupError) -> &str {
    match refused {
        SetupError::Conflict { what, .. } => what,
        other => panic!("{other}"),
    }
}
