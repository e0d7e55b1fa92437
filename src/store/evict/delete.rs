//! Deletion of images on request of the operator: the tags, and their content without other references. And removal of
//! blobs that an import has stored and no image needs.
//!
//! A deletion removes in the order of an eviction and under the same checks: content that another image began to use after the
//! snapshot stays. Otherwise nothing protects content of the image. A client that is reading a blob can read it to its
//! end. A manifest that was pulled by digest keeps what it references.

use std::collections::BTreeSet;

use super::super::graph::{Node, NodeId};
use super::super::pins::Pin;
use super::super::tags::TagKey;
use super::super::usage_report::Reclaimed;
use super::super::{Store, StoreError};
use super::execute::Readers;
use super::plan::{Plan, plan_deletion};
use super::{Evictor, ROUNDS_MAX};
use crate::oci::Digest;

/// Error of a deletion.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The tag or a part of its content is pinned. If the pin is new, other tags may be deleted already.
    #[error("{0} is pinned; unpin it first")]
    Pinned(Pin),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Deletes these tags and the content that nothing else references; with `is_dry_run`, only computes it. Pinned
    /// content is an error, except in a dry run. Blocks.
    pub fn delete_images(&self, keys: &[TagKey], is_dry_run: bool) -> Result<Reclaimed, DeleteError> {
        let mut tags = Vec::new();
        for key in keys.iter().collect::<BTreeSet<_>>() {
            if self.tag(key)?.is_some() {
                tags.push(key);
            }
        }
        let freed = if is_dry_run {
            let names: Vec<Digest> = tags.iter().map(|key| key.name()).collect();
            plan_deletion(self.evictor.snapshot()?, &names, &[]).reclaimed()
        } else {
            self.evictor.delete(&tags, |key| self.remove_tag(key).map(drop))?
        };
        Ok(Reclaimed {
            tags: tags.len() as u64,
            ..freed
        })
    }
}

impl Store {
    /// Removes those of these blobs that no stored manifest references, unless they are pinned or read. A blob whose bytes
    /// are also stored as a manifest is not needed either. Garbage collection removes what this cannot. Blocks.
    pub fn remove_unreferenced_blobs(&self, digests: &[Digest]) {
        if digests.is_empty() {
            return;
        }
        if let Err(fault) = self.evictor.remove_unreferenced_blobs(digests) {
            tracing::warn!(%fault, "failed to remove the blobs of an import that no image needs");
        }
    }
}

impl Evictor {
    fn remove_unreferenced_blobs(&self, digests: &[Digest]) -> Result<(), StoreError> {
        let _one_at_a_time = self.state.round.lock();
        self.tracked(|| {
            let graph = self.snapshot()?;
            let refcounts = graph.reference_counts();
            for digest in digests {
                let is_free = |blob: NodeId| {
                    let is_unreferenced = refcounts.get(blob.index()) == Some(&0);
                    (is_unreferenced || graph.manifest(digest).is_some())
                        && graph.is_kept.get(blob.index()) == Some(&false)
                };
                if graph.blob(digest).is_some_and(is_free) {
                    self.remove_content(&Node::Blob(*digest), digest, Readers::Keep)?;
                }
            }
            Ok(())
        })
    }

    /// `remove_tag` removes a tag durably.
    fn delete(
        &self,
        tags: &[&TagKey],
        remove_tag: impl Fn(&TagKey) -> Result<(), StoreError>,
    ) -> Result<Reclaimed, DeleteError> {
        let mut names: Vec<Digest> = tags.iter().map(|key| key.name()).collect();
        let mut manifests = Vec::new();
        let mut freed = Reclaimed::default();
        let _one_at_a_time = self.state.round.lock();
        for _ in 0..ROUNDS_MAX {
            let done = self.tracked(|| {
                let graph = self.snapshot()?;
                // In a further round, the tags are gone.
                let targets = graph.targets(&names);
                let plan = plan_deletion(graph, &names, &manifests);
                if !names.is_empty() {
                    self.remove_tags(tags, &plan, &remove_tag)?;
                    manifests = targets;
                    names = Vec::new();
                }
                Ok::<_, DeleteError>(self.remove_content_of(&plan, &mut freed)?)
            });
            if done? {
                break;
            }
        }
        Ok(freed)
    }

    /// Removes the tags, if neither they nor the content that `plan` removes are pinned.
    fn remove_tags(
        &self,
        tags: &[&TagKey],
        plan: &Plan,
        remove_tag: impl Fn(&TagKey) -> Result<(), StoreError>,
    ) -> Result<(), DeleteError> {
        let content = plan.steps().filter_map(|(node, _)| match node {
            Node::Tag(_) => None,
            Node::Manifest(digest) | Node::Blob(digest) => Some(Pin::Digest(digest)),
        });
        let tag_pins = tags.iter().map(|key| Pin::Tag((*key).clone()));
        if let Some(pin) = tag_pins.chain(content).find(|pin| self.pins.has(pin)) {
            return Err(DeleteError::Pinned(pin));
        }
        for key in tags {
            // A pin is acknowledged after this removal, or seen here.
            let _removing = self.access_times.removing();
            let pin = Pin::Tag((*key).clone());
            if self.pins.has(&pin) {
                return Err(DeleteError::Pinned(pin));
            }
            remove_tag(key)?;
        }
        Ok(())
    }

    /// Returns whether everything was removed. A manifest precedes its content, so the rest is complete.
    fn remove_content_of(&self, plan: &Plan, freed: &mut Reclaimed) -> Result<bool, StoreError> {
        for (node, _) in plan.steps() {
            let (Node::Manifest(digest) | Node::Blob(digest)) = &node else {
                continue;
            };
            match self.remove_content(&node, digest, Readers::ReadOn)? {
                Some(bytes) => freed.count(&node, bytes),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
