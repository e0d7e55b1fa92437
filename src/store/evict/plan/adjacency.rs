//! Compact digest index and adjacency lists of the eviction graph. In a store of a million objects, a hash map by
//! digest and one vector per node took half a gigabyte during an eviction.

use super::{Node, NodeId};
use crate::oci::Digest;

/// Node ID as stored. No supported file system holds 2³² files in such a tree. A node beyond that would be left out
/// of the graph and so not be evicted.
fn narrow(at: NodeId) -> Option<u32> {
    u32::try_from(at).ok()
}

fn wide(at: u32) -> NodeId {
    at as NodeId
}

/// Node IDs sorted by digest.
pub(super) struct DigestIndex(Vec<u32>);

impl DigestIndex {
    /// Indexes the nodes at `places`. Their digests must be distinct.
    pub(super) fn of(nodes: &[&Node], places: std::ops::Range<NodeId>) -> Self {
        let mut sorted: Vec<u32> = places.filter_map(narrow).collect();
        sorted.sort_unstable_by_key(|at| digest(nodes, *at));
        Self(sorted)
    }

    /// Finds a digest among the same nodes.
    pub(super) fn find(&self, nodes: &[&Node], wanted: &Digest) -> Option<NodeId> {
        let sorted = &self.0;
        let found = sorted.binary_search_by_key(&Some(wanted), |at| digest(nodes, *at));
        sorted.get(found.ok()?).copied().map(wide)
    }
}

fn digest<'a>(nodes: &[&'a Node], at: u32) -> Option<&'a Digest> {
    nodes.get(wide(at)).map(|content| &content.digest)
}

/// One list of node IDs per node.
pub(super) struct Adjacency {
    /// End of each list in `items`. A list begins where the previous one ends.
    ends: Vec<u32>,
    items: Vec<u32>,
}

impl Adjacency {
    /// Builds `count` lists from pairs of list and item. Lists are sorted and free of duplicates.
    pub(super) fn of(count: usize, pairs: impl Iterator<Item = (NodeId, NodeId)>) -> Self {
        let mut pairs: Vec<(u32, u32)> = pairs
            .filter_map(|(of, item)| Some((narrow(of)?, narrow(item)?)))
            .collect();
        pairs.sort_unstable();
        pairs.dedup();
        let ends = (0..count).map(|of| pairs.partition_point(|(owner, _)| wide(*owner) <= of));
        Self {
            ends: ends.filter_map(narrow).collect(),
            items: pairs.into_iter().map(|(_, item)| item).collect(),
        }
    }

    /// The list of a node.
    pub(super) fn neighbors(&self, of: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let end = |at: NodeId| self.ends.get(at).copied().map(wide);
        let from = of.checked_sub(1).map_or(Some(0), end);
        let list = from.zip(end(of)).and_then(|(from, to)| self.items.get(from..to));
        list.unwrap_or_default().iter().copied().map(wide)
    }

    /// All pairs of list and item.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (NodeId, NodeId)> + '_ {
        (0..self.ends.len()).flat_map(|of| self.neighbors(of).map(move |item| (of, item)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::time::SystemTime;

    use super::*;
    use crate::oci::Algorithm;

    #[test]
    fn adjacency_lists_are_sorted_and_unique() {
        let pairs = [(2, 9), (0, 4), (2, 1), (2, 9), (7, 7)];
        let lists = Adjacency::of(4, pairs.into_iter());
        let list = |of| lists.neighbors(of).collect::<Vec<_>>();
        assert_eq!((list(0), list(1), list(2)), (vec![4], vec![], vec![1, 9]));
        assert_eq!((list(3), list(4)), (vec![], vec![]), "nobody's, and no place");
        assert_eq!(lists.pairs().collect::<Vec<_>>(), [(0, 4), (2, 1), (2, 9)]);
    }

    #[test]
    fn digest_index_finds_only_its_own_nodes() {
        let stored = |name: &str| Node {
            digest: Digest::of(Algorithm::Sha256, name.as_bytes()),
            bytes: 1,
            used_at: SystemTime::UNIX_EPOCH,
            is_protected: false,
        };
        let contents = ["a", "b", "c", "d", "a"].map(stored);
        let nodes: Vec<&Node> = contents.iter().collect();
        let (first, second) = (DigestIndex::of(&nodes, 0..3), DigestIndex::of(&nodes, 3..5));
        let found = |name: &str| {
            let digest = stored(name).digest;
            (first.find(&nodes, &digest), second.find(&nodes, &digest))
        };
        assert_eq!(found("a"), (Some(0), Some(4)));
        assert_eq!(found("d"), (None, Some(3)));
        assert_eq!(found("e"), (None, None));
    }
}
