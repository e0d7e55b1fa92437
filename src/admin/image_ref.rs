//! Image references as users write them.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use serde::Deserialize;
use utoipa::ToSchema;

use super::response::Problem;
use crate::oci::{Reference, Repository, split_image};
use crate::proxy::UpstreamRegistry;
use crate::server::ServingState;
use crate::store::tags::TagKey;

/// A parsed image reference with its upstream.
#[derive(Clone)]
pub(super) struct ImageRef {
    pub(super) upstream_registry: Arc<UpstreamRegistry>,
    pub(super) repository: Repository,
    pub(super) reference: Reference,
}

impl ImageRef {
    /// Parses `docker.io/library/alpine:3.20` and the short forms that docker accepts.
    pub(super) fn parse(image: &str, registry: &ServingState) -> Result<Self, Problem> {
        if image.is_empty() {
            return Err(Problem::bad_request(
                "missing image, as in image=docker.io/library/alpine:3.20",
            ));
        }
        let (name, reference) = split_image(image);
        let (upstream_registry, rest) = match name.split_once('/') {
            Some((first, rest)) => match registry.router.by_name(first) {
                Some(upstream_registry) => (upstream_registry, rest),
                None if first.contains(['.', ':']) => return Err(unknown_upstream(first, registry)),
                None => (registry.router.default_registry(), name),
            },
            None => (registry.router.default_registry(), name),
        };
        let wrong = |error: &dyn std::fmt::Display| {
            Problem::bad_request(format!("`{image}` is not an image reference: {error}"))
        };
        let repository: Repository = rest.parse().map_err(|error| wrong(&error))?;
        let repository = upstream_registry
            .full_name(repository)
            .map_err(|error| wrong(&error))?;
        let reference = reference.parse().map_err(|error| wrong(&error))?;
        Ok(Self {
            upstream_registry: Arc::clone(upstream_registry),
            repository,
            reference,
        })
    }

    /// The tag key; `None` for a digest.
    pub(super) fn tag_key(&self) -> Option<TagKey> {
        match &self.reference {
            Reference::Tag(tag) => Some(TagKey {
                upstream: self.upstream_registry.name().into(),
                repository: self.repository.clone(),
                tag: tag.clone(),
            }),
            Reference::Digest(_) => None,
        }
    }
}

/// The fully qualified name.
impl std::fmt::Display for ImageRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = match &self.reference {
            Reference::Tag(_) => ':',
            Reference::Digest(_) => '@',
        };
        write!(
            f,
            "{}/{}{mark}{}",
            self.upstream_registry.name(),
            self.repository,
            self.reference
        )
    }
}

/// The fully qualified name of a tag.
pub(super) fn full_name(key: &TagKey) -> String {
    format!("{}/{}:{}", key.upstream, key.repository, key.tag)
}

/// The known names most similar to an unknown one.
pub(super) struct Nearest<'a> {
    text: &'a str,
    /// Candidates with their similarity, most similar first.
    likely: Vec<(f64, String)>,
}

impl<'a> Nearest<'a> {
    pub(super) fn to(text: &'a str) -> Self {
        Self {
            text,
            likely: Vec::new(),
        }
    }

    pub(super) fn consider(&mut self, name: String) {
        const SHOWN_MAX: usize = 3;
        const LIKENESS_MIN: f64 = 0.75;
        let likeness = strsim::jaro_winkler(self.text, &name);
        if likeness >= LIKENESS_MIN {
            self.likely.push((likeness, name));
            self.likely
                .sort_by(|(a, one), (b, other)| b.total_cmp(a).then_with(|| one.cmp(other)));
            self.likely.truncate(SHOWN_MAX);
        }
    }

    pub(super) fn names(self) -> Vec<String> {
        self.likely.into_iter().map(|(_, name)| name).collect()
    }
}

fn unknown_upstream(name: &str, registry: &ServingState) -> Problem {
    let mut near = Nearest::to(name);
    for upstream_registry in registry.router.all() {
        near.consider(upstream_registry.name().to_owned());
    }
    Problem {
        nearest: near.names(),
        ..Problem::bad_request(format!("`{name}` is not a configured upstream"))
    }
}

/// An image in a query.
#[derive(Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ImageQuery {
    /// Image reference, for example docker.io/library/alpine:3.20; docker's short forms are accepted.
    #[serde(default)]
    #[param(required = true)]
    pub(super) image: String,
}

/// An image, and an optional credential, which is neither stored nor logged.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageRequest {
    pub(super) image: String,
    username: Option<String>,
    password: Option<String>,
    /// Complete `Authorization` value instead of username and password.
    authorization: Option<String>,
    /// For pulls: a platform such as linux/amd64, or all. Default: the platform of this machine.
    pub(super) platforms: Option<Vec<String>>,
}

impl ImageRequest {
    /// The credential as an `Authorization` value.
    pub(super) fn authorization(&self) -> Result<Option<HeaderValue>, Problem> {
        let text = match (&self.authorization, &self.username) {
            (Some(_), Some(_)) => {
                return Err(Problem::bad_request(
                    "give either a username and password, or authorization",
                ));
            }
            (Some(text), None) => text.clone(),
            (None, Some(username)) => {
                let pair = format!("{username}:{}", self.password.as_deref().unwrap_or_default());
                format!("Basic {}", STANDARD.encode(pair))
            }
            (None, None) => return Ok(None),
        };
        let mut value = HeaderValue::from_str(&text)
            .map_err(|_| Problem::bad_request("the credential is not a valid header value"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}
