//! An image as people write it.

use std::sync::Arc;

use super::reply::Problem;
use crate::oci::{Query, Reference, Repository};
use crate::pull::Site;
use crate::server::Registry;
use crate::store::refs::TagKey;

/// An image, read.
#[derive(Clone)]
pub(super) struct Named {
    pub(super) site: Arc<Site>,
    pub(super) repository: Repository,
    pub(super) reference: Reference,
}

impl Named {
    /// Of a query's `image`.
    pub(super) fn of_query(query: &Query, registry: &Registry) -> Result<Self, Problem> {
        Self::read(query.get("image").unwrap_or_default(), registry)
    }

    /// Reads `docker.io/library/alpine:3.20`, and the short forms that docker knows.
    pub(super) fn read(image: &str, registry: &Registry) -> Result<Self, Problem> {
        if image.is_empty() {
            return Err(Problem::bad(
                "say which image, as in image=docker.io/library/alpine:3.20",
            ));
        }
        let (name, reference) = match (image.split_once('@'), image.rsplit_once(':')) {
            (Some((name, digest)), _) => (name, digest),
            (None, Some((name, tag))) if !tag.contains('/') => (name, tag),
            _ => (image, "latest"),
        };
        let (site, rest) = match name.split_once('/') {
            Some((first, rest)) => match registry.doors.named(first) {
                Some(site) => (site, rest),
                None if first.contains(['.', ':']) => return Err(unknown_upstream(first, registry)),
                None => (registry.doors.default_site(), name),
            },
            None => (registry.doors.default_site(), name),
        };
        let wrong =
            |error: &dyn std::fmt::Display| Problem::bad(format!("`{image}` is not an image: {error}"));
        let repository: Repository = rest.parse().map_err(|error| wrong(&error))?;
        let repository = site.full_name(repository).map_err(|error| wrong(&error))?;
        let reference = reference.parse().map_err(|error| wrong(&error))?;
        Ok(Self {
            site: Arc::clone(site),
            repository,
            reference,
        })
    }

    /// The key of its tag; a digest has none.
    pub(super) fn key(&self) -> Option<TagKey> {
        match &self.reference {
            Reference::Tag(tag) => Some(TagKey {
                upstream: self.site.name().into(),
                repository: self.repository.clone(),
                tag: tag.clone(),
            }),
            Reference::Digest(_) => None,
        }
    }
}

/// In full.
impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = match &self.reference {
            Reference::Tag(_) => ':',
            Reference::Digest(_) => '@',
        };
        write!(
            f,
            "{}/{}{mark}{}",
            self.site.name(),
            self.repository,
            self.reference
        )
    }
}

/// The name of a tag, in full.
pub(super) fn name_of(key: &TagKey) -> String {
    format!("{}/{}:{}", key.upstream, key.repository, key.tag)
}

/// Those of `known` that `text` is nearest to.
pub(super) fn nearest<'a>(text: &str, known: impl Iterator<Item = &'a str>) -> Vec<String> {
    const SHOWN_MAX: usize = 3;
    const LIKENESS_MIN: f64 = 0.75;
    let mut likely: Vec<(f64, &str)> = known
        .map(|name| (strsim::jaro_winkler(text, name), name))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .collect();
    likely.sort_by(|(a, one), (b, other)| b.total_cmp(a).then(one.cmp(other)));
    likely
        .into_iter()
        .take(SHOWN_MAX)
        .map(|(_, name)| name.to_owned())
        .collect()
}

fn unknown_upstream(name: &str, registry: &Registry) -> Problem {
    let known = registry.doors.all().iter().map(|site| site.name());
    Problem {
        nearest: nearest(name, known),
        ..Problem::bad(format!("`{name}` is not a configured upstream"))
    }
}
