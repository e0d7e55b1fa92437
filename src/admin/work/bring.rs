//! One pull at the operator's wish, from its tag to its last layer; what it does shows in its [`Work`].

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Layer, LayerState, Wish, Work, request};
use crate::admin::words;
use crate::clock::Clock;
use crate::oci::manifest::{Kind, Role};
use crate::oci::{AnyDigest, Digest, Operation, Reference};
use crate::proxy::{Content, Outcome, Pull};
use crate::store::manifests::HeldManifest;

/// Layers of one image at a time.
const LAYERS_AT_A_TIME: usize = 3;

/// How deep indexes may lie in each other.
const DEPTH_MAX: u32 = 2;

/// The whole road of one pull.
pub(super) async fn bring(
    pull: &Arc<Pull>,
    work: &Arc<Work>,
    wish: Wish,
    clock: Clock,
) -> Result<(), String> {
    let wish = Arc::new(wish);
    let first = manifest(pull, &wish, wish.named.reference.clone(), clock).await;
    let (first, reason) = first?;
    {
        let mut progress = work.progress();
        progress.digest = Some(first.digest);
        progress.reason = Some(reason);
    }
    let mut manifests = VecDeque::from([(first, None::<String>, DEPTH_MAX)]);
    let mut is_none = true;
    while let Some((held, platform, depth)) = manifests.pop_front() {
        if held.manifest.kind == Kind::Index {
            for child in held
                .manifest
                .children
                .iter()
                .filter(|child| child.role == Role::Manifest)
            {
                // It comes with the image that it attests.
                if child.attests.is_some() {
                    continue;
                }
                let own = child.platform.as_ref().map(ToString::to_string);
                let is_wanted = own.as_deref().is_none_or(|own| wish.platforms.want(own));
                let Some(depth) = depth.checked_sub(1).filter(|_| is_wanted) else {
                    continue;
                };
                let reference = Reference::Digest(child.digest.clone());
                let (held, _) = manifest(pull, &wish, reference, clock).await?;
                manifests.push_back((held, own, depth));
            }
            continue;
        }
        is_none = false;
        list(work, &held, platform.as_deref());
        layers(pull, work, &wish, &held, clock).await?;
        let reference = Reference::Digest(AnyDigest::Known(held.digest));
        let operation = Operation::Manifest {
            repository: wish.named.repository.clone(),
            reference,
        };
        // An image without its attestation is whole all the same, so that it cannot be had fails nothing.
        pull.bring_attestation(&request(&wish, operation, clock), &held.digest)
            .await;
    }
    if is_none {
        return Err(format!("{} has no image for the platform wanted", wish.named));
    }
    Ok(())
}

fn list(work: &Work, held: &HeldManifest, platform: Option<&str>) {
    let mut progress = work.progress();
    for child in &held.manifest.children {
        let AnyDigest::Known(digest) = child.digest else {
            continue;
        };
        if child.role == Role::Manifest
            || child.foreign
            || progress.layers.iter().any(|layer| layer.digest == digest)
        {
            continue;
        }
        progress.layers.push(Layer {
            digest,
            size: child.size,
            platform: platform.map(str::to_owned),
            role: if child.role == Role::Config {
                "config"
            } else {
                "layer"
            },
            state: LayerState::Waiting,
        });
    }
}

async fn layers(
    pull: &Arc<Pull>,
    work: &Arc<Work>,
    wish: &Arc<Wish>,
    held: &HeldManifest,
    clock: Clock,
) -> Result<(), String> {
    let places = Arc::new(Semaphore::new(LAYERS_AT_A_TIME));
    let mut tasks = JoinSet::new();
    for child in &held.manifest.children {
        let AnyDigest::Known(digest) = child.digest else {
            continue;
        };
        if child.role == Role::Manifest || child.foreign {
            continue;
        }
        let (pull, work, wish, places) = (
            Arc::clone(pull),
            Arc::clone(work),
            Arc::clone(wish),
            Arc::clone(&places),
        );
        tasks.spawn(async move {
            let _place = places.acquire_owned().await.ok();
            let brought = layer(&pull, &work, &wish, digest, clock).await;
            if brought.is_err() {
                work.mark(&digest, LayerState::Failed);
            }
            brought
        });
    }
    let mut failed = Ok(());
    while let Some(brought) = tasks.join_next().await {
        let brought = brought
            .unwrap_or_else(|_| Err("the task that fetched a layer ended without an answer".to_owned()));
        failed = failed.and(brought);
    }
    failed
}

async fn layer(
    pull: &Arc<Pull>,
    work: &Work,
    wish: &Wish,
    digest: Digest,
    clock: Clock,
) -> Result<(), String> {
    work.mark(&digest, LayerState::Fetching);
    let operation = Operation::Blob {
        repository: wish.named.repository.clone(),
        digest: AnyDigest::Known(digest),
    };
    match pull.answer(request(wish, operation, clock)).await {
        Outcome::Blob { content, .. } => match content {
            Content::Head | Content::Memory(_) | Content::File(_) => {
                work.mark(&digest, LayerState::Held);
                Ok(())
            }
            Content::Download(mut reader) => match reader.settled().await {
                Ok(_) => {
                    work.mark(&digest, LayerState::Fetched);
                    Ok(())
                }
                Err(failure) => Err(format!("{digest}: {failure}")),
            },
            Content::Passing(_) => Err(format!("{digest}: the disk cannot take it")),
        },
        Outcome::Refused(refused) => Err(format!(
            "{digest}: {}",
            words::refused(refused.refusal, wish.named.site.name())
        )),
        _ => Err(format!("{digest} cannot be stored")),
    }
}

async fn manifest(
    pull: &Arc<Pull>,
    wish: &Wish,
    reference: Reference,
    clock: Clock,
) -> Result<(Arc<HeldManifest>, &'static str), String> {
    let operation = Operation::Manifest {
        repository: wish.named.repository.clone(),
        reference: reference.clone(),
    };
    match pull.answer(request(wish, operation, clock)).await {
        Outcome::Manifest(manifest, how) => Ok((manifest, how.reason.name())),
        Outcome::Refused(refused) => Err(words::refused(refused.refusal, wish.named.site.name())),
        _ => Err(format!("{reference} cannot be stored")),
    }
}
