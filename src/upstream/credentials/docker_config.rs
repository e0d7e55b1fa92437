//! Docker's `config.json`: the credential or credential helper for each repository. No I/O.
//!
//! Supports both forms of keys: docker's, where a key is a host or a URL, and that of containers-auth.json(5), where
//! a key may include a path and the longest match wins.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::helper::HelperName;
use super::{IDENTITY_TOKEN, UpstreamCredential};
use crate::oci::name::Repository;

/// Docker Hub's name in docker's configuration and for its helpers.
pub(super) const HUB_SERVER: &str = "https://index.docker.io/v1/";
const HUB: &str = "docker.io";
const HUB_HOSTS: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// The credential settings of docker's configuration.
pub struct DockerConfig {
    /// By host, or host and path.
    credentials: HashMap<String, Arc<UpstreamCredential>>,
    /// By host, or host and path: the helper, and its name for the registry.
    helpers: HashMap<String, (HelperName, String)>,
    /// The default helper, with its names for the registries that it is known to have.
    store: Option<(HelperName, HashMap<String, String>)>,
}

/// Why a text is not docker's configuration. Never quotes the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DockerConfigError {
    /// Not JSON, or not of this structure.
    #[error("line {0} is not valid in docker's configuration")]
    RequestError(usize),
    /// An `auth` that is not the base64 of user and password.
    #[error("`auth` of `{0}` is not the base64 of a user, a colon and a password")]
    Auth(String),
    /// An invalid helper name.
    #[error("`{0}` cannot be the name of a credential helper")]
    Helper(String),
}

/// The result of a lookup.
pub(super) enum Match {
    Credential(Arc<UpstreamCredential>),
    Helper { helper: HelperName, server: String },
    Nothing,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    auths: HashMap<String, Entry>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
    #[serde(default)]
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Zeroizing<String>,
    username: String,
    password: Zeroizing<String>,
    identitytoken: Zeroizing<String>,
}

impl DockerConfig {
    /// Parses it.
    pub fn read(text: &str) -> Result<Self, DockerConfigError> {
        let file: File =
            serde_json::from_str(text).map_err(|error| DockerConfigError::RequestError(error.line()))?;
        let mut credentials = HashMap::new();
        let mut known = HashMap::new();
        for (key, entry) in file.auths {
            match entry.credential(&key)? {
                Some(credential) => {
                    credentials.insert(normalized_key(&key), Arc::new(credential));
                }
                None => {
                    known.insert(normalized_key(&key), key);
                }
            }
        }
        let helper = |name: String| {
            name.parse::<HelperName>()
                .map_err(|_| DockerConfigError::Helper(name))
        };
        let helpers = file
            .cred_helpers
            .into_iter()
            .map(|(key, name)| Ok((normalized_key(&key), (helper(name)?, key))));
        let helpers = helpers.collect::<Result<_, DockerConfigError>>()?;
        let store = match file.creds_store {
            name if name.is_empty() => None,
            name => Some((helper(name)?, known)),
        };
        Ok(Self {
            credentials,
            helpers,
            store,
        })
    }

    /// Looks up `repository` of the registry with these names. The longest matching key wins, and a helper takes
    /// precedence over a credential in the file. Without a match, the default helper is used.
    pub(super) fn find(&self, names: &[String], repository: Option<&Repository>) -> Match {
        let path = repository.map(Repository::as_str).unwrap_or_default();
        let mut below = Some(path).filter(|path| !path.is_empty());
        loop {
            for name in names {
                let host = normalized_key(name);
                let key = below.map_or_else(|| host.clone(), |path| format!("{host}/{path}"));
                if let Some((helper, server)) = self.helpers.get(&key) {
                    return Match::Helper {
                        helper: helper.clone(),
                        server: server.clone(),
                    };
                }
                if let Some(credential) = self.credentials.get(&key) {
                    return Match::Credential(Arc::clone(credential));
                }
            }
            let Some(path) = below else { break };
            below = path.rsplit_once('/').map(|(parent, _)| parent);
        }
        let Some((helper, known)) = &self.store else {
            return Match::Nothing;
        };
        let written = names
            .iter()
            .find_map(|name| known.get(&normalized_key(name)).cloned());
        let usual = || match names.first() {
            Some(name) if is_hub(name) => HUB_SERVER.to_owned(),
            name => name.cloned().unwrap_or_default(),
        };
        Match::Helper {
            helper: helper.clone(),
            server: written.unwrap_or_else(usual),
        }
    }
}

impl Entry {
    fn credential(self, key: &str) -> Result<Option<UpstreamCredential>, DockerConfigError> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(UpstreamCredential::new(
                IDENTITY_TOKEN,
                self.identitytoken.as_str(),
            )));
        }
        if self.auth.is_empty() {
            let has_both = !self.username.is_empty() && !self.password.is_empty();
            return Ok(has_both.then(|| UpstreamCredential::new(self.username, self.password.as_str())));
        }
        let wrong = || DockerConfigError::Auth(key.to_owned());
        let pair = BASE64_STANDARD
            .decode(self.auth.trim())
            .map(Zeroizing::new)
            .map_err(|_| wrong())?;
        let pair = std::str::from_utf8(&pair).map_err(|_| wrong())?;
        let (username, password) = pair.split_once(':').ok_or_else(wrong)?;
        // docker pads with NUL, and writes a lone colon for an empty credential.
        let password = password.trim_end_matches('\0');
        Ok((!username.is_empty()).then(|| UpstreamCredential::new(username, password)))
    }
}

/// Whether this host is Docker Hub's.
pub(super) fn is_hub(host: &str) -> bool {
    HUB_HOSTS.contains(&host)
}

/// Normalizes a key: lower-case host, and the path if there is one. The path of a URL is ignored.
fn normalized_key(key: &str) -> String {
    let stripped = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"));
    let (host, path) = match stripped {
        Some(rest) => (rest.split('/').next().unwrap_or_default(), ""),
        None => key.split_once('/').unwrap_or((key, "")),
    };
    let host = host.to_ascii_lowercase();
    let host = if is_hub(&host) { HUB } else { &host };
    match path.trim_end_matches('/') {
        "" | "v1" | "v2" => host.to_owned(),
        path => format!("{host}/{path}"),
    }
}

/// Prints nothing, because the text contains secrets.
impl std::fmt::Debug for DockerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DockerConfig").finish_non_exhaustive()
    }
}
