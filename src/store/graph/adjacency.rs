//! Adjacency lists in compressed form: one vector of node IDs, and where each list ends in it.

use std::io;

use super::NodeId;

/// One list of nodes for each node of a range.
#[derive(Debug, Default)]
pub(in crate::store) struct Adjacency {
    /// The first node that has a list.
    first: usize,
    /// End of each list in `items`. A list begins where the previous one ends.
    ends: Vec<u32>,
    items: Vec<NodeId>,
}

impl Adjacency {
    pub(super) fn with_capacity(lists: usize, items: usize) -> Self {
        Self {
            first: 0,
            ends: Vec::with_capacity(lists),
            items: Vec::with_capacity(items),
        }
    }

    /// Adds the list of the next node. Returns an error beyond 2³² items.
    pub(super) fn push(&mut self, list: impl IntoIterator<Item = NodeId>) -> io::Result<()> {
        self.items.extend(list);
        self.ends.push(NodeId::new(self.items.len())?.0);
        Ok(())
    }

    /// Builds the lists of `count` nodes from `first` on, from pairs of node and item. Pairs of other nodes are left
    /// out. There must be fewer than 2³² pairs.
    pub(in crate::store) fn of_pairs(
        first: usize,
        count: usize,
        pairs: impl Iterator<Item = (NodeId, NodeId)> + Clone,
    ) -> Self {
        let place = |of: NodeId| of.index().checked_sub(first);
        let mut lengths = vec![0_u32; count];
        for (of, _) in pairs.clone() {
            if let Some(length) = place(of).and_then(|of| lengths.get_mut(of)) {
                *length += 1;
            }
        }
        // The begin of each list, which filling the list moves to its end.
        let mut total = 0;
        for length in &mut lengths {
            total += std::mem::replace(length, total);
        }
        let mut ends = lengths;
        let mut items = vec![NodeId(0); total as usize];
        for (of, item) in pairs {
            let Some(end) = place(of).and_then(|of| ends.get_mut(of)) else {
                continue;
            };
            if let Some(place) = items.get_mut(*end as usize) {
                *place = item;
                *end += 1;
            }
        }
        Self { first, ends, items }
    }

    /// The list of a node; empty if it has none.
    pub(in crate::store) fn neighbors(&self, of: NodeId) -> impl Iterator<Item = NodeId> + Clone + '_ {
        let end = |at: usize| self.ends.get(at).map(|end| *end as usize);
        let list = of.index().checked_sub(self.first).and_then(|of| {
            let from = of.checked_sub(1).map_or(Some(0), end)?;
            self.items.get(from..end(of)?)
        });
        list.unwrap_or_default().iter().copied()
    }

    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        4 * (self.ends.capacity() + self.items.capacity())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn list(lists: &Adjacency, of: u32) -> Vec<u32> {
        lists.neighbors(NodeId(of)).map(|item| item.0).collect()
    }

    #[test]
    fn adjacency_lists_keep_the_order_of_their_items() {
        let mut lists = Adjacency::default();
        for items in [&[4][..], &[], &[9, 1, 9]] {
            lists.push(items.iter().copied().map(NodeId)).unwrap();
        }
        assert_eq!(
            (list(&lists, 0), list(&lists, 1), list(&lists, 2)),
            (vec![4], vec![], vec![9, 1, 9])
        );
        assert!(list(&lists, 3).is_empty(), "it has no list");
    }

    #[test]
    fn adjacency_of_pairs_has_lists_of_its_range_only() {
        let pairs = [(12, 9), (10, 4), (12, 1), (9, 5), (14, 7)];
        let pairs = pairs.map(|(of, item)| (NodeId(of), NodeId(item)));
        let lists = Adjacency::of_pairs(10, 4, pairs.into_iter());
        let all: Vec<_> = (9..16).map(|of| list(&lists, of)).collect();
        assert_eq!(all, [vec![], vec![4], vec![], vec![9, 1], vec![], vec![], vec![]]);
    }
}
