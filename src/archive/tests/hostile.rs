//! Malicious and damaged archives, which leave nothing in the store.

use std::io::Read;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::archive::import::ImportError;

/// Builder of an archive.
#[derive(Default)]
pub(super) struct Archive(Vec<(tar::EntryType, String, Vec<u8>)>);

impl Archive {
    /// A layout with `manifest` and one layer.
    pub(super) fn of(manifest: &[u8], blobs: &[&[u8]]) -> Self {
        let mut archive = Self::default();
        archive.file("oci-layout", &layout::layout_document());
        archive.file("index.json", &index(IMAGE, manifest, NAME));
        for blob in blobs.iter().chain([&manifest]) {
            archive.blob(blob);
        }
        archive
    }

    fn complete() -> Self {
        Self::of(&manifest(b"config", b"layer"), &[b"config", b"layer"])
    }

    fn file(&mut self, name: &str, bytes: &[u8]) {
        self.0
            .push((tar::EntryType::Regular, name.to_owned(), bytes.to_vec()));
    }

    fn blob(&mut self, bytes: &[u8]) {
        self.file(&layout::blob_name(&digest(bytes)), bytes);
    }

    fn special(&mut self, kind: tar::EntryType, name: &str) {
        self.0.push((kind, name.to_owned(), Vec::new()));
    }

    /// Bypasses the checks of the tar crate for writers.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        for (kind, name, bytes) in &self.0 {
            archive.extend(head(*kind, name, bytes.len() as u64));
            archive.extend(bytes);
            archive.resize(archive.len().div_ceil(512) * 512, 0);
        }
        archive.resize(archive.len() + 1024, 0);
        archive
    }
}

fn head(kind: tar::EntryType, name: &str, size: u64) -> [u8; 512] {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_cksum();
    *header.as_bytes()
}

fn index(media_type: &str, manifest: &[u8], name: &str) -> Vec<u8> {
    let mut entry = descriptor(media_type, manifest);
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
    json!({ "schemaVersion": 2, "manifests": [entry] })
        .to_string()
        .into_bytes()
}

/// Asserts that the archive is rejected and leaves no name and no bytes.
fn refused(archive: impl Read) -> ImportError {
    let ground = Ground::new();
    let options = ImportOptions {
        resolve: &named,
        name: None,
        is_public: true,
        now: now(),
    };
    let refused = import::import(&ground.store, archive, &options).unwrap_err();
    assert!(ground.tagged(NAME).is_none(), "{refused}");
    for blob in [&b"config"[..], b"layer", &manifest(b"config", b"layer")] {
        assert!(ground.blob(blob).is_none(), "{refused}");
        assert!(!ground.is_member(NAME, blob), "{refused}");
    }
    let image = named(NAME).unwrap();
    assert_eq!(
        ground.store.public_since(&image.upstream, &image.repository),
        None,
        "{refused}"
    );
    refused
}

fn refused_with(change: impl FnOnce(&mut Archive)) -> ImportError {
    let mut archive = Archive::complete();
    change(&mut archive);
    refused(&archive.bytes()[..])
}

#[test]
fn unmodified_archive_is_imported() {
    let ground = Ground::new();
    ground.import(&Archive::complete().bytes()).unwrap();
    assert!(ground.is_complete(NAME, &manifest(b"config", b"layer")));
}

#[test]
fn path_traversal_and_special_files_are_rejected() {
    for name in [
        "../../etc/passwd",
        "/etc/passwd",
        "blobs/sha256/../../x",
        "blobs/sha256/short",
        "layer.tar",
    ] {
        let refused = refused_with(|archive| archive.file(name, b"x"));
        assert!(
            matches!(&refused, ImportError::UnexpectedEntry { .. }),
            "{name}: {refused}"
        );
    }
    for kind in [
        tar::EntryType::Symlink,
        tar::EntryType::Link,
        tar::EntryType::Char,
        tar::EntryType::Block,
        tar::EntryType::Fifo,
        tar::EntryType::GNUSparse,
        tar::EntryType::Continuous,
        tar::EntryType::XGlobalHeader,
    ] {
        let name = layout::blob_name(&digest(b"other"));
        let refused = refused_with(|archive| archive.special(kind, &name));
        assert!(
            matches!(
                &refused,
                ImportError::UnexpectedEntry { .. } | ImportError::Unreadable(_)
            ),
            "{kind:?}: {refused}"
        );
    }
    let refused = refused_with(|archive| archive.special(tar::EntryType::Directory, "blobs/sha256/deeper"));
    assert!(
        matches!(refused, ImportError::UnexpectedEntry { .. }),
        "{refused}"
    );
}

#[test]
fn archive_bytes_of_another_digest_are_not_stored() {
    let refused = refused_with(|archive| {
        let name = layout::blob_name(&digest(b"one thing"));
        archive.file(&name, b"another");
    });
    assert!(matches!(refused, ImportError::DigestMismatch(_)), "{refused}");
}

#[test]
fn duplicate_file_is_rejected() {
    for twice in [
        refused_with(|archive| archive.blob(b"layer")),
        refused_with(|archive| archive.file("index.json", b"{}")),
        refused_with(|archive| archive.file("./oci-layout", b"{}")),
    ] {
        assert!(matches!(twice, ImportError::Duplicate(_)), "{twice}");
    }
}

#[test]
fn oversized_blob_is_rejected_at_once() {
    let mut archive = Archive::complete().bytes();
    archive.truncate(archive.len() - 1024);
    let name = layout::blob_name(&digest(b"huge"));
    archive.extend(head(tar::EntryType::Regular, &name, 1 << 62));
    let ground = Ground::new();
    ground.fs.set_bytes_max(1 << 20);
    let refused = ground.import(&archive).unwrap_err();
    assert!(matches!(refused, ImportError::Store(_)), "{refused}");
    assert!(
        ground.blob(b"layer").is_none(),
        "what came before it is gone again"
    );
}

#[test]
fn full_store_is_unchanged_by_a_failed_import() {
    let ground = Ground::new();
    let layer = vec![7; 1 << 20];
    let image = manifest(b"config", &layer);
    let archive = Archive::of(&image, &[b"config", &layer]).bytes();
    ground.fs.set_bytes_max(1 << 19);
    let refused = ground.import(&archive).unwrap_err();
    assert!(matches!(refused, ImportError::Store(_)), "{refused}");
    assert!(ground.blob(b"config").is_none() && ground.tagged(NAME).is_none());
    ground.fs.set_bytes_max(u64::MAX);
    ground.import(&archive).unwrap();
    assert!(ground.is_complete(NAME, &image));
}

#[test]
fn endless_archive_is_rejected() {
    // An endless long name exceeds the limit of data before a file, at the start and later.
    let mut complete = Archive::complete().bytes();
    complete.truncate(complete.len() - 1024);
    for before in [&[][..], &complete] {
        let long_name = head(tar::EntryType::GNULongName, "././@LongLink", 1 << 40);
        let endless = std::io::repeat(b'a').take(1 << 20);
        let refused = refused(before.chain(&long_name[..]).chain(endless));
        assert!(
            refused
                .to_string()
                .contains("the data before a file is too large"),
            "{refused}"
        );
    }
    // The number of files is limited.
    let folder = head(tar::EntryType::Directory, "blobs/", 0);
    let folders = folder.repeat(import::ENTRIES_MAX + 1);
    assert!(matches!(refused(&folders[..]), ImportError::TooMany(..)));
    let document = head(tar::EntryType::Regular, "manifest.json", 1 << 40);
    let refused_document = refused((&document[..]).chain(std::io::repeat(b'a')));
    assert!(
        matches!(refused_document, ImportError::TooMany(..)),
        "{refused_document}"
    );
}

#[test]
fn truncated_archive_is_rejected() {
    let whole = Archive::complete().bytes();
    for length in (0..whole.len() - 1024).step_by(97) {
        refused(&whole[..length]);
    }
    let broken = (&whole[..whole.len() - 1024]).chain(Broken);
    assert!(matches!(refused(broken), ImportError::Unreadable(_)));
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::ConnectionReset.into())
    }
}

#[test]
fn incomplete_archive_is_rejected() {
    let image = manifest(b"config", b"layer");
    let refused_layer = refused(&Archive::of(&image, &[b"config"]).bytes()[..]);
    assert!(
        refused_layer.to_string().contains(&digest(b"layer").to_string()),
        "{refused_layer}"
    );
    let refused_index = refused_with(|archive| archive.0.retain(|(_, name, _)| name != "index.json"));
    assert!(
        matches!(refused_index, ImportError::Document { .. }),
        "{refused_index}"
    );
    let refused_layout = refused_with(|archive| archive.0.retain(|(_, name, _)| name != "oci-layout"));
    assert!(
        matches!(refused_layout, ImportError::Document { .. }),
        "{refused_layout}"
    );
}

#[test]
fn unknown_or_conflicting_media_types_are_rejected() {
    for media_type in ["application/json", "text/html", INDEX] {
        let refused = refused_with(|archive| {
            archive.0[1].2 = index(media_type, &manifest(b"config", b"layer"), NAME);
        });
        assert!(
            matches!(refused, ImportError::Manifest { .. }),
            "{media_type}: {refused}"
        );
    }
    let both = br#"{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}"#;
    let refused_both = refused(&Archive::of(both, &[]).bytes()[..]);
    assert!(
        matches!(refused_both, ImportError::Manifest { .. }),
        "{refused_both}"
    );
}

#[test]
fn incomplete_image_name_is_rejected() {
    let short = |name: &str| {
        let mut archive = Archive::complete();
        archive.0[1].2 = index(IMAGE, &manifest(b"config", b"layer"), name);
        archive.bytes()
    };
    assert!(matches!(refused(&short("1")[..]), ImportError::Unnamed { .. }));
    assert!(matches!(
        refused(&short("elsewhere.example/a/b:1")[..]),
        ImportError::Unknown(_)
    ));
    let ground = Ground::new();
    ground.import_as(&short("1"), Some(NAME), false).unwrap();
    assert!(ground.tagged(NAME).is_some());
}

#[test]
fn digest_without_bytes_grants_no_access() {
    let ground = Ground::new();
    ground.has("docker.io/acme/secret:1", b"layer");
    let archive = Archive::of(&manifest(b"config", b"layer"), &[b"config"]).bytes();
    let refused = ground.import_as(&archive, None, true).unwrap_err();
    assert!(matches!(refused, ImportError::Incomplete { .. }), "{refused}");
    assert!(!ground.is_member(NAME, b"layer"));
    assert_eq!(ground.blob(b"layer").unwrap(), b"layer", "what was held stays");
    // With its bytes, it is accepted: the archive's creator had them.
    ground
        .import_as(&Archive::complete().bytes(), None, true)
        .unwrap();
    assert!(ground.is_member(NAME, b"layer"));
    // An archive must contain the bytes that it declares.
    let mut liar = Archive::of(&manifest(b"config", b"layer"), &[b"config"]);
    liar.file(&layout::blob_name(&digest(b"layer")), b"loyer");
    let other = Ground::new();
    other.has("docker.io/acme/secret:1", b"layer");
    let refused = other.import(&liar.bytes()).unwrap_err();
    assert!(matches!(refused, ImportError::DigestMismatch(_)), "{refused}");
}

#[test]
fn what_no_image_needs_does_not_stay() {
    let mut archive = Archive::complete();
    archive.blob(b"stowaway");
    let ground = Ground::new();
    let imported = ground.import(&archive.bytes()).unwrap();
    assert_eq!(imported.objects, 3);
    assert!(ground.blob(b"stowaway").is_none());
}

#[test]
fn shared_child_indexes_are_resolved_once() {
    let leaf = manifest(b"config", b"layer");
    let child = |number: usize, inner: &[u8]| {
        let list: Vec<Value> = (0..500)
            .map(|_| descriptor(if inner == leaf { IMAGE } else { INDEX }, inner))
            .collect();
        json!({ "schemaVersion": 2, "mediaType": INDEX, "n": number, "manifests": list })
            .to_string()
            .into_bytes()
    };
    let inner = child(0, &leaf);
    let outer = child(1, &inner);
    let mut archive = Archive::of(&outer, &[b"config", b"layer", &leaf, &inner]);
    archive.0[1].2 = index(INDEX, &outer, NAME);
    let ground = Ground::new();
    assert_eq!(ground.import(&archive.bytes()).unwrap().objects, 5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn modified_archive_is_imported_completely_or_rejected(
        place in any::<Index>(), other in any::<Index>(), change in 1_u8.., kind in 0_u8..4
    ) {
        let image = manifest(b"config", b"layer");
        let mut archive = Archive::complete().bytes();
        let (place, other) = (place.index(archive.len()), other.index(archive.len()));
        match kind {
            0 => archive[place] ^= change,
            1 => archive.truncate(place),
            2 => drop(archive.drain(place.min(other)..place.max(other))),
            _ => {
                let length = archive.len();
                archive.copy_within(place..length.min(place + 512), other.min(length - 512));
            }
        }
        let ground = Ground::new();
        ground.fs.set_bytes_max(1 << 24);
        if let Ok(imported) = ground.import(&archive) {
            // A changed byte may change the image's name, but not its content.
            let taken = &imported.images[0];
            prop_assert_eq!(taken.digest, digest(&image));
            prop_assert!(ground.is_complete(&taken.name, &image));
        } else {
            prop_assert!(ground.tagged(NAME).is_none());
            prop_assert!(ground.blob(b"layer").is_none() && ground.blob(b"config").is_none());
        }
    }
}
