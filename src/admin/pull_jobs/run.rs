//! Execution of one pull job, from its tag to its last layer. Progress is recorded in the [`PullJob`].

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Layer, LayerState, PullJob, PullSpec, request};
use crate::admin::format;
use crate::clock::Clock;
use crate::oci::manifest::{DescriptorKind, ManifestKind};
use crate::oci::{AnyDigest, Digest, Endpoint, Reference};
use crate::proxy::{BlobBody, ProxyResponse, ProxyService};
use crate::store::View;
use crate::store::manifests::StoredManifest;

/// Layers of one image fetched in parallel.
const LAYERS_PARALLEL_MAX: usize = 3;

/// Maximum nesting depth of indexes.
const DEPTH_MAX: u32 = 2;

/// Runs the job.
pub(super) async fn run(
    proxy: &Arc<ProxyService>,
    job: &Arc<PullJob>,
    spec: PullSpec,
    clock: Clock,
) -> Result<(), String> {
    let spec = Arc::new(spec);
    let first = manifest(proxy, &spec, spec.named.reference.clone(), clock).await;
    let (first, reason) = first?;
    {
        let mut progress = job.progress.lock();
        progress.digest = Some(first.digest);
        progress.reason = Some(reason);
    }
    let mut manifests = VecDeque::from([(first, None::<String>, DEPTH_MAX)]);
    let mut found_none = true;
    while let Some((stored, platform, depth)) = manifests.pop_front() {
        if stored.manifest.kind == ManifestKind::Index {
            for child in stored
                .manifest
                .descriptors
                .iter()
                .filter(|child| child.kind == DescriptorKind::Manifest)
            {
                // Attestations are fetched with the image that they refer to.
                if child.attests.is_some() {
                    continue;
                }
                let platform_name = child.platform.as_ref().map(ToString::to_string);
                let is_selected = platform_name
                    .as_deref()
                    .is_none_or(|platform_name| spec.platforms.includes(platform_name));
                let Some(depth) = depth.checked_sub(1).filter(|_| is_selected) else {
                    continue;
                };
                let reference = Reference::Digest(child.digest.clone());
                let (stored, _) = manifest(proxy, &spec, reference, clock).await?;
                manifests.push_back((stored, platform_name, depth));
            }
            continue;
        }
        found_none = false;
        list(job, &stored, platform.as_deref());
        layers(proxy, job, &spec, &stored, clock).await?;
        let reference = Reference::Digest(AnyDigest::Supported(stored.digest));
        let endpoint = Endpoint::Manifest {
            repository: spec.named.repository.clone(),
            reference,
        };
        // An image is complete without its attestation, so a failure to fetch it does not fail the job.
        proxy
            .fetch_attestation(&request(&spec, endpoint, clock), &stored.digest)
            .await;
    }
    if found_none {
        return Err(format!("{} has no image for the selected platforms", spec.named));
    }
    Ok(())
}

fn list(job: &PullJob, stored: &StoredManifest, platform: Option<&str>) {
    let mut progress = job.progress.lock();
    for child in &stored.manifest.descriptors {
        let AnyDigest::Supported(digest) = child.digest else {
            continue;
        };
        if child.kind == DescriptorKind::Manifest
            || child.has_urls
            || progress.layers.iter().any(|layer| layer.digest == digest)
        {
            continue;
        }
        progress.layers.push(Layer {
            digest,
            size: child.size,
            platform: platform.map(str::to_owned),
            role: if child.kind == DescriptorKind::Config {
                "config"
            } else {
                "layer"
            },
            state: LayerState::Waiting,
        });
    }
}

async fn layers(
    proxy: &Arc<ProxyService>,
    job: &Arc<PullJob>,
    spec: &Arc<PullSpec>,
    stored: &StoredManifest,
    clock: Clock,
) -> Result<(), String> {
    let permits = Arc::new(Semaphore::new(LAYERS_PARALLEL_MAX));
    let mut tasks = JoinSet::new();
    for child in &stored.manifest.descriptors {
        let AnyDigest::Supported(digest) = child.digest else {
            continue;
        };
        if child.kind == DescriptorKind::Manifest || child.has_urls {
            continue;
        }
        let (proxy, job, spec, permits) = (
            Arc::clone(proxy),
            Arc::clone(job),
            Arc::clone(spec),
            Arc::clone(&permits),
        );
        tasks.spawn(async move {
            let _permit = permits.acquire_owned().await.ok();
            let result = layer(&proxy, &job, &spec, digest, clock).await;
            if result.is_err() {
                job.mark(&digest, LayerState::Failed);
            }
            result
        });
    }
    let mut failed = Ok(());
    while let Some(result) = tasks.join_next().await {
        let result = result.unwrap_or_else(|_| Err("the task that fetched a layer panicked".to_owned()));
        failed = failed.and(result);
    }
    failed
}

async fn layer(
    proxy: &Arc<ProxyService>,
    job: &PullJob,
    spec: &PullSpec,
    digest: Digest,
    clock: Clock,
) -> Result<(), String> {
    job.mark(&digest, LayerState::Fetching);
    let endpoint = Endpoint::Blob {
        repository: spec.named.repository.clone(),
        digest: AnyDigest::Supported(digest),
    };
    match proxy.handle(&mut request(spec, endpoint, clock)).await {
        ProxyResponse::Blob { content, .. } => match content {
            BlobBody::Head | BlobBody::Memory(_) | BlobBody::File(_) | BlobBody::Redirect(_) => {
                job.mark(&digest, LayerState::Cached);
                Ok(())
            }
            BlobBody::Download(mut reader) => match reader.settled().await {
                Ok(_) => {
                    // Readers have the bytes before they are durable and named.
                    proxy.downloads().ended(&digest).await;
                    let is_stored = move |view: &View<'_>| matches!(view.blob(&digest), Ok(Some(_)));
                    if !proxy.store().read(is_stored).await {
                        return Err(format!(
                            "{digest}: it was fetched, but the disk failed to store it"
                        ));
                    }
                    job.mark(&digest, LayerState::Fetched);
                    Ok(())
                }
                Err(failure) => Err(format!("{digest}: {failure}")),
            },
            BlobBody::Passthrough(_) => Err(format!("{digest}: it cannot be stored on the disk")),
        },
        ProxyResponse::Denied(refused) => Err(format!(
            "{digest}: {}",
            format::describe_denial(refused.reason, spec.named.upstream_registry.name())
        )),
        _ => Err(format!("{digest} cannot be stored")),
    }
}

async fn manifest(
    proxy: &Arc<ProxyService>,
    spec: &PullSpec,
    reference: Reference,
    clock: Clock,
) -> Result<(Arc<StoredManifest>, &'static str), String> {
    let endpoint = Endpoint::Manifest {
        repository: spec.named.repository.clone(),
        reference: reference.clone(),
    };
    match proxy.handle(&mut request(spec, endpoint, clock)).await {
        ProxyResponse::Manifest(manifest, how) => Ok((manifest, how.reason.name())),
        ProxyResponse::Denied(refused) => Err(format::describe_denial(
            refused.reason,
            spec.named.upstream_registry.name(),
        )),
        _ => Err(format!("{reference} cannot be stored")),
    }
}
