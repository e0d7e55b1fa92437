//! Reads of the store, from memory alone or from the disk as well.
//!
//! The same function answers a request from the caches, on an async worker, and from the files, on a thread that may
//! block ([`super::async_store`]). In memory mode a look-up that needs the disk answers "nothing" and marks the view: what was
//! computed from it is then thrown away.

use std::cell::Cell;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use super::blobs::BlobHandle;
use super::challenges::StoredChallenge;
use super::invalidations::InvalidationKey;
use super::listings::{ListingKey, StoredListResponse, StoredListing};
use super::manifests::StoredManifest;
use super::tags::{TagKey, TagRecord};
use super::{Store, StoreError};
use crate::oci::{Digest, Repository};

/// What the store holds, as far as this view reaches.
pub struct View<'a> {
    pub(super) store: &'a Store,
    source: Source,
    /// Whether a look-up had to go beyond memory.
    needs_disk: Cell<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Memory,
    Disk,
}

impl Store {
    /// Everything that is held. Blocks.
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

    /// What `read` finds in memory; `None` where it takes the disk to know.
    pub(super) fn in_memory<T>(store: &'a Store, read: impl FnOnce(&Self) -> T) -> Option<T> {
        let view = Self::new(store, Source::Memory);
        let found = read(&view);
        (!view.needs_disk.get()).then_some(found)
    }

    /// Whether what was found so far is complete: not so after a look-up in memory mode that needed the disk.
    pub(super) fn needed_no_disk(&self) -> bool {
        !self.needs_disk.get()
    }

    /// `ready` is what the caches know; `stored` looks at the disk too.
    fn find<T>(
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

    /// The manifest, if it is held.
    pub fn manifest(&self, digest: &Digest) -> Result<Option<Arc<StoredManifest>>, StoreError> {
        self.find(
            Ok(None),
            |store| store.manifests.ready(digest).map(|held| Ok(Some(held))),
            |store| store.manifests.find(digest),
        )
    }

    /// The blob, if it is held.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobHandle>, StoreError> {
        self.find(
            Ok(None),
            |store| store.blobs.in_memory(digest).map(|held| Ok(Some(held))),
            |store| store.blobs.find(digest),
        )
    }

    /// The whole blob, if it is held and at most [`super::blobs::SMALL_BLOB_BYTES_MAX`] long.
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

    /// Whether the upstream was seen to have `digest` in this repository.
    pub fn is_member(&self, upstream: &str, repository: &Repository, digest: &Digest) -> bool {
        self.find(
            false,
            |store| store.membership.contains_in_memory(upstream, repository, digest),
            |store| store.is_member(upstream, repository, digest),
        )
    }

    /// When the repository was last proven readable by anyone, if that still holds.
    pub fn public_since(&self, upstream: &str, repository: &Repository) -> Option<SystemTime> {
        self.find(
            None,
            |store| store.membership.public_in_memory(upstream, repository),
            |store| store.public_since(upstream, repository),
        )
    }

    /// What is known of a tag.
    pub fn tag(&self, key: &TagKey) -> Result<Option<Arc<TagRecord>>, StoreError> {
        self.find(
            Ok(None),
            |store| store.tags.ready(key).map(|record| Ok(Some(record))),
            |store| store.tag(key),
        )
    }

    /// The last answer to a question for a list, if it is still kept.
    pub fn listing_response(&self, key: &ListingKey) -> Result<Option<StoredListResponse>, StoreError> {
        self.find(
            Ok(None),
            |store| store.listings.ready(key).map(|answer| Ok(Some(answer))),
            |store| store.listing_response(key),
        )
    }

    /// The last list given to this question, if it is still kept and no 404 came since.
    pub fn listing(&self, key: &ListingKey) -> Result<Option<Arc<StoredListing>>, StoreError> {
        Ok(match self.listing_response(key)? {
            Some(StoredListResponse::List(listing)) => Some(listing),
            Some(StoredListResponse::NotFound(_)) | None => None,
        })
    }

    /// What the upstream last said to a request without a credential, as far as that is kept.
    pub fn challenge(&self, upstream: &str) -> Option<Arc<StoredChallenge>> {
        self.find(
            None,
            |store| store.challenges.ready(upstream),
            |store| store.challenge(upstream),
        )
    }

    /// Since when `key` is in doubt. All doubts are in memory.
    pub fn invalidated_since(&self, key: &InvalidationKey) -> Option<SystemTime> {
        self.store.invalidated_since(key)
    }
}
