//! Configured credentials of an upstream: their sources, and the credential for each repository.
//!
//! A file is reloaded soon after it changes. A credential helper runs again well before its credential can expire,
//! and at once when the registry rejects it. The previous credential stays in use while no newer one is available.
//!
//! * `docker_config`: the file written by `docker login`. * `helper`: the programs named `docker-credential-…`. *
//!   `reloading_file`: a file that is reloaded when it changes.

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

/// The user name that marks an identity (refresh) token, as in docker's configuration.
const IDENTITY_TOKEN: &str = "<token>";

/// A configured user name and password. Zeroized on drop, never printed.
pub struct UpstreamCredential {
    username: String,
    password: Zeroizing<String>,
    /// Unique per credential, also if the same one is read again. Tokens are never shared between two credentials.
    serial: u64,
}

impl UpstreamCredential {
    /// A `username` of `<token>` means that the password is an identity (refresh) token, as in docker's
    /// configuration.
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

    /// The principal under which this credential's tokens are cached.
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

/// `Authorization: Basic …` of a user name and password (RFC 7617 §2), marked as sensitive.
pub(super) fn basic(username: &str, password: &str) -> HeaderValue {
    let text = Zeroizing::new(format!("{username}:{password}"));
    let text = Zeroizing::new(format!("Basic {}", BASE64_STANDARD.encode(text.as_bytes())));
    // Base64 is always a valid header value.
    let mut header = HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static(""));
    header.set_sensitive(true);
    header
}

impl fmt::Debug for UpstreamCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UpstreamCredential")
    }
}

/// Source of the configured credentials for an upstream.
#[derive(Debug)]
pub enum CredentialSource {
    /// A fixed credential.
    Fixed(UpstreamCredential),
    /// A user name, and a file with the password.
    PasswordFile {
        /// The user name.
        username: String,
        /// The file.
        path: PathBuf,
    },
    /// The file written by `docker login`: credentials and credential helpers for hosts, and for paths below a host.
    DockerConfig {
        /// The file.
        path: PathBuf,
    },
    /// A credential helper.
    Helper(HelperName),
}

impl From<UpstreamCredential> for CredentialSource {
    fn from(credential: UpstreamCredential) -> Self {
        Self::Fixed(credential)
    }
}

/// No credential is available; the reason was logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CredentialUnavailable;

/// Provider of the configured credentials for one upstream.
pub(super) struct CredentialProvider {
    source: Source,
    names: Names,
    serial: u64,
}

/// The names under which a credential is looked up, and the server name for a helper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// In lookup order.
    all: Vec<String>,
    /// Docker Hub's legacy URL, or the host of the first URL.
    server: String,
}

impl Names {
    /// An upstream that is a project of another registry is looked up by that registry's host first, because that
    /// registry receives the credential.
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

    /// Unique in this process.
    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// Whether the source and the names are the same.
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

    /// The next lookup checks the file, if there is one.
    pub(super) fn check_soon(&self) {
        match &self.source {
            Source::Password { file, .. } => file.check_soon(),
            Source::Docker(file, _) => file.check_soon(),
            Source::Fixed(_) | Source::Helper(..) => {}
        }
    }

    /// The credential for a repository, or for none in particular. `None`: none is configured for it.
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

    /// After the registry rejected `used`: another credential, if one is available now.
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
