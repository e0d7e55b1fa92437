//! Graph of images: a compact snapshot of the stored tags, manifests and blobs, and of what refers to what.
//!
//! Eviction, garbage collection, deletion and reference counts walk the same graph. A store may have a million
//! objects, so a node is a number, and a name is kept once, in a sorted table. A tag is known by the name of its file:
//! its key is read again when the tag is removed.

mod adjacency;
mod digests;
mod read;

use std::io;
use std::time::{Duration, SystemTime};

pub(super) use self::adjacency::Adjacency;
use self::digests::Digests;
pub(super) use self::read::Sources;
use super::checksummed_json::{checksum, to_millis};
use crate::oci::Digest;

/// Number of a node: first the tags, then the manifests, then the blobs, each in order of their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NodeId(u32);

impl NodeId {
    /// Returns an error beyond 2³². A node without a number would be missing from the graph, and what it refers to
    /// would seem unused.
    fn new(index: usize) -> io::Result<Self> {
        u32::try_from(index)
            .map(Self)
            .map_err(|_| io::Error::other("too many objects for an eviction"))
    }

    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Seconds since 1970, rounded up: content counts as used a little later than it was, never earlier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seconds(u32);

impl Seconds {
    pub(super) fn of(time: SystemTime) -> Self {
        Self(u32::try_from(to_millis(time).div_ceil(1000)).unwrap_or(u32::MAX))
    }

    /// The last full second up to `time`, for a limit that recorded uses are compared with.
    pub(super) fn before(time: SystemTime) -> Self {
        Self(u32::try_from(to_millis(time) / 1000).unwrap_or(u32::MAX))
    }

    pub(super) fn time(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.0.into())
    }
}

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Tag(TagNode),
    Manifest(Digest),
    Blob(Digest),
}

/// A tag: the name of its file, and a checksum of the digests that it refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TagNode {
    pub(super) name: Digest,
    pub(super) targets: TargetsChecksum,
}

/// Checksum of the digests that a tag refers to, stored or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TargetsChecksum([u8; 8]);

impl TargetsChecksum {
    /// The checksum of sorted digests.
    pub(super) fn of(targets: &[Digest]) -> Self {
        let bytes: Vec<&[u8]> = targets.iter().map(Digest::as_bytes).collect();
        Self(checksum(&bytes.concat()))
    }
}

/// The names and sizes of all nodes.
#[derive(Debug, Default)]
pub(super) struct Names {
    tags: Digests,
    targets: Vec<TargetsChecksum>,
    manifests: Digests,
    blobs: Digests,
    /// Size of each manifest and blob in bytes.
    sizes: Vec<u64>,
}

impl Names {
    pub(super) fn node(&self, id: NodeId) -> Option<Node> {
        let at = id.index();
        let Some(at) = at.checked_sub(self.tags.len()) else {
            let (name, targets) = (self.tags.get(at)?, *self.targets.get(at)?);
            return Some(Node::Tag(TagNode { name, targets }));
        };
        match at.checked_sub(self.manifests.len()) {
            None => self.manifests.get(at).map(Node::Manifest),
            Some(at) => self.blobs.get(at).map(Node::Blob),
        }
    }

    /// Size of a node in bytes; 0 for a tag.
    pub(super) fn size(&self, id: NodeId) -> u64 {
        let at = id.index().checked_sub(self.tags.len());
        at.and_then(|at| self.sizes.get(at)).copied().unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.tags.len() + self.manifests.len() + self.blobs.len()
    }

    fn manifest(&self, digest: &Digest) -> Option<NodeId> {
        NodeId::new(self.tags.len() + self.manifests.find(digest)?).ok()
    }

    fn blob(&self, digest: &Digest) -> Option<NodeId> {
        NodeId::new(self.tags.len() + self.manifests.len() + self.blobs.find(digest)?).ok()
    }
}

/// What the store has at one time.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub(super) names: Names,
    /// Last use of each node. A tag counts as used when its target changed, because uses are recorded on manifests.
    pub(super) used_at: Vec<Seconds>,
    /// Whether each node stays: pinned, or open by a reader.
    pub(super) is_kept: Vec<bool>,
    /// The manifests that a tag refers to, and the manifests and blobs that a manifest refers to. Absent ones are left
    /// out, and repeated ones are repeated.
    pub(super) children: Adjacency,
    /// Manifests with a stored subject, in order, each with its subject.
    subjects: Vec<(NodeId, NodeId)>,
}

impl Graph {
    /// Number of nodes.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = NodeId> + Clone + use<> {
        ids(0..self.len())
    }

    pub(super) fn tags(&self) -> impl Iterator<Item = NodeId> + Clone + use<> {
        ids(0..self.names.tags.len())
    }

    pub(super) fn manifests(&self) -> impl Iterator<Item = NodeId> + Clone + use<> {
        let first = self.names.tags.len();
        ids(first..first + self.names.manifests.len())
    }

    pub(super) fn is_tag(&self, id: NodeId) -> bool {
        id.index() < self.names.tags.len()
    }

    pub(super) fn is_blob(&self, id: NodeId) -> bool {
        id.index() >= self.names.tags.len() + self.names.manifests.len()
    }

    pub(super) fn is_manifest(&self, id: NodeId) -> bool {
        !self.is_tag(id) && !self.is_blob(id)
    }

    /// The tag whose file has this name.
    pub(super) fn tag(&self, name: &Digest) -> Option<NodeId> {
        NodeId::new(self.names.tags.find(name)?).ok()
    }

    /// The stored manifest with this digest.
    pub(super) fn manifest(&self, digest: &Digest) -> Option<NodeId> {
        self.names.manifest(digest)
    }

    /// The stored blob with this digest.
    pub(super) fn blob(&self, digest: &Digest) -> Option<NodeId> {
        self.names.blob(digest)
    }

    /// The stored manifests that the tags refer to whose files have these names.
    pub(super) fn targets(&self, names: &[Digest]) -> Vec<Digest> {
        let tags = names.iter().filter_map(|name| self.tag(name));
        let targets = tags.flat_map(|tag| self.children.neighbors(tag));
        let targets = targets.filter_map(|target| match self.names.node(target)? {
            Node::Manifest(digest) => Some(digest),
            Node::Tag(_) | Node::Blob(_) => None,
        });
        targets.collect()
    }

    /// Whether this is a manifest about another one that is stored, such as a signature.
    pub(super) fn is_referrer(&self, id: NodeId) -> bool {
        let subjects = &self.subjects;
        subjects
            .binary_search_by_key(&id, |(referrer, _)| *referrer)
            .is_ok()
    }

    /// The manifests about each manifest.
    pub(super) fn referrers(&self) -> Adjacency {
        let pairs = self
            .subjects
            .iter()
            .map(|(referrer, subject)| (*subject, *referrer));
        Adjacency::of_pairs(self.names.tags.len(), self.names.manifests.len(), pairs)
    }

    /// The manifests that refer to each manifest.
    pub(super) fn parent_manifests(&self) -> Adjacency {
        let pairs = self.manifests().flat_map(|parent| {
            let children = self.children.neighbors(parent);
            let children = children.filter(|child| self.is_manifest(*child));
            children.map(move |child| (child, parent))
        });
        Adjacency::of_pairs(self.names.tags.len(), self.names.manifests.len(), pairs)
    }

    /// Number of references to each node.
    pub(super) fn reference_counts(&self) -> Vec<u32> {
        let mut counts = vec![0_u32; self.len()];
        for child in self.nodes().flat_map(|parent| self.children.neighbors(parent)) {
            if let Some(count) = counts.get_mut(child.index()) {
                // There are fewer than 2³² references.
                *count += 1;
            }
        }
        counts
    }

    /// Number of tags that refer to each node, directly or not.
    pub(super) fn tag_counts(&self) -> Vec<u32> {
        let mut counts = vec![0_u32; self.len()];
        let mut visits = Visits::new(self.len());
        let mut open = Vec::new();
        for tag in self.tags() {
            visits.restart();
            open.push(tag);
            while let Some(at) = open.pop() {
                if visits.is_first(at) {
                    if let Some(count) = counts.get_mut(at.index()) {
                        *count += 1;
                    }
                    open.extend(self.children.neighbors(at));
                }
            }
        }
        counts
    }

    /// Keeps manifests and blobs that were used after `since`.
    pub(super) fn keep_content_used_after(&mut self, since: Seconds) {
        let uses = self.used_at.iter().zip(&mut self.is_kept);
        for (used_at, is_kept) in uses.skip(self.names.tags.len()) {
            *is_kept |= *used_at > since;
        }
    }

    /// Keeps all tags, and the referrers of stored manifests.
    pub(super) fn keep_tags_and_referrers(&mut self) {
        let referrers = self.subjects.iter().map(|(referrer, _)| *referrer);
        for kept in ids(0..self.names.tags.len()).chain(referrers) {
            if let Some(is_kept) = self.is_kept.get_mut(kept.index()) {
                *is_kept = true;
            }
        }
    }

    /// Last use of the least recently used tag that is not pinned.
    pub(super) fn oldest_tag(&self) -> Option<SystemTime> {
        let tags = self.tags().map(NodeId::index);
        let unpinned = tags.filter(|tag| self.is_kept.get(*tag) == Some(&false));
        let oldest = unpinned.filter_map(|tag| self.used_at.get(tag)).min();
        oldest.copied().map(Seconds::time)
    }

    /// Adds a tag. All tags are added before all manifests, and those before all blobs, each in order.
    fn add_tag(&mut self, name: &Digest, used_at: SystemTime) -> io::Result<()> {
        self.names.tags.push(name)?;
        self.add_node(used_at, false)
    }

    fn add_manifest(
        &mut self,
        digest: &Digest,
        (bytes, used_at, is_kept): (u64, SystemTime, bool),
    ) -> io::Result<()> {
        self.names.manifests.push(digest)?;
        self.names.sizes.push(bytes);
        self.add_node(used_at, is_kept)
    }

    fn add_blob(
        &mut self,
        digest: &Digest,
        (bytes, used_at, is_kept): (u64, SystemTime, bool),
    ) -> io::Result<()> {
        self.names.blobs.push(digest)?;
        self.names.sizes.push(bytes);
        self.add_node(used_at, is_kept)
    }

    fn add_node(&mut self, used_at: SystemTime, is_kept: bool) -> io::Result<()> {
        NodeId::new(self.len())?;
        self.used_at.push(Seconds::of(used_at));
        self.is_kept.push(is_kept);
        Ok(())
    }

    /// Adds the references of the next tag, after all nodes were added. `targets` are sorted.
    fn refer_from_tag(&mut self, tag: NodeId, targets: &[Digest], is_pinned: bool) -> io::Result<()> {
        self.names.targets.push(TargetsChecksum::of(targets));
        if let Some(is_kept) = self.is_kept.get_mut(tag.index()) {
            *is_kept = is_pinned;
        }
        let stored = targets.iter().filter_map(|target| self.names.manifest(target));
        self.children.push(stored)
    }

    /// Adds the references of the next manifest, after those of all tags.
    fn refer_from_manifest<'a>(
        &mut self,
        manifest: NodeId,
        children: impl Iterator<Item = &'a Digest>,
        subject: Option<&Digest>,
    ) -> io::Result<()> {
        let subject = subject.and_then(|subject| self.names.manifest(subject));
        self.subjects.extend(subject.map(|subject| (manifest, subject)));
        let names = &self.names;
        // A digest may be stored as both, because some clients fetch a manifest as a blob.
        let stored = children.flat_map(|child| [names.manifest(child), names.blob(child)]);
        self.children
            .push(stored.flatten().filter(|child| *child != manifest))
    }
}

/// Which nodes a walk has visited.
pub(super) struct Visited(Vec<bool>);

impl Visited {
    pub(super) fn new(nodes: usize) -> Self {
        Self(vec![false; nodes])
    }

    /// Whether the walk visits this node for the first time.
    pub(super) fn is_first(&mut self, id: NodeId) -> bool {
        let is_visited = self.0.get_mut(id.index());
        is_visited.is_some_and(|is_visited| !std::mem::replace(is_visited, true))
    }
}

/// [`Visited`] for many walks: beginning another one costs nothing.
pub(super) struct Visits {
    /// The walk that visited each node last.
    last: Vec<u32>,
    walk: u32,
}

impl Visits {
    pub(super) fn new(nodes: usize) -> Self {
        Self {
            last: vec![0; nodes],
            walk: 1,
        }
    }

    /// Begins another walk.
    pub(super) fn restart(&mut self) {
        // There are at most as many walks as nodes.
        self.walk = self.walk.saturating_add(1);
    }

    /// Whether the walk visits this node for the first time.
    pub(super) fn is_first(&mut self, id: NodeId) -> bool {
        let last = self.last.get_mut(id.index());
        last.is_some_and(|last| std::mem::replace(last, self.walk) != self.walk)
    }
}

fn ids(range: std::ops::Range<usize>) -> impl Iterator<Item = NodeId> + Clone {
    range.filter_map(|index| NodeId::new(index).ok())
}

#[cfg(test)]
pub(super) mod tests;
