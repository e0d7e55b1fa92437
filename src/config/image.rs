//! Image references as users write them, by the configured upstreams.

use std::sync::Arc;

use super::{Config, UpstreamConfig};
use crate::oci::{NameError, Reference, ReferenceError, Repository, split_image};
use crate::upstream::{Origin, OriginError};

/// Name of Docker Hub, of whose repositories `library/` may be omitted.
const DOCKER_HUB: &str = "docker.io";

/// An image at a configured upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfiguredImage {
    /// Name of the upstream.
    pub upstream: Arc<str>,
    /// Identity of the upstream: the same for every cache, whatever it calls the upstream.
    pub identity: String,
    /// The repository.
    pub repository: Repository,
    /// The tag or digest.
    pub reference: Reference,
}

/// The fully qualified name.
impl std::fmt::Display for ConfiguredImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = match &self.reference {
            Reference::Tag(_) => ':',
            Reference::Digest(_) => '@',
        };
        write!(f, "{}/{}{mark}{}", self.upstream, self.repository, self.reference)
    }
}

/// Why a text is not the reference of an image at a configured upstream.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The first component is not the name of an upstream.
    #[error("`{0}` is not a configured upstream")]
    Upstream(String),
    /// The name is not that of a repository.
    #[error("not an image reference: {0}")]
    Name(#[from] NameError),
    /// The text after the name is neither a tag nor a digest.
    #[error("not an image reference: {0}")]
    Reference(#[from] ReferenceError),
    /// The URL of the upstream is not one.
    #[error(transparent)]
    Url(#[from] OriginError),
}

impl UpstreamConfig {
    /// The URLs with their repository prefixes.
    pub fn origins(&self) -> Result<Vec<Origin>, OriginError> {
        let origins = self.urls.iter().map(|url| {
            let origin: Origin = url.address.parse()?;
            Ok(match &url.repository_prefix {
                Some(prefix) => origin.with_repository_prefix(prefix.clone()),
                None => origin,
            })
        });
        origins.collect()
    }
}

impl Config {
    /// Parses `docker.io/library/alpine:3.20` and the short forms that docker accepts.
    pub fn image(&self, text: &str) -> Result<ConfiguredImage, ImageError> {
        let (name, reference) = split_image(text);
        let find = |name: &str| self.upstreams.iter().find(|upstream| upstream.has_name(name));
        let default = || find(&self.default_upstream).or(self.upstreams.first());
        let (upstream, rest) = match name.split_once('/') {
            Some((first, rest)) => match find(first) {
                Some(upstream) => (Some(upstream), rest),
                None if first.contains(['.', ':']) => return Err(ImageError::Upstream(first.to_owned())),
                None => (default(), name),
            },
            None => (default(), name),
        };
        let upstream = upstream.ok_or_else(|| ImageError::Upstream(String::new()))?;
        let repository: Repository = rest.parse()?;
        let repository = if &*upstream.name == DOCKER_HUB && repository.is_one_component() {
            repository.with_prefix("library")?
        } else {
            repository
        };
        Ok(ConfiguredImage {
            upstream: Arc::clone(&upstream.name),
            identity: crate::upstream::identity(&upstream.origins()?),
            repository,
            reference: reference.parse()?,
        })
    }
}
