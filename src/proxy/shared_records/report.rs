//! Records about one image, for the operator.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};

use crate::oci::{Digest, Reference, Repository};
use crate::proxy::{ProxyService, UpstreamRegistry};
use crate::shared::{ContentState, PublicState, RecordRead, TagState};
use crate::store::tags::TagKey;

/// Longest time to read the records of one image.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// The records about one image.
pub struct RecordedImage {
    /// The tag record; `None` for an image by digest.
    pub tag: Option<RecordRead<TagState>>,
    /// The content record of the manifest, and its digest: that of the cached copy, or else the first one that the tag record
    /// names. `None`: there is none.
    pub content: Option<(Digest, RecordRead<ContentState>)>,
    /// The public record; `None` if it does not count for this upstream.
    pub public: Option<RecordRead<PublicState>>,
}

impl ProxyService {
    /// The records about an image, of which the copy with the digest `cached` is cached. `None`: this cache has no key for
    /// records. What the bucket does not send within two seconds is not read.
    pub async fn recorded_image(
        self: &Arc<Self>,
        registry: &UpstreamRegistry,
        repository: &Repository,
        reference: &Reference,
        cached: Option<Digest>,
    ) -> Option<RecordedImage> {
        if !self.shared.has_record_key() {
            return None;
        }
        let (place, until) = (
            &registry.record_place(repository),
            Instant::now() + REPORT_TIMEOUT,
        );
        let content = async |digest| {
            let reading = self.shared.content_record(place, digest);
            (digest, or_unread(until, reading).await)
        };
        let of_tag = async {
            let Reference::Tag(tag) = reference else {
                let by_digest = match reference {
                    Reference::Digest(digest) => digest.supported().copied(),
                    Reference::Tag(_) => None,
                };
                return match by_digest {
                    Some(digest) => (None, Some(content(digest).await)),
                    None => (None, None),
                };
            };
            let found = or_unread(until, self.shared.read_tag_record(place, tag)).await;
            let named = match &found {
                RecordRead::Found(found) => found.state.variants.first().map(|variant| variant.digest),
                RecordRead::Absent | RecordRead::Unread { .. } => None,
            };
            match cached.or(named) {
                Some(digest) => (Some(found), Some(content(digest).await)),
                None => (Some(found), None),
            }
        };
        let of_repository = async {
            if !registry.has_public_records() {
                return None;
            }
            Some(or_unread(until, self.shared.public_record(place, false)).await)
        };
        let ((tag, content), public) = tokio::join!(of_tag, of_repository);
        Some(RecordedImage { tag, content, public })
    }

    /// Whether the last confirmation of a tag was that of another cache, by its record.
    pub async fn is_confirmed_by_record(
        self: &Arc<Self>,
        key: TagKey,
        digest: Digest,
        confirmed_at: SystemTime,
    ) -> bool {
        let record = self.store.read(move |view| view.tag(&key)).await;
        record.ok().flatten().is_some_and(|record| {
            let mut variants = record.variants.iter();
            variants.any(|variant| {
                variant.is_by_record && (variant.digest, variant.confirmed_at) == (digest, confirmed_at)
            })
        })
    }
}

async fn or_unread<S>(until: Instant, reading: impl Future<Output = RecordRead<S>>) -> RecordRead<S> {
    let read = timeout_at(until, reading).await;
    read.unwrap_or(RecordRead::Unread { is_capped: false })
}
