//! HEAD and GET at one address of an upstream, with what stands in for a HEAD that a registry refuses or answers
//! without a digest. Says what was answered; deciding between addresses, limits and the breaker is one level up.

use http::header::CONTENT_RANGE;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::time::Instant;

use super::Caller;
use super::answer::{Answer, Said, header_digest};
use super::client::{Body, Reply, content_length};
use super::exchange::{Ask, Exchange, Refusal};
use super::fetched::{Address, Fetched, Part};
use super::origin::Origin;
use super::quirk::{Quirk, QuirksAt};
use crate::oci::accept::Accept;
use crate::oci::cause::Cause;
use crate::oci::digest::{Algorithm, AnyDigest, Digest};
use crate::oci::header::RateLimit;
use crate::oci::manifest::{Kind, Manifest, MediaType};
use crate::oci::name::{Reference, Repository};
use crate::oci::operation::Operation;
use crate::oci::range::parse_content_range;
use crate::trace::Trace;

/// One question, with everything it needs.
pub(super) struct Question<'a> {
    pub(super) exchange: &'a Exchange,
    pub(super) quirks: QuirksAt<'a>,
    pub(super) origin: &'a Origin,
    pub(super) caller: &'a Caller,
    pub(super) operation: &'a Operation,
    pub(super) accept: &'a Accept,
    pub(super) manifest_bytes_max: usize,
    pub(super) trace: &'a Trace,
}

impl Question<'_> {
    /// Which digest, or whether at all; costs no transfer where the registry plays along.
    pub(super) async fn head(&self) -> Answer {
        match self.operation {
            Operation::Manifest {
                repository,
                reference,
            } => self.head_manifest(repository, reference).await,
            Operation::Blob { repository, .. } => self.head_blob(repository).await,
            // Some registries know no HEAD here, and the bodies are small.
            Operation::Ping | Operation::Tags { .. } | Operation::Referrers { .. } => self
                .ask(Method::GET, None)
                .await
                .map_or_else(|refusal| refusal.answer, |reply| self.read(&reply)),
        }
    }

    async fn head_manifest(&self, repository: &Repository, reference: &Reference) -> Answer {
        let now = Instant::now();
        let by_tag = matches!(reference, Reference::Tag(_));
        if self.quirks.has(Quirk::HeadRefused, now) || (by_tag && self.quirks.has(Quirk::NoDigest, now)) {
            return self.get_manifest(reference, None).await;
        }
        let refusal = match self.ask(Method::HEAD, None).await {
            Ok(reply) => {
                let answer = self.read(&reply);
                drop(reply);
                if by_tag && answer.said == Said::Unnamed {
                    return self.get_manifest(reference, Some(Quirk::NoDigest)).await;
                }
                return answer;
            }
            Err(refusal) => *refusal,
        };
        match refusal.answer.status {
            Some(StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED) => {
                self.get_manifest(reference, Some(Quirk::HeadRefused)).await
            }
            // A registry's own 404 is believed. One that does not look like it is checked, once per repository.
            Some(StatusCode::NOT_FOUND)
                if self.quirks.has(Quirk::HeadUntrue, now)
                    || (!refusal.of_registry && self.quirks.first_check(repository, Quirk::HeadUntrue)) =>
            {
                let checked = self.get_manifest(reference, Some(Quirk::HeadUntrue)).await;
                if matches!(checked.said, Said::Is(_)) || checked.asks_to_wait().is_some() {
                    checked
                } else {
                    refusal.answer
                }
            }
            // The body says whether it is a limit, and a HEAD has none.
            Some(status)
                if refusal.of_registry
                    && status != StatusCode::UNAUTHORIZED
                    && matches!(refusal.answer.said, Said::Forbidden | Said::Other(_)) =>
            {
                match self.ask(Method::GET, None).await {
                    Err(by_get) if by_get.answer.asks_to_wait().is_some() => by_get.answer,
                    Ok(_) | Err(_) => refusal.answer,
                }
            }
            _ => refusal.answer,
        }
    }

    /// A GET that stands in for a HEAD: the digest is computed over the bytes, and the bytes are kept.
    async fn get_manifest(&self, reference: &Reference, teaches: Option<Quirk>) -> Answer {
        let reply = match self.ask(Method::GET, None).await {
            Ok(reply) => reply,
            Err(refusal) => return refusal.answer,
        };
        let answer = self.read(&reply);
        let promised = header_digest(&reply.headers);
        let bytes = match reply
            .collect(self.manifest_bytes_max, self.exchange.headers_within)
            .await
        {
            Ok(bytes) => bytes,
            Err(cause) => return Answer::silent(cause),
        };
        // A login page or an error with status 200 is no manifest, and must not become a "newer" one.
        let typed = answer.media_type.as_ref().is_some_and(MediaType::is_manifest);
        let manifest = match Manifest::read(&bytes) {
            Ok(manifest) if typed || manifest.kind != Kind::Other || !manifest.children.is_empty() => {
                manifest
            }
            Ok(_) | Err(_) => return Answer::silent(Cause::Malformed),
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
        // Some registries send `text/plain` or nothing; the manifest knows better.
        let header = answer.media_type.clone();
        let media_type = if typed {
            header
        } else {
            manifest.media_type.or(header)
        };
        Answer {
            said: Said::Is(digest),
            length: Some(bytes.len() as u64),
            body: media_type.clone().map(|media_type| (bytes, media_type)),
            media_type,
            ..answer
        }
    }

    /// A yes should say how long the blob is, so one that does not is asked for by a GET of one byte as well.
    async fn head_blob(&self, repository: &Repository) -> Answer {
        if self.quirks.has(Quirk::BlobHeadRefused, Instant::now()) {
            return self.probe_blob().await;
        }
        let (answer, is_doubtful) = match self.ask(Method::HEAD, None).await {
            Ok(reply) => {
                let answer = self.read(&reply);
                let has_length = answer.length.is_some();
                (answer, !has_length)
            }
            Err(refusal) if refusal.abroad => {
                let answer = self.vouched(*refusal);
                let is_yes = answer.said.is_yes();
                (answer, is_yes)
            }
            Err(refusal) => {
                let is_doubtful = match refusal.answer.status {
                    Some(StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED) => true,
                    Some(StatusCode::UNAUTHORIZED) => {
                        self.quirks.first_check(repository, Quirk::BlobHeadRefused)
                    }
                    _ => false,
                };
                (refusal.answer, is_doubtful)
            }
        };
        if !is_doubtful {
            return answer;
        }
        let probed = self.probe_blob().await;
        match (answer.status, probed.said.is_yes()) {
            (Some(StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED), _) | (_, true) => probed,
            _ => answer,
        }
    }

    /// A GET of one byte that stands in for the HEAD of a blob.
    async fn probe_blob(&self) -> Answer {
        let reply = match self
            .ask(Method::GET, Some(HeaderValue::from_static("bytes=0-0")))
            .await
        {
            Ok(reply) => reply,
            Err(refusal) if refusal.abroad => return self.vouched(*refusal),
            // An empty blob has no first byte.
            Err(refusal) if refusal.answer.status == Some(StatusCode::RANGE_NOT_SATISFIABLE) => {
                return Answer {
                    length: Some(0),
                    ..self.yes()
                };
            }
            Err(refusal) => return refusal.answer,
        };
        self.quirks.learn(Quirk::BlobHeadRefused, Instant::now());
        let length = match reply.status {
            StatusCode::PARTIAL_CONTENT => content_range(&reply.headers).and_then(|(_, total)| total),
            _ => content_length(&reply.headers),
        };
        Answer {
            length,
            ..self.read(&reply)
        }
    }

    /// The registry sent us to its storage, which is its yes; that the storage refuses a HEAD (signatures cover the
    /// method) takes nothing from it. A 404 of the storage does.
    fn vouched(&self, refusal: Refusal) -> Answer {
        match refusal.answer.said {
            Said::Silent(Cause::Status(400 | 401 | 403 | 405)) => self.yes(),
            _ => refusal.answer,
        }
    }

    fn yes(&self) -> Answer {
        Answer::read(self.operation, StatusCode::OK, &HeaderMap::new())
    }

    fn read(&self, reply: &Reply) -> Answer {
        Answer::read(self.operation, reply.status, &reply.headers)
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
        let length = content_length(&reply.headers);
        let (start, total) = match (reply.status, ranged) {
            (StatusCode::OK, _) => (0, length),
            (StatusCode::PARTIAL_CONTENT, true) => match content_range(&reply.headers) {
                Some((start, total)) if start == part.from => (start, total),
                _ => return Err(Answer::silent(Cause::Malformed).into()),
            },
            _ => return Err(Answer::silent(Cause::Malformed).into()),
        };
        let media_type = self.read(&reply).media_type;
        Ok(Fetched {
            status: reply.status,
            digest: header_digest(&reply.headers),
            media_type,
            length,
            start,
            total,
            rate_limit: RateLimit::read(&reply.headers),
            address,
            body: Body::new(reply.body, length, idle),
            headers: reply.headers,
            permit: None,
        })
    }

    async fn ask(&self, method: Method, range: Option<HeaderValue>) -> Result<Reply, Box<Refusal>> {
        let ask = Ask {
            method,
            operation: self.operation,
            accept: self.accept,
            range,
            trace: self.trace,
        };
        self.exchange.ask(self.origin, self.caller, &ask).await
    }
}

fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let (span, total) = parse_content_range(headers.get(CONTENT_RANGE)?.to_str().ok()?)?;
    Some((span.start, total))
}
