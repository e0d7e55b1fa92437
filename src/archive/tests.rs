//! Export and import between two stores, and rejected archives.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

mod hostile;
mod meanwhile;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde_json::{Value, json};

use super::export::{self, Plan, Platforms};
use super::import::{self, ImportOptions, Imported};
use super::{Image, layout};
use crate::oci::{Accept, Algorithm, AnyDigest, Digest, Hasher, MediaType, Reference};
use crate::store::blobs::Verified;
use crate::store::fs::{FileSystem, MemoryFs};
use crate::store::listings::StoredListing;
use crate::store::tags::{NEVER_CONFIRMED, TagKey, Variant};
use crate::store::{Settings, Store};

const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const NAME: &str = "docker.io/library/app:1";

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(bytes).to_string(), "size": bytes.len() })
}

/// Resolves a full name as the admin API does.
fn named(name: &str) -> Result<Image, String> {
    let (place, tag) = name.rsplit_once(':').ok_or("no tag")?;
    let (upstream, repository) = place.split_once('/').ok_or("no upstream")?;
    if upstream != "docker.io" {
        return Err(format!("`{upstream}` is not a configured upstream"));
    }
    Ok(Image {
        name: name.to_owned(),
        upstream: upstream.into(),
        repository: repository.parse().map_err(|_| "no repository")?,
        reference: tag.parse().map_err(|_| "no tag")?,
    })
}

fn key(name: &str) -> TagKey {
    let image = named(name).unwrap();
    let Reference::Tag(tag) = image.reference else {
        panic!()
    };
    TagKey {
        upstream: image.upstream,
        repository: image.repository,
        tag,
    }
}

/// A store with its folder.
struct Ground {
    fs: Arc<MemoryFs>,
    store: Store,
}

impl Ground {
    fn new() -> Self {
        let fs = Arc::new(MemoryFs::new());
        let store = Store::open(
            &Settings::default(),
            Arc::clone(&fs) as Arc<dyn FileSystem>,
            now(),
        )
        .unwrap();
        Self { fs, store }
    }

    fn holds_blob(&self, bytes: &[u8]) {
        let of = digest(bytes);
        let ingest = self.store.begin(&of, Some(bytes.len() as u64)).unwrap();
        ingest.file().write_at(bytes, 0).unwrap();
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        let proof = Verified::check(hasher, &of, bytes.len() as u64, None).unwrap();
        ingest.commit(proof).unwrap();
    }

    /// Stores a blob as a member of the repository of `name`.
    fn has(&self, name: &str, bytes: &[u8]) {
        self.holds_blob(bytes);
        let image = named(name).unwrap();
        self.store
            .add_member(&image.upstream, &image.repository, &digest(bytes))
            .unwrap();
    }

    fn has_manifest(&self, name: &str, media_type: &str, manifest: &[u8]) {
        let image = named(name).unwrap();
        let bytes = Bytes::copy_from_slice(manifest);
        self.store
            .put_manifest(
                bytes,
                media_type.parse().unwrap(),
                digest(manifest),
                &image.upstream,
                &image.repository,
            )
            .unwrap();
        self.store
            .add_member(&image.upstream, &image.repository, &digest(manifest))
            .unwrap();
    }

    fn has_tag(&self, name: &str, media_type: &str, manifest: &[u8], confirmed_at: SystemTime) {
        let variant = Variant {
            accept: Accept::manifests().key(),
            digest: digest(manifest),
            media_type: media_type.parse().unwrap(),
            accepts_indexes: true,
            confirmed_at,
            first_seen_at: now(),
            previous: None,
            is_by_record: false,
            history: Vec::new(),
        };
        self.store.put_tag(&key(name), variant).unwrap();
    }

    /// A tagged image with one layer.
    fn has_image(&self, name: &str, layer: &[u8]) -> Vec<u8> {
        let config = [b"config of ", layer].concat();
        let manifest = manifest(&config, layer);
        self.has(name, &config);
        self.has(name, layer);
        self.has_manifest(name, IMAGE, &manifest);
        self.has_tag(name, IMAGE, &manifest, now());
        manifest
    }

    fn export(&self, names: &[&str], platforms: Platforms<'_>) -> Result<Vec<u8>, export::ExportError> {
        let images: Vec<Image> = names.iter().map(|name| named(name).unwrap()).collect();
        let plan = Plan::new(&self.store, &images, platforms, now())?;
        let mut archive = Vec::new();
        plan.write(&self.store, &mut archive).unwrap();
        assert_eq!(
            plan.bytes(),
            archive.len() as u64,
            "the length is known before the first byte"
        );
        Ok(archive)
    }

    fn import(&self, archive: &[u8]) -> Result<Imported, import::ImportError> {
        self.import_as(archive, None, false)
    }

    fn import_as(
        &self,
        archive: &[u8],
        name: Option<&str>,
        is_public: bool,
    ) -> Result<Imported, import::ImportError> {
        let options = ImportOptions {
            resolve: &named,
            name: name.map(str::to_owned),
            is_public,
            now: now(),
        };
        import::import(&self.store, archive, &options)
    }

    fn tagged(&self, name: &str) -> Option<Variant> {
        let record = self.store.tag(&key(name)).unwrap()?;
        record.variants.first().cloned()
    }

    fn blob(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let held = self.store.blob(&digest(bytes)).unwrap()?;
        Some(held.read_all(u64::MAX).unwrap())
    }

    fn is_complete(&self, name: &str, manifest: &[u8]) -> bool {
        let image = named(name).unwrap();
        let Some(held) = self.store.manifest(&digest(manifest)).unwrap() else {
            return false;
        };
        self.store
            .is_image_complete(&image.upstream, &image.repository, &held, &|_| false)
    }

    fn is_member(&self, name: &str, bytes: &[u8]) -> bool {
        let image = named(name).unwrap();
        self.store
            .is_member(&image.upstream, &image.repository, &digest(bytes))
    }
}

/// A manifest with unusual formatting, so that only its original bytes match the digest.
fn manifest(config: &[u8], layer: &[u8]) -> Vec<u8> {
    let text = json!({
        "schemaVersion": 2,
        "mediaType": IMAGE,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", layer)],
    });
    format!("{text:#}\n ").into_bytes()
}

fn index_of(children: &[(&str, &[u8])]) -> Vec<u8> {
    let children: Vec<Value> = children
        .iter()
        .map(|(architecture, manifest)| {
            let mut child = descriptor(IMAGE, manifest);
            child["platform"] = json!({ "os": "linux", "architecture": architecture });
            child
        })
        .collect();
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": children })
        .to_string()
        .into_bytes()
}

/// A store with an image of three platforms, two of them complete.
fn several_platforms() -> (Ground, Vec<u8>, [Vec<u8>; 3]) {
    let ground = Ground::new();
    let amd64 = ground.has_image(NAME, b"amd64");
    let arm64 = ground.has_image(NAME, b"arm64");
    let s390x = manifest(b"config", b"s390x");
    let index = index_of(&[("amd64", &amd64), ("arm64", &arm64), ("s390x", &s390x)]);
    ground.has_manifest(NAME, INDEX, &index);
    ground.has_tag(NAME, INDEX, &index, now());
    (ground, index, [amd64, arm64, s390x])
}

#[test]
fn exported_image_is_imported_byte_for_byte() {
    let (from, index, [amd64, arm64, s390x]) = several_platforms();
    let archive = from.export(&[NAME], Platforms::Cached).unwrap();
    let to = Ground::new();
    let imported = to.import(&archive).unwrap();
    assert_eq!(imported.images[0].platforms, ["linux/amd64", "linux/arm64"]);
    assert_eq!((imported.objects, imported.new_objects), (7, 7));
    assert!(!imported.images[0].was_cached);
    assert_eq!(to.tagged(NAME).unwrap().digest, digest(&index));
    for manifest in [&index, &amd64, &arm64] {
        let held = to.store.manifest(&digest(manifest)).unwrap().unwrap();
        assert_eq!(&held.bytes[..], &manifest[..]);
        assert!(to.is_complete(NAME, manifest));
        assert!(
            to.blob(manifest).is_none(),
            "a manifest is kept as a manifest alone"
        );
    }
    assert!(to.store.manifest(&digest(&s390x)).unwrap().is_none());
    assert_eq!(to.blob(b"arm64").unwrap(), b"arm64");
    assert_eq!(
        to.export(&[NAME], Platforms::Cached).unwrap(),
        archive,
        "the same content is the same archive"
    );

    let again = to.import(&archive).unwrap();
    assert_eq!((again.new_objects, again.images[0].was_cached), (0, true));
}

#[test]
fn selected_platform_is_exported_alone_and_complete() {
    let (from, index, [amd64, arm64, s390x]) = several_platforms();
    let only = |wanted: &'static str| move |platform: &str| platform == wanted;
    let archive = from
        .export(&[NAME], Platforms::Selected(&only("linux/arm64")))
        .unwrap();
    let to = Ground::new();
    assert_eq!(to.import(&archive).unwrap().images[0].platforms, ["linux/arm64"]);
    assert!(to.is_complete(NAME, &index) && to.is_complete(NAME, &arm64) && !to.is_complete(NAME, &amd64));

    let refused = from
        .export(&[NAME], Platforms::Selected(&only("linux/s390x")))
        .unwrap_err();
    assert!(
        refused.to_string().contains(&digest(&s390x).to_string()),
        "{refused}"
    );
    let refused = from
        .export(&[NAME], Platforms::Selected(&only("windows/amd64")))
        .unwrap_err();
    assert!(matches!(refused, export::ExportError::NoPlatform(_)), "{refused}");
}

#[test]
fn incomplete_image_is_rejected_with_missing_digests() {
    let ground = Ground::new();
    ground.has_image(NAME, b"layer");
    ground.store.remove_blob(&digest(b"layer")).unwrap();
    let refused = ground.export(&[NAME], Platforms::Cached).unwrap_err();
    assert!(
        refused.to_string().contains(&digest(b"layer").to_string()),
        "{refused}"
    );
    let refused = ground
        .export(&["docker.io/library/other:1"], Platforms::Cached)
        .unwrap_err();
    assert!(matches!(refused, export::ExportError::NotCached(_)), "{refused}");
}

#[test]
fn export_omits_objects_of_other_repositories() {
    let ground = Ground::new();
    let manifest = manifest(b"config", b"of another");
    ground.has(NAME, b"config");
    ground.has("docker.io/other/private:1", b"of another");
    ground.has_manifest(NAME, IMAGE, &manifest);
    ground.has_tag(NAME, IMAGE, &manifest, now());
    let refused = ground.export(&[NAME], Platforms::Cached).unwrap_err();
    assert!(
        refused.to_string().contains(&digest(b"of another").to_string()),
        "{refused}"
    );
}

#[test]
fn imported_tag_is_unconfirmed_and_grants_nothing() {
    let from = Ground::new();
    let old = from.has_image(NAME, b"layer");
    let archive = from.export(&[NAME], Platforms::Cached).unwrap();
    let to = Ground::new();
    to.import(&archive).unwrap();
    let image = named(NAME).unwrap();
    assert_eq!(to.tagged(NAME).unwrap().confirmed_at, NEVER_CONFIRMED);
    assert!(to.is_member(NAME, b"layer") && to.is_member(NAME, &old));
    assert_eq!(
        to.store.public_since(&image.upstream, &image.repository),
        None,
        "nobody may read it"
    );
    assert_eq!(to.store.grants_count(&image.upstream, &image.repository), 0);

    to.import_as(&archive, None, true).unwrap();
    let since = to.store.public_since(&image.upstream, &image.repository);
    assert_eq!(
        since,
        Some(NEVER_CONFIRMED),
        "public for an outage, asked about while anyone answers"
    );

    // An import of a confirmed image keeps its confirmation.
    to.has_tag(NAME, IMAGE, &old, now());
    to.store
        .set_public(&image.upstream, &image.repository, Some(now()))
        .unwrap();
    to.import_as(&archive, None, true).unwrap();
    assert_eq!(to.tagged(NAME).unwrap().confirmed_at, now());
    assert_eq!(
        to.store.public_since(&image.upstream, &image.repository),
        Some(now())
    );
}

#[test]
fn imported_tag_serves_every_accept_set() {
    let from = Ground::new();
    let new = from.has_image(NAME, b"new");
    let archive = from.export(&[NAME], Platforms::Cached).unwrap();
    let to = Ground::new();
    let old = to.has_image(NAME, b"old");
    let variant = Variant {
        accept: 7,
        ..to.tagged(NAME).unwrap()
    };
    to.store.put_tag(&key(NAME), variant).unwrap();
    to.import(&archive).unwrap();
    let record = to.store.tag(&key(NAME)).unwrap().unwrap();
    let digests: Vec<Digest> = record.variants.iter().map(|variant| variant.digest).collect();
    assert_eq!(digests, [digest(&new)]);
    assert!(
        to.is_complete(NAME, &old),
        "what the tag named before is still here"
    );
}

#[test]
fn referrers_are_exported_and_listed_without_tag() {
    let from = Ground::new();
    let subject = from.has_image(NAME, b"layer");
    from.has(NAME, b"{}");
    from.has(NAME, b"signature");
    let mut signature = json!({
        "schemaVersion": 2,
        "mediaType": IMAGE,
        "config": descriptor("application/vnd.oci.empty.v1+json", b"{}"),
        "layers": [descriptor("application/vnd.example", b"signature")],
    });
    signature["subject"] = descriptor(IMAGE, &subject);
    let signature = signature.to_string().into_bytes();
    from.has_manifest(NAME, IMAGE, &signature);
    let mut listed = descriptor(IMAGE, &signature);
    listed["annotations"] =
        json!({ "io.containerd.image.name": "docker.io/library/alpine:latest", "by": "me" });
    let listing = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [listed] }).to_string();
    let listing = StoredListing::new(
        Bytes::from(listing),
        INDEX.parse::<MediaType>().unwrap(),
        None,
        None,
        now(),
    );
    let asked = export::referrers_key(&named(NAME).unwrap(), digest(&subject));
    from.store.put_listing(&asked, listing).unwrap();

    let archive = from.export(&[NAME], Platforms::Cached).unwrap();
    let to = Ground::new();
    let imported = to.import(&archive).unwrap();
    assert_eq!(
        imported.images.len(),
        1,
        "a signature's annotation names no image: {imported:?}"
    );
    assert!(to.is_member(NAME, &signature) && to.is_member(NAME, b"signature"));
    let kept = to.store.listing(&asked).unwrap().unwrap();
    let entries = layout::read_index(&kept.bytes).unwrap();
    assert_eq!(entries[0].digest, digest(&signature));
    assert_eq!(entries[0].descriptor["annotations"], json!({ "by": "me" }));
}

#[test]
fn an_image_by_digest_has_no_tag() {
    let from = Ground::new();
    let manifest = from.has_image(NAME, b"layer");
    let image = Image {
        name: format!("docker.io/library/app@{}", digest(&manifest)),
        reference: Reference::Digest(AnyDigest::Supported(digest(&manifest))),
        ..named(NAME).unwrap()
    };
    let plan = Plan::new(
        &from.store,
        std::slice::from_ref(&image),
        Platforms::Cached,
        now(),
    )
    .unwrap();
    let mut archive = Vec::new();
    plan.write(&from.store, &mut archive).unwrap();
    let to = Ground::new();
    let options = ImportOptions {
        resolve: &|_| Ok(image.clone()),
        name: None,
        is_public: false,
        now: now(),
    };
    import::import(&to.store, &archive[..], &options).unwrap();
    assert!(to.is_complete(NAME, &manifest));
    assert!(to.tagged(NAME).is_none());
}

#[test]
fn damaged_blob_aborts_the_export() {
    let ground = Ground::new();
    ground.has_image(NAME, b"layer");
    let images = [named(NAME).unwrap()];
    let plan = Plan::new(&ground.store, &images, Platforms::Cached, now()).unwrap();
    let of = digest(b"layer");
    let path = format!("blobs/sha256/{}/{}", &of.hex()[..2], of.hex());
    ground.fs.remove(path.as_ref()).unwrap();
    let file = ground.fs.create(path.as_ref()).unwrap();
    file.write_at(b"reyal", 0).unwrap();
    drop(ground.store.remove_blob(&digest(b"nothing")));
    let store = Store::open(
        &Settings::default(),
        Arc::clone(&ground.fs) as Arc<dyn FileSystem>,
        now(),
    )
    .unwrap();
    let mut archive = Vec::new();
    plan.write(&store, &mut archive).unwrap_err();
    assert!(store.blob(&of).unwrap().is_none(), "it is set aside");
}
