//! What of a request shapes its answer, and what its conditions come to.

use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderValue;
use http::header::{IF_NONE_MATCH, IF_RANGE, RANGE};
use http::request::Parts;

use crate::oci::query::Query;
use crate::oci::range::{ByteRange, ResolvedRange};
use crate::oci::{Endpoint, ErrorCode, RangeRequest, Reference};
use crate::proxy::{Request, UpstreamRegistry};
use crate::upstream::UpstreamResponse;

/// What of a request shapes its answer.
pub(in crate::server) struct Asked {
    upstream_registry: Arc<UpstreamRegistry>,
    /// As the client wrote it, so that links lead back through the door it came by.
    path: String,
    /// The `ns` of the client's query, if it sent one.
    namespace: Option<String>,
    pub(super) endpoint: Endpoint,
    pub(super) head: bool,
    if_none_match: Option<HeaderValue>,
    if_range: Option<HeaderValue>,
    range: RangeRequest,
    pub(super) now: SystemTime,
}

impl Asked {
    pub(in crate::server) fn new(head: &Parts, request: &Request) -> Self {
        let (path, namespace) = match request.endpoint {
            Endpoint::Tags { .. } | Endpoint::Referrers { .. } => {
                let query = Query::parse(head.uri.query());
                let namespace = query.ok().and_then(|(_, namespace)| namespace);
                (head.uri.path().to_owned(), namespace)
            }
            _ => (String::new(), None),
        };
        Self {
            upstream_registry: Arc::clone(&request.registry),
            path,
            namespace,
            endpoint: request.endpoint.clone(),
            head: request.head,
            if_none_match: head.headers.get(IF_NONE_MATCH).cloned(),
            if_range: head.headers.get(IF_RANGE).cloned(),
            range: RangeRequest::read(head.headers.get(RANGE)),
            now: request.now,
        }
    }

    pub(super) fn upstream(&self) -> &str {
        self.upstream_registry.name()
    }

    /// Where the next page of a list is for this client, of which the upstream said `next`: the same path it came by, with
    /// the upstream's parameters and its own `ns`. `None` where the upstream named no other page.
    pub(super) fn next_page(&self, next: &str) -> Option<String> {
        let (_, query) = next.split_once('?')?;
        let (query, _) = Query::parse(Some(query)).ok()?;
        if query.is_empty() {
            return None;
        }
        let namespace = Query::ns_suffix(self.namespace.as_deref());
        Some(format!("{}{}{namespace}", self.path, query))
    }

    /// What was asked for, in words: written only for those who are told no.
    pub(super) fn image(&self) -> String {
        match &self.endpoint {
            Endpoint::Ping => String::new(),
            Endpoint::Manifest {
                repository,
                reference: Reference::Tag(tag),
            } => format!("{repository}:{tag}"),
            Endpoint::Manifest {
                repository,
                reference: Reference::Digest(digest),
            }
            | Endpoint::Blob { repository, digest } => format!("{repository}@{digest}"),
            Endpoint::Tags { repository, .. } | Endpoint::Referrers { repository, .. } => {
                repository.to_string()
            }
        }
    }

    /// The code for "there is no such thing".
    ///
    /// For referrers, `NAME_UNKNOWN` says that the repository does not exist, any other code that this registry has no
    /// such lists, and then clients look for a tag instead: so it is passed on where the upstream said it, and else not
    /// used.
    pub(super) fn unknown(&self, answer: Option<&UpstreamResponse>) -> ErrorCode {
        let names_repository = || {
            let code = answer.and_then(|answer| answer.code.as_deref());
            code == Some(ErrorCode::NameUnknown.as_str())
        };
        match &self.endpoint {
            Endpoint::Blob { .. } => ErrorCode::BlobUnknown,
            Endpoint::Manifest { .. } => ErrorCode::ManifestUnknown,
            Endpoint::Referrers { .. } if !names_repository() => ErrorCode::Unsupported,
            Endpoint::Ping | Endpoint::Tags { .. } | Endpoint::Referrers { .. } => ErrorCode::NameUnknown,
        }
    }

    /// Whether one range without an end is asked for: most clients that send one read a little of it and close.
    pub(super) fn is_open_ended(&self) -> bool {
        matches!(self.range, RangeRequest::Single(ByteRange::FromOffset(_)))
    }

    /// What is to be sent of a blob of `size` bytes. A `Range` counts for GET alone (RFC 9110 §14.2), and an `If-Range`
    /// that names another content, weakly or by a date, means the whole (§13.1.5). So do several ranges of what is not
    /// held yet.
    pub(super) fn sent(&self, size: u64, etag: &str, is_held: bool) -> ResolvedRange {
        let unchanged = self
            .if_range
            .as_ref()
            .is_none_or(|tag| tag.as_bytes() == etag.as_bytes());
        let is_answered = is_held || !matches!(self.range, RangeRequest::Multi(_));
        if unchanged && is_answered && !self.head {
            self.range.resolve(size)
        } else {
            ResolvedRange::Full
        }
    }

    pub(super) fn has_already(&self, etag: &str) -> bool {
        let tags = self.if_none_match.as_ref().and_then(|tags| tags.to_str().ok());
        tags.is_some_and(|tags| {
            tags.split(',')
                .map(str::trim)
                .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
        })
    }
}
