//! What to let go when room is needed: a pure function over a snapshot of the store.
//!
//! The least recently used *images* go first. An image is a tag with all that it names; what was pulled by digest alone
//! counts as an image of its own, and so does a blob that no manifest names. A manifest or blob goes when the last of
//! those that need it has gone: shared content counts once, and nothing of an image that is still listed is touched. A
//! signature or another referrer stays as long as its subject is used, and goes right after it.
//!
//! Spared: what is pinned, in use, or was used since a given moment. A tag is spared too when nothing would be won by
//! forgetting it.
//!
//! Not here: looking at the disk and removing anything from it. That is [`super::evict`].

mod adjacency;

use std::cmp::Reverse;
use std::time::SystemTime;

use self::adjacency::{Adjacency, DigestIndex};
use crate::oci::Digest;
use crate::store::tags::TagKey;

/// A tag with what it names.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) key: TagKey,
    /// The digests that it names, held or not.
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
    /// Pinned by its digest, or being read now.
    pub(super) is_protected: bool,
}

/// A manifest, and what hangs on it.
#[derive(Clone, Debug)]
pub(super) struct ManifestNode {
    pub(super) content: Node,
    pub(super) children: Vec<Digest>,
    pub(super) subject: Option<Digest>,
}

/// The store at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    pub(super) images: Vec<Image>,
    pub(super) manifests: Vec<ManifestNode>,
    pub(super) blobs: Vec<Node>,
}

/// One thing to let go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Only if it still names just this.
    Tag(TagKey, Vec<Digest>),
    Manifest(Digest),
    Blob(Digest),
}

/// What to let go, in this order: of each image its tag, then manifests, then blobs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    /// How many bytes that frees.
    pub(super) bytes: u64,
}

/// Frees `bytes`, or as much as may be let go. What was used after `protected_since` stays.
pub(super) fn plan(snapshot: &Snapshot, bytes: u64, protected_since: SystemTime) -> Plan {
    let mut graph = Graph::of(snapshot);
    let candidates = graph.candidates(protected_since);
    let mut builder = PlanBuilder {
        is_protected: graph.protected(protected_since),
        is_evicted: vec![false; graph.nodes.len()],
        refcounts: std::mem::take(&mut graph.refcounts),
        plan: Plan::default(),
    };
    let mut idle = Vec::new();
    for candidate in &candidates {
        if builder.plan.bytes >= bytes {
            break;
        }
        let before = builder.plan.bytes;
        let at = builder.plan.steps.len();
        builder.evict(&graph, candidate);
        if builder.plan.bytes == before {
            idle.push((at, candidate));
        }
    }
    builder.without_useless_tags(&graph, &idle)
}

/// A place in [`Graph::nodes`]: first the manifests, then the blobs.
type NodeId = usize;

struct Graph<'a> {
    snapshot: &'a Snapshot,
    nodes: Vec<&'a Node>,
    manifests: DigestIndex,
    /// What each manifest needs.
    children: Adjacency,
    /// Which manifests need it.
    parents: Adjacency,
    /// Which manifests are about it.
    referrers: Adjacency,
    /// How many images and manifests need it.
    refcounts: Vec<u32>,
    /// What each image names.
    targets: Adjacency,
}

/// What is let go as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Candidate {
    /// A place in [`Snapshot::images`].
    Image(usize),
    /// A manifest or blob that nothing else needs.
    Unreferenced(NodeId),
}

impl<'a> Graph<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let listed = snapshot.manifests.iter().map(|listed| &listed.content);
        let nodes: Vec<&Node> = listed.chain(&snapshot.blobs).collect();
        let (count, first_blob) = (nodes.len(), snapshot.manifests.len());
        let manifests = DigestIndex::of(&nodes, 0..first_blob);
        let blobs = DigestIndex::of(&nodes, first_blob..count);
        let listed = || snapshot.manifests.iter().enumerate();
        let manifest = |digest: &Digest| manifests.find(&nodes, digest);
        // One digest may be held both ways: some clients fetch a manifest as a blob.
        let held = |digest: &Digest| [manifest(digest), blobs.find(&nodes, digest)];
        let needs = listed().flat_map(|(at, listed)| {
            let children = listed.children.iter().flat_map(held).flatten();
            children
                .filter(move |child| *child != at)
                .map(move |child| (at, child))
        });
        let children = Adjacency::of(first_blob, needs);
        let parents = Adjacency::of(count, children.pairs().map(|(parent, child)| (child, parent)));
        let about = listed().filter_map(|(at, listed)| Some((manifest(&listed.subject?)?, at)));
        let referrers = Adjacency::of(first_blob, about);
        let images = snapshot.images.iter().enumerate();
        let leads = images.flat_map(|(place, image)| {
            let manifests = image.targets.iter().filter_map(manifest);
            manifests.map(move |at| (place, at))
        });
        let targets = Adjacency::of(snapshot.images.len(), leads);
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

    /// What may be let go, the least recently used first.
    fn candidates(&self, protected_since: SystemTime) -> Vec<Candidate> {
        let used = self.effective_access_times();
        let mut candidates = self.all_candidates(&used);
        // A referrer is used whenever its subject is: handed down from the most recently used unit on.
        candidates.sort_by_key(|(candidate, at)| (Reverse(*at), self.name(*candidate)));
        let mut inherited = vec![None; self.nodes.len()];
        for (candidate, used_at) in &candidates {
            let mut reached = self.roots(*candidate);
            while let Some(at) = reached.pop() {
                let Some(seen @ None) = inherited.get_mut(at) else {
                    continue;
                };
                *seen = Some(*used_at);
                // One that something else needs too stays and goes with that.
                let alone = self.referrers.at(at);
                let alone = alone.filter(|referrer| self.refcounts.get(*referrer) == Some(&0));
                reached.extend(self.children.at(at).chain(alone));
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
        let images = images.map(|(place, image)| {
            let newest = self.targets.at(place).filter_map(used_at).max();
            (
                Candidate::Image(place),
                newest.map_or(image.used_at, |newest| newest.max(image.used_at)),
            )
        });
        let alone = (0..self.nodes.len()).filter(|at| self.refcounts.get(*at) == Some(&0));
        let alone = alone.filter_map(|at| Some((Candidate::Unreferenced(at), used_at(at)?)));
        images.chain(alone).collect()
    }

    /// When each was last used, or a manifest that it leads to: whoever pulls one platform uses the index.
    fn effective_access_times(&self) -> Vec<SystemTime> {
        let mut used: Vec<SystemTime> = self.nodes.iter().map(|content| content.used_at).collect();
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
                reached.extend(self.parents.at(at));
            }
        }
        used
    }

    fn protected(&self, protected_since: SystemTime) -> Vec<bool> {
        let is_protected = |content: &&Node| content.is_protected || content.used_at > protected_since;
        self.nodes.iter().map(is_protected).collect()
    }

    fn roots(&self, candidate: Candidate) -> Vec<NodeId> {
        match candidate {
            Candidate::Image(place) => self.targets.at(place).collect(),
            Candidate::Unreferenced(at) => vec![at],
        }
    }

    fn is_pinned(&self, candidate: Candidate) -> bool {
        match candidate {
            Candidate::Image(place) => self
                .snapshot
                .images
                .get(place)
                .is_some_and(|image| image.is_pinned),
            Candidate::Unreferenced(at) => self.nodes.get(at).is_some_and(|content| content.is_protected),
        }
    }

    fn is_referrer(&self, candidate: Candidate) -> bool {
        let Candidate::Unreferenced(at) = candidate else {
            return false;
        };
        let subject = self.snapshot.manifests.get(at).and_then(|listed| listed.subject);
        subject.is_some_and(|subject| self.manifests.find(&self.nodes, &subject).is_some())
    }

    /// Orders what was used at the same moment, the same way each time.
    fn name(&self, candidate: Candidate) -> (Option<&TagKey>, Option<Digest>, bool) {
        match candidate {
            Candidate::Image(place) => (
                self.snapshot.images.get(place).map(|image| &image.key),
                None,
                false,
            ),
            Candidate::Unreferenced(at) => (
                None,
                self.nodes.get(at).map(|content| content.digest),
                self.is_blob(at),
            ),
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
            Candidate::Image(place) => {
                let Some(image) = graph.snapshot.images.get(*place) else {
                    return;
                };
                self.plan
                    .steps
                    .push(Step::Tag(image.key.clone(), image.targets.clone()));
                for at in graph.targets.at(*place) {
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
            for child in graph.children.at(at) {
                self.release(child, &mut free);
            }
        }
        for blob in blobs {
            self.remove(graph, blob);
        }
    }

    /// One holder less.
    fn release(&mut self, at: NodeId, free: &mut Vec<NodeId>) {
        if let Some(refcounts) = self.refcounts.get_mut(at) {
            *refcounts = refcounts.saturating_sub(1);
            if *refcounts == 0 {
                free.push(at);
            }
        }
    }

    fn remove(&mut self, graph: &Graph<'_>, at: NodeId) {
        let (Some(content), Some(is_evicted @ false)) = (graph.nodes.get(at), self.is_evicted.get_mut(at))
        else {
            return;
        };
        *is_evicted = true;
        self.plan.bytes = self.plan.bytes.saturating_add(content.bytes);
        self.plan.steps.push(if graph.is_blob(at) {
            Step::Blob(content.digest)
        } else {
            Step::Manifest(content.digest)
        });
    }

    /// Takes back the tags of which everything is still there, for others need it.
    fn without_useless_tags(mut self, graph: &Graph<'_>, idle: &[(usize, &Candidate)]) -> Plan {
        let mut reverted = Vec::new();
        for (step, candidate) in idle {
            if !matches!(candidate, Candidate::Image(_)) {
                continue;
            }
            let mut reached = graph.roots(**candidate);
            let mut is_intact = !reached.is_empty();
            while let (true, Some(at)) = (is_intact, reached.pop()) {
                is_intact = self.is_evicted.get(at) == Some(&false);
                reached.extend(graph.children.at(at));
            }
            if is_intact {
                reverted.push(*step);
            }
        }
        let mut place = 0;
        self.plan.steps.retain(|_| {
            place += 1;
            reverted.binary_search(&(place - 1)).is_err()
        });
        self.plan
    }
}

#[cfg(test)]
mod tests;
