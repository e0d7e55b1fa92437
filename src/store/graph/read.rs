//! Reading of the graph from the files.
//!
//! First all names are listed, then tags and manifests are read for their references, so that these are stored as
//! numbers at once. Content that is needed after the walk began is tracked by `AccessTimes::mark_needed`.
//!
//! If a folder or file cannot be read at present, there is no graph: content that only a missing tag or manifest refers
//! to would seem unused.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use rustix::io::Errno;

use super::super::access_times::{AccessTimes, ContentId};
use super::super::blobs::{self, Blobs};
use super::super::fs::{Entry, FileSystem};
use super::super::pins::{Pin, Pins};
use super::super::tags::{TagKey, TagRecord, Tags};
use super::super::usage::Usage;
use super::super::walk::{content_files, record_files};
use super::super::{StoreError, content_path, manifests, tags};
use super::{Adjacency, Digests, Graph, NodeId};
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{Algorithm, AnyDigest, Digest, Manifest};

/// The parts of the store that a graph is read from.
pub(in crate::store) struct Sources<'a> {
    pub(in crate::store) fs: &'a dyn FileSystem,
    pub(in crate::store) blobs: &'a Blobs,
    pub(in crate::store) tags: &'a Tags,
    pub(in crate::store) pins: &'a Pins,
    pub(in crate::store) access_times: &'a AccessTimes,
    /// Expected number of objects.
    pub(in crate::store) usage: Usage,
    pub(in crate::store) stop: &'a AtomicBool,
}

impl Graph {
    /// Reads the graph. It is empty if the store is being closed. Blocks.
    pub(in crate::store) fn read(sources: &Sources<'_>) -> Result<Self, StoreError> {
        let mut graph = Self::with_capacity(&sources.usage);
        sources.add_tags(&mut graph)?;
        sources.add_content(&mut graph)?;
        let indexed = OnceCell::new();
        for tag in graph.tags() {
            sources.add_targets(&mut graph, tag, &indexed)?;
        }
        for manifest in graph.manifests() {
            sources.add_children(&mut graph, manifest)?;
        }
        if sources.is_stopped() {
            return Ok(Self::default());
        }
        graph.subjects.shrink_to_fit();
        Ok(graph)
    }

    /// Reserves memory for so many objects. A vector that grows needs up to three times the memory meanwhile.
    pub(super) fn with_capacity(usage: &Usage) -> Self {
        let of = |count: u64| usize::try_from(count).unwrap_or(0).min(CAPACITY_MAX);
        let [tags, manifests, blobs] = [usage.tags, usage.manifests, usage.blobs].map(of);
        let nodes = tags + manifests + blobs;
        Self {
            names: super::Names {
                tags: Digests::with_capacity(tags),
                targets: Vec::with_capacity(tags),
                manifests: Digests::with_capacity(manifests),
                blobs: Digests::with_capacity(blobs),
                sizes: Vec::with_capacity(manifests + blobs),
            },
            used_at: Vec::with_capacity(nodes),
            is_kept: Vec::with_capacity(nodes),
            children: Adjacency::with_capacity(tags + manifests, tags + blobs),
            subjects: Vec::new(),
        }
    }
}

/// Targets of tags, by the name of the tag's file.
type IndexedTargets = HashMap<Digest, Vec<Digest>>;

/// Tags that are read from the index at a time.
const INDEX_PAGE: usize = 1000;

/// Most nodes of a kind that memory is reserved for. The expected number is only an estimate.
const CAPACITY_MAX: usize = 4_000_000;

impl Sources<'_> {
    fn add_tags(&self, graph: &mut Graph) -> Result<(), StoreError> {
        let failed = |error: io::Error| StoreError::io("list", tags::TREE, &error);
        for file in record_files(self.fs, tags::TREE) {
            let (path, entry) = file.map_err(failed)?;
            if self.is_stopped() {
                return Ok(());
            }
            // Skips files that the store did not create.
            let name = Digest::from_hex(Algorithm::Sha256, &entry.name).ok();
            if let Some(name) = name.filter(|name| tags::path_of(name) == path) {
                let used_at = self.access_times.plausible(entry.modified);
                graph.add_tag(&name, used_at).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn add_content(&self, graph: &mut Graph) -> Result<(), StoreError> {
        for tree in [manifests::TREE, blobs::TREE] {
            let failed = |error: io::Error| StoreError::io("list", tree, &error);
            for file in content_files(self.fs, tree, None) {
                let (digest, entry) = match file {
                    Ok(file) => file,
                    // Blobs refer to nothing. Those of such a folder cannot be removed either.
                    Err(_) if tree == blobs::TREE => continue,
                    Err(error) => return Err(failed(error)),
                };
                if self.is_stopped() {
                    return Ok(());
                }
                let is_pinned = self.pins.has(&Pin::Digest(digest));
                let added = if tree == blobs::TREE {
                    let (bytes, used_at) = self.size_and_use(ContentId::Blob(digest), &entry);
                    graph.add_blob(
                        &digest,
                        (bytes, used_at, is_pinned || self.blobs.is_in_use(&digest)),
                    )
                } else {
                    let (bytes, used_at) = self.size_and_use(ContentId::Manifest(digest), &entry);
                    graph.add_manifest(&digest, (bytes, used_at, is_pinned))
                };
                added.map_err(failed)?;
            }
        }
        Ok(())
    }

    fn size_and_use(&self, content: ContentId, entry: &Entry) -> (u64, SystemTime) {
        let used_at = self.access_times.last_access(content, entry.modified);
        (entry.size, used_at)
    }

    /// If the file of the tag is damaged, `indexed` has its targets: clients are still served by the index.
    fn add_targets(
        &self,
        graph: &mut Graph,
        tag: NodeId,
        indexed: &OnceCell<IndexedTargets>,
    ) -> Result<(), StoreError> {
        let name = graph.names.tags.get(tag.index());
        let found = match name {
            Some(name) if !self.is_stopped() => self.tag(&name)?,
            _ => None,
        };
        let added = if let Some((key, record)) = found {
            let targets = self.tags.digests_of(&key, &record);
            graph.refer_from_tag(tag, &targets, self.pins.has(&Pin::Tag(key)))
        } else {
            let indexed = indexed.get_or_init(|| self.indexed_targets());
            let targets = name.and_then(|name| indexed.get(&name));
            graph.refer_from_tag(tag, targets.map_or(&[], Vec::as_slice), true)
        };
        added.map_err(|error| StoreError::io("read", tags::TREE, &error))
    }

    /// The targets of all tags in the index. Empty while the index is unavailable.
    fn indexed_targets(&self) -> IndexedTargets {
        let mut targets = IndexedTargets::new();
        let mut after = Vec::new();
        while !self.is_stopped()
            && let Some(page) = self.tags.list_indexed(&after, INDEX_PAGE)
        {
            let is_last = page.len() < INDEX_PAGE;
            for (key, record) in page {
                after = key.to_index();
                targets.insert(key.name(), self.tags.digests_of(&key, &record));
            }
            if is_last {
                break;
            }
        }
        targets
    }

    fn tag(&self, name: &Digest) -> Result<Option<(TagKey, TagRecord)>, StoreError> {
        match self.tags.read_named(name) {
            Err(error) if is_lost(&error) => Ok(None),
            read => read.map_err(|error| StoreError::io("read", tags::path_of(name), &error)),
        }
    }

    fn add_children(&self, graph: &mut Graph, id: NodeId) -> Result<(), StoreError> {
        let digest = graph.names.manifests.get(id.index() - graph.names.tags.len());
        let manifest = match digest {
            Some(digest) if !self.is_stopped() => self.manifest(&content_path(manifests::TREE, &digest))?,
            _ => None,
        };
        let children = manifest.iter().flat_map(|manifest| &manifest.descriptors);
        let children = children.filter_map(|child| AnyDigest::supported(&child.digest));
        let subject = manifest.as_ref().and_then(|manifest| manifest.subject);
        graph
            .refer_from_manifest(id, children, subject.as_ref())
            .map_err(|error| StoreError::io("read", manifests::TREE, &error))
    }

    /// The manifest in a file. A corrupt one has no children. The next request for it detects the corruption.
    fn manifest(&self, path: &Path) -> Result<Option<Manifest>, StoreError> {
        match self.fs.read_file(path, MANIFEST_BYTES_MAX as u64) {
            Ok(bytes) => Ok(Manifest::read(&bytes).ok()),
            Err(error) if is_lost(&error) => Ok(None),
            Err(error) => Err(StoreError::io("read", path, &error)),
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Whether a file that cannot be read is lost, and with it what it refers to: removed since it was listed, foreign, or on
/// a bad sector. Other errors pass, such as too many open files.
fn is_lost(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::FileTooLarge
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::IsADirectory
    ) || is_bad_sector(error)
}

fn is_bad_sector(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::IO.raw_os_error())
}
