//! HEAD and GET at one address of an upstream, with what stands in for a HEAD that a registry refuses or answers
//! without a digest. Says what was answered; deciding between addresses, limits and health is one level up.

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

/// One question, with everything it needs.
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
    /// A no is not checked by a GET. Who pushes needs to know what the registry takes for there.
    pub(super) trusts_head: bool,
}

impl RegistryRequest<'_> {
    /// Which digest, or whether at all; costs no transfer where the registry plays along.
    pub(super) async fn head(&self) -> UpstreamResponse {
        match self.endpoint {
            Endpoint::Manifest { reference, .. } => self.head_manifest(reference).await,
            Endpoint::Blob { .. } => self.head_blob().await,
            // Some registries know no HEAD here, and the bodies are small.
            Endpoint::Ping | Endpoint::Tags { .. } | Endpoint::Referrers { .. } => self
                .send(Method::GET, None)
                .await
                .map_or_else(|error| error.answer, |reply| self.read(&reply)),
        }
    }

    async fn head_manifest(&self, reference: &Reference) -> UpstreamResponse {
        let now = Instant::now();
        if self.quirks.has(Quirk::HeadRefused, now) || self.quirks.has(Quirk::NoDigest, now) {
            return self.get_manifest(reference, None).await;
        }
        let error = match self.send(Method::HEAD, None).await {
            Ok(reply) => {
                let answer = self.read(&reply);
                let is_ok = reply.status == StatusCode::OK;
                drop(reply);
                return match answer.kind {
                    ResponseKind::Digest(_) | ResponseKind::UnprovenDigest(_) => answer,
                    ResponseKind::NoDigest if self.has_unsupported_digest() => answer,
                    // The label may be wrong: the bytes tell.
                    ResponseKind::Unavailable(UpstreamFailure::Unverifiable) => {
                        self.get_manifest(reference, None).await
                    }
                    // Without the registry's marks, also as a page, it may be a HEAD that is merely labelled wrong.
                    _ if is_ok => self.get_manifest(reference, Some(Quirk::NoDigest)).await,
                    _ => answer,
                };
            }
            Err(error) => *error,
        };
        let quirk = match error.answer.kind {
            ResponseKind::Denied => Quirk::HeadForbidden,
            _ => Quirk::HeadUntrue,
        };
        let known = self.quirks.has(quirk, now);
        match error.answer.status.map(|status| status.as_u16()) {
            Some(405 | 501) => self.get_manifest(reference, Some(Quirk::HeadRefused)).await,
            Some(400 | 403 | 404 | 410 | 500) if known || self.may_check(now) => {
                let checked = self.get_manifest(reference, Some(quirk)).await;
                choose_response(error.answer, checked, known)
            }
            // The body says whether it is a limit, and a HEAD has none.
            Some(status)
                if error.is_from_registry
                    && status != StatusCode::UNAUTHORIZED
                    && matches!(error.answer.kind, ResponseKind::Denied | ResponseKind::Other(_)) =>
            {
                match self.send(Method::GET, None).await {
                    Err(get_error) if get_error.answer.backoff_cause().is_some() => {
                        choose_response(error.answer, get_error.answer, false)
                    }
                    Ok(_) | Err(_) => error.answer,
                }
            }
            _ => error.answer,
        }
    }

    /// Whether a HEAD that says no is worth a GET of the same: see [`QuirksAt::may_check`].
    fn may_check(&self, now: Instant) -> bool {
        let path = self.endpoint.path_and_query();
        !self.trusts_head && self.quirks.may_check(self.caller.principal, path, now)
    }

    /// Whether what is asked about has a digest that cannot be verified here.
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

    /// A GET that stands in for a HEAD: the digest is computed over the bytes, and the bytes are kept.
    async fn get_manifest(&self, reference: &Reference, proves: Option<Quirk>) -> UpstreamResponse {
        let reply = match self.send(Method::GET, None).await {
            Ok(reply) => reply,
            Err(error) => return error.answer,
        };
        if !matches!(reply.status, StatusCode::OK) {
            return UpstreamResponse::unavailable(UpstreamFailure::NotRegistry);
        }
        let answer = self.read(&reply);
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
        // A login page or an error with status 200 is no manifest, and must not become a "newer" one.
        let manifest = Manifest::read(&bytes).ok();
        let sent = answer.media_type.as_ref();
        let is_asked_for = match reference {
            Reference::Digest(AnyDigest::Supported(asked)) => Digest::of(asked.algorithm(), &bytes) == *asked,
            Reference::Digest(AnyDigest::Unsupported(_)) => true,
            Reference::Tag(_) => false,
        };
        let is_signed = |manifest: &Manifest| manifest.is_signed_schema_1(sent);
        if !is_asked_for && manifest.as_ref().is_some_and(is_signed) {
            return UpstreamResponse {
                kind: ResponseKind::Unavailable(UpstreamFailure::Unverifiable),
                ..answer
            };
        }
        let by_tag = matches!(reference, Reference::Tag(_));
        let media_type = manifest.as_ref().and_then(|manifest| {
            if !by_tag {
                return manifest.type_by_digest(sent);
            }
            let media_type = manifest.type_sent_as(sent)?;
            // Of a tag nothing but the answer says what it names, so label and shape have to agree.
            (!is_page && manifest.has_shape_of(&media_type)).then_some(media_type)
        });
        let Some(media_type) = media_type else {
            return UpstreamResponse::unavailable(if is_page {
                UpstreamFailure::NotRegistry
            } else {
                UpstreamFailure::Malformed
            });
        };
        let (digest, asked) = match reference {
            Reference::Digest(AnyDigest::Supported(asked)) => {
                (Digest::of(asked.algorithm(), &bytes), Some(*asked))
            }
            Reference::Digest(AnyDigest::Unsupported(_)) => return answer,
            Reference::Tag(_) => {
                let algorithm = stated.map_or(Algorithm::Sha256, |stated| stated.algorithm());
                (Digest::of(algorithm, &bytes), None)
            }
        };
        if asked.is_some_and(|asked| asked != digest) {
            return UpstreamResponse::unavailable(UpstreamFailure::DigestMismatch);
        }
        if stated.is_some_and(|stated| stated.algorithm() == digest.algorithm() && stated != digest) {
            tracing::warn!(origin = %self.origin, path = self.endpoint.path_and_query(), computed = %digest,
                "the registry's digest header is not that of the manifest it sent");
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
            ..answer
        }
    }

    /// Whether the registry has the blob for this caller. A yes should say how long it is, and one without the registry's
    /// marks proves nothing, so where the HEAD says less a GET of one byte is sent as well, and that counts.
    async fn head_blob(&self) -> UpstreamResponse {
        let now = Instant::now();
        if self.quirks.has(Quirk::BlobHeadRefused, now) || self.quirks.has(Quirk::BlobHeadUntrue, now) {
            return self.get_first_byte(None).await;
        }
        let error = match self.send(Method::HEAD, None).await {
            Ok(reply) => {
                let answer = self.read(&reply);
                let is_ok = reply.status == StatusCode::OK;
                drop(reply);
                let has_length = answer.length.is_some_and(|length| length > 0);
                return match answer.kind {
                    ResponseKind::Digest(_) if !has_length => {
                        let probed = self.get_first_byte(Some(Quirk::BlobHeadRefused)).await;
                        let is_yes = probed.kind.is_success();
                        // A length of 0 is that of an empty response, unless the blob is empty.
                        let own = answer.length.filter(|_| self.is_empty_blob());
                        let length = probed.length.filter(|_| is_yes).or(own);
                        UpstreamResponse { length, ..answer }
                    }
                    ResponseKind::Unavailable(UpstreamFailure::NotRegistry)
                    | ResponseKind::UnprovenDigest(_)
                        if is_ok && !has_length =>
                    {
                        self.get_first_byte(Some(Quirk::BlobHeadRefused)).await
                    }
                    _ => answer,
                };
            }
            Err(error) => *error,
        };
        match error.answer.status.map(|status| status.as_u16()) {
            // Signed URLs hold for one method, so storage may refuse the HEAD of what it gives to a GET.
            _ if error.from_other_origin => self.get_first_byte(Some(Quirk::BlobHeadRefused)).await,
            Some(405 | 501) => self.get_first_byte(Some(Quirk::BlobHeadRefused)).await,
            Some(status @ (400 | 401 | 403 | 404 | 410 | 500)) if self.may_check(now) => {
                let quirk = if matches!(status, 404 | 410) {
                    Quirk::BlobHeadUntrue
                } else {
                    Quirk::BlobHeadRefused
                };
                let checked = self.get_first_byte(Some(quirk)).await;
                choose_response(error.answer, checked, false)
            }
            _ => error.answer,
        }
    }

    /// A GET of one byte that stands in for the HEAD of a blob.
    async fn get_first_byte(&self, proves: Option<Quirk>) -> UpstreamResponse {
        let range = Some(HeaderValue::from_static("bytes=0-0"));
        let reply = match self.send(Method::GET, range).await {
            Ok(reply) => reply,
            // An empty blob has no first byte; whether it is one, its digest tells.
            Err(error)
                if error.answer.status == Some(StatusCode::RANGE_NOT_SATISFIABLE) && self.is_empty_blob() =>
            {
                return UpstreamResponse {
                    length: Some(0),
                    ..self.read_as(StatusCode::OK, &HeaderMap::new(), Sender::OtherOrigin)
                };
            }
            Err(error) => return error.answer,
        };
        let length = match reply.status {
            StatusCode::PARTIAL_CONTENT => match content_range(&reply.headers) {
                Some((0, total)) => total,
                _ => return UpstreamResponse::unavailable(UpstreamFailure::Malformed),
            },
            _ => content_length(&reply.headers),
        };
        let answer = self.read(&reply);
        if answer.kind.is_success()
            && let Some(quirk) = proves
        {
            self.quirks.learn(quirk, Instant::now());
        }
        UpstreamResponse { length, ..answer }
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

    /// The bytes; only those of `range_spec` if the registry knows how.
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
            .send(Method::GET, range)
            .await
            .map_err(|error| error.answer)?;
        // The bytes of a manifest or a blob tell what they are, whatever their label; of a list there is nothing else.
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
        let spec = RequestSpec {
            method,
            endpoint: self.endpoint,
            accept: self.accept,
            range,
            trace: self.trace,
            pending: self.pending,
        };
        self.auth_client.send(self.origin, self.caller, &spec).await
    }
}

/// The response to a GET that checks a HEAD. Where it brings nothing usable, the HEAD is believed unless the HEADs of this
/// upstream are known to lie.
///
/// A registry may deny the HEAD and limit only GETs. Such a limit says nothing of the right, so the denial stands.
fn choose_response(head: UpstreamResponse, get: UpstreamResponse, is_known_to_lie: bool) -> UpstreamResponse {
    let head_is_usable = head.failure().is_none() && !is_known_to_lie;
    let is_limit = get.backoff_cause().is_some();
    let get_counts = match (head.kind, get.kind) {
        // A limit with the status of a denial shows in the body alone, and the response to a HEAD has none.
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
