//! The proxy's own credentials: where they come from, and which of them is for which repository.
//!
//! A file is read again soon after it changed. A helper is asked again long before what it gave can have run out, and at
//! once when the registry refuses that. What was had before stays in use while nothing newer can be had.
//!
//! * `docker_config`: the file that `docker login` writes. * `helper`: the programs named `docker-credential-…`.

mod docker_config;
mod helper;
mod reloading_file;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::HeaderValue;
use zeroize::Zeroizing;

pub use docker_config::{DockerConfig, DockerConfigError};
pub use helper::{HelperName, HelperNameError};

use super::origin::Origin;
use crate::oci::name::Repository;
use docker_config::Match;
use helper::Helpers;
use reloading_file::ReloadingFile;

/// The name that means an identity (refresh) token, as docker's configuration has it.
const IDENTITY_TOKEN: &str = "<token>";

/// A user name and password of our own. Wiped when dropped, never shown.
pub struct UpstreamCredential {
    username: String,
    password: Zeroizing<String>,
    /// Tells it from every other, also from one read later: no token got with one is used for another.
    serial: u64,
}

impl UpstreamCredential {
    /// `username` `<token>` means that the password is an identity (refresh) token, as docker's configuration has it.
    pub fn new(username: impl Into<String>, password: impl Into<String>) -> UpstreamCredential {
        static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);
        UpstreamCredential {
            username: username.into(),
            password: Zeroizing::new(password.into()),
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
        }
    }

    pub(super) fn username(&self) -> &str {
        &self.username
    }

    pub(super) fn password(&self) -> &str {
        &self.password
    }

    pub(super) fn is_identity_token(&self) -> bool {
        self.username == IDENTITY_TOKEN
    }

    pub(super) fn basic(&self) -> HeaderValue {
        basic(&self.username, &self.password)
    }

    /// In the place of a principal: whose tokens are kept under it.
    pub(super) fn principal(&self) -> [u8; 32] {
        let mut principal = [0; 32];
        for (to, from) in principal.iter_mut().zip(self.serial.to_be_bytes()) {
            *to = from;
        }
        principal
    }

    fn is_same_as(&self, other: &UpstreamCredential) -> bool {
        self.username == other.username && self.password == other.password
    }
}

/// `Authorization: Basic …` of a user name and password (RFC 7617 §2), marked sensitive.
pub(super) fn basic(username: &str, password: &str) -> HeaderValue {
    let text = Zeroizing::new(format!("{username}:{password}"));
    let text = Zeroizing::new(format!("Basic {}", BASE64_STANDARD.encode(text.as_bytes())));
    // Base64 is always a legal header value.
    let mut header = HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static(""));
    header.set_sensitive(true);
    header
}

impl fmt::Debug for UpstreamCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UpstreamCredential")
    }
}

/// Where the proxy's own credentials for an upstream come from.
#[derive(Debug)]
pub enum CredentialSource {
    /// Always this one.
    Fixed(UpstreamCredential),
    /// A user, and the file with its password.
    PasswordFile {
        /// The user.
        username: String,
        /// The file.
        path: PathBuf,
    },
    /// The file that `docker login` writes, with all that it names: credentials for hosts and for what lies below a
    /// path, credential helpers.
    DockerConfig {
        /// The file.
        path: PathBuf,
    },
    /// A program that gives the credential.
    Helper(HelperName),
}

impl From<UpstreamCredential> for CredentialSource {
    fn from(credential: UpstreamCredential) -> Self {
        Self::Fixed(credential)
    }
}

/// The proxy's own credential cannot be had; told in the log when it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CredentialUnavailable;

/// The proxy's own credentials for one upstream.
pub(super) struct CredentialProvider {
    source: Source,
    names: Names,
    serial: u64,
}

/// By which names a credential is looked for, and what a helper calls the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// The one to look for first at the front.
    all: Vec<String>,
    /// Docker Hub by its old URL, all others by the host of their address.
    server: String,
}

impl Names {
    /// An upstream below a project of another registry is found by that one's address first: it is that registry which is
    /// shown the credential.
    pub(super) fn new(name: &str, hosts: Vec<String>, url: Option<&Origin>) -> Names {
        let address = url.map(|url| url.authority().to_string()).unwrap_or_default();
        let is_elsewhere = url.is_some_and(|url| url.repository_prefix().is_some());
        let server = if docker_config::is_hub(name) && !is_elsewhere {
            docker_config::HUB_SERVER.to_owned()
        } else {
            address.clone()
        };
        let mut all: Vec<_> = std::iter::once(name.to_owned()).chain(hosts).collect();
        all.insert(if is_elsewhere { 0 } else { all.len() }, address);
        Names { all, server }
    }
}

enum Source {
    Fixed(Arc<UpstreamCredential>),
    Password {
        username: String,
        file: ReloadingFile<UpstreamCredential>,
    },
    Docker(ReloadingFile<DockerConfig>, Helpers),
    Helper(HelperName, Helpers),
}

impl CredentialProvider {
    pub(super) fn new(source: CredentialSource, names: Names) -> CredentialProvider {
        static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);
        let source = match source {
            CredentialSource::Fixed(credential) => Source::Fixed(Arc::new(credential)),
            CredentialSource::PasswordFile { username, path } => {
                let known_as = username.clone();
                let read = move |text: &str| {
                    let password = text.trim_end_matches(['\r', '\n']);
                    let credential = UpstreamCredential::new(username.clone(), password);
                    (!password.is_empty())
                        .then_some(credential)
                        .ok_or_else(|| "it is empty".to_owned())
                };
                Source::Password {
                    username: known_as,
                    file: ReloadingFile::new(path, Box::new(read)),
                }
            }
            CredentialSource::DockerConfig { path } => {
                let read = |text: &str| DockerConfig::read(text).map_err(|error| error.to_string());
                Source::Docker(ReloadingFile::new(path, Box::new(read)), Helpers::default())
            }
            CredentialSource::Helper(name) => Source::Helper(name, Helpers::default()),
        };
        CredentialProvider {
            source,
            names,
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Tells it from every other of this process.
    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// Whether these settings mean just this.
    pub(super) fn is_from(&self, source: &CredentialSource, names: &Names) -> bool {
        let is_same = match (&self.source, source) {
            (Source::Fixed(known), CredentialSource::Fixed(given)) => known.is_same_as(given),
            (
                Source::Password { username, file },
                CredentialSource::PasswordFile {
                    username: given,
                    path,
                },
            ) => username == given && file.path() == path,
            (Source::Docker(file, _), CredentialSource::DockerConfig { path }) => file.path() == path,
            (Source::Helper(known, _), CredentialSource::Helper(given)) => known == given,
            _ => false,
        };
        is_same && self.names == *names
    }

    /// The next one who asks looks at the file, if there is one.
    pub(super) fn check_soon(&self) {
        match &self.source {
            Source::Password { file, .. } => file.check_soon(),
            Source::Docker(file, _) => file.check_soon(),
            Source::Fixed(_) | Source::Helper(..) => {}
        }
    }

    /// The credential for a repository, or for none in particular; `None`: none is needed there.
    pub(super) async fn current(
        &self,
        repository: Option<&Repository>,
    ) -> Result<Option<Arc<UpstreamCredential>>, CredentialUnavailable> {
        match &self.source {
            Source::Fixed(credential) => Ok(Some(Arc::clone(credential))),
            Source::Password { file, .. } => file.get().await.map(Some),
            Source::Docker(file, helpers) => match file.get().await?.find(&self.names.all, repository) {
                Match::Credential(credential) => Ok(Some(credential)),
                Match::Helper { helper, server } => helpers.get(&helper, &server).await,
                Match::Nothing => Ok(None),
            },
            Source::Helper(name, helpers) => helpers.get(name, &self.names.server).await,
        }
    }

    /// The registry has refused `used`: another one, if there is another by now.
    pub(super) async fn renewed(
        &self,
        repository: Option<&Repository>,
        used: &UpstreamCredential,
    ) -> Option<Arc<UpstreamCredential>> {
        match &self.source {
            Source::Fixed(_) => return None,
            Source::Password { file, .. } => file.check_soon(),
            Source::Docker(file, helpers) => {
                file.check_soon();
                helpers.check_soon(used);
            }
            Source::Helper(_, helpers) => helpers.check_soon(used),
        }
        let renewed = self.current(repository).await.ok()??;
        (!renewed.is_same_as(used)).then_some(renewed)
    }
}
