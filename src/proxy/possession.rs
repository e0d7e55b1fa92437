//! Proof of possession: whether the upstream sends this principal the bytes that are cached.
//!
//! A `HEAD` of a blob may be answered by storage after a redirect or without the registry's response headers, and
//! then also by a login page. A login page cannot return the first bytes of the blob. They are requested with the
//! principal's own credential and compared, which costs a few KiB instead of the whole blob.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::manifest_fetch::UpstreamRequest;
use super::{BlobBody, ProxyService, UpstreamRegistry};
use crate::blocking;
use crate::download::Reader;
use crate::oci::{Digest, Repository, UpstreamFailure};
use crate::store::blobs::BlobHandle;
use crate::upstream::{RangeSpec, UpstreamResponse};

/// Size of the compared sample. Larger than the common beginning of any two pages or archives.
const SAMPLE_BYTES: u64 = 4096;

/// Downloads remembered by repository.
const ACTIVE_DOWNLOADS_MAX: usize = 4096;

/// Downloads by the repository of their upstream response: a principal authorized there may follow. All bytes come
/// from that response, and the last ones are withheld until verification.
pub(super) struct ActiveDownloads(Cache<(Arc<str>, Repository, Digest), ()>);

impl Default for ActiveDownloads {
    fn default() -> Self {
        Self(Cache::new(ACTIVE_DOWNLOADS_MAX))
    }
}

impl ActiveDownloads {
    pub(super) fn insert(&self, registry: &UpstreamRegistry, repository: &Repository, digest: Digest) {
        self.0.insert(key(registry, repository, digest), ());
    }

    pub(super) fn remove(&self, registry: &UpstreamRegistry, repository: &Repository, digest: Digest) {
        self.0.remove(&key(registry, repository, digest));
    }

    pub(super) fn contains(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        digest: Digest,
    ) -> bool {
        self.0.get(&key(registry, repository, digest)).is_some()
    }
}

fn key(
    registry: &UpstreamRegistry,
    repository: &Repository,
    digest: Digest,
) -> (Arc<str>, Repository, Digest) {
    (registry.shared_name(), repository.clone(), digest)
}

/// Sample: the first bytes of a blob.
pub(super) struct Sample(Bytes);

impl Sample {
    pub(super) fn of_content(content: &BlobBody) -> impl Future<Output = Option<Self>> + Send + use<> {
        let known = match content {
            BlobBody::Memory(bytes) => {
                let length = usize::try_from(SAMPLE_BYTES).unwrap_or(usize::MAX);
                Some(Self(bytes.slice(..length.min(bytes.len()))))
            }
            _ => None,
        };
        let file = match content {
            BlobBody::File(handle) => Some(Self::of_file(handle)),
            _ => None,
        };
        async move {
            match (known, file) {
                (Some(known), _) => Some(known),
                (None, Some(file)) => file.await,
                (None, None) => None,
            }
        }
    }

    pub(super) fn of_file(handle: &BlobHandle) -> impl Future<Output = Option<Self>> + Send + use<> {
        let (size, file) = (handle.size, Arc::clone(&handle.file));
        async move {
            let length = usize::try_from(size.min(SAMPLE_BYTES)).ok()?;
            let read = blocking::read_file(move || {
                let mut bytes = BytesMut::zeroed(length);
                let mut at = 0;
                while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
                    match file.read_at(rest, at as u64)? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        read => at += read,
                    }
                }
                Ok(bytes.freeze())
            });
            read.await.ok().map(Self)
        }
    }

    /// Sample of a running download, once enough bytes may be read.
    pub(super) fn of_reader(reader: &Reader) -> impl Future<Output = Option<Self>> + Send + use<> {
        let mut reader = reader.head_reader(SAMPLE_BYTES);
        async move {
            let mut bytes = BytesMut::new();
            while let Some(chunk) = reader.next().await {
                bytes.extend_from_slice(&chunk.ok()?);
            }
            Some(Self(bytes.freeze()))
        }
    }
}

impl ProxyService {
    /// Requests the bytes of `sample` from the upstream. If they match, the registry has authorized this principal
    /// for the blob in this repository, and the grant is recorded.
    pub(super) async fn request_sample(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
        sample: &Sample,
    ) -> Result<(), UpstreamResponse> {
        let UpstreamRequest {
            registry,
            endpoint,
            accept,
            caller,
            ..
        } = upstream_request;
        let sent_at = Instant::now();
        let part = RangeSpec {
            from: 0,
            until: Some(sample.0.len() as u64),
            ..RangeSpec::default()
        };
        if !sample.0.is_empty() {
            // Short like a `HEAD`, and queued like one.
            let _permit = registry
                .upstream()
                .admit(caller, endpoint)
                .await
                .map_err(|response| *response)?;
            let answered = registry.upstream().get_part(caller, endpoint, accept, part).await;
            if let Err(response) = &answered {
                self.record_response(upstream_request, response, sent_at).await;
            }
            let mut fetched = answered?;
            let mut left = sample.0.clone();
            while !left.is_empty() {
                let Some(Ok(chunk)) = fetched.chunk().await else {
                    return Err(UpstreamResponse::unavailable(UpstreamFailure::NotRegistry));
                };
                let length = chunk.len().min(left.len());
                if chunk.slice(..length) != left.split_to(length) {
                    return Err(UpstreamResponse::unavailable(UpstreamFailure::NotRegistry));
                }
            }
        }
        self.record_verified_blob(upstream_request, (digest, sample.0.len() as u64), sent_at)
            .await;
        Ok(())
    }

    /// Records the consequences of verified bytes of a blob. The caller gets a grant if the bytes are evidence of
    /// one. The repository gets the blob as member if the caller is authorized or a manifest there references it.
    /// Bytes that the caller may have chosen prove nothing.
    pub(super) async fn record_verified_blob(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        (digest, size): (Digest, u64),
        sent_at: Instant,
    ) {
        if self.is_evidence(upstream_request, digest, size).await {
            self.record_grant(upstream_request, sent_at).await;
        }
        if self.is_referenced(upstream_request, digest) || self.is_authorized(upstream_request).await {
            self.add_member(&upstream_request.registry, &upstream_request.repository, digest)
                .await;
            self.settle_on_confirmation(upstream_request, digest.into()).await;
        }
    }
}
