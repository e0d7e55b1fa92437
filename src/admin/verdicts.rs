//! Blocks and approvals of digests: `/api/v1/blocks` and `/api/v1/approvals`.

mod target;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::target::Target;
use super::Admin;
use super::extract::JsonBody;
use super::format::rfc3339;
use super::response::{Problem, blocking, switching};
use crate::server::ServingState;
use crate::store::Store;
use crate::store::verdicts::{
    FirstVerdicts, VerdictError, VerdictKey, VerdictKind, VerdictNote, VerdictScope, cut,
};

/// A verdict in a list.
#[derive(Serialize, ToSchema)]
#[schema(as = Verdict)]
pub(super) struct VerdictView {
    /// upstream/repository@digest, or the digest alone if it applies to every repository.
    pub(super) image: String,
    pub(super) digest: String,
    /// Null if it applies to every repository.
    pub(super) upstream: Option<String>,
    pub(super) repository: Option<String>,
    #[schema(format = DateTime)]
    pub(super) at: String,
    /// Name of the operator, as given.
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
        // As stored, so that the log has no more.
        let text = |text: Option<String>| text.map(cut).filter(|text| !text.trim().is_empty());
        VerdictNote {
            at,
            by: text(self.by).unwrap_or_else(|| "the admin API".to_owned()),
            reason: text(self.reason),
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

#[derive(Serialize, ToSchema)]
pub(super) struct Blocks {
    blocks: Vec<VerdictView>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Approvals {
    approvals: Vec<VerdictView>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockRequest {
    /// upstream/repository@digest, or a digest alone for every repository.
    image: String,
    /// False removes it. For a digest without a repository, it is removed in every repository.
    blocked: bool,
    /// Name of the operator, recorded as given.
    by: Option<String>,
    /// Reason. Denied clients see it.
    reason: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct BlockResult {
    image: String,
    blocked: bool,
    /// Whether it was blocked before.
    was: bool,
    /// Whether the digest is blocked now, in this or in every repository.
    still_blocked: bool,
    /// Images of a blocked index that are still served by their own digests, if the index is cached.
    images: Vec<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ApprovalRequest {
    /// upstream/repository@digest, or a digest alone for every repository.
    image: String,
    /// False removes it. For a digest without a repository, it is removed in every repository.
    approved: bool,
    /// Name of the operator, recorded as given.
    by: Option<String>,
    /// Reason.
    reason: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[expect(clippy::struct_excessive_bools, reason = "members of the API")]
pub(super) struct ApprovalResult {
    image: String,
    approved: bool,
    /// Whether it was approved before.
    was: bool,
    /// Whether the digest is approved now, in this or in every repository.
    still_approved: bool,
    /// Whether the digest is blocked now, in this or in every repository.
    still_blocked: bool,
    /// Always empty.
    images: Vec<String>,
}

/// List of blocked digests.
#[utoipa::path(get, path = "/api/v1/blocks", responses((status = 200, body = Blocks)))]
pub(super) async fn blocks(State(admin): State<Admin>) -> Result<Response, Problem> {
    // The list can be long, so it is written on a blocking thread.
    blocking(move || {
        let VerdictList { verdicts, .. } = list(&admin.registry.load(), VerdictKind::Blocked, usize::MAX);
        Ok(Json(Blocks { blocks: verdicts }).into_response())
    })
    .await
}

/// Block a digest in one or in every repository, or remove the block.
///
/// A blocked digest is never served, not even in an outage or in offline mode. The change is durable when the response
/// arrives.
#[utoipa::path(
    post,
    path = "/api/v1/blocks",
    request_body = BlockRequest,
    responses(
        (status = 200, body = BlockResult),
        (status = 409, description = "Too many digests are blocked or approved."),
        (status = 500, description = "The disk failed. A block applies until the next restart."),
    )
)]
pub(super) async fn block(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<BlockRequest>,
) -> Result<Json<BlockResult>, Problem> {
    let BlockRequest {
        image,
        blocked,
        by,
        reason,
    } = request;
    let change = (VerdictKind::Blocked, blocked);
    let changed = admin.set_verdict(change, &image, Motive { by, reason }).await?;
    Ok(Json(BlockResult {
        image: changed.image,
        blocked,
        was: changed.was,
        still_blocked: changed.is_blocked,
        images: changed.images,
    }))
}

/// List of approved digests.
#[utoipa::path(get, path = "/api/v1/approvals", responses((status = 200, body = Approvals)))]
pub(super) async fn approvals(State(admin): State<Admin>) -> Result<Response, Problem> {
    blocking(move || {
        let VerdictList { verdicts, .. } = list(&admin.registry.load(), VerdictKind::Approved, usize::MAX);
        Ok(Json(Approvals { approvals: verdicts }).into_response())
    })
    .await
}

/// Approve a digest in one or in every repository, or remove the approval.
///
/// An approved digest is served before `min_age` has passed. A block takes precedence. The change is durable when the
/// response arrives.
#[utoipa::path(
    post,
    path = "/api/v1/approvals",
    request_body = ApprovalRequest,
    responses(
        (status = 200, body = ApprovalResult),
        (status = 409, description = "Too many digests are blocked or approved."),
        (status = 500, description = "The disk failed. Nothing changed."),
    )
)]
pub(super) async fn approve(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<ApprovalRequest>,
) -> Result<Json<ApprovalResult>, Problem> {
    let ApprovalRequest {
        image,
        approved,
        by,
        reason,
    } = request;
    let change = (VerdictKind::Approved, approved);
    let changed = admin.set_verdict(change, &image, Motive { by, reason }).await?;
    Ok(Json(ApprovalResult {
        image: changed.image,
        approved,
        was: changed.was,
        still_approved: changed.is_approved,
        still_blocked: changed.is_blocked,
        images: changed.images,
    }))
}

impl Admin {
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
        switching(move || set(registry.proxy.store().blocking(), &target, change, note)).await
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
