//! Execution of an eviction plan: each removal is durable before the next kind begins.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::super::StoreError;
use super::super::graph::Node;
use super::super::pins::Pin;
use super::super::quota::QuotaKind;
use super::super::tags::{self, TagKey};
use super::super::usage_report::Reclaimed;
use super::Evictor;
use super::plan::Plan;
use crate::oci::Digest;

/// Treatment of a blob that a client is reading.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Readers {
    /// It stays.
    Keep,
    /// It is removed. The client can read it to its end.
    ReadOn,
}

/// Result of executing a plan.
pub(super) struct PlanOutcome {
    pub(super) freed: Reclaimed,
    pub(super) is_complete: bool,
}

impl Evictor {
    /// Executes the removals in plan order. Stops early if content was needed meanwhile.
    pub(super) fn execute(
        &self,
        plan: &Plan,
        quota_kind: Option<QuotaKind>,
    ) -> Result<PlanOutcome, StoreError> {
        let done = self.execute_steps(plan, quota_kind);
        // Also after an early stop, because the next round or process removes the content of those tags.
        self.sync_tag_removals()?;
        done
    }

    fn execute_steps(&self, plan: &Plan, quota_kind: Option<QuotaKind>) -> Result<PlanOutcome, StoreError> {
        let totals = &self.state.totals;
        let objects = match quota_kind {
            None => &totals.collected,
            Some(QuotaKind::Size) => &totals.for_size,
            Some(QuotaKind::Free) => &totals.for_free,
        };
        let why = quota_kind.map_or("unused", QuotaKind::name);
        let mut done = PlanOutcome {
            freed: Reclaimed::default(),
            is_complete: true,
        };
        for (node, _) in plan.steps() {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let removed = match &node {
                Node::Tag(tag) => {
                    let is_free = |key: &TagKey, targets: &[Digest]| {
                        !self.pins.has(&Pin::Tag(key.clone()))
                            && !targets.iter().any(|target| self.access_times.was_needed(target))
                    };
                    let _removing = self.access_times.removing();
                    let removed = self.tags.evict(tag, is_free)?;
                    if removed.is_some() {
                        self.note_tag_removal(&tag.name);
                    }
                    removed
                }
                Node::Manifest(digest) | Node::Blob(digest) => {
                    self.sync_tag_removals()?;
                    self.remove_content(&node, digest, Readers::Keep)?
                }
            };
            let Some(freed) = removed else {
                done.is_complete = false;
                break;
            };
            if matches!(node, Node::Tag(_)) {
                totals.tags.fetch_add(1, Ordering::Relaxed);
            } else {
                objects.fetch_add(1, Ordering::Relaxed);
                totals.bytes.fetch_add(freed, Ordering::Relaxed);
            }
            done.freed.count(&node, freed);
        }
        let Reclaimed {
            tags,
            manifests,
            blobs,
            bytes,
        } = done.freed;
        if tags + manifests + blobs > 0 {
            tracing::info!(why, tags, manifests, blobs, bytes, "evicted");
        }
        Ok(done)
    }

    /// Removes a manifest or blob. Returns its size, or `None` if it stays, because it was needed since the snapshot, is
    /// pinned, or is read.
    pub(super) fn remove_content(
        &self,
        node: &Node,
        digest: &Digest,
        readers: Readers,
    ) -> Result<Option<u64>, StoreError> {
        let _removing = self.access_times.removing();
        let is_free = || !self.access_times.was_needed(digest) && !self.pins.has(&Pin::Digest(*digest));
        match node {
            Node::Manifest(_) => self.manifests.evict(digest, is_free),
            _ => self.blobs.evict(digest, || {
                is_free() && (readers == Readers::ReadOn || !self.blobs.is_in_use(digest))
            }),
        }
    }

    fn note_tag_removal(&self, name: &Digest) {
        let mut folders = self.state.unsynced.lock();
        folders.extend(tags::path_of(name).parent().map(Path::to_owned));
    }

    /// Makes the removal of all evicted tags durable. Otherwise a power cut could restore a tag whose image has lost
    /// content.
    fn sync_tag_removals(&self) -> Result<(), StoreError> {
        let mut folders = self.state.unsynced.lock();
        while let Some(folder) = folders.pop_first() {
            match self.fs.sync_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let fault = StoreError::io("fsync", &folder, &error);
                    folders.insert(folder);
                    return Err(fault);
                }
                _ => {}
            }
        }
        Ok(())
    }
}
