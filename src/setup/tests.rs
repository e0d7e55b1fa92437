#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

mod applied;
mod clients;
mod ways;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::plan::Plan;
use super::*;

/// A certificate authority that is none: only its bytes matter here.
const CA: &str = "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n";

/// A disk in memory.
#[derive(Default)]
struct Held(BTreeMap<PathBuf, Vec<u8>>);

impl Held {
    fn with(path: &str, text: &str) -> Self {
        Self::default().and(path, text)
    }

    fn and(mut self, path: &str, text: &str) -> Self {
        self.0.insert(PathBuf::from(path), text.as_bytes().to_vec());
        self
    }
}

impl Files for Held {
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, Refused> {
        Ok(self.0.get(path).cloned())
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, Refused> {
        let held = self.0.keys().filter(|path| path.parent() == Some(folder));
        Ok(held.cloned().collect())
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

/// Plain, on loopback, with two upstreams.
fn local() -> Way {
    Way {
        scheme: Scheme::Http,
        host: "127.0.0.1".to_owned(),
        port: 5000,
        authority: None,
        upstreams: vec!["docker.io".into(), "ghcr.io".into()],
        warnings: Vec::new(),
    }
}

/// Another host's, with TLS and its authority.
fn remote() -> Way {
    Way {
        scheme: Scheme::Https,
        host: "cache.example.org".to_owned(),
        authority: Authority::of(CA.as_bytes()),
        ..local()
    }
}

fn text<'a>(plan: &'a Plan, path: &str) -> &'a str {
    let wanted = plan.files.iter().find(|wanted| wanted.path == Path::new(path));
    let wanted = wanted.unwrap_or_else(|| panic!("no {path} in {plan:#?}"));
    std::str::from_utf8(&wanted.bytes).unwrap()
}

/// What a plan makes of the files, to plan on again.
fn carried_out(held: &Held, plan: &Plan) -> Held {
    let mut after = Held(held.0.clone());
    for wanted in &plan.files {
        after.0.insert(wanted.path.clone(), wanted.bytes.clone());
    }
    after
}

fn conflict(refused: &Refused) -> &str {
    match refused {
        Refused::Conflict { what, .. } => what,
        other => panic!("{other}"),
    }
}
