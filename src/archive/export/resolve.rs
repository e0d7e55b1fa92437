//! Resolution of an image for export: its objects, and whether all are cached and members of its repository.

use std::sync::Arc;

use super::{ArchiveObject, ExportError, Platforms, refuse_blocked};
use crate::archive::layout::{self, Entry};
use crate::archive::{INDEX_DEPTH_MAX, Image};
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind};
use crate::oci::{AnyDigest, Digest, Endpoint, Query, Reference};
use crate::store::listings::ListingKey;
use crate::store::manifests::StoredManifest;
use crate::store::tags::{TagKey, TagReader};
use crate::store::{Store, StoreError};

/// Resolver of one image.
pub(super) struct ImageResolver<'a> {
    pub(super) store: &'a Store,
    pub(super) image: &'a Image,
    pub(super) platforms: Platforms<'a>,
    pub(super) objects: Vec<ArchiveObject>,
}

impl ImageResolver<'_> {
    /// The manifest of the image. For a tag, the one that the tag names for the operator.
    pub(super) fn root(&self) -> Result<Arc<StoredManifest>, ExportError> {
        let not_held = || ExportError::NotCached(self.image.name.clone());
        let tag = match &self.image.reference {
            Reference::Digest(AnyDigest::Supported(digest)) => {
                return self.manifest(digest)?.ok_or_else(not_held);
            }
            Reference::Digest(AnyDigest::Unsupported(_)) => return Err(not_held()),
            Reference::Tag(tag) => tag.clone(),
        };
        let key = TagKey {
            upstream: Arc::clone(&self.image.upstream),
            repository: self.image.repository.clone(),
            tag,
        };
        let record = self.store.tag(&key)?.ok_or_else(not_held)?;
        let named = self.store.resolve_tag(&key, &record, TagReader::Operator);
        match named {
            Some(named) => self.manifest(&named.digest)?.ok_or_else(not_held),
            None => Err(not_held()),
        }
    }

    fn manifest(&self, digest: &Digest) -> Result<Option<Arc<StoredManifest>>, StoreError> {
        if !self.is_member(digest) {
            return Ok(None);
        }
        self.store.manifest(digest)
    }

    fn is_member(&self, digest: &Digest) -> bool {
        self.store
            .is_member(&self.image.upstream, &self.image.repository, digest)
    }

    /// Adds a manifest and its children.
    pub(super) fn add(&mut self, stored: &Arc<StoredManifest>, depth: u32) -> Result<(), ExportError> {
        refuse_blocked(self.store, self.image, &stored.digest)?;
        self.objects.push(ArchiveObject::Manifest(Arc::clone(stored)));
        let children = &stored.manifest.descriptors;
        let mut missing = Vec::new();
        for child in children
            .iter()
            .filter(|child| child.kind != DescriptorKind::Manifest)
        {
            match self.blob(child)? {
                Some(object) => self.objects.push(object),
                None if child.has_urls => {}
                None => missing.push(child.digest.to_string()),
            }
        }
        if !missing.is_empty() {
            return Err(self.incomplete(missing));
        }
        let manifests: Vec<_> = children
            .iter()
            .filter(|child| child.kind == DescriptorKind::Manifest)
            .collect();
        let mut is_empty = stored.manifest.kind == ManifestKind::Index && !manifests.is_empty();
        for child in manifests {
            is_empty &= !self.add_child(child, depth)?;
        }
        if is_empty {
            return Err(ExportError::NoPlatform(self.image.name.clone()));
        }
        Ok(())
    }

    /// Adds a child manifest. Returns whether an image was added.
    fn add_child(&mut self, child: &Descriptor, depth: u32) -> Result<bool, ExportError> {
        let platform = child.platform.as_ref().map(ToString::to_string);
        // Attestations are listed with platform `unknown`. They are included if they are cached.
        let is_image = child
            .platform
            .as_ref()
            .is_none_or(|platform| platform.os != "unknown");
        let is_requested = match (self.platforms, &platform) {
            (Platforms::Selected(want), Some(platform)) if is_image => {
                if !want(platform) {
                    return Ok(false);
                }
                true
            }
            _ => false,
        };
        let Some(depth) = depth.checked_sub(1) else {
            return Ok(false);
        };
        let stored = match &child.digest {
            AnyDigest::Supported(digest) => self.manifest(digest)?,
            AnyDigest::Unsupported(_) => None,
        };
        let before = self.objects.len();
        let added = match stored {
            Some(stored) => self.add(&stored, depth),
            None => Err(self.incomplete(vec![child.digest.to_string()])),
        };
        match added {
            Ok(()) => Ok(is_image),
            Err(ExportError::Incomplete { .. } | ExportError::NoPlatform(_)) if !is_requested => {
                self.objects.truncate(before);
                Ok(false)
            }
            Err(refused) => Err(refused),
        }
    }

    fn blob(&self, child: &Descriptor) -> Result<Option<ArchiveObject>, ExportError> {
        let AnyDigest::Supported(digest) = child.digest else {
            return Ok(None);
        };
        refuse_blocked(self.store, self.image, &digest)?;
        if !self.is_member(&digest) {
            return Ok(None);
        }
        let stored = self.store.blob(&digest)?;
        Ok(stored.map(|stored| ArchiveObject::Blob {
            digest,
            size: stored.size,
        }))
    }

    fn incomplete(&self, missing: Vec<String>) -> ExportError {
        ExportError::Incomplete {
            image: self.image.name.clone(),
            missing,
        }
    }

    /// Adds the cached and complete referrers of the added manifests, from the last list of the registry.
    pub(super) fn referrers(&mut self) -> Vec<Entry> {
        let subjects: Vec<Digest> = self
            .objects
            .iter()
            .filter_map(|object| match object {
                ArchiveObject::Manifest(stored) => Some(stored.digest),
                ArchiveObject::Blob { .. } => None,
            })
            .collect();
        let mut entries = Vec::new();
        for subject in subjects {
            let key = referrers_key(self.image, subject);
            let listing = self.store.listing(&key).ok().flatten();
            let listed = listing.and_then(|listing| layout::read_index(&listing.bytes).ok());
            for entry in listed.unwrap_or_default() {
                let before = self.objects.len();
                let stored = self.manifest(&entry.digest).ok().flatten();
                if stored.is_some_and(|stored| self.add(&stored, INDEX_DEPTH_MAX).is_ok()) {
                    entries.push(entry.without_name());
                } else {
                    self.objects.truncate(before);
                }
            }
        }
        entries
    }
}

/// Key of the referrers list of `subject` in the image's repository.
pub(in crate::archive) fn referrers_key(image: &Image, subject: Digest) -> ListingKey {
    let endpoint = Endpoint::Referrers {
        repository: image.repository.clone(),
        digest: AnyDigest::Supported(subject),
        query: Query::default(),
    };
    ListingKey {
        upstream: Arc::clone(&image.upstream),
        path: endpoint.path_and_query(),
    }
}
