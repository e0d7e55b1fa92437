//! Rebuilds index entries from the tag files.
//!
//! One index lookup per tag would read all of the index in random order, page by page, again and again. Instead, the
//! index is scanned once in its own order, and a few bytes per tag are kept. Every file is then compared with those.
//! Only tags that differ are processed under their writer lock.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use super::record::KEY_PREFIX;
use super::{TagKey, TagRecord, Tags};
use crate::store::IndexState;
use crate::store::checksummed_json::{checksum, to_millis};
use crate::store::index::handle::VALUE_BYTES_MAX;

const PAGE: usize = 1000;

/// Pause while the index cannot accept more writes.
const PAUSE: Duration = Duration::from_millis(5);

/// Summary of an index entry. One per tag is in memory, so it is small.
struct IndexedTag {
    /// First 8 bytes of the file name of the tag.
    name: u64,
    /// Hash of the variants: see [`sum`].
    names: u64,
    /// The latest confirmation.
    confirmed_at_ms: u64,
}

impl IndexedTag {
    /// Whether the index entry contains everything in the file, which was written at `modified`.
    fn covers(&self, on_disk: &TagRecord, modified: Option<SystemTime>) -> bool {
        modified.is_some_and(|modified| self.confirmed_at_ms > to_millis(modified))
            || self.names == sum(on_disk)
    }
}

impl Tags {
    /// Adds missing tags to the index. Returns whether it reached the end.
    pub(in crate::store) fn reindex(&self, stop: &AtomicBool) -> bool {
        // A second caller waits and finds the index complete.
        let _healing = self.reindexing.lock();
        if self.index.is_complete() {
            return true;
        }
        // Open the index first: losses found while opening are counted before `losses` is read.
        let _ = self.index.scan(vec![KEY_PREFIX], Vec::new(), 1);
        let losses = self.index.losses();
        let entries = self.entries(stop);
        let walked = self.walk_with_times(stop, |key, on_disk, modified| {
            let path = key.path();
            let Some(entries) = &entries else {
                return self.update_index(&key, &path);
            };
            let at = entries.binary_search_by_key(&name(&path), |entries| entries.name);
            match at.ok().and_then(|at| entries.get(at)) {
                None => self.fill_index(&key, &path, &on_disk, stop),
                Some(entries) if !entries.covers(&on_disk, modified) => self.update_index(&key, &path),
                Some(_) => {}
            }
        });
        if walked && self.index.state() == IndexState::Ready {
            self.index.set_complete(losses);
            tracing::info!("index rebuilt");
        }
        walked
    }

    /// Summaries of all index entries, sorted by [`IndexedTag::name`]; `None` if the index is unavailable.
    fn entries(&self, stop: &AtomicBool) -> Option<Vec<IndexedTag>> {
        let mut entries = Vec::new();
        let mut after = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let page = self.index.scan(vec![KEY_PREFIX], after.clone(), PAGE).ok()?;
            let Some((last, _)) = page.last() else { break };
            after.clone_from(last);
            for (key, value) in page {
                // An undecodable record counts as empty.
                let record = TagRecord::from_index(&value).unwrap_or_default();
                if let Some(key) = TagKey::from_index(&key) {
                    let confirmed = record.variants.iter().map(|variant| variant.confirmed_at);
                    entries.push(IndexedTag {
                        name: name(&key.path()),
                        names: sum(&record),
                        confirmed_at_ms: confirmed.max().map_or(0, to_millis),
                    });
                }
            }
        }
        entries.sort_unstable_by_key(|entries| entries.name);
        Some(entries)
    }

    /// Adds a tag that the index lacks, unless another writer added it first.
    fn fill_index(&self, key: &TagKey, path: &Path, on_disk: &TagRecord, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            {
                let _writing = self.lock_writer(path);
                // Do not restore a tag that was removed in the meantime.
                let is_there = self.fs.open(path).is_ok();
                if !is_there
                    || self
                        .index
                        .put_if_absent(key.to_index(), on_disk.to_index(VALUE_BYTES_MAX))
                {
                    return;
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Updates the index entry of a tag that differs from its file.
    fn update_index(&self, key: &TagKey, path: &Path) {
        let _writing = self.lock_writer(path);
        let Ok(Some(on_disk)) = self.read_file(key) else {
            return;
        };
        let indexed = self.read_index(key);
        if !indexed.as_ref().is_some_and(|indexed| indexed.covers(&on_disk))
            && let Some(merged) = TagRecord::merge(Some(on_disk), indexed)
        {
            self.write_index(key, &merged);
        }
    }
}

fn name(path: &Path) -> u64 {
    let name = path.file_name().and_then(|name| name.to_str()?.get(..16));
    name.and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .unwrap_or(0)
}

/// Hash of the digests and media types of a record, without times.
fn sum(record: &TagRecord) -> u64 {
    let named = |variant: &super::Variant| {
        format!(
            "{:016x} {} {}\n",
            variant.accept,
            variant.digest,
            variant.media_type.as_str()
        )
    };
    let mut named: Vec<String> = record.variants.iter().map(named).collect();
    named.sort_unstable();
    u64::from_be_bytes(checksum(named.concat().as_bytes()))
}
