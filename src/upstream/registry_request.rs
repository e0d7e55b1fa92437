//! HEAD and GET requests to one URL of an upstream, with the fallbacks for registries that reject a HEAD or omit the
//! digest. Failover between URLs, rate limits and health are handled one level up.

use http::header::CONTENT_RANGE;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::time::Instant;

use super::Caller;
use super::auth_client::{AuthClient, ErrorResponse, RequestSpec};
use super::http_client::{Body, HttpResponse, content_length};
use super::origin::Origin;
use super::proof::{self, Sender};
use super::quirks::{Quirk, QuirksAt};
use super::response::{ResponseKind, UpstreamResponse, header_digest};
use super::response_stream::{RangeSpec, ResponseStream, UrlIndex};
use super::state::InFlightRequest;
use crate::oci::accept::Accept;
use crate::oci::digest::{Algorithm, AnyDigest, Digest};
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::RateLimit;
use crate::oci::manifest::Manifest;
use crate::oci::name::Reference;
use crate::oci::range::parse_content_range;
use crate::trace_context::TraceContext;

/// One request with its dependencies.
pub(super) struct RegistryRequest<'a> {
    pub(super) auth_client: &'a AuthClient,
    pub(super) pending: &'a InFlightRequest<'a>,
    pub(super) quirks: QuirksAt<'a>,
    pub(super) origin: &'a Origin,
    pub(super) caller: &'a Caller,
    pub(super) endpoint: &'a Endpoint,
    pub(super) accept: &'a Accept,
    pub(super) manifest_bytes_max: usize,
    pub(super) trace: &'a TraceContext,
    /// Whether a negative HEAD is final. A client that pushes needs the registry's own view of what exists.
    pub(super) trusts_head: bool,
}

impl RegistryRequest<'_> {
    /// Checks existence and digest. Transfers no content unless the registry requires a GET.
    pub(super) async fn head(&self) -> UpstreamResponse {
        match self.endpoint {
            Endpoint::Manifest { reference, .. } => self.head_manifest(reference).await,
            Endpoint::Blob { .. } => self.head_blob().await,
            // Some registries reject HEAD here, and these bodies are small.
            Endpoint::Ping | Endpoint::Tags { .. } | Endpoint::Referrers { .. } => self
                .send(Method::GET, None)
                .await
                .map_or_else(|error| error.response, |reply| self.read(&reply)),
        }
    }

    async fn head_manifest(&self, reference: &Reference) -> UpstreamResponse {
        let now = Instant::now();
        if self.quirks.has(Quirk::HeadRefused, now) || self.quirks.has(Quirk::NoDigest, now) {
            return self.get_manifest(reference, None).await;
        }
        let error = match self.send(Method::HEAD, None).await {
            Ok(reply) => {
                let response = self.read(&reply);
                let is_ok = reply.status == StatusCode::OK;
                drop(reply);
                return match response.kind {
                    ResponseKind::Digest(_) | ResponseKind::UnprovenDigest(_) => response,
                    ResponseKind::NoDigest if self.has_unsupported_digest() => response,
                    // The media type may be wrong; the manifest itself tells whether it is signed.
                    ResponseKind::Unavailable(UpstreamFailure::Unverifiable) => {
                        self.get_manifest(reference, None).await
                    }
                    // Without the registry's headers, the response may be an HTML page or a HEAD with a wrong
                    // `Content-Type`. The GET tells.
                    _ if is_ok => self.get_manifest(reference, Some(Quirk::NoDigest)).await,
                    _ => response,
                };
            }
            Err(error) => *error,
        };
        let quirk = match error.response.kind {
            ResponseKind::Denied => Quirk::HeadForbidden,
            _ => Quirk::HeadUntrue,
        };
        let known = self.quirks.has(quirk, now);
        match error.response.status.map(|status| status.as_u16()) {
            Some(405 | 501) => self.get_manifest(reference, Some(Quirk::HeadRefused)).await,
            Some(400 | 403 | 404 | 410 | 500) if known || self.may_check(now) => {
                let checked = self.get_manifest(reference, Some(quirk)).await;
                choose_response(error.response, checked, known)
            }
            // Only an error body tells whether this is a rate limit, and a HEAD has none.
            Some(status)
                if error.is_from_registry
                    && status != StatusCode::UNAUTHORIZED
                    && matches!(error.response.kind, ResponseKind::Denied | ResponseKind::Other(_)) =>
            {
                match self.send(Method::GET, None).await {
                    Err(get_error) if get_error.response.backoff_cause().is_some() => {
                        choose_response(error.response, get_error.response, false)
                    }
                    Ok(_) | Err(_) => error.response,
                }
            }
            _ => error.response,
        }
    }

    /// Whether to verify a negative HEAD by a GET; see [`QuirksAt::may_check`].
    fn may_check(&self, now: Instant) -> bool {
        let path = self.endpoint.path_and_query();
        !self.trusts_head && self.quirks.may_check(self.caller.principal, path, now)
    }

    /// Whether the requested digest has an algorithm that cannot be verified here.
    fn has_unsupported_digest(&self) -> bool {
        matches!(
            self.endpoint,
            Endpoint::Manifest {
                reference: Reference::Digest(AnyDigest::Unsupported(_)),
                ..
            } | Endpoint::Blob {
                digest: AnyDigest::Unsupported(_),
                ..
            }
        )
    }

    /// Replaces a HEAD by a GET. The digest is computed from the manifest, which is kept for the store.
    async fn get_manifest(&self, reference: &Reference, proves: Option<Quirk>) -> UpstreamResponse {
        let reply = match self.send(Method::GET, None).await {
            Ok(reply) => reply,
            Err(error) => return error.response,
        };
        if !matches!(reply.status, StatusCode::OK) {
            return UpstreamResponse::unavailable(UpstreamFailure::NotRegistry);
        }
        let response = self.read(&reply);
        let is_page = proof::is_page(&reply.headers);
        let sender = Sender::of(reply.from_other_origin);
        let stated = header_digest(&reply.headers);
        let bytes = match reply
            .collect(self.manifest_bytes_max, self.auth_client.headers_timeout)
            .await
        {
            Ok(bytes) => bytes,
            Err(cause) => return UpstreamResponse::unavailable(cause),
        };
        // A login page or an error with status 200 must not be taken for a newer manifest.
        let manifest = Manifest::read(&bytes).ok();
        let sent = response.media_type.as_ref();
        let is_requested = match reference {
            Reference::Digest(AnyDigest::Supported(requested)) => {
                Digest::of(requested.algorithm(), &bytes) == *requested
            }
            Reference::Digest(AnyDigest::Unsupported(_)) => true,
            Reference::Tag(_) => false,
        };
        let is_signed = |manifest: &Manifest| manifest.is_signed_schema_1(sent);
        if !is_requested && manifest.as_ref().is_some_and(is_signed) {
            return UpstreamResponse {
                kind: ResponseKind::Unavailable(UpstreamFailure::Unverifiable),
                ..response
            };
        }
        let by_tag = matches!(reference, Reference::Tag(_));
        let media_type = manifest.as_ref().and_then(|manifest| {
            if !by_tag {
                return manifest.type_by_digest(sent);
            }
            let media_type = manifest.media_type_for(sent)?;
            // For a tag, only the response states the digest, so media type and structure must agree.
            (!is_page && manifest.has_shape_of(&media_type)).then_some(media_type)
        });
        let Some(media_type) = media_type else {
            return UpstreamResponse::unavailable(if is_page {
                UpstreamFailure::NotRegistry
            } else {
                UpstreamFailure::Malformed
            });
        };
        let (digest, requested) = match reference {
            Reference::Digest(AnyDigest::Supported(requested)) => {
                (Digest::of(requested.algorithm(), &bytes), Some(*requested))
            }
            Reference::Digest(AnyDigest::Unsupported(_)) => return response,
            Reference::Tag(_) => {
                let algorithm = stated.map_or(Algorithm::Sha256, |stated| stated.algorithm());
                (Digest::of(algorithm, &bytes), None)
            }
        };
        if requested.is_some_and(|requested| requested != digest) {
            return UpstreamResponse::unavailable(UpstreamFailure::DigestMismatch);
        }
        if stated.is_some_and(|stated| stated.algorithm() == digest.algorithm() && stated != digest) {
            tracing::warn!(origin = %self.origin, path = self.endpoint.path_and_query(), computed = %digest,
                "digest header does not match the manifest");
        }
        if let Some(quirk) = proves {
            self.quirks.learn(quirk, Instant::now());
        }
        let is_proof = manifest.is_some_and(|manifest| proof::is_by_manifest(&manifest, sender));
        UpstreamResponse {
            kind: if is_proof {
                ResponseKind::Digest(digest)
            } else {
                ResponseKind::UnprovenDigest(digest)
            },
            length: Some(bytes.len() as u64),
            body: Some((bytes, media_type.clone())),
            media_type: Some(media_type),
            ..response
        }
    }

    /// Checks a blob. A success must state the size and carry the registry's headers. If a HEAD lacks either, a GET
    /// of one byte replaces it.
    async fn head_blob(&self) -> UpstreamResponse {
        let now = Instant::now();
        if self.quirks.has(Quirk::BlobHeadRefused, now) || self.quirks.has(Quirk::BlobHeadUntrue, now) {
            return self.get_first_byte(None).await;
        }
        let error = match self.send(Method::HEAD, None).await {
            Ok(reply) => {
                let response = self.read(&reply);
                let is_ok = reply.status == StatusCode::OK;
                drop(reply);
                let has_length = response.length.is_some_and(|length| length > 0);
                return match response.kind {
                    ResponseKind::Digest(_) if !has_length => {
                        let probed = self.get_first_byte(Some(Quirk::BlobHeadRefused)).await;
                        let is_yes = probed.kind.is_success();
                        // `Content-Length: 0` describes the empty response body, unless the blob is empty.
                        let stated_length = response.length.filter(|_| self.is_empty_blob());
                        let length = probed.length.filter(|_| is_yes).or(stated_length);
                        UpstreamResponse { length, ..response }
                    }
                    ResponseKind::Unavailable(UpstreamFailure::NotRegistry)
                    | ResponseKind::UnprovenDigest(_)
                        if is_ok && !has_length =>
                    {
                        self.get_first_byte(Some(Quirk::BlobHeadRefused)).await
                    }
                    _ => response,
                };
            }
            Err(error) => *error,
        };
        match error.response.status.map(|status| status.as_u16()) {
            // Signed URLs are valid for one method, so storage may reject the HEAD of a blob that it serves by GET.
            _ if error.from_other_origin => self.get_first_byte(Some(Quirk::BlobHeadRefused)).await,
            Some(405 | 501) => self.get_first_byte(Some(Quirk::BlobHeadRefused)).await,
            Some(status @ (400 | 401 | 403 | 404 | 410 | 500)) if self.may_check(now) => {
                let quirk = if matches!(status, 404 | 410) {
                    Quirk::BlobHeadUntrue
                } else {
                    Quirk::BlobHeadRefused
                };
                let checked = self.get_first_byte(Some(quirk)).await;
                choose_response(error.response, checked, false)
            }
            _ => error.response,
        }
    }

    /// Replaces the HEAD of a blob by a GET of its first byte.
    async fn get_first_byte(&self, proves: Option<Quirk>) -> UpstreamResponse {
        let range = Some(HeaderValue::from_static("bytes=0-0"));
        let reply = match self.send(Method::GET, range).await {
            Ok(reply) => reply,
            // An empty blob has no first byte; its digest identifies it.
            Err(error)
                if error.response.status == Some(StatusCode::RANGE_NOT_SATISFIABLE)
                    && self.is_empty_blob() =>
            {
                return UpstreamResponse {
                    length: Some(0),
                    ..self.read_as(StatusCode::OK, &HeaderMap::new(), Sender::OtherOrigin)
                };
            }
            Err(error) => return error.response,
        };
        let length = match reply.status {
            StatusCode::PARTIAL_CONTENT => match content_range(&reply.headers) {
                Some((0, total)) => total,
                _ => return UpstreamResponse::unavailable(UpstreamFailure::Malformed),
            },
            _ => content_length(&reply.headers),
        };
        let response = self.read(&reply);
        if response.kind.is_success()
            && let Some(quirk) = proves
        {
            self.quirks.learn(quirk, Instant::now());
        }
        UpstreamResponse { length, ..response }
    }

    fn is_empty_blob(&self) -> bool {
        let Endpoint::Blob {
            digest: AnyDigest::Supported(digest),
            ..
        } = self.endpoint
        else {
            return false;
        };
        Digest::of(digest.algorithm(), b"") == *digest
    }

    fn read(&self, reply: &HttpResponse) -> UpstreamResponse {
        self.read_as(reply.status, &reply.headers, Sender::of(reply.from_other_origin))
    }

    fn read_as(&self, status: StatusCode, headers: &HeaderMap, sender: Sender) -> UpstreamResponse {
        UpstreamResponse::read(self.endpoint, status, headers, sender)
    }

    /// Fetches the content; only `range_spec` if the registry supports ranges.
    pub(super) async fn get(
        &self,
        range_spec: RangeSpec,
        url: UrlIndex,
        idle: std::time::Duration,
    ) -> Result<ResponseStream, Box<UpstreamResponse>> {
        let range = range_spec.range().map(HeaderValue::try_from);
        let range = range
            .transpose()
            .map_err(|_| UpstreamResponse::unavailable(UpstreamFailure::Malformed))?;
        let ranged = range.is_some();
        let reply = self
            .send_paced(Method::GET, range, range_spec.is_client_paced)
            .await
            .map_err(|error| error.response)?;
        // Manifests and blobs are verified by their digest, whatever their media type. A list has no digest.
        let has_digest = matches!(self.endpoint, Endpoint::Manifest { .. } | Endpoint::Blob { .. });
        if !has_digest && proof::is_page(&reply.headers) {
            return Err(UpstreamResponse::unavailable(UpstreamFailure::NotRegistry).into());
        }
        let length = content_length(&reply.headers);
        let (start, total) = match (reply.status, ranged) {
            (StatusCode::OK, _) => (0, length),
            (StatusCode::PARTIAL_CONTENT, true) => match content_range(&reply.headers) {
                Some((start, total)) if start == range_spec.from => (start, total),
                _ => return Err(UpstreamResponse::unavailable(UpstreamFailure::Malformed).into()),
            },
            (StatusCode::PARTIAL_CONTENT, false) => {
                return Err(UpstreamResponse::unavailable(UpstreamFailure::Malformed).into());
            }
            _ => return Err(UpstreamResponse::unavailable(UpstreamFailure::NotRegistry).into()),
        };
        let media_type = proof::media_type(&reply.headers);
        Ok(ResponseStream {
            status: reply.status,
            digest: header_digest(&reply.headers),
            media_type,
            length,
            start,
            total,
            is_redirect_target: reply.from_other_origin,
            rate_limit: RateLimit::read(&reply.headers),
            url,
            body: Body::new(reply.body, length, idle),
            headers: reply.headers,
            permit: None,
        })
    }

    async fn send(
        &self,
        method: Method,
        range: Option<HeaderValue>,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        self.send_paced(method, range, false).await
    }

    async fn send_paced(
        &self,
        method: Method,
        range: Option<HeaderValue>,
        is_client_paced: bool,
    ) -> Result<HttpResponse, Box<ErrorResponse>> {
        let spec = RequestSpec {
            method,
            endpoint: self.endpoint,
            accept: self.accept,
            range,
            is_client_paced,
            trace: self.trace,
            pending: self.pending,
        };
        self.auth_client.send(self.origin, self.caller, &spec).await
    }
}

/// Chooses between a HEAD and the GET that verified it. If the GET returned no usable response, the HEAD counts,
/// unless HEADs of this upstream are known to be wrong.
///
/// A registry may deny a HEAD and apply a rate limit only to GETs. Such a limit says nothing about access, so the
/// denial counts.
fn choose_response(head: UpstreamResponse, get: UpstreamResponse, is_known_to_lie: bool) -> UpstreamResponse {
    let head_is_usable = head.failure().is_none() && !is_known_to_lie;
    let is_limit = get.backoff_cause().is_some();
    let get_counts = match (head.kind, get.kind) {
        // A rate limit with a denial's status is recognized by its body only, and a HEAD has no body.
        (ResponseKind::Denied, ResponseKind::Unavailable(_)) => is_limit && get.status == head.status,
        (ResponseKind::Denied, ResponseKind::Other(_)) => false,
        (_, ResponseKind::Unavailable(_)) => is_limit,
        _ => true,
    };
    if head_is_usable && !get_counts { head } else { get }
}

fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let (span, total) = parse_content_range(headers.get(CONTENT_RANGE)?.to_str().ok()?)?;
    Some((span.start, total))
}
