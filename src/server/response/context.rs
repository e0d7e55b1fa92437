//! Request headers that shape a response: conditions, ranges and paging.

use std::sync::Arc;
use std::time::SystemTime;

use http::header::IF_NONE_MATCH;
use http::request::Parts;
use http::{HeaderValue, Version};

use crate::oci::query::Query;
use crate::oci::range::{ByteRange, ResolvedRange};
use crate::oci::{Endpoint, ErrorCode, RangeRequest};
use crate::proxy::{Request, UpstreamCaches, UpstreamRegistry};
use crate::server::routing::ConnectionInfo;
use crate::server::sendfile::SendfileQueue;
use crate::upstream::UpstreamResponse;

/// The parts of a request that its response depends on.
pub(in crate::server) struct ResponseContext {
    upstream_registry: Arc<UpstreamRegistry>,
    /// As the client sent it, so that links lead back by the same route.
    path: String,
    /// The `ns` of the client's query, if it sent one.
    namespace: Option<String>,
    pub(super) endpoint: Endpoint,
    pub(super) head: bool,
    if_none_match: Option<HeaderValue>,
    range: RangeRequest,
    pub(super) now: SystemTime,
    /// What caches before this one say about the response.
    pub(super) upstream_caches: UpstreamCaches,
    /// Sends file ranges without copying them. `None` if the connection cannot, or for HTTP/2, which puts every frame
    /// of a body behind a header of its own.
    pub(super) sendfile: Option<SendfileQueue>,
}

impl ResponseContext {
    pub(in crate::server) fn new(head: &Parts, request: &Request, peer: &ConnectionInfo) -> Self {
        let copies = head.version >= Version::HTTP_2;
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
            range: request.range.clone(),
            now: request.now,
            upstream_caches: request.upstream_caches.clone(),
            sendfile: peer.sendfile.clone().filter(|_| !copies),
        }
    }

    pub(super) fn upstream(&self) -> &str {
        self.upstream_registry.name()
    }

    /// [`Self::upstream`], for a value that outlives the request.
    pub(super) fn shared_upstream(&self) -> Arc<str> {
        self.upstream_registry.shared_name()
    }

    /// The client's URL of the next page: the path of this request, the query of the upstream's `next` link, and the
    /// client's `ns`. `None` if `next` has no query.
    pub(super) fn next_page(&self, next: &str) -> Option<String> {
        let (_, query) = next.split_once('?')?;
        let (query, _) = Query::parse(Some(query)).ok()?;
        if query.is_empty() {
            return None;
        }
        let namespace = Query::ns_suffix(self.namespace.as_deref());
        Some(format!("{}{}{namespace}", self.path, query))
    }

    /// The error code for missing content.
    ///
    /// For referrers, `NAME_UNKNOWN` means that the repository does not exist. With any other code clients conclude
    /// that the registry has no referrers API and look for a tag instead. So it is used only if the upstream sent it.
    pub(super) fn not_found_code(&self, answer: Option<&UpstreamResponse>) -> ErrorCode {
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

    /// Whether the request has one open-ended range. Most clients that send one read a little and close.
    pub(super) fn is_open_ended(&self) -> bool {
        matches!(self.range, RangeRequest::Single(ByteRange::FromOffset(_)))
    }

    /// The ranges to send of a blob of `size` bytes. `Range` applies to GET alone (RFC 9110 §14.2). Several ranges of a blob
    /// that is not cached mean the full blob.
    pub(super) fn resolve_range(&self, size: u64, is_cached: bool) -> ResolvedRange {
        let is_supported = is_cached || !matches!(self.range, RangeRequest::Multi(_));
        if is_supported && !self.head {
            self.range.resolve(size)
        } else {
            ResolvedRange::Full
        }
    }

    pub(super) fn matches_if_none_match(&self, etag: &str) -> bool {
        let tags = self.if_none_match.as_ref().and_then(|tags| tags.to_str().ok());
        tags.is_some_and(|tags| {
            tags.split(',')
                .map(str::trim)
                .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
        })
    }
}
