//! Blocks and approvals of digests: `/api/v1/blocks` and `/api/v1/approvals`.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Admin;
use super::format::rfc3339;
use super::image_ref::ImageRef;
use super::response::{ApiResponse, Problem, json_response};
use super::router::{blocking, parse_json};
use crate::oci::manifest::DescriptorKind;
use crate::oci::{Algorithm, AnyDigest, Digest, Reference};
use crate::server::ServingState;
use crate::store::verdicts::{
    FirstVerdicts, VerdictError, VerdictKey, VerdictKind, VerdictNote, VerdictScope,
};
use crate::store::{Store, StoreError};

/// A verdict in a list.
#[derive(Serialize)]
pub(super) struct VerdictView {
    /// `upstream/repository@digest`, or the digest alone if the verdict holds everywhere.
    pub(super) image: String,
    pub(super) digest: String,
    /// `null`: in every repository.
    pub(super) upstream: Option<String>,
    pub(super) repository: Option<String>,
    pub(super) at: String,
    pub(super) by: String,
    pub(super) reason: Option<String>,
}

/// The result of a change.
pub(super) struct Changed {
    /// The image or digest, as in [`VerdictView::image`].
    pub(super) image: String,
    /// Whether such a verdict existed.
    pub(super) was: bool,
    /// Whether the digest is blocked now.
    pub(super) is_blocked: bool,
    /// Whether the digest is approved now.
    pub(super) is_approved: bool,
    /// Manifests of the blocked digest, if it is a cached index, that are still served by their own digests.
    pub(super) images: Vec<String>,
}

/// The operator's name and reason.
#[derive(Clone, Debug, Default)]
pub(super) struct Motive {
    pub(super) by: Option<String>,
    pub(super) reason: Option<String>,
}

impl Motive {
    fn note(self, at: std::time::SystemTime) -> VerdictNote {
        let text = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        VerdictNote {
            at,
            by: text(self.by).unwrap_or_else(|| "the admin API".to_owned()),
            reason: text(self.reason),
        }
    }
}

/// What a verdict is about.
enum Target {
    /// A digest in every repository.
    Digest(Digest),
    /// A digest in one repository.
    Image(ImageRef, Digest),
}

impl Target {
    fn parse(text: &str, registry: &ServingState) -> Result<Self, Problem> {
        let algorithm = text.split(':').next().unwrap_or_default();
        if !text.contains(['@', '/']) && algorithm.parse::<Algorithm>().is_ok() {
            let digest = text.parse::<Digest>();
            return digest
                .map(Self::Digest)
                .map_err(|error| Problem::bad_request(format!("`{text}` is not a digest: {error}")));
        }
        let named = ImageRef::parse(text, registry)?;
        match named.reference {
            Reference::Digest(AnyDigest::Supported(digest)) => Ok(Self::Image(named, digest)),
            Reference::Digest(AnyDigest::Unsupported(_)) => Err(Problem::bad_request(
                "digests of this algorithm cannot be verified, so they are not cached",
            )),
            Reference::Tag(_) => Err(Problem::bad_request(format!(
                "a digest is required, as in {}/{}@sha256:…, or sha256:… for every repository; a tag names another \
                 digest tomorrow",
                named.upstream_registry.name(),
                named.repository
            ))),
        }
    }

    fn digest(&self) -> Digest {
        match self {
            Self::Digest(digest) | Self::Image(_, digest) => *digest,
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Digest(digest) => digest.to_string(),
            Self::Image(named, _) => named.to_string(),
        }
    }

    fn key(&self, kind: VerdictKind) -> VerdictKey {
        let scope = match self {
            Self::Digest(_) => VerdictScope::Everywhere,
            Self::Image(named, _) => VerdictScope::Repository {
                upstream: named.upstream_registry.name().into(),
                repository: named.repository.clone(),
            },
        };
        VerdictKey {
            kind,
            scope,
            digest: self.digest(),
        }
    }

    /// Takes the verdict back, in every repository if none is named. Returns whether one existed.
    fn remove(&self, kind: VerdictKind, store: &Store) -> Result<bool, StoreError> {
        match self {
            Self::Image(..) => store.remove_verdict(&self.key(kind)),
            Self::Digest(digest) => store.remove_verdicts_of(kind, digest),
        }
    }

    /// The manifests that this digest lists, if it is a cached index, and that are not blocked.
    fn unblocked_images(&self, store: &Store) -> Result<Vec<String>, StoreError> {
        let Some(held) = store.manifest(&self.digest())? else {
            return Ok(Vec::new());
        };
        let children = held.manifest.descriptors.iter();
        let manifests = children.filter(|child| child.kind == DescriptorKind::Manifest);
        let digests = manifests.filter_map(|child| match child.digest {
            AnyDigest::Supported(digest) => Some(digest),
            AnyDigest::Unsupported(_) => None,
        });
        let named = digests.map(|digest| match self {
            Self::Digest(_) => Self::Digest(digest),
            Self::Image(named, _) => {
                let reference = Reference::Digest(AnyDigest::Supported(digest));
                Self::Image(
                    ImageRef {
                        reference,
                        ..named.clone()
                    },
                    digest,
                )
            }
        });
        Ok(named
            .filter(|image| !image.has(VerdictKind::Blocked, store))
            .map(|image| image.name())
            .collect())
    }

    /// Whether a verdict of this kind holds: for an image, in its repository or everywhere; for a digest, in any.
    fn has(&self, kind: VerdictKind, store: &Store) -> bool {
        match self {
            Self::Image(named, digest) => store
                .verdict(kind, named.upstream_registry.name(), &named.repository, digest)
                .is_some(),
            Self::Digest(digest) => store.has_verdict(kind, digest),
        }
    }
}

/// The first verdicts of a kind.
pub(super) struct VerdictList {
    pub(super) verdicts: Vec<VerdictView>,
    /// Number of all verdicts of this kind.
    pub(super) total: usize,
}

/// The verdicts of this kind, at most `count_max`.
pub(super) fn list(registry: &ServingState, kind: VerdictKind, count_max: usize) -> VerdictList {
    let store = registry.proxy.store().blocking();
    let FirstVerdicts { verdicts, total } = store.first_verdicts(kind, count_max);
    let view = |(key, note): &(VerdictKey, Arc<VerdictNote>)| {
        let (image, upstream, repository) = match &key.scope {
            VerdictScope::Everywhere => (key.digest.to_string(), None, None),
            VerdictScope::Repository { upstream, repository } => (
                format!("{upstream}/{repository}@{}", key.digest),
                Some(upstream.to_string()),
                Some(repository.to_string()),
            ),
        };
        VerdictView {
            image,
            digest: key.digest.to_string(),
            upstream,
            repository,
            at: rfc3339(note.at),
            by: note.by.clone(),
            reason: note.reason.clone(),
        }
    };
    VerdictList {
        verdicts: verdicts.iter().map(view).collect(),
        total,
    }
}

impl Admin {
    /// `POST /api/v1/blocks`.
    pub(super) async fn block_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct BlockRequest {
            image: String,
            blocked: bool,
            by: Option<String>,
            reason: Option<String>,
        }
        let BlockRequest {
            image,
            blocked,
            by,
            reason,
        } = parse_json(body)?;
        let (kind, motive) = (VerdictKind::Blocked, Motive { by, reason });
        let changed = self.set_verdict((kind, blocked), &image, motive).await?;
        Ok(json_response(&json!({
            "image": changed.image,
            "blocked": blocked,
            "was": changed.was,
            "still_blocked": changed.is_blocked,
            "images": changed.images,
        })))
    }

    /// `POST /api/v1/approvals`.
    pub(super) async fn approval_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct ApprovalRequest {
            image: String,
            approved: bool,
            by: Option<String>,
            reason: Option<String>,
        }
        let ApprovalRequest {
            image,
            approved,
            by,
            reason,
        } = parse_json(body)?;
        let (kind, motive) = (VerdictKind::Approved, Motive { by, reason });
        let changed = self.set_verdict((kind, approved), &image, motive).await?;
        Ok(json_response(&json!({
            "image": changed.image,
            "approved": approved,
            "was": changed.was,
            "still_approved": changed.is_approved,
            "still_blocked": changed.is_blocked,
            "images": changed.images,
        })))
    }

    /// Gives a verdict (`true`) or takes it back.
    pub(super) async fn set_verdict(
        &self,
        change: (VerdictKind, bool),
        image: &str,
        motive: Motive,
    ) -> Result<Changed, Problem> {
        let registry = self.registry.load_full();
        let target = Target::parse(image, &registry)?;
        let note = motive.note(self.clock.now());
        blocking(move || set(registry.proxy.store().blocking(), &target, change, note)).await
    }
}

/// Gives a verdict or takes it back, and logs who did. On the blocking thread, because a client that leaves ends the
/// task that waits for it, but not the change.
fn set(
    store: &Store,
    target: &Target,
    (kind, is_given): (VerdictKind, bool),
    note: VerdictNote,
) -> Result<Changed, Problem> {
    let image = target.name();
    let (by, reason) = (note.by.clone(), note.reason.clone().unwrap_or_default());
    let changed = if is_given {
        let put = store.put_verdict(&target.key(kind), note);
        put.map(|is_new| !is_new).map_err(Problem::from)
    } else {
        target.remove(kind, store).map_err(Problem::from)
    };
    let was = changed.inspect_err(|problem| {
        tracing::error!(
            image,
            verdict = kind.name(),
            is_given,
            by,
            reason,
            error = problem.detail,
            "failed to change verdict on request"
        );
    })?;
    tracing::warn!(
        image,
        verdict = kind.name(),
        is_given,
        by,
        reason,
        "verdict changed on request"
    );
    let images = match (kind, is_given) {
        // The block holds, so a failure to read the index is not one of the change.
        (VerdictKind::Blocked, true) => target.unblocked_images(store).unwrap_or_else(|error| {
            tracing::warn!(image, %error, "failed to read which images a blocked digest lists");
            Vec::new()
        }),
        _ => Vec::new(),
    };
    Ok(Changed {
        is_blocked: target.has(VerdictKind::Blocked, store),
        is_approved: target.has(VerdictKind::Approved, store),
        image,
        was,
        images,
    })
}

impl From<VerdictError> for Problem {
    fn from(fault: VerdictError) -> Self {
        let status = match fault {
            VerdictError::TooMany => StatusCode::CONFLICT,
            VerdictError::NotDurable(_) | VerdictError::NoteNotDurable(_) | VerdictError::Store(_) => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        Self::new(status, fault.to_string())
    }
}
