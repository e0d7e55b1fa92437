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

mod places;

use std::cmp::Reverse;
use std::time::SystemTime;

use self::places::{ByDigest, Lists};
use super::tags::TagKey;
use crate::oci::Digest;

/// A tag with what it names.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) key: TagKey,
    /// The digests that it names, held or not.
    pub(super) names: Vec<Digest>,
    pub(super) used_at: SystemTime,
    pub(super) is_pinned: bool,
}

/// A manifest or a blob.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    pub(super) used_at: SystemTime,
    /// Pinned by its digest, or being read now.
    pub(super) is_kept: bool,
}

/// A manifest, and what hangs on it.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub(super) content: Content,
    pub(super) children: Vec<Digest>,
    pub(super) subject: Option<Digest>,
}

/// The store at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    pub(super) images: Vec<Image>,
    pub(super) manifests: Vec<Listed>,
    pub(super) blobs: Vec<Content>,
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

/// Frees `bytes`, or as much as may be let go. What was used after `spared_since` stays.
pub(super) fn plan(snapshot: &Snapshot, bytes: u64, spared_since: SystemTime) -> Plan {
    let mut graph = Graph::of(snapshot);
    let units = graph.units(spared_since);
    let mut letting_go = LettingGo {
        is_spared: graph.spared(spared_since),
        is_gone: vec![false; graph.nodes.len()],
        holders: std::mem::take(&mut graph.holders),
        plan: Plan::default(),
    };
    let mut idle = Vec::new();
    for unit in &units {
        if letting_go.plan.bytes >= bytes {
            break;
        }
        let before = letting_go.plan.bytes;
        let at = letting_go.plan.steps.len();
        letting_go.unit(&graph, unit);
        if letting_go.plan.bytes == before {
            idle.push((at, unit));
        }
    }
    letting_go.without_idle_tags(&graph, &idle)
}

/// A place in [`Graph::nodes`]: first the manifests, then the blobs.
type At = usize;

struct Graph<'a> {
    snapshot: &'a Snapshot,
    nodes: Vec<&'a Content>,
    manifests: ByDigest,
    /// What each manifest needs.
    children: Lists,
    /// Which manifests need it.
    parents: Lists,
    /// Which manifests are about it.
    referrers: Lists,
    /// How many images and manifests need it.
    holders: Vec<u32>,
    /// What each image names.
    named: Lists,
}

/// What is let go as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// A place in [`Snapshot::images`].
    Image(usize),
    /// A manifest or blob that nothing else needs.
    Alone(At),
}

impl<'a> Graph<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let listed = snapshot.manifests.iter().map(|listed| &listed.content);
        let nodes: Vec<&Content> = listed.chain(&snapshot.blobs).collect();
        let (count, first_blob) = (nodes.len(), snapshot.manifests.len());
        let manifests = ByDigest::of(&nodes, 0..first_blob);
        let blobs = ByDigest::of(&nodes, first_blob..count);
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
        let children = Lists::of(first_blob, needs);
        let parents = Lists::of(count, children.pairs().map(|(parent, child)| (child, parent)));
        let about = listed().filter_map(|(at, listed)| Some((manifest(&listed.subject?)?, at)));
        let referrers = Lists::of(first_blob, about);
        let images = snapshot.images.iter().enumerate();
        let leads = images.flat_map(|(place, image)| {
            let manifests = image.names.iter().filter_map(manifest);
            manifests.map(move |at| (place, at))
        });
        let named = Lists::of(snapshot.images.len(), leads);
        let mut holders = vec![0_u32; count];
        for (_, at) in children.pairs().chain(named.pairs()) {
            if let Some(holders) = holders.get_mut(at) {
                *holders = holders.saturating_add(1);
            }
        }
        Self {
            snapshot,
            nodes,
            manifests,
            children,
            parents,
            referrers,
            holders,
            named,
        }
    }

    /// What may be let go, the least recently used first.
    fn units(&self, spared_since: SystemTime) -> Vec<Unit> {
        let used = self.used_with_ancestors();
        let mut units = self.all_units(&used);
        // A referrer is used whenever its subject is: handed down from the most recently used unit on.
        units.sort_by_key(|(unit, at)| (Reverse(*at), self.name(*unit)));
        let mut handed_down = vec![None; self.nodes.len()];
        for (unit, used_at) in &units {
            let mut reached = self.roots(*unit);
            while let Some(at) = reached.pop() {
                let Some(seen @ None) = handed_down.get_mut(at) else {
                    continue;
                };
                *seen = Some(*used_at);
                // One that something else needs too stays and goes with that.
                let alone = self.referrers.at(at);
                let alone = alone.filter(|referrer| self.holders.get(*referrer) == Some(&0));
                reached.extend(self.children.at(at).chain(alone));
            }
        }
        let mut ordered: Vec<_> = units
            .into_iter()
            .map(|(unit, own)| {
                let handed_down = match unit {
                    Unit::Alone(at) => handed_down.get(at).copied().flatten(),
                    Unit::Image(_) => None,
                };
                (handed_down.unwrap_or(own).max(own), unit)
            })
            .filter(|(used_at, unit)| *used_at <= spared_since && !self.is_pinned(*unit))
            .collect();
        ordered.sort_by_key(|(used_at, unit)| (*used_at, self.is_referrer(*unit), self.name(*unit)));
        ordered.into_iter().map(|(_, unit)| unit).collect()
    }

    fn all_units(&self, used: &[SystemTime]) -> Vec<(Unit, SystemTime)> {
        let used_at = |at: At| used.get(at).copied();
        let images = self.snapshot.images.iter().enumerate();
        let images = images.map(|(place, image)| {
            let newest = self.named.at(place).filter_map(used_at).max();
            (
                Unit::Image(place),
                newest.map_or(image.used_at, |newest| newest.max(image.used_at)),
            )
        });
        let alone = (0..self.nodes.len()).filter(|at| self.holders.get(*at) == Some(&0));
        let alone = alone.filter_map(|at| Some((Unit::Alone(at), used_at(at)?)));
        images.chain(alone).collect()
    }

    /// When each was last used, or a manifest that it leads to: whoever pulls one platform uses the index.
    fn used_with_ancestors(&self) -> Vec<SystemTime> {
        let mut used: Vec<SystemTime> = self.nodes.iter().map(|content| content.used_at).collect();
        let mut by_use: Vec<At> = (0..self.snapshot.manifests.len()).collect();
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

    fn spared(&self, spared_since: SystemTime) -> Vec<bool> {
        let is_spared = |content: &&Content| content.is_kept || content.used_at > spared_since;
        self.nodes.iter().map(is_spared).collect()
    }

    fn roots(&self, unit: Unit) -> Vec<At> {
        match unit {
            Unit::Image(place) => self.named.at(place).collect(),
            Unit::Alone(at) => vec![at],
        }
    }

    fn is_pinned(&self, unit: Unit) -> bool {
        match unit {
            Unit::Image(place) => self
                .snapshot
                .images
                .get(place)
                .is_some_and(|image| image.is_pinned),
            Unit::Alone(at) => self.nodes.get(at).is_some_and(|content| content.is_kept),
        }
    }

    fn is_referrer(&self, unit: Unit) -> bool {
        let Unit::Alone(at) = unit else { return false };
        let subject = self.snapshot.manifests.get(at).and_then(|listed| listed.subject);
        subject.is_some_and(|subject| self.manifests.find(&self.nodes, &subject).is_some())
    }

    /// Orders what was used at the same moment, the same way each time.
    fn name(&self, unit: Unit) -> (Option<&TagKey>, Option<Digest>, bool) {
        match unit {
            Unit::Image(place) => (
                self.snapshot.images.get(place).map(|image| &image.key),
                None,
                false,
            ),
            Unit::Alone(at) => (
                None,
                self.nodes.get(at).map(|content| content.digest),
                self.is_blob(at),
            ),
        }
    }

    fn is_blob(&self, at: At) -> bool {
        at >= self.snapshot.manifests.len()
    }
}

struct LettingGo {
    is_spared: Vec<bool>,
    is_gone: Vec<bool>,
    holders: Vec<u32>,
    plan: Plan,
}

impl LettingGo {
    fn unit(&mut self, graph: &Graph<'_>, unit: &Unit) {
        let mut free = Vec::new();
        match unit {
            Unit::Image(place) => {
                let Some(image) = graph.snapshot.images.get(*place) else {
                    return;
                };
                self.plan
                    .steps
                    .push(Step::Tag(image.key.clone(), image.names.clone()));
                for at in graph.named.at(*place) {
                    self.release(at, &mut free);
                }
            }
            Unit::Alone(at) => free.push(*at),
        }
        let mut blobs = Vec::new();
        let mut next = 0;
        while let Some(at) = free.get(next).copied() {
            next += 1;
            if self.is_spared.get(at) == Some(&true) {
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
    fn release(&mut self, at: At, free: &mut Vec<At>) {
        if let Some(holders) = self.holders.get_mut(at) {
            *holders = holders.saturating_sub(1);
            if *holders == 0 {
                free.push(at);
            }
        }
    }

    fn remove(&mut self, graph: &Graph<'_>, at: At) {
        let (Some(content), Some(is_gone @ false)) = (graph.nodes.get(at), self.is_gone.get_mut(at)) else {
            return;
        };
        *is_gone = true;
        self.plan.bytes = self.plan.bytes.saturating_add(content.bytes);
        self.plan.steps.push(if graph.is_blob(at) {
            Step::Blob(content.digest)
        } else {
            Step::Manifest(content.digest)
        });
    }

    /// Takes back the tags of which everything is still there, for others need it.
    fn without_idle_tags(mut self, graph: &Graph<'_>, idle: &[(usize, &Unit)]) -> Plan {
        let mut taken_back = Vec::new();
        for (step, unit) in idle {
            if !matches!(unit, Unit::Image(_)) {
                continue;
            }
            let mut reached = graph.roots(**unit);
            let mut is_whole = !reached.is_empty();
            while let (true, Some(at)) = (is_whole, reached.pop()) {
                is_whole = self.is_gone.get(at) == Some(&false);
                reached.extend(graph.children.at(at));
            }
            if is_whole {
                taken_back.push(*step);
            }
        }
        let mut place = 0;
        self.plan.steps.retain(|_| {
            place += 1;
            taken_back.binary_search(&(place - 1)).is_err()
        });
        self.plan
    }
}

#[cfg(test)]
mod tests;
