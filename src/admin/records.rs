//! Records of other caches in an explanation: the view of the admin API, and its sentences.

use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use super::format::{duration, short_digest};
use super::names::RecordStateName;
use crate::oci::Digest;
use crate::proxy::RecordedImage;
use crate::shared::{ContentState, Dated, PublicState, RecordRead, TagState};

/// Records of the shared storage about an image.
#[derive(Serialize, ToSchema)]
pub(super) struct RecordsView {
    /// Null for an image by digest.
    pub(super) tag: Option<TagRecordView>,
    /// Null if no digest is known.
    pub(super) content: Option<ContentRecordView>,
    /// Null for an upstream with a client certificate.
    pub(super) public: Option<PublicRecordView>,
}

/// The digest that the upstream named for the tag to any cache.
#[derive(Serialize, ToSchema)]
pub(super) struct TagRecordView {
    #[schema(value_type = RecordStateName)]
    pub(super) state: &'static str,
    /// Null also if the tag was deleted or changed since.
    pub(super) digest: Option<String>,
    /// Time since the digest was confirmed, by the clock of the storage.
    pub(super) age_seconds: Option<u64>,
    /// Time since the tag was first seen to name the digest.
    pub(super) seen_for_seconds: Option<u64>,
    /// Time since the tag was deleted or changed through a cache.
    pub(super) changed_seconds_ago: Option<u64>,
}

/// That the upstream has the manifest.
#[derive(Serialize, ToSchema)]
pub(super) struct ContentRecordView {
    #[schema(value_type = RecordStateName)]
    pub(super) state: &'static str,
    pub(super) digest: String,
    /// Whether the manifest was deleted through a cache.
    pub(super) is_deleted: bool,
    /// Number of its blobs and manifests that the upstream was seen to have.
    pub(super) children: usize,
}

/// Whether the repository is public.
#[derive(Serialize, ToSchema)]
pub(super) struct PublicRecordView {
    #[schema(value_type = RecordStateName)]
    pub(super) state: &'static str,
    pub(super) is_public: Option<bool>,
    pub(super) age_seconds: Option<u64>,
}

/// Names of the results of a read.
pub(super) const RECORD_STATES: [&str; 3] = ["found", "absent", "unread"];

fn state_of<S>(read: &RecordRead<S>) -> (&'static str, Option<&Dated<S>>) {
    let [found, absent, unread] = RECORD_STATES;
    match read {
        RecordRead::Found(record) => (found, Some(record)),
        RecordRead::Absent => (absent, None),
        RecordRead::Unread { .. } => (unread, None),
    }
}

impl RecordsView {
    pub(super) fn new(image: &RecordedImage) -> Self {
        Self {
            tag: image.tag.as_ref().map(TagRecordView::new),
            content: image.content.as_ref().map(|(digest, read)| {
                let (state, found) = state_of(read);
                ContentRecordView {
                    state,
                    digest: digest.to_string(),
                    is_deleted: found.is_some_and(|found| !found.state.is_present()),
                    children: found.map_or(0, |found| found.state.children.len()),
                }
            }),
            public: image.public.as_ref().map(|read| {
                let (state, found) = state_of(read);
                PublicRecordView {
                    state,
                    is_public: found.map(|found| found.state.is_public),
                    age_seconds: found.map(|found| found.age(found.state.at).as_secs()),
                }
            }),
        }
    }
}

impl TagRecordView {
    fn new(read: &RecordRead<TagState>) -> Self {
        let (state, found) = state_of(read);
        // A time in the future counts as none.
        let newest = found.and_then(|found| found.state.variants.iter().find(|variant| variant.at > 0));
        let age = |at: u64| found.map(|found| found.age(at).as_secs());
        let changed_at = found.map(|found| found.state.unnamed_at).filter(|at| *at > 0);
        Self {
            state,
            digest: newest.map(|newest| newest.digest.to_string()),
            age_seconds: newest.and_then(|newest| age(newest.at)),
            seen_for_seconds: newest.and_then(|newest| Some(found?.seen_for(&newest.digest)?.as_secs())),
            changed_seconds_ago: changed_at.and_then(age),
        }
    }
}

/// The records as sentences.
pub(super) fn sentences(image: &RecordedImage) -> Vec<String> {
    let tag = image.tag.as_ref().map(tag_sentence);
    let content = image.content.as_ref().map(content_sentence);
    let public = image.public.as_ref().map(public_sentence);
    [tag, content, public].into_iter().flatten().collect()
}

fn ago(seconds: u64) -> String {
    format!("{} ago", duration(Duration::from_secs(seconds)))
}

fn tag_sentence(read: &RecordRead<TagState>) -> String {
    let view = TagRecordView::new(read);
    match (read, view.digest, view.age_seconds, view.changed_seconds_ago) {
        (RecordRead::Found(_), Some(digest), Some(age), _) => {
            let digest = short_digest(&digest);
            format!(
                "the tag record of the caches names {digest}, confirmed {}",
                ago(age)
            )
        }
        (RecordRead::Found(_), _, _, Some(changed)) => format!(
            "by the tag record of the caches, the tag was deleted or changed {}",
            ago(changed)
        ),
        (RecordRead::Found(_) | RecordRead::Absent, ..) => "the caches have no tag record".to_owned(),
        (RecordRead::Unread { .. }, ..) => unread("tag"),
    }
}

fn content_sentence((digest, read): &(Digest, RecordRead<ContentState>)) -> String {
    let digest = short_digest(&digest.to_string());
    match read {
        RecordRead::Found(found) if found.state.is_present() => format!(
            "by the content record of {digest}, the upstream has it with {} of its blobs and manifests",
            found.state.children.len()
        ),
        RecordRead::Found(_) => format!("by its content record, {digest} was deleted"),
        RecordRead::Absent => format!("the caches have no content record of {digest}"),
        RecordRead::Unread { .. } => unread("content"),
    }
}

fn public_sentence(read: &RecordRead<PublicState>) -> String {
    match read {
        RecordRead::Found(found) => {
            let kind = if found.state.is_public {
                "public"
            } else {
                "not public"
            };
            let age = ago(found.age(found.state.at).as_secs());
            format!("by the public record of the caches, the repository was {kind} {age}")
        }
        RecordRead::Absent => "the caches have no public record of the repository".to_owned(),
        RecordRead::Unread { .. } => unread("public"),
    }
}

fn unread(class: &str) -> String {
    format!("the {class} record could not be read from the shared storage")
}
