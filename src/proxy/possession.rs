//! Proof by possession: whether the upstream gives this principal the bytes that are cached.
//!
//! A HEAD of a blob that was answered by storage after a redirect, or without the registry's marks, may have been
//! answered by a login page. The first bytes of the blob cannot be: they are asked for with the principal's own
//! credential and compared. That costs a few KiB where a transfer would cost the blob.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quick_cache::sync::Cache;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::manifest_fetch::UpstreamRequest;
use super::{BlobBody, ProxyService, UpstreamRegistry};
use crate::download::Reader;
use crate::oci::{Digest, Repository, UpstreamFailure};
use crate::store::blobs::BlobHandle;
use crate::upstream::{RangeSpec, UpstreamResponse};

/// How much is compared. More than any page and any archive have in common at their beginning.
const SAMPLE_BYTES: u64 = 4096;

/// Transfers remembered by the repository that they are led in.
const ARRIVING_MAX: usize = 4096;

/// The transfers whose upstream response came in a repository: who may read there may follow. Their bytes are that
/// response's, and the last of them are withheld until they are verified.
pub(super) struct ActiveDownloads(Cache<(Arc<str>, Repository, Digest), ()>);

impl Default for ActiveDownloads {
    fn default() -> Self {
        Self(Cache::new(ARRIVING_MAX))
    }
}

impl ActiveDownloads {
    pub(super) fn note(&self, site: &UpstreamRegistry, repository: &Repository, digest: Digest) {
        self.0.insert(key(site, repository, digest), ());
    }

    pub(super) fn forget(&self, site: &UpstreamRegistry, repository: &Repository, digest: Digest) {
        self.0.remove(&key(site, repository, digest));
    }

    pub(super) fn is_in(&self, site: &UpstreamRegistry, repository: &Repository, digest: Digest) -> bool {
        self.0.get(&key(site, repository, digest)).is_some()
    }
}

fn key(site: &UpstreamRegistry, repository: &Repository, digest: Digest) -> (Arc<str>, Repository, Digest) {
    (site.name().into(), repository.clone(), digest)
}

/// The first bytes of a blob.
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
            BlobBody::File(held) => Some(Self::of_file(held)),
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

    pub(super) fn of_file(held: &BlobHandle) -> impl Future<Output = Option<Self>> + Send + use<> {
        let (size, file) = (held.size, Arc::clone(&held.file));
        async move {
            let length = usize::try_from(size.min(SAMPLE_BYTES)).ok()?;
            let read = spawn_blocking(move || {
                let mut bytes = BytesMut::zeroed(length);
                let mut at = 0;
                while at < length {
                    match file.read_at(bytes.get_mut(at..)?, at as u64) {
                        Ok(read) if read > 0 => at += read,
                        _ => return None,
                    }
                }
                Some(Self(bytes.freeze()))
            });
            read.await.ok()?
        }
    }

    /// Of what is arriving, as soon as so much of it may be read.
    pub(super) fn of_reader(reader: &Reader) -> impl Future<Output = Option<Self>> + Send + use<> {
        let mut reader = reader.beginning(SAMPLE_BYTES);
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
    /// Asks the upstream for the bytes of `sample`. If they come, that is the registry's yes to this principal for this
    /// blob in this repository, and is noted as that.
    pub(super) async fn prove(
        self: &Arc<Self>,
        of: &UpstreamRequest,
        digest: Digest,
        sample: &Sample,
    ) -> Result<(), UpstreamResponse> {
        let UpstreamRequest {
            site,
            endpoint,
            accept,
            caller,
            ..
        } = of;
        let asked_at = Instant::now();
        let part = RangeSpec {
            from: 0,
            until: Some(sample.0.len() as u64),
            after: None,
        };
        if !sample.0.is_empty() {
            // As short as a question, and queued as one.
            let _place = site
                .upstream()
                .admit(caller, endpoint)
                .await
                .map_err(|answer| *answer)?;
            let answered = site.upstream().get_part(caller, endpoint, accept, part).await;
            if let Err(answer) = &answered {
                self.learn(of, answer, asked_at).await;
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
        self.learn_blob(of, (digest, sample.0.len() as u64), asked_at)
            .await;
        Ok(())
    }

    /// Keeps what follows from verified bytes of a blob: the caller's right where they are evidence of one, and that the
    /// upstream has the blob here, where the caller has a right or a manifest of the repository names the blob. Of bytes
    /// that the caller chose nothing follows.
    pub(super) async fn learn_blob(
        self: &Arc<Self>,
        of: &UpstreamRequest,
        (digest, size): (Digest, u64),
        asked_at: Instant,
    ) {
        if self.is_evidence(of, digest, size).await {
            self.learn_yes(of, asked_at).await;
        }
        if self.is_named_there(of, digest) || self.is_vouched(of).await {
            self.add_member(&of.site, &of.repository, digest).await;
            self.confirmed(of, digest.into()).await;
        }
    }
}
