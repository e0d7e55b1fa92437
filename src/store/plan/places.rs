//! Places of things among all that is held, by the million and in little memory: in a store of a million objects, a map
//! by digest and a list of its own for each object took half a gigabyte while room was made.

use super::{At, Content};
use crate::oci::Digest;

/// A place as it is stored. No file system here holds 2³² files in such a tree; one that is further would be lost sight
/// of, and so stay.
fn narrow(at: At) -> Option<u32> {
    u32::try_from(at).ok()
}

fn wide(at: u32) -> At {
    at as At
}

/// Which digest is where.
pub(super) struct ByDigest(Vec<u32>);

impl ByDigest {
    /// Of the nodes at `places`, no two of which have the same digest.
    pub(super) fn of(nodes: &[&Content], places: std::ops::Range<At>) -> Self {
        let mut sorted: Vec<u32> = places.filter_map(narrow).collect();
        sorted.sort_unstable_by_key(|at| digest(nodes, *at));
        Self(sorted)
    }

    /// Where it is, among the same nodes.
    pub(super) fn find(&self, nodes: &[&Content], wanted: &Digest) -> Option<At> {
        let sorted = &self.0;
        let found = sorted.binary_search_by_key(&Some(wanted), |at| digest(nodes, *at));
        sorted.get(found.ok()?).copied().map(wide)
    }
}

fn digest<'a>(nodes: &[&'a Content], at: u32) -> Option<&'a Digest> {
    nodes.get(wide(at)).map(|content| &content.digest)
}

/// For each place a list of places.
pub(super) struct Lists {
    /// Where the list of each place ends; it begins where that of the one before it ends.
    ends: Vec<u32>,
    items: Vec<u32>,
}

impl Lists {
    /// `count` lists of what the pairs name: whose list, and what is in it. Sorted, each item once.
    pub(super) fn of(count: usize, pairs: impl Iterator<Item = (At, At)>) -> Self {
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

    /// The list of a place.
    pub(super) fn at(&self, of: At) -> impl Iterator<Item = At> + '_ {
        let end = |at: At| self.ends.get(at).copied().map(wide);
        let from = of.checked_sub(1).map_or(Some(0), end);
        let list = from.zip(end(of)).and_then(|(from, to)| self.items.get(from..to));
        list.unwrap_or_default().iter().copied().map(wide)
    }

    /// Every pair: whose list, and what is in it.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (At, At)> + '_ {
        (0..self.ends.len()).flat_map(|of| self.at(of).map(move |item| (of, item)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::time::SystemTime;

    use super::*;
    use crate::oci::Algorithm;

    #[test]
    fn each_list_has_its_own_once_and_in_order() {
        let pairs = [(2, 9), (0, 4), (2, 1), (2, 9), (7, 7)];
        let lists = Lists::of(4, pairs.into_iter());
        let list = |of| lists.at(of).collect::<Vec<_>>();
        assert_eq!((list(0), list(1), list(2)), (vec![4], vec![], vec![1, 9]));
        assert_eq!((list(3), list(4)), (vec![], vec![]), "nobody's, and no place");
        assert_eq!(lists.pairs().collect::<Vec<_>>(), [(0, 4), (2, 1), (2, 9)]);
    }

    #[test]
    fn a_digest_is_found_in_its_own_part_alone() {
        let held = |name: &str| Content {
            digest: Digest::of(Algorithm::Sha256, name.as_bytes()),
            bytes: 1,
            used_at: SystemTime::UNIX_EPOCH,
            is_kept: false,
        };
        let contents = ["a", "b", "c", "d", "a"].map(held);
        let nodes: Vec<&Content> = contents.iter().collect();
        let (first, second) = (ByDigest::of(&nodes, 0..3), ByDigest::of(&nodes, 3..5));
        let found = |name: &str| {
            let digest = held(name).digest;
            (first.find(&nodes, &digest), second.find(&nodes, &digest))
        };
        assert_eq!(found("a"), (Some(0), Some(4)));
        assert_eq!(found("d"), (None, Some(3)));
        assert_eq!(found("e"), (None, None));
    }
}
