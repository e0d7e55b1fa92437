//! Endpoints of the distribution spec: validated read requests, independent of transport and client.
//!
//! The names `end-1` to `end-12` are those of the spec. Writes are not parsed here: they are forwarded as they are, or
//! denied. `/v2/_catalog` is not supported, because it would list repositories that the client has no right to read.

use std::borrow::Cow;
use std::fmt::Write as _;

use http::{Method, StatusCode};

use super::digest::{AnyDigest, DigestError};
use super::error::ErrorCode;
use super::name::{NameError, Reference, ReferenceError, Repository};
use super::path::PathError;
use super::query::{Query, QueryError};

/// `@` and the text of a SHA-256 digest.
const DIGEST_TEXT_BYTES: usize = 72;

/// A read request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v2/` (end-1): API version and authentication check.
    Ping,
    /// A manifest by tag or digest (end-3).
    Manifest {
        /// Repository in the path.
        repository: Repository,
        /// Requested manifest.
        reference: Reference,
    },
    /// A blob (end-2).
    Blob {
        /// Repository in the path.
        repository: Repository,
        /// Requested blob.
        digest: AnyDigest,
    },
    /// Tags of a repository (end-8).
    Tags {
        /// Repository in the path.
        repository: Repository,
        /// `n`, `last` and any other parameters.
        query: Query,
    },
    /// Referrers of a manifest (end-12).
    Referrers {
        /// Repository in the path.
        repository: Repository,
        /// Subject manifest.
        digest: AnyDigest,
        /// `artifactType` and any other parameters.
        query: Query,
    },
}

impl Endpoint {
    /// Parses a request line: method, path as sent, and query without its `?`.
    ///
    /// A name may contain the words `manifests`, `blobs`, `referrers` and `tags`, so the *last* such word is
    /// the resource. Percent-encoding is rejected, because no name needs it, except `%3A` for the colon of a
    /// digest. The query matters for tags and referrers only. `ns` is removed from it (see [`Query::parse`]).
    pub fn parse(method: &Method, path: &str, query: Option<&str>) -> Result<Self, RequestError> {
        let rest = if path == "/v2" {
            ""
        } else {
            path.strip_prefix("/v2/").ok_or(RequestError::Path)?
        };
        check_method(method)?;
        if rest.is_empty() {
            return Ok(Self::Ping);
        }
        if let Some(name) = rest.strip_suffix("/tags/list") {
            let query = Query::parse(query).and_then(|(query, _)| query.with_page_size())?;
            return Ok(Self::Tags {
                repository: repository(name)?,
                query,
            });
        }
        let (name, resource, reference) = split_at_last_resource(rest)?;
        match resource {
            Resource::Manifests => Ok(Self::Manifest {
                repository: repository(name)?,
                reference: with_colon(reference).parse().map_err(|error| match error {
                    ReferenceError::Tag(error) => RequestError::Tag(error),
                    ReferenceError::Digest(error) => RequestError::Digest(error),
                })?,
            }),
            // A request for the state of an upload belongs to a push, whatever its method.
            Resource::Blobs if reference == "uploads" || reference.starts_with("uploads/") => {
                Err(RequestError::Write {
                    method: method.clone(),
                })
            }
            Resource::Blobs => Ok(Self::Blob {
                repository: repository(name)?,
                digest: with_colon(reference).parse()?,
            }),
            Resource::Referrers => Ok(Self::Referrers {
                repository: repository(name)?,
                digest: with_colon(reference).parse()?,
                query: Query::parse(query)?.0,
            }),
        }
    }

    /// The requested image, for messages: `repository:tag` or `repository@digest`. Empty for [`Endpoint::Ping`].
    pub fn image(&self) -> String {
        match self {
            Self::Ping => String::new(),
            Self::Manifest {
                repository,
                reference: Reference::Tag(tag),
            } => [repository.as_str(), ":", tag.as_str()].concat(),
            Self::Manifest {
                repository,
                reference: Reference::Digest(digest),
            }
            | Self::Blob { repository, digest } => {
                let mut image = String::with_capacity(repository.as_str().len() + DIGEST_TEXT_BYTES);
                // Writing to a `String` cannot fail.
                let _infallible = write!(image, "{repository}@{digest}");
                image
            }
            Self::Tags { repository, .. } | Self::Referrers { repository, .. } => repository.to_string(),
        }
    }

    /// Its repository, or `None` for [`Endpoint::Ping`].
    pub const fn repository(&self) -> Option<&Repository> {
        match self {
            Self::Ping => None,
            Self::Manifest { repository, .. }
            | Self::Blob { repository, .. }
            | Self::Tags { repository, .. }
            | Self::Referrers { repository, .. } => Some(repository),
        }
    }

    /// The same endpoint in another repository. A ping is unchanged.
    #[must_use]
    pub fn with_repository(mut self, new: Repository) -> Self {
        match &mut self {
            Self::Ping => {}
            Self::Manifest { repository, .. }
            | Self::Blob { repository, .. }
            | Self::Tags { repository, .. }
            | Self::Referrers { repository, .. } => *repository = new,
        }
        self
    }

    /// Path and query for the upstream: `/v2/<name>/manifests/<reference>`, without `ns`.
    pub fn path_and_query(&self) -> String {
        let Some(repository) = self.repository() else {
            return "/v2/".to_owned();
        };
        let mut text = String::with_capacity(repository.as_str().len() + 160);
        text.push_str("/v2/");
        text.push_str(repository.as_str());
        // Writing to a `String` cannot fail.
        let _infallible = match self {
            Self::Ping => Ok(()),
            Self::Manifest { reference, .. } => write!(text, "/manifests/{reference}"),
            Self::Blob { digest, .. } => write!(text, "/blobs/{digest}"),
            Self::Tags { query, .. } => write!(text, "/tags/list{query}"),
            Self::Referrers { digest, query, .. } => write!(text, "/referrers/{digest}{query}"),
        };
        text
    }
}

/// Error in a request, made by the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Unknown endpoint.
    #[error("there is no such endpoint")]
    Path,
    /// A path that servers may parse differently.
    #[error("path: {0}")]
    AmbiguousPath(#[from] PathError),
    /// Invalid repository name.
    #[error("repository: {0}")]
    Repository(NameError),
    /// Invalid tag, so no manifest can have it.
    #[error("tag: {0}")]
    Tag(NameError),
    /// Invalid digest.
    #[error("digest: {0}")]
    Digest(#[from] DigestError),
    /// Invalid query.
    #[error("query: {0}")]
    Query(#[from] QueryError),
    /// Part of a push or a deletion, which only a listener with write forwarding accepts.
    #[error("this cache is read-only, and this {method} is part of a push or a deletion")]
    Write {
        /// Method as sent. It may be GET if the path is that of an upload.
        method: Method,
    },
    /// Unsupported method.
    #[error("only GET and HEAD are supported")]
    Method,
}

impl RequestError {
    /// Code of the error body.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Repository(_) | Self::AmbiguousPath(_) => ErrorCode::NameInvalid,
            Self::Tag(_) => ErrorCode::TagInvalid,
            Self::Digest(_) => ErrorCode::DigestInvalid,
            Self::Path | Self::Query(_) | Self::Write { .. } | Self::Method => ErrorCode::Unsupported,
        }
    }

    /// Status of the response. An invalid tag is 404, because the conformance suite requests one to test for a
    /// missing manifest.
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::Path | Self::Tag(_) => StatusCode::NOT_FOUND,
            Self::Repository(_) | Self::AmbiguousPath(_) | Self::Digest(_) | Self::Query(_) => {
                StatusCode::BAD_REQUEST
            }
            Self::Write { .. } | Self::Method => StatusCode::METHOD_NOT_ALLOWED,
        }
    }
}

fn check_method(method: &Method) -> Result<(), RequestError> {
    match *method {
        Method::GET | Method::HEAD => Ok(()),
        Method::POST | Method::PUT | Method::PATCH | Method::DELETE => Err(RequestError::Write {
            method: method.clone(),
        }),
        _ => Err(RequestError::Method),
    }
}

#[derive(Clone, Copy)]
enum Resource {
    Manifests,
    Blobs,
    Referrers,
}

impl Resource {
    const ALL: [(Self, &str); 3] = [
        (Self::Manifests, "/manifests/"),
        (Self::Blobs, "/blobs/"),
        (Self::Referrers, "/referrers/"),
    ];
}

/// Name, resource and reference of a path, split at the last `/<resource>/`.
fn split_at_last_resource(rest: &str) -> Result<(&str, Resource, &str), RequestError> {
    // A valid reference has no slash, so the last two slashes nearly always enclose the resource.
    if let Some((before, reference)) = rest.rsplit_once('/')
        && let Some((name, word)) = before.rsplit_once('/')
    {
        match word {
            "manifests" => return Ok((name, Resource::Manifests, reference)),
            "blobs" => return Ok((name, Resource::Blobs, reference)),
            "referrers" => return Ok((name, Resource::Referrers, reference)),
            _ => {}
        }
    }
    Resource::ALL
        .into_iter()
        .filter_map(|(resource, mark)| {
            rest.rsplit_once(mark)
                .map(|(name, reference)| (name, resource, reference))
        })
        .max_by_key(|(name, ..)| name.len())
        .ok_or(RequestError::Path)
}

fn repository(name: &str) -> Result<Repository, RequestError> {
    name.parse().map_err(RequestError::Repository)
}

/// Decodes a percent-encoded colon, which some HTTP libraries send.
fn with_colon(reference: &str) -> Cow<'_, str> {
    let Some((before, after)) = reference.split_once('%') else {
        return Cow::Borrowed(reference);
    };
    match after.strip_prefix("3A").or_else(|| after.strip_prefix("3a")) {
        Some(after) => Cow::Owned([before, ":", after].concat()),
        None => Cow::Borrowed(reference),
    }
}

#[cfg(test)]
mod tests;
