//! One image in the bucket: the statement of its tag record, and its objects.

#[cfg(all(test, feature = "shared"))]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;

use super::objects::Objects;
use crate::bucket::{BucketError, Fault, Listed, Object, ObjectInfo, ObjectKey, ObjectStorage};
use crate::oci::manifest::{Descriptor, DescriptorKind, MANIFEST_BYTES_MAX, Manifest, ManifestKind};
use crate::oci::{AnyDigest, Digest, Tag};
use crate::shared::maintenance::ObjectKind;
use crate::shared::record::{Class, ContentState, RecordId, RecordPlace, RecordRead, TagState};
use crate::shared::{Active, Dated, Leases, SharedSettings};
use crate::telemetry::Telemetry;

/// Objects of an image, and parts of a blob. Images in use have fewer than a thousand.
const OBJECTS_MAX: usize = 10_000;

/// Nesting depth of indexes, as for their completeness.
const INDEX_DEPTH_MAX: u32 = 2;

/// Concurrent requests.
const CONCURRENCY_MAX: usize = 8;

/// Attempts to replace a tag record. Caches write it at the same time.
const REPLACEMENTS_MAX: usize = 4;

/// What a tag record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagFound {
    /// The digests that the tag names, and when the upstream last named them.
    pub digests: Vec<(Digest, Duration)>,
    /// When the tag was deleted, or changed in a way that is not known.
    pub unnamed: Option<Duration>,
}

/// What a content record says of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFound {
    /// There is no record.
    Absent,
    /// The record cannot be read.
    Unread,
    /// The upstream had the manifest in the repository.
    Present {
        /// Children of the manifest that the upstream was seen to have there.
        children: usize,
        /// Time since the upstream confirmed that; `None` if it is not known.
        confirmed: Option<Duration>,
    },
    /// The manifest was deleted.
    Deleted,
}

/// Role of an object in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectRole {
    /// A manifest or an index.
    Manifest,
    /// The config.
    Config,
    /// A layer or another blob.
    Layer,
}

impl ObjectRole {
    /// Name for the operator. Stable.
    pub fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Config => "config",
            Self::Layer => "layer",
        }
    }
}

/// State of an object in the bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectState {
    /// The bucket has it.
    Present {
        /// Size in bytes.
        size: u64,
        /// Time since it was written, by the clock of the storage.
        age: Option<Duration>,
    },
    /// The bucket does not have it.
    Missing,
    /// The bucket has other bytes, or cannot read them.
    Damaged,
}

/// An object of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageObject {
    /// Its digest.
    pub digest: Digest,
    /// Its role.
    pub role: ObjectRole,
    /// Number of the indexes above a manifest.
    pub depth: u32,
    /// The platform that an index states for a manifest.
    pub platform: Option<String>,
    /// Its state.
    pub state: ObjectState,
    /// For a manifest, if there is a key: its content record.
    pub content: Option<ContentFound>,
}

impl ImageObject {
    /// The object, if the bucket has it.
    pub fn listed(&self) -> Option<Listed> {
        let (size, age) = match self.state {
            ObjectState::Present { size, age } => (size, age),
            ObjectState::Damaged => (0, None),
            ObjectState::Missing => return None,
        };
        Some(Listed {
            key: match self.role {
                ObjectRole::Manifest => ObjectKey::manifest(&self.digest),
                ObjectRole::Config | ObjectRole::Layer => ObjectKey::blob(&self.digest),
            },
            size,
            age,
            date: None,
        })
    }
}

/// The objects of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageObjects {
    /// Manifests before what they list. Children of a manifest that the bucket does not have are not known.
    pub objects: Vec<ImageObject>,
    /// The image has more objects than are listed here.
    pub is_truncated: bool,
    /// Number of the manifests that the bucket has and that cannot be parsed wholly.
    pub unparsed_manifests: usize,
    /// Number of the indexes nested so deep that their children were not read.
    pub deep_indexes: usize,
    /// Number of the manifests that are listed with a digest of an unsupported algorithm, so that no cache stores them.
    pub unsupported_manifests: usize,
}

impl ImageObjects {
    /// The objects that the bucket has, in steps by which they are deleted: what a manifest lists before the manifest, so that
    /// a deletion that was interrupted can be repeated. Configs and layers only on request.
    pub fn deletion_steps(&self, has_blobs: bool) -> Vec<Vec<Listed>> {
        let (mut blobs, mut manifests) = (Vec::new(), BTreeMap::<u32, Vec<Listed>>::new());
        for object in &self.objects {
            let Some(listed) = object.listed() else { continue };
            if object.role == ObjectRole::Manifest {
                manifests.entry(object.depth).or_default().push(listed);
            } else if has_blobs {
                blobs.push(listed);
            }
        }
        let manifests = manifests.into_values().rev();
        [blobs].into_iter().chain(manifests).collect()
    }

    /// Whether the bucket may have objects of the image that are not listed here. A missing manifest is not counted: caches store
    /// the manifests of an index that clients request.
    pub fn has_unknown_objects(&self) -> bool {
        let is_damaged = |object: &ImageObject| {
            object.role == ObjectRole::Manifest && object.state == ObjectState::Damaged
        };
        let not_read = self.unparsed_manifests + self.deep_indexes + self.unsupported_manifests;
        self.is_truncated || not_read > 0 || self.objects.iter().any(is_damaged)
    }

    /// Number of the manifests of which the bucket does not have the content.
    pub fn unread_manifests(&self) -> usize {
        let is_unread = |object: &&ImageObject| {
            object.role == ObjectRole::Manifest && !matches!(object.state, ObjectState::Present { .. })
        };
        self.objects.iter().filter(is_unread).count()
    }
}

/// Why a tag record cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TagRecordError {
    /// Without a key there are no records.
    #[error("without `key_file` in [shared], nothing says what a tag names; write IMAGE@sha256:…")]
    NoKey,
    /// The record cannot be read. With the reason, if it is known.
    #[error("the tag record cannot be read: {0}")]
    Unread(Arc<str>),
    /// Caches have written the record at each attempt.
    #[error("the tag record was written by caches at each attempt")]
    Lost,
    /// The record cannot be written.
    #[error("the tag record cannot be written: {0}")]
    Write(BucketError),
}

/// One bucket, for commands of the operator about one image.
pub struct BucketImages {
    active: Arc<Active>,
}

impl BucketImages {
    /// Sends no request.
    pub fn new(settings: SharedSettings) -> Self {
        let leases: Arc<Leases> = Arc::default();
        Self {
            active: Arc::new(Active::new(settings, &leases, Telemetry::new())),
        }
    }

    /// Whether there is a key, and so records.
    pub fn has_key(&self) -> bool {
        self.active.settings.records.is_some()
    }

    fn bucket(&self) -> &Arc<dyn ObjectStorage> {
        &self.active.settings.bucket
    }

    /// The tag record. `None`: there is none.
    pub async fn tag(&self, place: &RecordPlace, tag: &Tag) -> Result<Option<TagFound>, TagRecordError> {
        let id = place.id(Class::Tag, tag.as_str());
        let Some(found) = self.read_tag(&id).await? else {
            return Ok(None);
        };
        let state = &found.state;
        let digests = state
            .variants
            .iter()
            .map(|variant| (variant.digest, found.age(variant.at)));
        let unnamed_at = Some(state.unnamed_at).filter(|at| *at > 0);
        Ok(Some(TagFound {
            digests: digests.collect(),
            unnamed: unnamed_at.map(|at| found.age(at)),
        }))
    }

    async fn read_tag(&self, id: &RecordId) -> Result<Option<Dated<TagState>>, TagRecordError> {
        if !self.has_key() {
            return Err(TagRecordError::NoKey);
        }
        match self.active.read_record(id).await {
            RecordRead::Found(found) => Ok(Some(found)),
            RecordRead::Absent => Ok(None),
            RecordRead::Unread { .. } => {
                let reason = self.active.unread_reason(id).await;
                let failure = || self.active.reads.lock().failure.clone();
                Err(TagRecordError::Unread(
                    reason
                        .or_else(failure)
                        .unwrap_or_else(|| "the storage states no time".into()),
                ))
            }
        }
    }

    /// Replaces a tag record by the statement that the tag names nothing since now. A deletion instead would let a cache that
    /// was cut off from the bucket bring an earlier digest back. Returns whether the record was changed.
    pub async fn unname(&self, place: &RecordPlace, tag: &Tag) -> Result<bool, TagRecordError> {
        let id = place.id(Class::Tag, tag.as_str());
        for attempt in 0..=REPLACEMENTS_MAX {
            match self.read_tag(&id).await? {
                None => return Ok(false),
                Some(found) if found.state.variants.is_empty() => return Ok(attempt > 0),
                Some(_) => {
                    let written = self.active.unname_tag(&id).await;
                    written.map_err(TagRecordError::Write)?;
                }
            }
        }
        Err(TagRecordError::Lost)
    }

    /// The objects of the manifests with these digests.
    pub async fn objects(
        &self,
        place: &RecordPlace,
        digests: &[Digest],
    ) -> Result<ImageObjects, BucketError> {
        let mut found = ImageObjects::default();
        let mut known: BTreeSet<Digest> = digests.iter().copied().collect();
        let mut manifests: VecDeque<_> = known.iter().map(|digest| (*digest, None, 0)).collect();
        let mut blobs = Vec::new();
        while let Some((digest, platform, depth)) = manifests.pop_front() {
            let (state, manifest) = self.manifest(digest).await?;
            let is_unparsed = manifest.is_none() && matches!(state, ObjectState::Present { .. });
            found.unparsed_manifests += usize::from(is_unparsed);
            found.objects.push(ImageObject {
                digest,
                role: ObjectRole::Manifest,
                depth,
                platform,
                state,
                content: self.content(place, digest).await,
            });
            let Some(manifest) = manifest else { continue };
            if manifest.kind == ManifestKind::Index && depth >= INDEX_DEPTH_MAX {
                found.deep_indexes += 1;
                continue;
            }
            found.unparsed_manifests += usize::from(manifest.unparsed > 0);
            for child in &manifest.descriptors {
                let AnyDigest::Supported(digest) = child.digest else {
                    found.unsupported_manifests += usize::from(role_of(child) == ObjectRole::Manifest);
                    continue;
                };
                if known.len() >= OBJECTS_MAX {
                    found.is_truncated = true;
                } else if known.insert(digest) {
                    match role_of(child) {
                        ObjectRole::Manifest => {
                            let platform = child.platform.as_ref().map(ToString::to_string);
                            manifests.push_back((digest, platform, depth + 1));
                        }
                        role => blobs.push((digest, role)),
                    }
                }
            }
        }
        let checks = blobs.into_iter().map(|(digest, role)| async move {
            let state = state_of(self.bucket().head(&ObjectKey::blob(&digest)).await)?;
            Ok(ImageObject {
                digest,
                role,
                depth: 0,
                platform: None,
                state,
                content: None,
            })
        });
        let mut checks = futures_util::stream::iter(checks).buffered(CONCURRENCY_MAX);
        while let Some(object) = checks.next().await {
            found.objects.push(object?);
        }
        Ok(found)
    }

    /// Reads and parses a manifest.
    async fn manifest(&self, digest: Digest) -> Result<(ObjectState, Option<Manifest>), BucketError> {
        let key = ObjectKey::manifest(&digest);
        let (info, bytes) = match self.bucket().get(&key, 0).await {
            Ok(object) => read(object).await?,
            Err(error) => return Ok((state_of(Err(error))?, None)),
        };
        match bytes.filter(|bytes| Digest::of(digest.algorithm(), bytes) == digest) {
            Some(bytes) => Ok((state_of(Ok(info))?, Manifest::read(&bytes).ok())),
            None => Ok((ObjectState::Damaged, None)),
        }
    }

    async fn content(&self, place: &RecordPlace, digest: Digest) -> Option<ContentFound> {
        self.active.settings.records.as_ref()?;
        let id = place.id(Class::Content, &digest.to_string());
        Some(match self.active.read_record::<ContentState>(&id).await {
            RecordRead::Absent => ContentFound::Absent,
            RecordRead::Unread { .. } => ContentFound::Unread,
            RecordRead::Found(found) if found.state.is_present() => ContentFound::Present {
                children: found.state.children.len(),
                confirmed: Some(found.state.at).filter(|at| *at > 0).map(|at| found.age(at)),
            },
            RecordRead::Found(_) => ContentFound::Deleted,
        })
    }

    /// The objects of a digest: a blob, a manifest, a claim and parts.
    pub async fn objects_of(&self, digest: &Digest) -> Result<Vec<Listed>, BucketError> {
        let mut found = Vec::new();
        for key in [
            ObjectKey::blob(digest),
            ObjectKey::manifest(digest),
            ObjectKey::claim(digest),
            ObjectKey::manifest_claim(digest),
        ] {
            match self.bucket().head(&key).await {
                Ok(info) => found.push(Listed {
                    key,
                    size: info.size,
                    age: info.age,
                    date: None,
                }),
                Err(error) if error.fault() == Fault::None => {}
                Err(error) => return Err(error),
            }
        }
        let mut parts = Objects::new(self.bucket(), &ObjectKey::parts(digest));
        while let Some(part) = parts.next().await {
            let part = part?;
            if ObjectKind::of(&part.key) == ObjectKind::Part && found.len() < OBJECTS_MAX {
                found.push(part);
            }
        }
        Ok(found)
    }
}

fn role_of(child: &Descriptor) -> ObjectRole {
    match child.kind {
        DescriptorKind::Manifest => ObjectRole::Manifest,
        DescriptorKind::Config => ObjectRole::Config,
        DescriptorKind::Layer => ObjectRole::Layer,
    }
}

fn state_of(found: Result<ObjectInfo, BucketError>) -> Result<ObjectState, BucketError> {
    match found {
        Ok(info) => Ok(ObjectState::Present {
            size: info.size,
            age: info.age,
        }),
        Err(BucketError::Unreadable(_)) => Ok(ObjectState::Damaged),
        Err(error) if error.fault() == Fault::None => Ok(ObjectState::Missing),
        Err(error) => Err(error),
    }
}

/// The bytes of an object; `None`: more than a manifest has.
async fn read(mut object: Object) -> Result<(ObjectInfo, Option<Vec<u8>>), BucketError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = object.body.chunk().await {
        bytes.extend_from_slice(&chunk?);
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Ok((object.info, None));
        }
    }
    Ok((object.info, Some(bytes)))
}
