//! Effect of a write request on cached content: the tags that it moves and the digest that it deletes.

use http::Method;

use super::UpstreamRegistry;
use crate::oci::{AnyDigest, Digest, Endpoint, Query, QueryError, Reference, Repository, RequestError, Tag};
use crate::store::invalidations::InvalidationKey;

/// Maximum number of tags in the query of one push.
const PUSHED_TAGS_MAX: usize = 64;

/// Cached content that a write changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteEffect {
    /// These tags point to another manifest or are deleted. A push by digest alone changes no tag, but its manifest
    /// may have a subject, so a referrers list may have grown.
    Tags(Repository, Vec<Tag>),
    /// A manifest or a blob was deleted, and with a manifest every tag that points to it.
    Deleted(Repository, Digest),
}

impl WriteEffect {
    /// Effect of a request, or `None` if it changes nothing that can be cached, such as an upload chunk. A manifest
    /// or blob name that cannot be parsed here is rejected, because the registry may accept it.
    pub fn of(method: &Method, path: &str, query: Option<&str>) -> Result<Option<Self>, RequestError> {
        let deletes = *method == Method::DELETE;
        if !deletes && *method != Method::PUT {
            return Ok(None);
        }
        let endpoint = match Endpoint::parse(&Method::GET, path, None) {
            Ok(endpoint) => endpoint,
            Err(RequestError::Path | RequestError::Write { .. }) => return Ok(None),
            Err(malformed) => return Err(malformed),
        };
        Ok(match endpoint {
            Endpoint::Manifest {
                repository,
                reference,
            } if !deletes => {
                let mut tags = pushed_tags(query)?;
                if let Reference::Tag(tag) = reference {
                    tags.push(tag);
                }
                Some(Self::Tags(repository, tags))
            }
            Endpoint::Manifest {
                repository,
                reference: Reference::Tag(tag),
            } => Some(Self::Tags(repository, vec![tag])),
            Endpoint::Manifest {
                repository,
                reference: Reference::Digest(AnyDigest::Supported(digest)),
            }
            | Endpoint::Blob {
                repository,
                digest: AnyDigest::Supported(digest),
            } if deletes => Some(Self::Deleted(repository, digest)),
            _ => None,
        })
    }

    pub(super) fn repository(&self) -> &Repository {
        match self {
            Self::Tags(repository, _) | Self::Deleted(repository, _) => repository,
        }
    }

    /// Cache entries that the write invalidates. Referrers lists are excluded: they are fresh only while no write
    /// happened.
    pub(super) fn invalidation_keys(&self, registry: &UpstreamRegistry) -> Vec<InvalidationKey> {
        let key = |reference| InvalidationKey {
            upstream: registry.shared_name(),
            repository: self.repository().clone(),
            reference,
        };
        match self {
            Self::Tags(_, tags) => tags.iter().map(|tag| key(tag.clone().into())).collect(),
            Self::Deleted(_, digest) => vec![key((*digest).into())],
        }
    }
}

/// Tags in the query of a push (`?tag=`, draft of the distribution specification 1.2).
fn pushed_tags(query: Option<&str>) -> Result<Vec<Tag>, RequestError> {
    let tags = Query::values(query, "tag")?;
    if tags.len() > PUSHED_TAGS_MAX {
        return Err(QueryError::TooManyTags.into());
    }
    let tags = tags.iter().map(|tag| tag.parse().map_err(RequestError::Tag));
    tags.collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn only_cacheable_writes_have_an_effect() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let tags = |names: &[&str]| {
            let tags = names.iter().map(|name| name.parse().unwrap()).collect();
            Some(WriteEffect::Tags("team/demo".parse().unwrap(), tags))
        };
        let gone = Some(WriteEffect::Deleted(
            "team/demo".parse().unwrap(),
            digest.parse().unwrap(),
        ));
        for (method, path, change) in [
            (Method::PUT, "/v2/team/demo/manifests/1".to_owned(), tags(&["1"])),
            (
                Method::DELETE,
                "/v2/team/demo/manifests/1".to_owned(),
                tags(&["1"]),
            ),
            (
                Method::DELETE,
                format!("/v2/team/demo/manifests/{digest}"),
                gone.clone(),
            ),
            (Method::DELETE, format!("/v2/team/demo/blobs/{digest}"), gone),
            (
                Method::PUT,
                format!("/v2/team/demo/manifests/{digest}"),
                tags(&[]),
            ),
            (Method::PUT, "/v2/team/demo/blobs/uploads/7".to_owned(), None),
            (Method::DELETE, "/v2/team/demo/blobs/uploads/7".to_owned(), None),
            (Method::POST, "/v2/team/demo/blobs/uploads/".to_owned(), None),
            (Method::GET, "/v2/team/demo/manifests/1".to_owned(), None),
            (Method::POST, "/token".to_owned(), None),
        ] {
            assert_eq!(
                WriteEffect::of(&method, &path, None),
                Ok(change),
                "{method} {path}"
            );
        }
    }

    #[test]
    fn t16_push_by_digest_changes_each_query_tag() {
        let path = format!("/v2/team/demo/manifests/sha256:{}", "a".repeat(64));
        let of = |path: &str, query: &str| WriteEffect::of(&Method::PUT, path, Some(query));
        let tags = |names: &[&str]| {
            let tags = names.iter().map(|name| name.parse().unwrap()).collect();
            Ok(Some(WriteEffect::Tags("team/demo".parse().unwrap(), tags)))
        };
        for (query, names) in [
            ("tag=1", &["1"][..]),
            ("tag=1&x=%zz&tag=2", &["1", "2"]),
            ("x;tag=1", &["1"]),
            ("%74ag=%31&TAG=2", &["1", "2"]),
            ("tags=1&digest=x", &[]),
        ] {
            assert_eq!(of(&path, query), tags(names), "{query}");
        }
        assert_eq!(of("/v2/team/demo/manifests/1", "tag=2"), tags(&["2", "1"]));
        for query in ["tag=", "tag=%zz", "tag=a%2Fb", &"tag=a&".repeat(65)] {
            assert!(of(&path, query).is_err(), "{query}");
        }
    }

    #[test]
    fn t16_write_to_invalid_name_is_rejected() {
        for path in [
            "/v2/team/demo/manifests/1/",
            "/v2/Team/demo/manifests/1",
            "/v2/team/demo/manifests/sha256:1",
        ] {
            for method in [Method::PUT, Method::DELETE] {
                assert!(WriteEffect::of(&method, path, None).is_err(), "{method} {path}");
            }
        }
    }
}
