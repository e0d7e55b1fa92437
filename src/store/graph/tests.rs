#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use super::super::usage::Usage;
use super::*;
use crate::oci::Algorithm;
use crate::store::tags::TagKey;

/// A tag with its targets.
#[derive(Clone, Debug)]
pub(in crate::store) struct Image {
    pub(in crate::store) key: TagKey,
    /// The digests it references, stored or not.
    pub(in crate::store) targets: Vec<Digest>,
    pub(in crate::store) used_at: SystemTime,
    pub(in crate::store) is_pinned: bool,
}

impl Image {
    pub(in crate::store) fn sorted_targets(&self) -> Vec<Digest> {
        let mut targets = self.targets.clone();
        targets.sort_unstable();
        targets.dedup();
        targets
    }
}

/// A manifest or a blob.
#[derive(Clone, Debug)]
pub(in crate::store) struct Node {
    pub(in crate::store) digest: Digest,
    pub(in crate::store) bytes: u64,
    pub(in crate::store) used_at: SystemTime,
    /// Pinned by digest, or open by a reader.
    pub(in crate::store) is_protected: bool,
}

/// A manifest with its references.
#[derive(Clone, Debug)]
pub(in crate::store) struct ManifestNode {
    pub(in crate::store) node: Node,
    pub(in crate::store) children: Vec<Digest>,
    pub(in crate::store) subject: Option<Digest>,
}

/// The stored content, by name and in any order.
#[derive(Clone, Debug, Default)]
pub(in crate::store) struct Snapshot {
    pub(in crate::store) images: Vec<Image>,
    pub(in crate::store) manifests: Vec<ManifestNode>,
    pub(in crate::store) blobs: Vec<Node>,
}

impl Snapshot {
    /// The graph of a store with this content.
    pub(in crate::store) fn graph(&self) -> Graph {
        let mut images: Vec<&Image> = self.images.iter().collect();
        images.sort_by_key(|image| image.key.name());
        let mut manifests: Vec<&ManifestNode> = self.manifests.iter().collect();
        manifests.sort_by_key(|manifest| manifest.node.digest);
        let mut blobs: Vec<&Node> = self.blobs.iter().collect();
        blobs.sort_by_key(|blob| blob.digest);
        let mut graph = Graph::with_capacity(&Usage {
            tags: images.len() as u64,
            manifests: manifests.len() as u64,
            blobs: blobs.len() as u64,
            ..Usage::default()
        });
        let of = |node: &Node| (node.bytes, node.used_at, node.is_protected);
        for image in &images {
            graph.add_tag(&image.key.name(), image.used_at).unwrap();
        }
        for manifest in &manifests {
            let node = &manifest.node;
            graph.add_manifest(&node.digest, of(node)).unwrap();
        }
        for blob in &blobs {
            graph.add_blob(&blob.digest, of(blob)).unwrap();
        }
        for (id, image) in graph.tags().zip(&images) {
            let targets = image.sorted_targets();
            graph.refer_from_tag(id, &targets, image.is_pinned).unwrap();
        }
        for (id, manifest) in graph.manifests().zip(&manifests) {
            let (children, subject) = (manifest.children.iter(), manifest.subject.as_ref());
            graph.refer_from_manifest(id, children, subject).unwrap();
        }
        graph
    }
}

fn digest(name: &str) -> Digest {
    Digest::of(Algorithm::Sha256, name.as_bytes())
}

fn node(name: &str) -> Node {
    Node {
        digest: digest(name),
        bytes: 1000,
        used_at: SystemTime::UNIX_EPOCH,
        is_protected: false,
    }
}

fn image(tag: &str, target: &str) -> Image {
    Image {
        key: TagKey {
            upstream: "docker.io".into(),
            repository: "library/alpine".parse().unwrap(),
            tag: tag.parse().unwrap(),
        },
        targets: vec![digest(target)],
        used_at: SystemTime::UNIX_EPOCH,
        is_pinned: false,
    }
}

fn manifest(name: &str, children: &[String]) -> ManifestNode {
    ManifestNode {
        node: node(name),
        children: children.iter().map(|child| digest(child)).collect(),
        subject: None,
    }
}

/// A store of so many objects: a quarter are manifests with a tag and three blobs each.
pub(in crate::store) fn large_store(objects: u32) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for number in 0..objects / 4 {
        let name = format!("m{number}");
        let blobs: Vec<String> = (0..3).map(|blob| format!("{number}-{blob}")).collect();
        snapshot.blobs.extend(blobs.iter().map(|blob| node(blob)));
        snapshot.images.push(image(&name, &name));
        snapshot.manifests.push(manifest(&name, &blobs));
    }
    snapshot
}

impl Graph {
    /// Allocated bytes.
    pub(in crate::store) fn heap_bytes(&self) -> usize {
        let Names {
            tags,
            targets,
            manifests,
            blobs,
            sizes,
        } = &self.names;
        let names: usize = [tags, manifests, blobs]
            .into_iter()
            .map(Digests::heap_bytes)
            .sum();
        names
            + size_of::<TargetsChecksum>() * targets.capacity()
            + size_of::<u64>() * sizes.capacity()
            + size_of::<Seconds>() * self.used_at.capacity()
            + size_of::<bool>() * self.is_kept.capacity()
            + self.children.heap_bytes()
            + size_of::<(NodeId, NodeId)>() * self.subjects.capacity()
    }
}

#[test]
fn graph_takes_at_most_64_bytes_per_object() {
    let objects = 40_000;
    let graph = large_store(objects).graph();
    assert_eq!(graph.len(), 50_000, "and a tag for each manifest");
    let bytes_per_object = graph.heap_bytes() / objects as usize;
    assert!(bytes_per_object <= 64, "{bytes_per_object}");
}

#[test]
fn node_number_beyond_u32_is_an_error() {
    let max = u32::MAX as usize;
    assert_eq!(NodeId::new(max).unwrap().index(), max);
    assert!(NodeId::new(max + 1).is_err());
}

#[test]
fn use_is_rounded_up_to_seconds() {
    let at = |millis| Seconds::of(SystemTime::UNIX_EPOCH + Duration::from_millis(millis)).0;
    assert_eq!([at(0), at(1), at(1000), at(1001)], [0, 1, 1, 2]);
    assert_eq!(at(u64::MAX / 2), u32::MAX);
    let before = |millis| Seconds::before(SystemTime::UNIX_EPOCH + Duration::from_millis(millis)).0;
    assert_eq!([before(0), before(999), before(1000)], [0, 0, 1]);
    assert!(at(10_600) > before(10_500), "used after the limit");
}

#[test]
fn tags_are_counted_once_per_node() {
    let blobs = ["shared", "own"].map(str::to_owned);
    let mut snapshot = Snapshot {
        images: vec![image("1", "m"), image("2", "m"), image("3", "index")],
        manifests: vec![
            manifest("m", &blobs),
            manifest("other", &blobs[..1]),
            manifest("index", &["m", "other", "m"].map(str::to_owned)),
        ],
        blobs: blobs.iter().map(|blob| node(blob)).collect(),
    };
    snapshot.blobs.push(node("untagged"));
    let graph = snapshot.graph();
    let counts = graph.tag_counts();
    let count = |id: Option<NodeId>| counts.get(id.unwrap().index()).copied().unwrap();
    let manifest = |name| count(graph.names.manifest(&digest(name)));
    let blob = |name| count(graph.names.blob(&digest(name)));
    assert_eq!((manifest("m"), manifest("other"), manifest("index")), (3, 1, 1));
    assert_eq!((blob("shared"), blob("own"), blob("untagged")), (3, 3, 0));
}
