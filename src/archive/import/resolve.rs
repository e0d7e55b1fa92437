//! Resolution of the images that `index.json` names. All are resolved before anything is stored under a name.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use super::{IMAGES_MAX, ImportError, ImportOptions, ImportTransaction, ImportedImage};
use crate::archive::export::referrers_key;
use crate::archive::layout::{self, Entry};
use crate::archive::{INDEX_DEPTH_MAX, Image};
use crate::oci::manifest::{DescriptorKind, MANIFEST_BYTES_MAX, ManifestKind};
use crate::oci::{Accept, AnyDigest, Digest, MediaType, Reference};
use crate::store::access_times::ContentId;
use crate::store::listings::StoredListing;
use crate::store::manifests::StoredManifest;
use crate::store::tags::{NEVER_CONFIRMED, TagKey, Variant};
use crate::store::{Store, StoreError};

/// The images that `index.json` names.
pub(super) struct ResolvedImport {
    pub(super) images: Vec<ResolvedImage>,
}

pub(super) struct ResolvedImage {
    image: Image,
    root: Digest,
    /// Manifests, children before their parents.
    manifests: Vec<(Digest, MediaType)>,
    /// The digests of `manifests`, for lookups.
    manifest_digests: HashSet<Digest>,
    blobs: BTreeSet<Digest>,
    platforms: Vec<String>,
    was_cached: bool,
    /// Referrers of each manifest, as entries of a referrers list.
    referrers: BTreeMap<Digest, Vec<Entry>>,
}

impl ResolvedImage {
    pub(super) fn report(&self) -> ImportedImage {
        ImportedImage {
            name: self.image.name.clone(),
            digest: self.root,
            platforms: self.platforms.clone(),
            was_cached: self.was_cached,
        }
    }

    fn key(&self) -> Option<TagKey> {
        match &self.image.reference {
            Reference::Digest(_) => None,
            Reference::Tag(tag) => Some(TagKey {
                upstream: Arc::clone(&self.image.upstream),
                repository: self.image.repository.clone(),
                tag: tag.clone(),
            }),
        }
    }
}

impl ResolvedImport {
    pub(super) fn of(
        store: &Store,
        transaction: &ImportTransaction<'_>,
        index: &[u8],
        options: &ImportOptions<'_>,
    ) -> Result<Self, ImportError> {
        let wrong = |reason: String| ImportError::Document {
            file: layout::INDEX_FILE,
            reason,
        };
        let entries = layout::read_index(index).map_err(wrong)?;
        if entries.len() > IMAGES_MAX {
            return Err(ImportError::TooMany("images", IMAGES_MAX as u64));
        }
        let resolver = Resolver { store, transaction };
        // An entry with a subject and without a name is a referrer. Every other entry needs a name.
        let (mut images, mut referrers) = (Vec::new(), Vec::new());
        for entry in entries {
            let stored = resolver.manifest(&entry.digest, &entry.media_type)?;
            match stored.manifest.subject {
                Some(subject) if entry.name.is_none() => referrers.push((entry, subject)),
                _ => images.push(entry),
            }
        }
        if images.is_empty() {
            return Err(wrong("it names no image".to_owned()));
        }
        let is_only = images.len() == 1;
        let mut found = Vec::new();
        for entry in images {
            let image = image_of(&entry, is_only, options)?;
            found.push(resolver.resolve(image, &entry)?);
        }
        for (entry, subject) in referrers {
            resolver.add_referrer(&entry, subject, &mut found)?;
        }
        Ok(Self { images: found })
    }

    /// Every required digest, and whether it is a manifest.
    pub(super) fn needed(&self) -> BTreeMap<Digest, bool> {
        let manifests = self.images.iter().flat_map(|image| &image.manifests);
        let blobs = self.images.iter().flat_map(|image| &image.blobs);
        let blobs = blobs.map(|digest| (*digest, false));
        // A digest that is both counts as a blob, because the later entry applies.
        manifests
            .map(|(digest, _)| (*digest, true))
            .chain(blobs)
            .collect()
    }

    /// Stores manifests, memberships and referrers, but no tags.
    pub(super) fn store_content(
        &self,
        store: &Store,
        options: &ImportOptions<'_>,
    ) -> Result<(), ImportError> {
        for found in &self.images {
            let (upstream, repository) = (&found.image.upstream, &found.image.repository);
            for digest in &found.blobs {
                store.add_member(upstream, repository, digest)?;
            }
            for (digest, media_type) in &found.manifests {
                let stored = read_manifest(store, digest, media_type)?;
                store.put_manifest(stored.bytes, stored.media_type, *digest, upstream, repository)?;
                store.add_member(upstream, repository, digest)?;
            }
            for (subject, entries) in &found.referrers {
                let key = referrers_key(&found.image, *subject);
                // A list from the upstream is more complete.
                if store.listing(&key)?.is_none()
                    && let Ok(media_type) = "application/vnd.oci.image.index.v1+json".parse()
                {
                    let bytes = Bytes::from(layout::index_document(entries.iter()));
                    let listing = StoredListing::new(bytes, media_type, None, None, NEVER_CONFIRMED);
                    store.put_listing(&key, listing)?;
                }
            }
            if options.is_public && store.public_since(upstream, repository).is_none() {
                // The oldest time: it grants access in an outage, and is revalidated while the upstream is available.
                store.set_public(upstream, repository, Some(NEVER_CONFIRMED))?;
            }
        }
        Ok(())
    }

    /// Requires that everything is stored still.
    pub(super) fn require_stored(&self, store: &Store) -> Result<(), ImportError> {
        for (digest, is_manifest) in self.needed() {
            let content = if is_manifest {
                ContentId::Manifest(digest)
            } else {
                ContentId::Blob(digest)
            };
            if !store.is_stored(content) {
                return Err(ImportError::Removed(digest));
            }
        }
        Ok(())
    }

    pub(super) fn store_tags(&self, store: &Store, now: SystemTime) -> Result<(), ImportError> {
        self.images.iter().try_for_each(|found| found.put_tag(store, now))
    }
}

impl ResolvedImage {
    /// Stores the tag, unless it names this image already. Its record may then have the time of a confirmation, which
    /// must not be overwritten.
    fn put_tag(&self, store: &Store, now: SystemTime) -> Result<(), ImportError> {
        let Some(key) = self.key() else { return Ok(()) };
        let record = store.tag(&key)?;
        let names_it = |variant: &Variant| variant.digest == self.root;
        if record.is_some_and(|record| record.variants.iter().any(names_it)) {
            return Ok(());
        }
        let Some((_, media_type)) = self.manifests.iter().find(|(digest, _)| *digest == self.root) else {
            return Ok(());
        };
        let variant = Variant {
            accept: Accept::manifests().key(),
            digest: self.root,
            media_type: media_type.clone(),
            accepts_indexes: true,
            confirmed_at: NEVER_CONFIRMED,
            first_seen_at: now,
            previous: None,
            is_by_record: false,
            history: Vec::new(),
        };
        Ok(store.put_tag(&key, variant)?)
    }
}

/// The manifest: a cached one, or one that the import has stored as a blob.
fn read_manifest(
    store: &Store,
    digest: &Digest,
    media_type: &MediaType,
) -> Result<StoredManifest, ImportError> {
    let wrong = |reason: String| ImportError::Manifest {
        digest: *digest,
        reason,
    };
    if !media_type.is_manifest() {
        return Err(wrong(format!("unknown manifest type `{media_type}`")));
    }
    let bytes = if let Some(stored) = store.manifest(digest)? {
        stored.bytes.clone()
    } else {
        let stored = store.blob(digest)?;
        let stored = stored.ok_or(ImportError::Removed(*digest))?;
        let bytes = stored.read_all(MANIFEST_BYTES_MAX as u64);
        Bytes::from(bytes.map_err(|error| wrong(error.to_string()))?)
    };
    let stored = StoredManifest::verify(bytes, media_type.clone(), *digest);
    let stored = stored.map_err(|fault| wrong(fault.to_string()))?;
    match &stored.manifest.media_type {
        Some(own) if own != media_type => Err(wrong(format!(
            "its mediaType is `{own}`, but the archive states `{media_type}`"
        ))),
        _ => Ok(stored),
    }
}

/// Resolves an entry to an image.
fn image_of(entry: &Entry, is_only: bool, options: &ImportOptions<'_>) -> Result<Image, ImportError> {
    let unnamed = || ImportError::Unnamed {
        digest: entry.digest,
        name: entry.name.clone(),
    };
    let name = match (&options.name, &entry.name) {
        (Some(name), _) if is_only => name,
        (Some(_), _) => {
            return Err(ImportError::Unknown(
                "one name was given, but the archive contains several images".to_owned(),
            ));
        }
        // A bare tag, as written by skopeo and BuildKit, does not name a registry.
        (None, Some(name)) if name.contains('/') => name,
        (None, _) => return Err(unnamed()),
    };
    let image = (options.resolve)(name).map_err(ImportError::Unknown)?;
    match &image.reference {
        Reference::Digest(digest) if *digest != AnyDigest::Supported(entry.digest) => Err(
            ImportError::Unknown(format!("{name} is another digest than {}", entry.digest)),
        ),
        _ => Ok(image),
    }
}

struct Resolver<'a> {
    store: &'a Store,
    transaction: &'a ImportTransaction<'a>,
}

impl Resolver<'_> {
    fn manifest(&self, digest: &Digest, media_type: &MediaType) -> Result<StoredManifest, ImportError> {
        if !self.transaction.objects.contains_key(digest) {
            return Err(ImportError::Manifest {
                digest: *digest,
                reason: "it is not in the archive".to_owned(),
            });
        }
        read_manifest(self.store, digest, media_type)
    }

    fn resolve(&self, image: Image, entry: &Entry) -> Result<ResolvedImage, ImportError> {
        let mut found = ResolvedImage {
            image,
            root: entry.digest,
            manifests: Vec::new(),
            manifest_digests: HashSet::new(),
            blobs: BTreeSet::new(),
            platforms: Vec::new(),
            was_cached: false,
            referrers: BTreeMap::new(),
        };
        self.add_manifest(&mut found, entry.digest, &entry.media_type, INDEX_DEPTH_MAX)?;
        found.was_cached = self.was_cached(&found)?;
        Ok(found)
    }

    /// Whether the tag already names this image and all objects are cached.
    fn was_cached(&self, found: &ResolvedImage) -> Result<bool, StoreError> {
        let Some(key) = found.key() else { return Ok(false) };
        let record = self.store.tag(&key)?;
        let names_it = |variant: &Variant| variant.digest == found.root;
        let manifests = found.manifests.iter().map(|(digest, _)| digest);
        let was_here = |digest: &Digest| {
            let is_new = self
                .transaction
                .objects
                .get(digest)
                .is_some_and(|object| object.is_new);
            !is_new && self.store.is_member(&key.upstream, &key.repository, digest)
        };
        Ok(record.is_some_and(|record| record.variants.iter().any(names_it))
            && manifests.chain(&found.blobs).all(was_here))
    }

    /// Adds a manifest with its children.
    fn add_manifest(
        &self,
        found: &mut ResolvedImage,
        digest: Digest,
        media_type: &MediaType,
        depth: u32,
    ) -> Result<(), ImportError> {
        if found.manifest_digests.contains(&digest) {
            return Ok(());
        }
        let stored = self.manifest(&digest, media_type)?;
        let mut missing = Vec::new();
        let (mut children, mut is_empty) = (0, stored.manifest.kind == ManifestKind::Index);
        for child in &stored.manifest.descriptors {
            let known = child
                .digest
                .supported()
                .filter(|digest| self.transaction.objects.contains_key(*digest));
            match (child.kind, known) {
                (DescriptorKind::Manifest, known) => {
                    children += 1;
                    // One image of an index is enough; the report lists those that are present.
                    let (Some(child_digest), Some(depth)) = (known, depth.checked_sub(1)) else {
                        continue;
                    };
                    let media_type = child.media_type.clone().ok_or_else(|| ImportError::Manifest {
                        digest: *child_digest,
                        reason: "the index does not state its media type".to_owned(),
                    })?;
                    self.add_manifest(found, *child_digest, &media_type, depth)?;
                    let platform = child
                        .platform
                        .as_ref()
                        .filter(|platform| platform.os != "unknown");
                    found.platforms.extend(platform.map(ToString::to_string));
                    is_empty &= child.platform.is_some() && platform.is_none();
                }
                (_, Some(digest)) => _ = found.blobs.insert(*digest),
                (_, None) if child.has_urls => {}
                (_, None) => missing.push(child.digest.to_string()),
            }
        }
        if is_empty && children > 0 {
            missing.push("every image of the index".to_owned());
        }
        if !missing.is_empty() {
            return Err(ImportError::Incomplete {
                image: found.image.name.clone(),
                missing,
            });
        }
        if found.manifest_digests.insert(digest) {
            found.manifests.push((digest, media_type.clone()));
        }
        Ok(())
    }

    /// Adds a referrer to the images that it refers to.
    fn add_referrer(
        &self,
        entry: &Entry,
        subject: Digest,
        images: &mut [ResolvedImage],
    ) -> Result<(), ImportError> {
        let mut is_attached = false;
        for image in images {
            if image.manifest_digests.contains(&subject) {
                self.add_manifest(image, entry.digest, &entry.media_type, INDEX_DEPTH_MAX)?;
                image.referrers.entry(subject).or_default().push(entry.clone());
                is_attached = true;
            }
        }
        if is_attached {
            return Ok(());
        }
        Err(ImportError::Unnamed {
            digest: entry.digest,
            name: None,
        })
    }
}
