//! HEAD and GET at one address of an upstream, with what stands in for a HEAD that a registry refuses or answers
//! without a digest. Says what was answered; deciding between addresses, limits and health is one level up.

use http::header::CONTENT_RANGE;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::time::Instant;

use super::Caller;
use super::answer::{Answer, Said, header_digest};
use super::client::{Body, Reply, content_length};
use super::exchange::{Ask, Exchange, Refusal};
use super::fetched::{Address, Fetched, Part};
use super::origin::Origin;
use super::proof::{self, Sender};
use super::quirk::{Quirk, QuirksAt};
use super::state::Pending;
use crate::oci::accept::Accept;
use crate::oci::cause::Cause;
use crate::oci::digest::{Algorithm, AnyDigest, Digest};
use crate::oci::header::RateLimit;
use crate::oci::manifest::Manifest;
use crate::oci::name::Reference;
use crate::oci::operation::Operation;
use crate::oci::range::parse_content_range;
use crate::trace_context::Trace;

/// One question, with everything it needs.
pub(super) struct Question<'a> {
    pub(super) exchange: &'a Exchange,
    pub(super) pending: &'a Pending<'a>,
    pub(super) quirks: QuirksAt<'a>,
    pub(super) origin: &'a Origin,
    pub(super) caller: &'a Caller,
    pub(super) operation: &'a Operation,
    pub(super) accept: &'a Accept,
    pub(super) manifest_bytes_max: usize,
    pub(super) trace: &'a Trace,
    /// A no is not checked by a GET. Who pushes needs to know what the registry takes for there.
    pub(super) takes_heads_word: bool,
}

impl Question<'_> {
    /// Which digest, or whether at all; costs no transfer where the registry plays along.
    pub(super) async fn head(&self) -> Answer {
        match self.operation {
            Operation::Manifest { reference, .. } => self.head_manifest(reference).await,
            Operation::Blob { .. } => self.head_blob().await,
            // Some registries know no HEAD here, and the bodies are small.
            Operation::Ping | Operation::Tags { .. } | Operation::Referrers { .. } => self
                .ask(Method::GET, None)
                .await
                .map_or_else(|refusal| refusal.answer, |reply| self.read(&reply)),
        }
    }

    async fn head_manifest(&self, reference: &Reference) -> Answer {
        let now = Instant::now();
        if self.quirks.has(Quirk::HeadRefused, now) || self.quirks.has(Quirk::NoDigest, now) {
            return self.get_manifest(reference, None).await;
        }
        let refusal = match self.ask(Method::HEAD, None).await {
            Ok(reply) => {
                let answer = self.read(&reply);
                let is_ok = reply.status == StatusCode::OK;
                drop(reply);
                return match answer.said {
                    Said::Is(_) | Said::Unproven(_) => answer,
                    Said::Unnamed if self.is_foreign() => answer,
                    // The label may be wrong: the bytes tell.
                    Said::Silent(Cause::Unverifiable) => self.get_manifest(reference, None).await,
                    // Without the registry's marks, also as a page, it may be a HEAD that is merely labelled wrong.
                    _ if is_ok => self.get_manifest(reference, Some(Quirk::NoDigest)).await,
                    _ => answer,
                };
            }
            Err(refusal) => *refusal,
        };
        let quirk = match refusal.answer.said {
            Said::Forbidden => Quirk::HeadForbidden,
            _ => Quirk::HeadUntrue,
        };
        let known = self.quirks.has(quirk, now);
        match refusal.answer.status.map(|status| status.as_u16()) {
            Some(405 | 501) => self.get_manifest(reference, Some(Quirk::HeadRefused)).await,
            Some(400 | 403 | 404 | 410 | 500) if known || self.may_check(now) => {
                let checked = self.get_manifest(reference, Some(quirk)).await;
                truer(refusal.answer, checked, known)
            }
            // The body says whether it is a limit, and a HEAD has none.
            Some(status)
                if refusal.of_registry
                    && status != StatusCode::UNAUTHORIZED
                    && matches!(refusal.answer.said, Said::Forbidden | Said::Other(_)) =>
            {
                match self.ask(Method::GET, None).await {
                    Err(by_get) if by_get.answer.asks_to_wait().is_some() => {
                        truer(refusal.answer, by_get.answer, false)
                    }
                    Ok(_) | Err(_) => refusal.answer,
                }
            }
            _ => refusal.answer,
        }
    }

    /// Whether a HEAD that says no is worth a GET of the same: see [`QuirksAt::may_check`].
    fn may_check(&self, now: Instant) -> bool {
        let path = self.operation.path_and_query();
        !self.takes_heads_word && self.quirks.may_check(self.caller.principal, path, now)
    }

    /// Whether what is asked about has a digest that cannot be verified here.
    fn is_foreign(&self) -> bool {
        matches!(
            self.operation,
            Operation::Manifest {
                reference: Reference::Digest(AnyDigest::Foreign(_)),
                ..
            } | Operation::Blob {
                digest: AnyDigest::Foreign(_),
                ..
            }
        )
    }

    /// A GET that stands in for a HEAD: the digest is computed over the bytes, and the bytes are kept.
    async fn get_manifest(&self, reference: &Reference, teaches: Option<Quirk>) -> Answer {
        let reply = match self.ask(Method::GET, None).await {
            Ok(reply) => reply,
            Err(refusal) => return refusal.answer,
        };
        if !matches!(reply.status, StatusCode::OK) {
            return Answer::silent(Cause::NotRegistry);
        }
        let answer = self.read(&reply);
        let is_page = proof::is_page(&reply.headers);
        let sender = Sender::of(reply.abroad);
        let promised = header_digest(&reply.headers);
        let bytes = match reply
            .collect(self.manifest_bytes_max, self.exchange.headers_within)
            .await
        {
            Ok(bytes) => bytes,
            Err(cause) => return Answer::silent(cause),
        };
        // A login page or an error with status 200 is no manifest, and must not become a "newer" one.
        let manifest = Manifest::read(&bytes).ok();
        let sent = answer.media_type.as_ref();
        let is_asked_for = match reference {
            Reference::Digest(AnyDigest::Known(asked)) => Digest::of(asked.algorithm(), &bytes) == *asked,
            Reference::Digest(AnyDigest::Foreign(_)) => true,
            Reference::Tag(_) => false,
        };
        let is_signed = |manifest: &Manifest| manifest.is_signed_schema_1(sent);
        if !is_asked_for && manifest.as_ref().is_some_and(is_signed) {
            return Answer {
                said: Said::Silent(Cause::Unverifiable),
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
            return Answer::silent(if is_page {
                Cause::NotRegistry
            } else {
                Cause::Malformed
            });
        };
        let (digest, asked) = match reference {
            Reference::Digest(AnyDigest::Known(asked)) => {
                (Digest::of(asked.algorithm(), &bytes), Some(*asked))
            }
            Reference::Digest(AnyDigest::Foreign(_)) => return answer,
            Reference::Tag(_) => {
                let algorithm = promised.map_or(Algorithm::Sha256, |promised| promised.algorithm());
                (Digest::of(algorithm, &bytes), None)
            }
        };
        if asked.is_some_and(|asked| asked != digest) {
            return Answer::silent(Cause::WrongDigest);
        }
        if promised.is_some_and(|promised| promised.algorithm() == digest.algorithm() && promised != digest) {
            tracing::warn!(origin = %self.origin, path = self.operation.path_and_query(), computed = %digest,
                "the registry's digest header is not that of the manifest it sent");
        }
        if let Some(quirk) = teaches {
            self.quirks.learn(quirk, Instant::now());
        }
        let is_proof = manifest.is_some_and(|manifest| proof::is_by_manifest(&manifest, sender));
        Answer {
            said: if is_proof {
                Said::Is(digest)
            } else {
                Said::Unproven(digest)
            },
            length: Some(bytes.len() as u64),
            body: Some((bytes, media_type.clone())),
            media_type: Some(media_type),
            ..answer
        }
    }

    /// Whether the registry has the blob for this caller. A yes should say how long it is, and one without the registry's
    /// marks proves nothing, so where the HEAD says less a GET of one byte is sent as well, and that counts.
    async fn head_blob(&self) -> Answer {
        let now = Instant::now();
        if self.quirks.has(Quirk::BlobHeadRefused, now) || self.quirks.has(Quirk::BlobHeadUntrue, now) {
            return self.probe_blob(None).await;
        }
        let refusal = match self.ask(Method::HEAD, None).await {
            Ok(reply) => {
                let answer = self.read(&reply);
                let is_ok = reply.status == StatusCode::OK;
                drop(reply);
                let has_length = answer.length.is_some_and(|length| length > 0);
                return match answer.said {
                    Said::Is(_) if !has_length => {
                        let probed = self.probe_blob(Some(Quirk::BlobHeadRefused)).await;
                        let is_yes = probed.said.is_yes();
                        // A length of 0 is that of an empty response, unless the blob is empty.
                        let own = answer.length.filter(|_| self.is_of_nothing());
                        let length = probed.length.filter(|_| is_yes).or(own);
                        Answer { length, ..answer }
                    }
                    Said::Silent(Cause::NotRegistry) | Said::Unproven(_) if is_ok && !has_length => {
                        self.probe_blob(Some(Quirk::BlobHeadRefused)).await
                    }
                    _ => answer,
                };
            }
            Err(refusal) => *refusal,
        };
        match refusal.answer.status.map(|status| status.as_u16()) {
            // Signed URLs hold for one method, so storage may refuse the HEAD of what it gives to a GET.
            _ if refusal.abroad => self.probe_blob(Some(Quirk::BlobHeadRefused)).await,
            Some(405 | 501) => self.probe_blob(Some(Quirk::BlobHeadRefused)).await,
            Some(status @ (400 | 401 | 403 | 404 | 410 | 500)) if self.may_check(now) => {
                let quirk = if matches!(status, 404 | 410) {
                    Quirk::BlobHeadUntrue
                } else {
                    Quirk::BlobHeadRefused
                };
                let checked = self.probe_blob(Some(quirk)).await;
                truer(refusal.answer, checked, false)
            }
            _ => refusal.answer,
        }
    }

    /// A GET of one byte that stands in for the HEAD of a blob.
    async fn probe_blob(&self, teaches: Option<Quirk>) -> Answer {
        let range = Some(HeaderValue::from_static("bytes=0-0"));
        let reply = match self.ask(Method::GET, range).await {
            Ok(reply) => reply,
            // An empty blob has no first byte; whether it is one, its digest tells.
            Err(refusal)
                if refusal.answer.status == Some(StatusCode::RANGE_NOT_SATISFIABLE)
                    && self.is_of_nothing() =>
            {
                return Answer {
                    length: Some(0),
                    ..self.read_as(StatusCode::OK, &HeaderMap::new(), Sender::Elsewhere)
                };
            }
            Err(refusal) => return refusal.answer,
        };
        let length = match reply.status {
            StatusCode::PARTIAL_CONTENT => match content_range(&reply.headers) {
                Some((0, total)) => total,
                _ => return Answer::silent(Cause::Malformed),
            },
            _ => content_length(&reply.headers),
        };
        let answer = self.read(&reply);
        if answer.said.is_yes()
            && let Some(quirk) = teaches
        {
            self.quirks.learn(quirk, Instant::now());
        }
        Answer { length, ..answer }
    }

    fn is_of_nothing(&self) -> bool {
        let Operation::Blob {
            digest: AnyDigest::Known(digest),
            ..
        } = self.operation
        else {
            return false;
        };
        Digest::of(digest.algorithm(), b"") == *digest
    }

    fn read(&self, reply: &Reply) -> Answer {
        self.read_as(reply.status, &reply.headers, Sender::of(reply.abroad))
    }

    fn read_as(&self, status: StatusCode, headers: &HeaderMap, sender: Sender) -> Answer {
        Answer::read(self.operation, status, headers, sender)
    }

    /// The bytes; only those of `part` if the registry knows how.
    pub(super) async fn get(
        &self,
        part: Part,
        address: Address,
        idle: std::time::Duration,
    ) -> Result<Fetched, Box<Answer>> {
        let range = part.range().map(HeaderValue::try_from);
        let range = range.transpose().map_err(|_| Answer::silent(Cause::Malformed))?;
        let ranged = range.is_some();
        let reply = self
            .ask(Method::GET, range)
            .await
            .map_err(|refusal| refusal.answer)?;
        // The bytes of a manifest or a blob tell what they are, whatever their label; of a list there is nothing else.
        let has_digest = matches!(
            self.operation,
            Operation::Manifest { .. } | Operation::Blob { .. }
        );
        if !has_digest && proof::is_page(&reply.headers) {
            return Err(Answer::silent(Cause::NotRegistry).into());
        }
        let length = content_length(&reply.headers);
        let (start, total) = match (reply.status, ranged) {
            (StatusCode::OK, _) => (0, length),
            (StatusCode::PARTIAL_CONTENT, true) => match content_range(&reply.headers) {
                Some((start, total)) if start == part.from => (start, total),
                _ => return Err(Answer::silent(Cause::Malformed).into()),
            },
            (StatusCode::PARTIAL_CONTENT, false) => return Err(Answer::silent(Cause::Malformed).into()),
            _ => return Err(Answer::silent(Cause::NotRegistry).into()),
        };
        let media_type = proof::media_type(&reply.headers);
        Ok(Fetched {
            status: reply.status,
            digest: header_digest(&reply.headers),
            media_type,
            length,
            start,
            total,
            is_elsewheres: reply.abroad,
            rate_limit: RateLimit::read(&reply.headers),
            address,
            body: Body::new(reply.body, length, idle),
            headers: reply.headers,
            place: None,
        })
    }

    async fn ask(&self, method: Method, range: Option<HeaderValue>) -> Result<Reply, Box<Refusal>> {
        let ask = Ask {
            method,
            operation: self.operation,
            accept: self.accept,
            range,
            trace: self.trace,
            pending: self.pending,
        };
        self.exchange.ask(self.origin, self.caller, &ask).await
    }
}

/// The response to a GET that checks a HEAD. Where it brings nothing usable, the HEAD is believed unless the HEADs of this
/// upstream are known to lie.
///
/// A registry may deny the HEAD and limit only GETs. Such a limit says nothing of the right, so the denial stands.
fn truer(head: Answer, get: Answer, is_known_to_lie: bool) -> Answer {
    let head_is_usable = head.silence().is_none() && !is_known_to_lie;
    let is_limit = get.asks_to_wait().is_some();
    let get_counts = match (head.said, get.said) {
        // A limit with the status of a denial shows in the body alone, and the response to a HEAD has none.
        (Said::Forbidden, Said::Silent(_)) => is_limit && get.status == head.status,
        (Said::Forbidden, Said::Other(_)) => false,
        (_, Said::Silent(_)) => is_limit,
        _ => true,
    };
    if head_is_usable && !get_counts { head } else { get }
}

fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let (span, total) = parse_content_range(headers.get(CONTENT_RANGE)?.to_str().ok()?)?;
    Some((span.start, total))
}
