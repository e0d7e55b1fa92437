//! Eviction plan: a pure function from a snapshot of the store to the removals, least recently used images first.
//!
//! An image is a tag with all the content it references. A manifest that was pulled by digest alone counts as an
//! image, and so does a blob that no manifest references. A manifest or blob is removed with the last image or
//! manifest that references it. So shared content counts once, and a listed image never loses content. A signature
//! or another referrer counts as used when its subject is used, and is removed right after it.
//!
//! Pinned content, content with readers, and content used since a given time are protected. A tag is also protected
//! if its removal would free no bytes.
//!
//! Disk access and the removal itself are in [`super`].

mod adjacency;

use std::cmp::Reverse;
use std::time::SystemTime;

use self::adjacency::{Adjacency, DigestIndex};
use crate::oci::Digest;
use crate::store::tags::TagKey;

/// A tag with its targets.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) key: TagKey,
    /// The digests it references, stored or not.
    pub(super) targets: Vec<Digest>,
    pub(super) used_at: SystemTime,
    pub(super) is_pinned: bool,
}

/// A manifest or a blob.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    pub(super) used_at: SystemTime,
    /// Pinned by digest, or open by a reader.
    pub(super) is_protected: bool,
}

/// A manifest with its references.
#[derive(Clone, Debug)]
pub(super) struct ManifestNode {
    pub(super) node: Node,
    pub(super) children: Vec<Digest>,
    pub(super) subject: Option<Digest>,
}

/// The stored content at one time.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    pub(super) images: Vec<Image>,
    pub(super) manifests: Vec<ManifestNode>,
    pub(super) blobs: Vec<Node>,
}

/// One removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Removed only if the tag still references exactly these digests.
    Tag(TagKey, Vec<Digest>),
    Manifest(Digest),
    Blob(Digest),
}

/// The removals in order: per image the tag, then manifests, then blobs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    /// Bytes that the plan frees.
    pub(super) bytes: u64,
}

/// Plans removals that free `bytes`, or as much as possible. Content used after `protected_since` stays.
pub(super) fn plan(snapshot: &Snapshot, bytes: u64, protected_since: SystemTime) -> Plan {
    let mut graph = Graph::of(snapshot);
    let candidates = graph.candidates(protected_since);
    let mut builder = PlanBuilder {
        is_protected: graph.protected(protected_since),
        is_evicted: vec![false; graph.nodes.len()],
        refcounts: std::mem::take(&mut graph.refcounts),
        plan: Plan::default(),
    };
    let mut useless = Vec::new();
    for candidate in &candidates {
        if builder.plan.bytes >= bytes {
            break;
        }
        let before = builder.plan.bytes;
        let at = builder.plan.steps.len();
        builder.evict(&graph, candidate);
        if builder.plan.bytes == before {
            useless.push((at, candidate));
        }
    }
    builder.without_useless_tags(&graph, &useless)
}

/// Index into [`Graph::nodes`], which holds the manifests, then the blobs.
type NodeId = usize;

struct Graph<'a> {
    snapshot: &'a Snapshot,
    nodes: Vec<&'a Node>,
    manifests: DigestIndex,
    /// Children of each manifest.
    children: Adjacency,
    /// Manifests that reference each node.
    parents: Adjacency,
    /// Manifests whose subject is each node.
    referrers: Adjacency,
    /// Number of images and manifests that reference each node.
    refcounts: Vec<u32>,
    /// Manifests that each image references.
    targets: Adjacency,
}

/// Unit of eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Candidate {
    /// Index into [`Snapshot::images`].
    Image(usize),
    /// A manifest or blob without references.
    Unreferenced(NodeId),
}

impl<'a> Graph<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let manifest_node = snapshot.manifests.iter().map(|manifest_node| &manifest_node.node);
        let nodes: Vec<&Node> = manifest_node.chain(&snapshot.blobs).collect();
        let (count, first_blob) = (nodes.len(), snapshot.manifests.len());
        let manifests = DigestIndex::of(&nodes, 0..first_blob);
        let blobs = DigestIndex::of(&nodes, first_blob..count);
        let manifest_node = || snapshot.manifests.iter().enumerate();
        let manifest = |digest: &Digest| manifests.find(&nodes, digest);
        // A digest may be stored as both, because some clients fetch a manifest as a blob.
        let stored_as = |digest: &Digest| [manifest(digest), blobs.find(&nodes, digest)];
        let references = manifest_node().flat_map(|(at, manifest_node)| {
            let children = manifest_node.children.iter().flat_map(stored_as).flatten();
            children
                .filter(move |child| *child != at)
                .map(move |child| (at, child))
        });
        let children = Adjacency::of(first_blob, references);
        let parents = Adjacency::of(count, children.pairs().map(|(parent, child)| (child, parent)));
        let subjects =
            manifest_node().filter_map(|(at, manifest_node)| Some((manifest(&manifest_node.subject?)?, at)));
        let referrers = Adjacency::of(first_blob, subjects);
        let images = snapshot.images.iter().enumerate();
        let image_targets = images.flat_map(|(image_index, image)| {
            let manifests = image.targets.iter().filter_map(manifest);
            manifests.map(move |at| (image_index, at))
        });
        let targets = Adjacency::of(snapshot.images.len(), image_targets);
        let mut refcounts = vec![0_u32; count];
        for (_, at) in children.pairs().chain(targets.pairs()) {
            if let Some(refcounts) = refcounts.get_mut(at) {
                *refcounts = refcounts.saturating_add(1);
            }
        }
        Self {
            snapshot,
            nodes,
            manifests,
            children,
            parents,
            referrers,
            refcounts,
            targets,
        }
    }

    /// The evictable candidates, least recently used first.
    fn candidates(&self, protected_since: SystemTime) -> Vec<Candidate> {
        let used = self.effective_access_times();
        let mut candidates = self.all_candidates(&used);
        // A referrer inherits the access time of its subject. The most recently used candidate comes first, so the
        // first time that reaches a node is its latest.
        candidates.sort_by_key(|(candidate, at)| (Reverse(*at), self.name(*candidate)));
        let mut inherited = vec![None; self.nodes.len()];
        for (candidate, used_at) in &candidates {
            let mut reached = self.roots(*candidate);
            while let Some(at) = reached.pop() {
                let Some(seen @ None) = inherited.get_mut(at) else {
                    continue;
                };
                *seen = Some(*used_at);
                // A referrer that a tag or a manifest also references is evicted with that one.
                let unreferenced = self.referrers.neighbors(at);
                let unreferenced = unreferenced.filter(|referrer| self.refcounts.get(*referrer) == Some(&0));
                reached.extend(self.children.neighbors(at).chain(unreferenced));
            }
        }
        let mut ordered: Vec<_> = candidates
            .into_iter()
            .map(|(candidate, own)| {
                let inherited = match candidate {
                    Candidate::Unreferenced(at) => inherited.get(at).copied().flatten(),
                    Candidate::Image(_) => None,
                };
                (inherited.unwrap_or(own).max(own), candidate)
            })
            .filter(|(used_at, candidate)| *used_at <= protected_since && !self.is_pinned(*candidate))
            .collect();
        ordered.sort_by_key(|(used_at, candidate)| {
            (*used_at, self.is_referrer(*candidate), self.name(*candidate))
        });
        ordered.into_iter().map(|(_, candidate)| candidate).collect()
    }

    fn all_candidates(&self, used: &[SystemTime]) -> Vec<(Candidate, SystemTime)> {
        let used_at = |at: NodeId| used.get(at).copied();
        let images = self.snapshot.images.iter().enumerate();
        let images = images.map(|(image_index, image)| {
            let newest = self.targets.neighbors(image_index).filter_map(used_at).max();
            (
                Candidate::Image(image_index),
                newest.map_or(image.used_at, |newest| newest.max(image.used_at)),
            )
        });
        let unreferenced = (0..self.nodes.len()).filter(|at| self.refcounts.get(*at) == Some(&0));
        let unreferenced = unreferenced.filter_map(|at| Some((Candidate::Unreferenced(at), used_at(at)?)));
        images.chain(unreferenced).collect()
    }

    /// The last access of each node or of any manifest it leads to: a client that pulls one platform also uses the
    /// image index.
    fn effective_access_times(&self) -> Vec<SystemTime> {
        let mut used: Vec<SystemTime> = self.nodes.iter().map(|node| node.used_at).collect();
        let mut by_use: Vec<NodeId> = (0..self.snapshot.manifests.len()).collect();
        by_use.sort_by_key(|at| Reverse(used.get(*at).copied()));
        let mut is_known = vec![false; self.nodes.len()];
        for newest in by_use {
            let Some(used_at) = used.get(newest).copied() else {
                continue;
            };
            let mut reached = vec![newest];
            while let Some(at) = reached.pop() {
                match (is_known.get_mut(at), used.get_mut(at)) {
                    (Some(known @ false), Some(used)) => {
                        *known = true;
                        *used = used_at.max(*used);
                    }
                    _ => continue,
                }
                reached.extend(self.parents.neighbors(at));
            }
        }
        used
    }

    fn protected(&self, protected_since: SystemTime) -> Vec<bool> {
        let is_protected = |node: &&Node| node.is_protected || node.used_at > protected_since;
        self.nodes.iter().map(is_protected).collect()
    }

    fn roots(&self, candidate: Candidate) -> Vec<NodeId> {
        match candidate {
            Candidate::Image(image_index) => self.targets.neighbors(image_index).collect(),
            Candidate::Unreferenced(at) => vec![at],
        }
    }

    fn is_pinned(&self, candidate: Candidate) -> bool {
        match candidate {
            Candidate::Image(image_index) => self
                .snapshot
                .images
                .get(image_index)
                .is_some_and(|image| image.is_pinned),
            Candidate::Unreferenced(at) => self.nodes.get(at).is_some_and(|node| node.is_protected),
        }
    }

    fn is_referrer(&self, candidate: Candidate) -> bool {
        let Candidate::Unreferenced(at) = candidate else {
            return false;
        };
        let subject = self
            .snapshot
            .manifests
            .get(at)
            .and_then(|manifest_node| manifest_node.subject);
        subject.is_some_and(|subject| self.manifests.find(&self.nodes, &subject).is_some())
    }

    /// Orders candidates with equal access times deterministically.
    fn name(&self, candidate: Candidate) -> (Option<&TagKey>, Option<Digest>, bool) {
        match candidate {
            Candidate::Image(image_index) => (
                self.snapshot.images.get(image_index).map(|image| &image.key),
                None,
                false,
            ),
            Candidate::Unreferenced(at) => {
                (None, self.nodes.get(at).map(|node| node.digest), self.is_blob(at))
            }
        }
    }

    fn is_blob(&self, at: NodeId) -> bool {
        at >= self.snapshot.manifests.len()
    }
}

struct PlanBuilder {
    is_protected: Vec<bool>,
    is_evicted: Vec<bool>,
    refcounts: Vec<u32>,
    plan: Plan,
}

impl PlanBuilder {
    fn evict(&mut self, graph: &Graph<'_>, candidate: &Candidate) {
        let mut free = Vec::new();
        match candidate {
            Candidate::Image(image_index) => {
                let Some(image) = graph.snapshot.images.get(*image_index) else {
                    return;
                };
                self.plan
                    .steps
                    .push(Step::Tag(image.key.clone(), image.targets.clone()));
                for at in graph.targets.neighbors(*image_index) {
                    self.release(at, &mut free);
                }
            }
            Candidate::Unreferenced(at) => free.push(*at),
        }
        let mut blobs = Vec::new();
        let mut next = 0;
        while let Some(at) = free.get(next).copied() {
            next += 1;
            if self.is_protected.get(at) == Some(&true) {
                continue;
            }
            if graph.is_blob(at) {
                blobs.push(at);
                continue;
            }
            self.remove(graph, at);
            for child in graph.children.neighbors(at) {
                self.release(child, &mut free);
            }
        }
        for blob in blobs {
            self.remove(graph, blob);
        }
    }

    /// Drops one reference.
    fn release(&mut self, at: NodeId, free: &mut Vec<NodeId>) {
        if let Some(refcounts) = self.refcounts.get_mut(at) {
            *refcounts = refcounts.saturating_sub(1);
            if *refcounts == 0 {
                free.push(at);
            }
        }
    }

    fn remove(&mut self, graph: &Graph<'_>, at: NodeId) {
        let (Some(node), Some(is_evicted @ false)) = (graph.nodes.get(at), self.is_evicted.get_mut(at))
        else {
            return;
        };
        *is_evicted = true;
        self.plan.bytes = self.plan.bytes.saturating_add(node.bytes);
        self.plan.steps.push(if graph.is_blob(at) {
            Step::Blob(node.digest)
        } else {
            Step::Manifest(node.digest)
        });
    }

    /// Takes back the removal of a tag if all its content remains, because other images reference it.
    fn without_useless_tags(mut self, graph: &Graph<'_>, useless: &[(usize, &Candidate)]) -> Plan {
        let mut reverted = Vec::new();
        for (step, candidate) in useless {
            if !matches!(candidate, Candidate::Image(_)) {
                continue;
            }
            let mut reached = graph.roots(**candidate);
            let mut is_intact = !reached.is_empty();
            while let (true, Some(at)) = (is_intact, reached.pop()) {
                is_intact = self.is_evicted.get(at) == Some(&false);
                reached.extend(graph.children.neighbors(at));
            }
            if is_intact {
                reverted.push(*step);
            }
        }
        let mut step_index = 0;
        self.plan.steps.retain(|_| {
            step_index += 1;
            reverted.binary_search(&(step_index - 1)).is_err()
        });
        self.plan
    }
}

#[cfg(test)]
mod tests;
