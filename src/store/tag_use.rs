//! Tags for scheduled refreshes: listed a page at a time, with the time of their last use by a client.
//!
//! A tag was last used when a client last read a manifest that it points to. Content also counts as used when it is
//! stored. A refresh stores an image that no client asked for, so afterwards it puts the time back: otherwise a tag that
//! moves often would be refreshed for ever.

use std::time::SystemTime;

use super::access_times::ContentId;
use super::tags::{TagKey, TagRecord};
use super::{AsyncStore, Store, View};
use crate::oci::Digest;

impl Store {
    /// When a client last read a manifest that the tag points to. `None` if none is cached.
    fn last_use(&self, record: &TagRecord) -> Option<SystemTime> {
        let read = record
            .variants
            .iter()
            .filter_map(|variant| self.last_access(ContentId::Manifest(variant.digest)));
        read.max()
    }
}

impl View<'_> {
    /// At most `limit` tags in order, after `after`. `None` while the index is incomplete or unavailable, because the
    /// files would have to be read for each page. Never answered from memory.
    pub fn indexed_tags(&self, after: Option<&TagKey>, limit: usize) -> Option<Vec<(TagKey, TagRecord)>> {
        self.find(
            None,
            |_| None,
            |store| {
                let after = after.map(TagKey::to_index).unwrap_or_default();
                store.tags.list_indexed(&after, limit)
            },
        )
    }

    /// When a client last read a manifest that the tag points to. Never answered from memory.
    pub fn last_use(&self, record: &TagRecord) -> Option<SystemTime> {
        self.find(None, |_| None, |store| store.last_use(record))
    }

    /// When the cached manifest was last used or stored. Never answered from memory.
    pub fn manifest_used_at(&self, digest: Digest) -> Option<SystemTime> {
        self.find(
            None,
            |_| None,
            |store| store.last_access(ContentId::Manifest(digest)),
        )
    }
}

impl AsyncStore {
    /// Sets the last use of a manifest to `used_at`, even if its storage at `stored_at` was later. Of a use after that, or
    /// any use if `stored_at` is `None`, and `used_at` the later counts.
    pub async fn keep_last_use(&self, digest: Digest, stored_at: Option<SystemTime>, used_at: SystemTime) {
        self.write(move |store| {
            store.access_times.put_back(
                store.fs.as_ref(),
                ContentId::Manifest(digest),
                (stored_at, used_at),
            );
        })
        .await;
    }
}
