//! Evictions, deletions and pulls during an import or an export.

use std::io::{self, Read, Write};

use super::hostile::Archive;
use super::*;
use crate::archive::import::ImportError;
use crate::store::Limits;
use crate::store::access_times::ContentId;
use crate::store::verdicts::{VerdictKey, VerdictKind, VerdictNote, VerdictScope};

const OLD: &str = "docker.io/library/old:1";
const OTHER: &str = "docker.io/library/other:1";

/// An archive that calls `meanwhile` before the byte at `at`.
struct Interrupted<'a, F> {
    archive: &'a [u8],
    at: usize,
    meanwhile: Option<F>,
}

impl<F: FnOnce()> Read for Interrupted<'_, F> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let before = match (self.at, self.meanwhile.take()) {
            (0, Some(meanwhile)) => {
                meanwhile();
                into.len()
            }
            (at, meanwhile @ Some(_)) => {
                self.meanwhile = meanwhile;
                at
            }
            (_, None) => into.len(),
        };
        let count = before.min(into.len());
        let read = self.archive.read(&mut into[..count])?;
        self.at = self.at.saturating_sub(read);
        Ok(read)
    }
}

/// Imports `archive`, with `meanwhile` before the header of `blob`.
fn import_with(
    ground: &Ground,
    archive: &[u8],
    blob: &[u8],
    meanwhile: impl FnOnce(),
) -> Result<Imported, ImportError> {
    let name = layout::blob_name(&digest(blob));
    let at = archive
        .windows(name.len())
        .position(|bytes| bytes == name.as_bytes());
    let archive = Interrupted {
        archive,
        at: at.unwrap(),
        meanwhile: Some(meanwhile),
    };
    let options = ImportOptions {
        resolve: &named,
        name: None,
        is_public: false,
        now: now(),
    };
    import::import(&ground.store, archive, &options)
}

fn image_of(layers: &[&[u8]]) -> Vec<u8> {
    let layer = |bytes: &&[u8]| descriptor("application/vnd.oci.image.layer.v1.tar", bytes);
    let layers: Vec<Value> = layers.iter().map(layer).collect();
    json!({ "schemaVersion": 2, "mediaType": IMAGE, "layers": layers })
        .to_string()
        .into_bytes()
}

#[test]
fn import_into_full_store_keeps_cached_layers_it_needs() {
    let hours = |hours: u64| now() + Duration::from_secs(hours * 3600);
    // At once, and after a part that takes longer than new content is protected.
    for second_layer_at in [hours(2), hours(5)] {
        let ground = Ground::new();
        let (first, second, unneeded) = (vec![1; 3000], vec![2; 2000], vec![3; 3000]);
        ground.has_image(OLD, &first);
        let other = ground.has_image(OTHER, &unneeded);
        ground.store.touch(
            ContentId::Manifest(digest(&other)),
            hours(0) + Duration::from_secs(60),
        );
        while !ground.store.usage().is_complete {
            std::thread::yield_now();
        }
        ground.store.tick(hours(2));
        let usage = ground.store.usage();
        ground.store.set_limits(Limits {
            bytes_max: usage.blob_bytes + usage.manifest_bytes + 1000,
            free_bytes_min: 0,
        });
        let image = image_of(&[&first, &second]);
        let archive = Archive::of(&image, &[&first, &second]).bytes();
        let time_passes = || ground.store.tick(second_layer_at);
        import_with(&ground, &archive, &second, time_passes).unwrap();
        assert!(ground.is_complete(NAME, &image));
        assert!(ground.tagged(OLD).is_none(), "it made room");
    }
}

#[test]
fn import_fails_if_a_layer_is_removed_meanwhile() {
    let ground = Ground::new();
    ground.has(OTHER, b"first");
    let image = image_of(&[b"first", b"second"]);
    let archive = Archive::of(&image, &[b"first", b"second"]).bytes();
    let remove = || _ = ground.store.remove_blob(&digest(b"first")).unwrap();
    let refused = import_with(&ground, &archive, &image, remove).unwrap_err();
    assert!(
        matches!(refused, ImportError::Removed(removed) if removed == digest(b"first")),
        "{refused}"
    );
    assert!(ground.tagged(NAME).is_none());
    ground.import(&archive).unwrap();
    assert!(ground.is_complete(NAME, &image));
}

#[test]
fn failed_import_keeps_what_another_image_uses_by_then() {
    let ground = Ground::new();
    let archive = Archive::of(&image_of(&[b"first", b"second"]), &[b"first"]).bytes();
    let pulled = image_of(&[b"first"]);
    let pull = || ground.has_manifest(OTHER, IMAGE, &pulled);
    let image = image_of(&[b"first", b"second"]);
    let refused = import_with(&ground, &archive, &image, pull).unwrap_err();
    assert!(matches!(refused, ImportError::Incomplete { .. }), "{refused}");
    assert!(ground.blob(b"first").is_some());
    assert!(ground.blob(&image).is_none(), "nothing uses its manifest");
}

/// Output of an export that calls `meanwhile` after so many bytes.
struct Reader<F> {
    bytes: usize,
    after: usize,
    meanwhile: Option<F>,
}

impl<F: FnOnce()> Write for Reader<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len();
        if self.bytes >= self.after
            && let Some(meanwhile) = self.meanwhile.take()
        {
            meanwhile();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn export_ends_when_a_digest_is_blocked() {
    const MIB: usize = 1024 * 1024;
    let ground = Ground::new();
    let layer = vec![1; 8 * MIB];
    let image = image_of(&[&layer]);
    ground.has(NAME, &layer);
    ground.has_manifest(NAME, IMAGE, &image);
    ground.has_tag(NAME, IMAGE, &image, now());
    let other = ground.has_image(OTHER, b"layer");
    let named = named(NAME).unwrap();
    let plan = Plan::new(
        &ground.store,
        std::slice::from_ref(&named),
        Platforms::Cached,
        now(),
    )
    .unwrap();
    let key = |digest: Digest, name: &str| VerdictKey {
        kind: VerdictKind::Blocked,
        scope: VerdictScope::Repository {
            upstream: named.upstream.clone(),
            repository: super::named(name).unwrap().repository,
        },
        digest,
    };
    let note = || VerdictNote {
        at: now(),
        by: "an operator".to_owned(),
        reason: None,
    };
    let write = |key: &VerdictKey| {
        let mut out = Reader {
            bytes: 0,
            after: 2 * MIB,
            meanwhile: Some(|| _ = ground.store.put_verdict(key, note()).unwrap()),
        };
        let written = plan.write(&ground.store, &mut out);
        ground.store.remove_verdict(key).unwrap();
        (written, out.bytes)
    };
    // The layer that is being written, and the manifest that was written before it.
    for digest in [digest(&layer), digest(&image)] {
        let (written, bytes) = write(&key(digest, NAME));
        let error = written.unwrap_err().to_string();
        assert!(error.contains("is blocked"), "{error}");
        assert!(bytes < 4 * MIB, "{bytes}");
    }
    for key in [key(digest(&layer), OTHER), key(digest(&other), NAME)] {
        let (written, bytes) = write(&key);
        written.unwrap();
        assert_eq!(bytes as u64, plan.bytes());
    }
}
