#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::{Node, SystemTime, plan_deletion};
use crate::oci::{Algorithm, Digest};
use crate::store::graph::TargetsChecksum;
use crate::store::graph::tests::{Image, ManifestNode, Node as StoredNode, Snapshot};
use crate::store::tags::TagKey;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// Content used later is protected.
const PROTECTED_SINCE: u64 = 80;

fn digest(name: &str) -> Digest {
    Digest::of(Algorithm::Sha256, name.as_bytes())
}

fn key(tag: &str) -> TagKey {
    TagKey {
        upstream: "docker.io".into(),
        repository: "library/alpine".parse().unwrap(),
        tag: tag.parse().unwrap(),
    }
}

fn node(name: &str, bytes: u64, used: u64) -> StoredNode {
    StoredNode {
        digest: digest(name),
        bytes,
        used_at: at(used),
        is_protected: false,
    }
}

fn manifest_node(name: &str, used: u64, children: &[&str]) -> ManifestNode {
    ManifestNode {
        node: node(name, 1, used),
        children: children.iter().map(|name| digest(name)).collect(),
        subject: None,
    }
}

fn image(tag: &str, targets: &[&str]) -> Image {
    Image {
        key: key(tag),
        targets: targets.iter().map(|name| digest(name)).collect(),
        used_at: at(0),
        is_pinned: false,
    }
}

/// A removal as the tests write it: a tag with its key and targets.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Tag(TagKey, Vec<Digest>),
    Manifest(Digest),
    Blob(Digest),
}

/// A plan as the tests read it.
struct Planned {
    steps: Vec<Step>,
    bytes: u64,
}

fn plan(snapshot: &Snapshot, bytes: u64, protected_since: SystemTime) -> Planned {
    let plan = super::plan(snapshot.graph(), bytes, protected_since);
    let step = |(node, _)| match node {
        Node::Tag(tag) => {
            let image = snapshot.images.iter().find(|image| image.key.name() == tag.name);
            let image = image.unwrap();
            assert_eq!(tag.targets, TargetsChecksum::of(&image.sorted_targets()));
            Step::Tag(image.key.clone(), image.targets.clone())
        }
        Node::Manifest(digest) => Step::Manifest(digest),
        Node::Blob(digest) => Step::Blob(digest),
    };
    assert_eq!(plan.reclaimed().bytes, plan.bytes);
    Planned {
        steps: plan.steps().map(step).collect(),
        bytes: plan.bytes,
    }
}

fn steps(snapshot: &Snapshot, bytes: u64) -> Vec<Step> {
    plan(snapshot, bytes, at(PROTECTED_SINCE)).steps
}

fn tag(tag: &str, targets: &[&str]) -> Step {
    let Image { key, targets, .. } = image(tag, targets);
    Step::Tag(key, targets)
}

fn manifest(name: &str) -> Step {
    Step::Manifest(digest(name))
}

fn blob(name: &str) -> Step {
    Step::Blob(digest(name))
}

/// Two images that share a base layer.
fn two_images() -> Snapshot {
    Snapshot {
        images: vec![image("new", &["m-new"]), image("old", &["m-old"])],
        manifests: vec![
            manifest_node("m-old", 10, &["base", "only-old"]),
            manifest_node("m-new", 20, &["base", "only-new"]),
        ],
        blobs: vec![
            node("base", 100, 1),
            node("only-old", 10, 1),
            node("only-new", 10, 1),
        ],
    }
}

#[test]
fn plan_evicts_lru_image_and_keeps_shared_content() {
    let oldest = [tag("old", &["m-old"]), manifest("m-old"), blob("only-old")];
    assert_eq!(steps(&two_images(), 1), oldest);
    assert_eq!(plan(&two_images(), 1, at(PROTECTED_SINCE)).bytes, 11);
}

#[test]
fn plan_evicts_shared_layer_with_its_last_image() {
    let all = plan(&two_images(), u64::MAX, at(PROTECTED_SINCE));
    assert_eq!(all.bytes, 122);
    assert_eq!(
        all.steps[3..],
        [
            tag("new", &["m-new"]),
            manifest("m-new"),
            blob("base"),
            blob("only-new")
        ]
    );
}

#[test]
fn plan_protects_recent_pinned_and_open_content() {
    let mut snapshot = two_images();
    snapshot.manifests[0].node.used_at = at(PROTECTED_SINCE + 1);
    snapshot.images[0].is_pinned = true;
    assert_eq!(steps(&snapshot, u64::MAX), []);
    snapshot.images[0].is_pinned = false;
    snapshot.manifests[1].node.is_protected = true;
    assert_eq!(
        steps(&snapshot, u64::MAX),
        [],
        "a tag is not forgotten for nothing"
    );
    snapshot.manifests[1].node.is_protected = false;
    snapshot.blobs[2].is_protected = true;
    assert_eq!(
        steps(&snapshot, u64::MAX),
        [tag("new", &["m-new"]), manifest("m-new")]
    );
}

#[test]
fn plan_keeps_tag_whose_removal_frees_nothing() {
    let mut snapshot = two_images();
    snapshot.images.push(image("0-alias", &["m-new"]));
    snapshot.manifests[1].node.used_at = at(5);
    snapshot.manifests[0].node.used_at = at(20);
    snapshot.images[0].used_at = at(90);
    assert_eq!(
        steps(&snapshot, 1),
        [tag("old", &["m-old"]), manifest("m-old"), blob("only-old")]
    );
}

#[test]
fn plan_counts_platform_pull_as_use_of_the_index() {
    let snapshot = Snapshot {
        images: vec![image("multi", &["index"]), image("single", &["m-single"])],
        manifests: vec![
            manifest_node("index", 1, &["m-amd64", "m-absent"]),
            manifest_node("m-amd64", 30, &["layer"]),
            manifest_node("m-single", 20, &["other"]),
        ],
        blobs: vec![node("layer", 10, 1), node("other", 10, 1)],
    };
    assert_eq!(
        steps(&snapshot, 1),
        [tag("single", &["m-single"]), manifest("m-single"), blob("other")]
    );
    assert_eq!(
        steps(&snapshot, u64::MAX)[3..],
        [
            tag("multi", &["index"]),
            manifest("index"),
            manifest("m-amd64"),
            blob("layer")
        ]
    );
}

#[test]
fn plan_evicts_untagged_image_in_lru_order() {
    let mut snapshot = two_images();
    snapshot
        .manifests
        .push(manifest_node("untagged", 15, &["base", "its-own"]));
    snapshot
        .blobs
        .extend([node("its-own", 5, 1), node("stray", 7, 12)]);
    let steps = steps(&snapshot, 24);
    assert_eq!(steps[3..], [blob("stray"), manifest("untagged"), blob("its-own")]);
}

#[test]
fn plan_evicts_signature_right_after_its_subject() {
    let mut snapshot = two_images();
    let mut signature = manifest_node("signature", 2, &["payload"]);
    signature.subject = Some(digest("m-new"));
    snapshot.manifests.push(signature);
    snapshot.blobs.push(node("payload", 3, 2));
    let steps = steps(&snapshot, u64::MAX);
    assert_eq!(steps[0], tag("old", &["m-old"]));
    assert_eq!(steps[7..], [manifest("signature"), blob("payload")]);
}

#[test]
fn plan_removes_tag_without_stored_content() {
    let mut snapshot = two_images();
    snapshot.images.push(image("dangling", &["gone"]));
    assert_eq!(steps(&snapshot, 1)[0], tag("dangling", &["gone"]));
    assert_eq!(steps(&snapshot, 0), []);
}

/// Any snapshot. A manifest references any blobs, but only manifests with a higher number: digests allow no cycle.
fn any_snapshot() -> impl Strategy<Value = Snapshot> {
    let manifest = (
        0_u64..100,
        any::<prop::sample::Selector>(),
        0_usize..4,
        0_usize..3,
        prop::option::weighted(0.2, any::<prop::sample::Index>()),
        prop::bool::weighted(0.05),
    );
    let manifests = prop::collection::vec(manifest, 1..14);
    let blobs = prop::collection::vec((0_u64..100, 0_u64..1000, prop::bool::weighted(0.05)), 1..20);
    let images = prop::collection::vec(
        (
            prop::collection::vec(any::<prop::sample::Index>(), 0..3),
            0_u64..100,
            prop::bool::weighted(0.1),
        ),
        0..10,
    );
    (manifests, blobs, images, any::<prop::sample::Selector>()).prop_map(
        |(manifests, blobs, images, picks)| {
            let count = manifests.len();
            let name = |at: usize| format!("m{at}");
            let manifest_node = manifests
                .into_iter()
                .enumerate()
                .map(
                    |(at, (used, pick, few_blobs, few_manifests, subject, is_protected))| {
                        let mut children = Vec::new();
                        for _ in 0..few_blobs {
                            children.push(digest(&format!("b{}", picks.select(0..blobs.len() + 2))));
                        }
                        if at + 1 < count {
                            for _ in 0..few_manifests {
                                children.push(digest(&name(pick.select(at + 1..=count))));
                            }
                        }
                        ManifestNode {
                            node: StoredNode {
                                is_protected,
                                ..node(&name(at), 1, used)
                            },
                            children,
                            subject: subject.map(|subject| digest(&name(subject.index(count)))),
                        }
                    },
                )
                .collect();
            let blobs = blobs
                .into_iter()
                .enumerate()
                .map(|(at, (used, bytes, is_protected))| StoredNode {
                    is_protected,
                    ..node(&format!("b{at}"), bytes, used)
                });
            let images = images
                .into_iter()
                .enumerate()
                .map(|(at, (targets, used, is_pinned))| Image {
                    key: key(&format!("t{at}")),
                    targets: targets
                        .iter()
                        .map(|index| digest(&name(index.index(count + 1))))
                        .collect(),
                    used_at: at_time(used),
                    is_pinned,
                })
                .collect();
            Snapshot {
                images,
                manifests: manifest_node,
                blobs: blobs.collect(),
            }
        },
    )
}

fn at_time(seconds: u64) -> SystemTime {
    at(seconds)
}

/// Reference model of the snapshot: keyed by digest, without node IDs and reference counts.
struct Model<'a> {
    snapshot: &'a Snapshot,
    manifests: BTreeMap<Digest, &'a ManifestNode>,
    blobs: BTreeMap<Digest, &'a StoredNode>,
}

impl<'a> Model<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let manifests = snapshot.manifests.iter();
        Self {
            snapshot,
            manifests: manifests
                .map(|manifest_node| (manifest_node.node.digest, manifest_node))
                .collect(),
            blobs: snapshot.blobs.iter().map(|blob| (blob.digest, blob)).collect(),
        }
    }

    fn contents(&self) -> impl Iterator<Item = &StoredNode> {
        let manifests = self.manifests.values().map(|manifest_node| &manifest_node.node);
        manifests.chain(self.blobs.values().copied())
    }

    /// Stored content that is reachable from `from`.
    fn closure(&self, from: impl IntoIterator<Item = Digest>) -> BTreeSet<Digest> {
        let mut found = BTreeSet::new();
        let mut open: Vec<Digest> = from.into_iter().collect();
        while let Some(digest) = open.pop() {
            let is_held = self.manifests.contains_key(&digest) || self.blobs.contains_key(&digest);
            if is_held
                && found.insert(digest)
                && let Some(manifest_node) = self.manifests.get(&digest)
            {
                open.extend(&manifest_node.children);
            }
        }
        found
    }

    fn used(&self, from: impl IntoIterator<Item = Digest>) -> Option<SystemTime> {
        let closure = self.closure(from);
        let manifests = closure.iter().filter_map(|digest| self.manifests.get(digest));
        manifests.map(|manifest_node| manifest_node.node.used_at).max()
    }

    fn image_used(&self, image: &Image) -> SystemTime {
        let newest = self.used(
            image
                .targets
                .iter()
                .copied()
                .filter(|name| self.manifests.contains_key(name)),
        );
        newest.map_or(image.used_at, |newest| newest.max(image.used_at))
    }

    fn is_protected(&self, image: &Image) -> bool {
        image.is_pinned || self.image_used(image) > at(PROTECTED_SINCE)
    }

    /// Content that must stay, however many bytes are requested.
    fn untouchable(&self) -> BTreeSet<Digest> {
        let images = self
            .snapshot
            .images
            .iter()
            .filter(|image| self.is_protected(image));
        let named = images.flat_map(|image| image.targets.iter().copied());
        let named = named.filter(|name| self.manifests.contains_key(name));
        let kept = self
            .contents()
            .filter(|node| node.is_protected || node.used_at > at(PROTECTED_SINCE));
        self.closure(named.chain(kept.map(|node| node.digest)).collect::<Vec<_>>())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn plan_keeps_listed_images_complete_and_frees_enough(snapshot in any_snapshot(), wanted in 0_u64..6000) {
        let model = Model::of(&snapshot);
        let plan = plan(&snapshot, wanted, at(PROTECTED_SINCE));
        let mut removed = BTreeSet::new();
        let mut forgotten = BTreeSet::new();
        for step in &plan.steps {
            match step {
                Step::Tag(key, _) => prop_assert!(forgotten.insert(key.clone())),
                Step::Manifest(digest) => {
                    let parents = model.manifests.values().filter(|manifest_node| manifest_node.children.contains(digest));
                    for parent in parents {
                        prop_assert!(removed.contains(&parent.node.digest), "a parent goes before its child");
                    }
                    prop_assert!(removed.insert(*digest));
                }
                Step::Blob(digest) => prop_assert!(removed.insert(*digest)),
            }
        }
        // Shared content counts once.
        let bytes: u64 = model.contents().filter(|node| removed.contains(&node.digest)).map(|node| node.bytes).sum();
        prop_assert_eq!(bytes, plan.bytes);
        // A remaining image keeps all its content.
        let staying: Vec<&Image> = snapshot.images.iter().filter(|image| !forgotten.contains(&image.key)).collect();
        for image in &staying {
            let targets = image.targets.iter().copied().filter(|name| model.manifests.contains_key(name));
            prop_assert!(model.closure(targets).is_disjoint(&removed), "{} is broken", image.key.tag);
        }
        for manifest_node in model.manifests.values().filter(|manifest_node| !removed.contains(&manifest_node.node.digest)) {
            prop_assert!(model.closure(manifest_node.children.iter().copied()).is_disjoint(&removed));
        }
        for image in snapshot.images.iter().filter(|image| model.is_protected(image)) {
            prop_assert!(!forgotten.contains(&image.key));
        }
        let untouchable = model.untouchable();
        prop_assert!(untouchable.is_disjoint(&removed));
        // The plan frees enough, or everything evictable. A referrer stays as long as its subject.
        let leads_to_what_was_used = |node: &StoredNode| {
            model.manifests.contains_key(&node.digest) && model.used([node.digest]) > Some(at(PROTECTED_SINCE))
        };
        let about_what_stays = |node: &StoredNode| {
            if leads_to_what_was_used(node) { return true; }
            let mut at = model.manifests.get(&node.digest).and_then(|manifest_node| manifest_node.subject);
            for _ in 0..snapshot.manifests.len() {
                let Some(subject) = at.filter(|subject| model.manifests.contains_key(subject)) else { return false };
                if !removed.contains(&subject) { return true; }
                at = model.manifests[&subject].subject;
            }
            true
        };
        if plan.bytes < wanted {
            let referrers = model.contents().filter(|node| about_what_stays(node)).map(|node| node.digest);
            let may_stay = model.closure(referrers.chain(untouchable.iter().copied()).collect::<Vec<_>>());
            for node in model.contents() {
                prop_assert!(removed.contains(&node.digest) || may_stay.contains(&node.digest));
            }
        }
        // Least recently used first. An older image stays only if its removal would free nothing.
        let newest = snapshot.images.iter().filter(|image| forgotten.contains(&image.key)).map(|image| model.image_used(image)).max();
        for older in staying.iter().filter(|image| !image.is_pinned && newest.is_some_and(|newest| model.image_used(image) < newest)) {
            let others = staying.iter().filter(|image| image.key != older.key).flat_map(|image| image.targets.iter().copied());
            let manifests = model.manifests.values().filter(|manifest_node| !removed.contains(&manifest_node.node.digest));
            let others: Vec<_> = others.chain(untouchable.iter().copied())
                .chain(manifests.filter(|manifest_node| !older.targets.contains(&manifest_node.node.digest)).map(|manifest_node| manifest_node.node.digest)).collect();
            let needed = model.closure(others);
            let targets = older.targets.iter().copied().filter(|name| model.manifests.contains_key(name));
            let own = model.closure(targets);
            let own: Vec<_> = own.difference(&needed).collect();
            prop_assert!(own.is_empty(), "{} is older and has {own:?} of its own", older.key.tag);
        }
    }

    #[test]
    fn plan_is_independent_of_listing_order(snapshot in any_snapshot(), wanted in 0_u64..3000) {
        let mut turned = snapshot.clone();
        turned.images.reverse();
        turned.manifests.reverse();
        turned.blobs.reverse();
        let (one, other) = (plan(&snapshot, wanted, at(PROTECTED_SINCE)), plan(&turned, wanted, at(PROTECTED_SINCE)));
        prop_assert_eq!(one.bytes, other.bytes);
        let sorted = |plan: &Planned| {
            let mut targets: Vec<String> = plan.steps.iter().map(|step| format!("{step:?}")).collect();
            targets.sort();
            targets
        };
        prop_assert_eq!(sorted(&one), sorted(&other));
    }
}

#[test]
fn deletion_removes_what_only_its_tags_reference() {
    let mut snapshot = two_images();
    // Protection is against eviction, not against the operator.
    snapshot.images[0].is_pinned = true;
    snapshot.manifests[1].node.used_at = at(PROTECTED_SINCE + 1);
    snapshot.blobs[2].is_protected = true;
    let delete = |snapshot: &Snapshot, tags: &[&str]| {
        let names: Vec<Digest> = tags.iter().map(|tag| key(tag).name()).collect();
        let plan = plan_deletion(snapshot.graph(), &names, &[]);
        plan.steps().map(|(node, _)| node).collect::<Vec<_>>()
    };
    let content = |nodes: &[Node]| nodes[1..].to_vec();
    let own = [Node::Manifest(digest("m-new")), Node::Blob(digest("only-new"))];
    assert_eq!(content(&delete(&snapshot, &["new"])), own);
    assert_eq!(delete(&snapshot, &["absent"]), []);
    assert_eq!(delete(&snapshot, &["old", "new"]).len(), 7);
    // Its platform was pulled with an index, by digest.
    snapshot.manifests.push(manifest_node("untagged", 1, &["m-new"]));
    assert_eq!(content(&delete(&snapshot, &["new"])), []);
}

#[test]
fn plan_of_diamonds_ends() {
    // Each manifest refers to both of the next level: 2^60 paths, 121 nodes.
    let name = |level: u32, side: &str| format!("{level}-{side}");
    let mut manifests = vec![manifest_node("top", 1, &["0-a", "0-b", "0-a"])];
    for level in 0..60 {
        let next = [name(level + 1, "a"), name(level + 1, "b")];
        let next = [&*next[0], &*next[1]];
        manifests.extend(["a", "b"].map(|side| manifest_node(&name(level, side), 1, &next)));
    }
    let snapshot = Snapshot {
        images: vec![image("kept", &["top"]), image("useless", &["top"])],
        manifests,
        blobs: vec![],
    };
    let mut kept = snapshot.clone();
    kept.images[0].is_pinned = true;
    assert_eq!(steps(&kept, 1), []);
    assert_eq!(steps(&snapshot, u64::MAX).len(), 2 + 121);
}
