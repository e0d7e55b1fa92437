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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]
    use std::path::Path;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn config() -> Config {
        let text = "[upstream.\"docker.io\"]\nurl = [\"https://cache.example:5000\", \"https://registry-1.docker.io\"]\n\
                    repository_prefix = [\"hub\", \"\"]\n[upstream.\"ghcr.io\"]\nurl = \"https://ghcr.io\"\n";
        Config::read(text, Path::new("ifnewer.toml")).unwrap_or_else(|faults| panic!("{faults}"))
    }

    #[test]
    fn image_has_a_full_name_and_the_identity_of_its_urls() {
        let hub = "https://cache.example:5000/v2/hub https://registry-1.docker.io";
        let with_digest = format!("alpine@{DIGEST}");
        let full_with_digest = format!("docker.io/library/alpine@{DIGEST}");
        for (text, name, identity) in [
            ("alpine", "docker.io/library/alpine:latest", hub),
            ("team/app:1", "docker.io/team/app:1", hub),
            ("docker.io/alpine:3.20", "docker.io/library/alpine:3.20", hub),
            (
                "ghcr.io/acme/web:main",
                "ghcr.io/acme/web:main",
                "https://ghcr.io",
            ),
            (&with_digest, &full_with_digest, hub),
        ] {
            let image = config().image(text).unwrap();
            assert_eq!(
                (image.to_string().as_str(), &*image.identity),
                (name, identity),
                "{text}"
            );
        }
    }

    #[test]
    fn image_at_an_unknown_upstream_is_rejected() {
        for (text, message) in [
            ("quay.example/app", "`quay.example` is not a configured upstream"),
            (
                "localhost:5000/app",
                "`localhost:5000` is not a configured upstream",
            ),
            ("Alpine", "not an image reference"),
            ("alpine@sha256:00", "not an image reference"),
        ] {
            let error = config().image(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
