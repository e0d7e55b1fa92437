//! A manifest from the upstream: fetched once for all who may share it, verified, kept.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::HeaderValue;
use tokio::time::Instant;

use super::detached::detached;
use super::invalidation::WriteSnapshot;
use super::revalidate::CoalesceKey;
use super::{ProxyService, Request, UpstreamRegistry};
use crate::download::Requester;
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{
    Accept, Algorithm, AnyDigest, Digest, Endpoint, Manifest, MediaType, Reference, Repository,
    UpstreamFailure,
};
use crate::policy::{Authorization, Revalidation};
use crate::store::manifests::StoredManifest;
use crate::store::tags::TagKey;
use crate::upstream::{Caller, Credential, ResponseKind, ResponseStream, UpstreamResponse};

/// A manifest asked for.
#[derive(Clone)]
pub(super) struct UpstreamRequest {
    pub(super) site: Arc<UpstreamRegistry>,
    pub(super) repository: Repository,
    pub(super) endpoint: Endpoint,
    pub(super) accept: Accept,
    pub(super) caller: Caller,
    /// When the [`Request`] arrived that it is for: no request to the upstream is older.
    pub(super) asked_at: SystemTime,
    /// As in that request.
    pub(super) writes: WriteSnapshot,
    /// As in the [`Request`] that it is for.
    pub(super) for_push: bool,
    /// The digest that the upstream's response to a HEAD named, where a tag is fetched because it moved.
    pub(super) named: Option<Digest>,
    /// Whether the caller is known to have shown no right in the repository: nothing cached may make a difference to it.
    pub(super) is_strangers: bool,
}

impl UpstreamRequest {
    pub(super) fn of(request: &Request, repository: &Repository, caller: &Caller) -> Self {
        Self {
            site: Arc::clone(&request.site),
            repository: repository.clone(),
            endpoint: request.endpoint.clone(),
            accept: request.accept.clone(),
            caller: caller.clone(),
            asked_at: request.now,
            writes: request.writes,
            for_push: request.for_push,
            named: None,
            is_strangers: false,
        }
    }

    /// A fetch of the tag because it moved, as this response to a HEAD says.
    pub(super) fn naming(self, revalidation: Revalidation) -> Self {
        let named = match revalidation {
            Revalidation::Digest { digest, .. } => Some(digest),
            _ => None,
        };
        Self { named, ..self }
    }

    fn is_for_referrers_tag(&self) -> bool {
        match &self.endpoint {
            Endpoint::Manifest {
                reference: Reference::Tag(tag),
                ..
            } => tag.is_referrers_tag(),
            _ => false,
        }
    }

    /// The client's credential, as it is sent on.
    pub(super) fn shown(&self) -> Option<&HeaderValue> {
        match &self.caller.credential {
            Credential::Client(shown) => Some(shown),
            Credential::Anonymous | Credential::Configured => None,
        }
    }

    /// On whose right a blob is downloaded.
    pub(super) fn requester(&self) -> Requester {
        Requester {
            upstream: self.site.name().into(),
            repository: self.repository.clone(),
            principal: self.caller.principal,
        }
    }
}

impl ProxyService {
    /// Fetches a manifest, keeps it and what it shows; one fetch for all who may share it.
    pub(super) async fn fetch_manifest(
        self: &Arc<Self>,
        wanted: UpstreamRequest,
    ) -> Result<Arc<StoredManifest>, Arc<UpstreamResponse>> {
        let key = CoalesceKey::new(self, &wanted);
        let (demand, is_made_up) = (self.demand(&wanted), self.may_be_made_up(&wanted));
        let call = self.manifests.share_for(key, demand, |waiters| {
            if !is_made_up {
                waiters.detach();
            }
            let pull = Arc::clone(self);
            async move {
                let UpstreamRequest {
                    site,
                    endpoint,
                    accept,
                    caller,
                    ..
                } = &wanted;
                let asked_at = Instant::now();
                let caller = Caller {
                    waiters: Some(waiters.clone()),
                    ..caller.clone()
                };
                let getting = site.upstream().get(&caller, endpoint, accept, None);
                let got = waiters.while_wanted(getting).await?;
                Some(match got {
                    Ok(fetched) => {
                        let is_registrys = !fetched.is_redirect_target;
                        let received = pull.receive(&wanted, fetched).await;
                        let received = match received {
                            Ok(manifest) => Ok(pull.not_replaced(&wanted, manifest).await),
                            Err(cause) => Err(cause),
                        };
                        if let Ok(manifest) = &received
                            && pull.shows_right(&wanted, manifest, is_registrys).await
                        {
                            pull.learn_yes(&wanted, asked_at).await;
                        }
                        pull.keep(&wanted, received).await
                    }
                    Err(answer) => {
                        pull.learn(&wanted, &answer, asked_at).await;
                        Err(Arc::new(answer))
                    }
                })
            }
        });
        call.wait()
            .await
            .unwrap_or_else(|| Err(Arc::new(UpstreamResponse::unavailable(UpstreamFailure::Busy))))
    }

    /// The manifest that the HEAD named, where the GET by tag brought one that the tag named before: a replica of the
    /// registry that lags behind sent it. A manifest that is new here may be newer than the HEAD, and stays.
    async fn not_replaced(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        received: StoredManifest,
    ) -> StoredManifest {
        let Some(named) = wanted.named.filter(|named| *named != received.digest) else {
            return received;
        };
        if !self.is_known_of_tag(wanted, received.digest).await {
            return received;
        }
        let endpoint = Endpoint::Manifest {
            repository: wanted.repository.clone(),
            reference: Reference::Digest(AnyDigest::Supported(named)),
        };
        let by_digest = UpstreamRequest {
            endpoint,
            ..wanted.clone()
        };
        let UpstreamRequest {
            site, accept, caller, ..
        } = wanted;
        let fetched = site
            .upstream()
            .get(caller, &by_digest.endpoint, accept, None)
            .await;
        match fetched {
            Ok(fetched) => self.receive(&by_digest, fetched).await.unwrap_or(received),
            Err(_) => received,
        }
    }

    /// Whether the tag is known to have named this digest.
    async fn is_known_of_tag(self: &Arc<Self>, wanted: &UpstreamRequest, digest: Digest) -> bool {
        let Endpoint::Manifest {
            reference: Reference::Tag(tag),
            ..
        } = &wanted.endpoint
        else {
            return false;
        };
        let key = TagKey {
            upstream: wanted.site.name().into(),
            repository: wanted.repository.clone(),
            tag: tag.clone(),
        };
        let record = self.store.read(move |view| view.tag(&key)).await;
        matches!(record, Ok(Some(record)) if record.has_pointed_to(&digest))
    }

    /// Whether a verified manifest shows a right to the repository: the registry's own origin sent it and it points to
    /// something, or it was seen there before.
    async fn shows_right(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        manifest: &StoredManifest,
        is_registrys: bool,
    ) -> bool {
        let is_placeholder = manifest.manifest.descriptors.is_empty();
        !is_placeholder
            && (is_registrys
                || self
                    .is_evidence(wanted, manifest.digest, manifest.bytes.len() as u64)
                    .await)
    }

    /// The manifest that came with the answer, where a GET had to stand in for the HEAD: it is not fetched twice.
    pub(super) async fn brought(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        answer: &UpstreamResponse,
    ) -> Option<Arc<StoredManifest>> {
        let (bytes, media_type) = answer.body.clone()?;
        let named = match answer.kind {
            ResponseKind::Digest(digest) | ResponseKind::UnprovenDigest(digest) => Some(digest),
            _ => None,
        };
        let received = verify(bytes, named, Some(&media_type), &wanted.endpoint);
        let (pull, wanted) = (Arc::clone(self), wanted.clone());
        detached(async move { pull.keep(&wanted, received).await.ok() }).await
    }

    /// Keeps a verified manifest for one who has a right to the repository: its bytes, that it was seen here, and the tag
    /// that named it. What the disk cannot take, and what nothing proves to be the registry's, is served and not kept.
    async fn keep(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        received: Result<StoredManifest, UpstreamFailure>,
    ) -> Result<Arc<StoredManifest>, Arc<UpstreamResponse>> {
        let UpstreamRequest {
            site,
            repository,
            endpoint,
            ..
        } = wanted;
        let manifest = received.map_err(|cause| {
            if cause == UpstreamFailure::DigestMismatch {
                tracing::error!(upstream = site.name(), %repository, path = %endpoint.path_and_query(),
                    "the upstream sent a manifest whose digest is not the one it named; nothing was stored");
            }
            Arc::new(UpstreamResponse::unavailable(cause))
        })?;
        let manifest = Arc::new(manifest);
        if !self.is_vouched(wanted).await {
            return Ok(manifest);
        }
        self.sizes.learn(site, repository, &manifest.manifest);
        let kept = {
            let (site, repository) = (Arc::clone(site), repository.clone());
            let manifest = Arc::clone(&manifest);
            self.store
                .write(move |store| {
                    let StoredManifest {
                        digest,
                        bytes,
                        media_type,
                        ..
                    } = manifest.as_ref();
                    store.put_manifest(
                        bytes.clone(),
                        media_type.clone(),
                        *digest,
                        site.name(),
                        &repository,
                    )
                })
                .await
        };
        let served = match &kept {
            Ok(kept) => Arc::clone(kept),
            Err(_) => manifest,
        };
        super::revalidate::report(kept, "keep a manifest");
        // As for a list of the referrers API: a registry may have an answer for those who may not read the repository.
        let is_believed =
            !wanted.is_for_referrers_tag() || self.standing_of(wanted).await != Authorization::Unknown;
        if let Endpoint::Manifest { reference, .. } = endpoint
            && is_believed
        {
            let media_type = Some(&served.media_type);
            self.learn_name_unless_written(wanted, reference, served.digest, media_type)
                .await;
        }
        Ok(served)
    }

    /// Reads a manifest and holds it against everything that was said of it.
    ///
    /// The bytes are believed, never a header: by digest they must hash to it; by tag they must hash to what the same
    /// answer's `Docker-BlobBody-Digest` says, where it says anything, or else to what a HEAD names. And they must be a
    /// manifest: an HTML page with status 200 is not one.
    async fn receive(
        &self,
        wanted: &UpstreamRequest,
        fetched: ResponseStream,
    ) -> Result<StoredManifest, UpstreamFailure> {
        let UpstreamRequest {
            site,
            endpoint,
            accept,
            caller,
            ..
        } = wanted;
        let (header, media_type) = (fetched.digest, fetched.media_type.clone());
        let is_page = media_type.as_ref().is_some_and(MediaType::is_page);
        let bytes = fetched.collect(MANIFEST_BYTES_MAX).await?;
        let mut received = verify(bytes.clone(), header, media_type.as_ref(), endpoint);
        if matches!(received, Err(UpstreamFailure::DigestMismatch))
            && by_tag(endpoint)
            && let ResponseKind::Digest(named) = site.upstream().head(caller, endpoint, accept).await.kind
        {
            received = verify(bytes, Some(named), media_type.as_ref(), endpoint);
        }
        if is_page {
            received.map_err(|_| UpstreamFailure::NotRegistry)
        } else {
            received
        }
    }
}

fn by_tag(endpoint: &Endpoint) -> bool {
    matches!(
        endpoint,
        Endpoint::Manifest {
            reference: Reference::Tag(_),
            ..
        }
    )
}

fn verify(
    bytes: Bytes,
    header: Option<Digest>,
    media_type: Option<&MediaType>,
    endpoint: &Endpoint,
) -> Result<StoredManifest, UpstreamFailure> {
    let asked = match endpoint {
        Endpoint::Manifest {
            reference: Reference::Digest(AnyDigest::Supported(digest)),
            ..
        } => Some(*digest),
        _ => None,
    };
    let expected = asked.or(header);
    let algorithm = expected.map_or(Algorithm::Sha256, |digest| digest.algorithm());
    let digest = Digest::of(algorithm, &bytes);
    let is_right = expected.is_none_or(|expected| expected == digest);
    let read = Manifest::read(&bytes);
    if !(is_right && asked.is_some())
        && let Ok(manifest) = &read
        && manifest.is_signed_schema_1(media_type)
    {
        return Err(UpstreamFailure::Unverifiable);
    }
    if !is_right {
        return Err(UpstreamFailure::DigestMismatch);
    }
    let manifest = read.map_err(|_| UpstreamFailure::Malformed)?;
    let is_page = media_type.is_some_and(MediaType::is_page);
    let media_type = if asked.is_some() {
        manifest.type_by_digest(media_type)
    } else {
        manifest.type_sent_as(media_type)
    };
    let media_type = media_type.ok_or(UpstreamFailure::Malformed)?;
    // Of a tag nothing but the answer says what it names, so label and shape have to agree.
    if asked.is_none() && (is_page || !manifest.has_shape_of(&media_type)) {
        return Err(UpstreamFailure::Malformed);
    }
    Ok(StoredManifest {
        digest,
        bytes,
        media_type,
        manifest,
    })
}
