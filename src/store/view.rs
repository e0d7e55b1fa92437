//! Read view of the store: memory caches alone, or caches and disk.
//!
//! The same function reads the caches on an async worker, and the files on a blocking thread ([`super::async_store`]).
//! In memory mode, a lookup that needs the disk returns "nothing" and marks the view; the result is then discarded.

use std::cell::Cell;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use super::blobs::BlobHandle;
use super::challenges::StoredChallenge;
use super::invalidations::InvalidationKey;
use super::listings::{ListingKey, StoredListResponse, StoredListing};
use super::manifests::StoredManifest;
use super::tags::sightings::{SightingKey, Sightings};
use super::tags::{TagKey, TagRecord};
use super::{Store, StoreError};
use crate::oci::{Digest, Repository};

/// A read view of the store.
pub struct View<'a> {
    pub(super) store: &'a Store,
    source: Source,
    /// Whether a lookup needed the disk.
    needs_disk: Cell<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Memory,
    Disk,
}

impl Store {
    /// A view that includes the disk. Its reads block.
    pub fn view(&self) -> View<'_> {
        View::new(self, Source::Disk)
    }
}

impl<'a> View<'a> {
    fn new(store: &'a Store, source: Source) -> Self {
        Self {
            store,
            source,
            needs_disk: Cell::new(false),
        }
    }

    /// Runs `read` on the memory caches; `None` if it needed the disk.
    pub(super) fn in_memory<T>(store: &'a Store, read: impl FnOnce(&Self) -> T) -> Option<T> {
        let view = Self::new(store, Source::Memory);
        let found = read(&view);
        (!view.needs_disk.get()).then_some(found)
    }

    /// Whether all lookups so far were answered by this view. Always true for a disk view.
    pub(super) fn needed_no_disk(&self) -> bool {
        !self.needs_disk.get()
    }

    /// `ready` reads the caches, `stored` the caches and the disk.
    pub(super) fn find<T>(
        &self,
        unknown: T,
        ready: impl FnOnce(&Store) -> Option<T>,
        stored: impl FnOnce(&Store) -> T,
    ) -> T {
        match self.source {
            Source::Disk => stored(self.store),
            Source::Memory => ready(self.store).unwrap_or_else(|| {
                self.needs_disk.set(true);
                unknown
            }),
        }
    }

    /// The manifest, if cached.
    pub fn manifest(&self, digest: &Digest) -> Result<Option<Arc<StoredManifest>>, StoreError> {
        self.find(
            Ok(None),
            |store| store.manifests.ready(digest).map(|found| Ok(Some(found))),
            |store| store.manifests.find(digest),
        )
    }

    /// The blob, if cached.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobHandle>, StoreError> {
        self.find(
            Ok(None),
            |store| store.blobs.in_memory(digest).map(|found| Ok(Some(found))),
            |store| store.blobs.find(digest),
        )
    }

    /// The complete bytes of a cached blob of at most [`super::blobs::SMALL_BLOB_BYTES_MAX`].
    pub fn small_blob(&self, digest: &Digest) -> Option<Bytes> {
        self.find(
            None,
            |store| store.blobs.small_in_memory(digest),
            |store| store.blobs.find_small(digest),
        )
    }

    pub(super) fn has_blob_file(&self, digest: &Digest) -> bool {
        self.find(
            false,
            |store| store.blobs.is_open(digest).then_some(true),
            |store| store.blobs.has(digest),
        )
    }

    /// Whether `digest` is a member of this repository: the upstream was observed to have it there.
    pub fn is_member(&self, upstream: &str, repository: &Repository, digest: &Digest) -> bool {
        self.find(
            false,
            |store| store.membership.contains_in_memory(upstream, repository, digest),
            |store| store.is_member(upstream, repository, digest),
        )
    }

    /// When the repository was last proven readable anonymously, if it is public.
    pub fn public_since(&self, upstream: &str, repository: &Repository) -> Option<SystemTime> {
        self.find(
            None,
            |store| store.membership.public_in_memory(upstream, repository),
            |store| store.public_since(upstream, repository),
        )
    }

    /// The record of a tag.
    pub fn tag(&self, key: &TagKey) -> Result<Option<Arc<TagRecord>>, StoreError> {
        self.find(
            Ok(None),
            |store| store.tags.ready(key).map(|record| Ok(Some(record))),
            |store| store.tag(key),
        )
    }

    /// The sightings of a tag or digest.
    pub fn sightings(&self, key: &SightingKey) -> Arc<Sightings> {
        self.find(
            Arc::default(),
            |store| store.sightings.ready(key),
            |store| store.sightings(key),
        )
    }

    /// The last response to a list request, if still stored.
    pub fn listing_response(&self, key: &ListingKey) -> Result<Option<StoredListResponse>, StoreError> {
        self.find(
            Ok(None),
            |store| store.listings.ready(key).map(|answer| Ok(Some(answer))),
            |store| store.listing_response(key),
        )
    }

    /// The last list for this request, if still stored and not superseded by a 404.
    pub fn listing(&self, key: &ListingKey) -> Result<Option<Arc<StoredListing>>, StoreError> {
        Ok(match self.listing_response(key)? {
            Some(StoredListResponse::List(listing)) => Some(listing),
            Some(StoredListResponse::NotFound(_)) | None => None,
        })
    }

    /// The stored authentication challenge of an upstream.
    pub fn challenge(&self, upstream: &str) -> Option<Arc<StoredChallenge>> {
        self.find(
            None,
            |store| store.challenges.ready(upstream),
            |store| store.challenge(upstream),
        )
    }

    /// The time since when `key` is invalidated. All invalidations are in memory.
    pub fn invalidated_since(&self, key: &InvalidationKey) -> Option<SystemTime> {
        self.store.invalidated_since(key)
    }
}
