//! Eviction plan: a pure function from a graph of the stored images to the removals, least recently used images first.
//!
//! An image is a tag with all the content it references. A manifest that was pulled by digest alone counts as an
//! image, and so does a blob that no manifest references. A manifest or blob is removed with the last image or
//! manifest that references it. So shared content counts once, and a listed image never loses content. A signature
//! or another referrer counts as used when its subject is used, and is removed right after it.
//!
//! Pinned content, content with readers, and content used since a given time are protected. A tag is also protected
//! if its removal would free no bytes.
//!
//! A deletion of chosen tags plans the same removals, and protects nothing but what others reference.
//!
//! Disk access and the removal itself are in [`super`].

use std::cmp::Reverse;
use std::time::SystemTime;

use crate::oci::Digest;
use crate::store::graph::{Graph, Names, Node, NodeId, Seconds, Visited, Visits};
use crate::store::usage_report::Reclaimed;

/// The removals in order: per image the tag, then manifests, then blobs.
#[derive(Debug, Default)]
pub(in crate::store) struct Plan {
    names: Names,
    pub(super) steps: Vec<NodeId>,
    /// Bytes that the plan frees.
    pub(super) bytes: u64,
}

impl Plan {
    /// The removals, each with the bytes that it frees.
    pub(in crate::store) fn steps(&self) -> impl Iterator<Item = (Node, u64)> + '_ {
        self.steps.iter().filter_map(|id| self.step(*id))
    }

    pub(super) fn step(&self, id: NodeId) -> Option<(Node, u64)> {
        Some((self.names.node(id)?, self.names.size(id)))
    }

    /// What the plan removes.
    pub(in crate::store) fn reclaimed(&self) -> Reclaimed {
        let mut all = Reclaimed::default();
        for (node, bytes) in self.steps() {
            all.count(&node, bytes);
        }
        all
    }
}

/// Plans removals that free `bytes`, or as much as possible. Content used after `protected_since` stays.
pub(super) fn plan(mut graph: Graph, bytes: u64, protected_since: SystemTime) -> Plan {
    let since = Seconds::before(protected_since);
    graph.keep_content_used_after(since);
    let refcounts = graph.reference_counts();
    let candidates = candidates(&mut graph, &refcounts, since);
    let mut removals = Removals::new(&graph, refcounts);
    let mut useless = Vec::new();
    for (_, candidate) in candidates {
        if removals.bytes >= bytes {
            break;
        }
        let before = (removals.steps.len(), removals.bytes);
        removals.remove_root(candidate);
        if removals.bytes == before.1 && graph.is_tag(candidate) {
            useless.push((before.0, candidate));
        }
    }
    removals.take_back_tags(&useless);
    let Removals { steps, bytes, .. } = removals;
    Plan {
        names: graph.names,
        steps,
        bytes,
    }
}

/// Plans the removal of these tags, of the manifests that nothing references, and of the content that nothing else
/// references. Protects nothing.
pub(super) fn plan_deletion(mut graph: Graph, tags: &[Digest], manifests: &[Digest]) -> Plan {
    graph.is_kept.fill(false);
    let mut removals = Removals::new(&graph, graph.reference_counts());
    for tag in tags.iter().filter_map(|name| graph.tag(name)) {
        removals.remove_root(tag);
    }
    for manifest in manifests.iter().filter_map(|digest| graph.manifest(digest)) {
        if removals.is_free(manifest) {
            removals.remove_root(manifest);
        }
    }
    let Removals { steps, bytes, .. } = removals;
    Plan {
        names: graph.names,
        steps,
        bytes,
    }
}

/// The evictable nodes without references, least recently used first.
fn candidates(graph: &mut Graph, refcounts: &[u32], since: Seconds) -> Vec<(Seconds, NodeId)> {
    use_parents_of_used(graph);
    let is_unreferenced = |id: &NodeId| refcounts.get(id.index()) == Some(&0);
    let used_at = |graph: &Graph, id: NodeId| graph.used_at.get(id.index()).copied().unwrap_or_default();
    let roots = graph.nodes().filter(is_unreferenced);
    let mut candidates: Vec<_> = roots.map(|id| (used_at(graph, id), id)).collect();
    // A referrer inherits the last use of its subject. The most recently used candidate comes first, so the first
    // time that reaches a node is its latest.
    candidates.sort_unstable_by_key(|(used_at, id)| (Reverse(*used_at), *id));
    let referrers = graph.referrers();
    let mut visited = Visited::new(graph.len());
    let mut open = Vec::new();
    for (used_at, root) in &candidates {
        open.push(*root);
        while let Some(at) = open.pop() {
            if !visited.is_first(at) {
                continue;
            }
            if let Some(used) = graph.used_at.get_mut(at.index()) {
                *used = (*used).max(*used_at);
            }
            // A referrer that a tag or a manifest also references is evicted with that one.
            open.extend(referrers.neighbors(at).filter(is_unreferenced));
            open.extend(graph.children.neighbors(at));
        }
    }
    for (used, id) in &mut candidates {
        *used = used_at(graph, *id);
    }
    candidates.retain(|(used_at, id)| *used_at <= since && graph.is_kept.get(id.index()) == Some(&false));
    candidates
        .sort_unstable_by_key(|(used_at, id)| (*used_at, graph.is_referrer(*id), graph.is_tag(*id), *id));
    candidates.shrink_to_fit();
    candidates
}

/// Sets the last use of each manifest and tag to that of any manifest it leads to, if that is later: a client that
/// pulls one platform also uses the image index.
fn use_parents_of_used(graph: &mut Graph) {
    let parents = graph.parent_manifests();
    let mut by_use: Vec<NodeId> = graph.manifests().collect();
    by_use.sort_unstable_by_key(|id| Reverse(graph.used_at.get(id.index()).copied()));
    let mut visited = Visited::new(graph.len());
    for newest in by_use {
        let Some(used_at) = graph.used_at.get(newest.index()).copied() else {
            continue;
        };
        let mut open = vec![newest];
        while let Some(at) = open.pop() {
            if let Some(used) = graph.used_at.get_mut(at.index()).filter(|_| visited.is_first(at)) {
                *used = used_at.max(*used);
                open.extend(parents.neighbors(at));
            }
        }
    }
    for tag in graph.tags() {
        let targets = graph.children.neighbors(tag);
        let newest = targets.filter_map(|target| graph.used_at.get(target.index()).copied());
        let newest = newest.max();
        if let (Some(used), Some(newest)) = (graph.used_at.get_mut(tag.index()), newest) {
            *used = newest.max(*used);
        }
    }
}

/// The removals planned so far.
struct Removals<'a> {
    graph: &'a Graph,
    is_removed: Vec<bool>,
    /// Remaining references to each node.
    refcounts: Vec<u32>,
    steps: Vec<NodeId>,
    bytes: u64,
}

impl<'a> Removals<'a> {
    fn new(graph: &'a Graph, refcounts: Vec<u32>) -> Self {
        Self {
            is_removed: vec![false; graph.len()],
            refcounts,
            steps: Vec::new(),
            bytes: 0,
            graph,
        }
    }

    /// Whether a node has no references and stays so far.
    fn is_free(&self, at: NodeId) -> bool {
        let is_removed = self.is_removed.get(at.index());
        self.refcounts.get(at.index()) == Some(&0) && is_removed == Some(&false)
    }

    /// Removes a node without references, and what it alone references.
    fn remove_root(&mut self, root: NodeId) {
        let graph = self.graph;
        let (mut free, mut blobs) = (vec![root], Vec::new());
        let mut next = 0;
        while let Some(at) = free.get(next).copied() {
            next += 1;
            if graph.is_kept.get(at.index()) == Some(&true) {
                continue;
            }
            if graph.is_blob(at) {
                blobs.push(at);
                continue;
            }
            self.remove(at);
            for child in graph.children.neighbors(at) {
                self.release(child, &mut free);
            }
        }
        for blob in blobs {
            self.remove(blob);
        }
    }

    /// Drops one reference.
    fn release(&mut self, at: NodeId, free: &mut Vec<NodeId>) {
        if let Some(refcount) = self.refcounts.get_mut(at.index()) {
            *refcount = refcount.saturating_sub(1);
            if *refcount == 0 {
                free.push(at);
            }
        }
    }

    fn remove(&mut self, at: NodeId) {
        if let Some(is_removed @ false) = self.is_removed.get_mut(at.index()) {
            *is_removed = true;
            self.bytes = self.bytes.saturating_add(self.graph.names.size(at));
            self.steps.push(at);
        }
    }

    /// Takes back the removal of a tag if all its content remains, because other images reference it. `useless`: the
    /// tags whose removal freed nothing, each with its step.
    fn take_back_tags(&mut self, useless: &[(usize, NodeId)]) {
        if useless.is_empty() {
            return;
        }
        self.refcounts = Vec::new();
        let mut visits = Visits::new(self.graph.len());
        let mut reverted = Vec::new();
        for (step, tag) in useless {
            visits.restart();
            let mut open: Vec<NodeId> = self.graph.children.neighbors(*tag).collect();
            let mut is_intact = !open.is_empty();
            while let (true, Some(at)) = (is_intact, open.pop()) {
                is_intact = self.is_removed.get(at.index()) == Some(&false);
                if visits.is_first(at) {
                    open.extend(self.graph.children.neighbors(at));
                }
            }
            if is_intact {
                reverted.push(*step);
            }
        }
        let mut step_index = 0;
        self.steps.retain(|_| {
            step_index += 1;
            reverted.binary_search(&(step_index - 1)).is_err()
        });
    }
}

#[cfg(test)]
mod tests;
