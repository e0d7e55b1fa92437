//! Puts into the index what the files know and it does not.
//!
//! A question to the index for each tag would read all of it in no order, page by page, again and again. So it is read
//! through once, in its own order, and a few bytes of each tag are remembered; then every file is compared with those.
//! Only what differs is looked at closely, in turn with its writers.

use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use super::record::KEY_PREFIX;
use super::{TagKey, TagRecord, Tags};
use crate::store::IndexState;
use crate::store::checksummed_json::{checksum, to_millis};
use crate::store::index::handle::VALUE_BYTES_MAX;

const PAGE: usize = 1000;

/// So long is waited where the index does not keep up.
const PAUSE: Duration = Duration::from_millis(5);

/// What the index says of a tag, as short as it can be: there is one for every tag.
struct IndexedTag {
    /// Which tag: the beginning of the name of its file.
    name: u64,
    /// What it names: see [`sum`].
    names: u64,
    /// The newest confirmation.
    confirmed_at_ms: u64,
}

impl IndexedTag {
    /// Whether the index misses nothing that the file, written at `modified`, says.
    fn covers(&self, filed: &TagRecord, modified: Option<SystemTime>) -> bool {
        modified.is_some_and(|modified| self.confirmed_at_ms > to_millis(modified))
            || self.names == sum(filed)
    }
}

impl Tags {
    /// Puts into the index whatever the files know and it does not. Says whether it came to the end.
    pub(in crate::store) fn reindex(&self, stop: &AtomicBool) -> bool {
        // One after the other: who comes second finds it done.
        let _healing = self.reindexing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.index.is_complete() {
            return true;
        }
        // It is opened first: what it finds lost then is no loss of what comes after.
        let _ = self.index.scan(vec![KEY_PREFIX], Vec::new(), 1);
        let losses = self.index.losses();
        let known = self.known(stop);
        let walked = self.walk_with_times(stop, |key, filed, modified| {
            let path = key.path();
            let Some(known) = &known else {
                return self.update_index(&key, &path);
            };
            let at = known.binary_search_by_key(&name(&path), |known| known.name);
            match at.ok().and_then(|at| known.get(at)) {
                None => self.fill_index(&key, &path, &filed, stop),
                Some(known) if !known.covers(&filed, modified) => self.update_index(&key, &path),
                Some(_) => {}
            }
        });
        if walked && self.index.state() == IndexState::Ready {
            self.index.set_complete(losses);
            tracing::info!("every tag is in the index");
        }
        walked
    }

    /// What the index says of every tag, in the order of [`IndexedTag::name`]; `None` where it does not answer.
    fn known(&self, stop: &AtomicBool) -> Option<Vec<IndexedTag>> {
        let mut known = Vec::new();
        let mut after = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let page = self.index.scan(vec![KEY_PREFIX], after.clone(), PAGE).ok()?;
            let Some((last, _)) = page.last() else { break };
            after.clone_from(last);
            for (key, value) in page {
                // A record that says nothing to us covers nothing.
                let record = TagRecord::from_index(&value).unwrap_or_default();
                if let Some(key) = TagKey::from_index(&key) {
                    let confirmed = record.variants.iter().map(|variant| variant.confirmed_at);
                    known.push(IndexedTag {
                        name: name(&key.path()),
                        names: sum(&record),
                        confirmed_at_ms: confirmed.max().map_or(0, to_millis),
                    });
                }
            }
        }
        known.sort_unstable_by_key(|known| known.name);
        Some(known)
    }

    /// A tag that the index did not have: it gets what the file says, unless a writer was quicker.
    fn fill_index(&self, key: &TagKey, path: &Path, filed: &TagRecord, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            {
                let _writing = self.lock_writer(path);
                // A tag that was removed since must not come back.
                let is_there = self.fs.open(path).is_ok();
                if !is_there
                    || self
                        .index
                        .put_if_absent(key.to_index(), filed.to_index(VALUE_BYTES_MAX))
                {
                    return;
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// A tag of which the index knows something else than the file.
    fn update_index(&self, key: &TagKey, path: &Path) {
        let _writing = self.lock_writer(path);
        let Ok(Some(filed)) = self.read_file(key) else {
            return;
        };
        let indexed = self.read_index(key);
        if !indexed.as_ref().is_some_and(|indexed| indexed.covers(&filed))
            && let Some(whole) = TagRecord::merge(Some(filed), indexed)
        {
            self.write_index(key, &whole);
        }
    }
}

fn name(path: &Path) -> u64 {
    let name = path.file_name().and_then(|name| name.to_str()?.get(..16));
    name.and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .unwrap_or(0)
}

/// Stands for what a record names, whenever that was confirmed.
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
