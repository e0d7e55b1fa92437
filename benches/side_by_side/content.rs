//! Content: one repository as files, so that plain nginx can serve it as a registry.

use crate::Outcome;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

pub(crate) const REPOSITORY: &str = "library/bench";
/// The type of the one manifest.
pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// The digests of everything under `root`.
pub(crate) struct Content {
    /// nginx's document root.
    pub(crate) root: PathBuf,
    /// The image with the repeatedly requested blob.
    pub(crate) image: Image,
    /// The image of the stampede.
    pub(crate) herd_image: Image,
    /// Blobs requested once each. In no image, so that they are not prefetched.
    pub(crate) cold: Vec<String>,
}

/// A tag, its manifest, its configuration and its one layer.
pub(crate) struct Image {
    pub(crate) tag: &'static str,
    pub(crate) manifest: String,
    pub(crate) config: String,
    pub(crate) layer: String,
    pub(crate) layer_bytes: u64,
}

impl Content {
    /// Writes the repository below `scratch`. Every blob is incompressible and of its own bytes.
    pub(crate) fn make(scratch: &Path, blob_bytes: u64, cold: usize) -> Outcome<Self> {
        let root = scratch.join("www");
        let repository = make_repository(&root)?;
        let blobs = repository.join("blobs");
        let image = |tag, seed| {
            Image::make(
                &repository,
                tag,
                write_noise(&blobs, seed, blob_bytes)?,
                blob_bytes,
            )
        };
        let (image, herd_image) = (image("latest", 1)?, image("herd", 2)?);
        let cold = (0..cold as u64)
            .map(|n| write_noise(&blobs, n + 3, blob_bytes))
            .collect::<Outcome<_>>()?;
        Ok(Content {
            root,
            image,
            herd_image,
            cold,
        })
    }
}

impl Image {
    fn make(repository: &Path, tag: &'static str, layer: String, layer_bytes: u64) -> Outcome<Self> {
        let (manifest, config) = write_manifest(repository, tag, &[&layer], layer_bytes)?;
        Ok(Image {
            tag,
            manifest,
            config,
            layer,
            layer_bytes,
        })
    }
}

/// A tag and layers of one size.
pub(crate) struct Layered {
    pub(crate) tag: &'static str,
    pub(crate) manifest: String,
    pub(crate) config: String,
    pub(crate) layers: Vec<String>,
    pub(crate) layer_bytes: u64,
}

impl Layered {
    /// Writes the image into the repository below `root`. The layers' bytes are those of the seeds from `seed` on.
    pub(crate) fn make(
        root: &Path,
        tag: &'static str,
        seed: u64,
        count: u64,
        layer_bytes: u64,
    ) -> Outcome<Self> {
        let repository = make_repository(root)?;
        let blobs = repository.join("blobs");
        let layers = (seed..seed + count)
            .map(|seed| write_noise(&blobs, seed, layer_bytes))
            .collect::<Outcome<Vec<_>>>()?;
        let names: Vec<&str> = layers.iter().map(String::as_str).collect();
        let (manifest, config) = write_manifest(&repository, tag, &names, layer_bytes)?;
        Ok(Layered {
            tag,
            manifest,
            config,
            layers,
            layer_bytes,
        })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.layer_bytes * self.layers.len() as u64
    }
}

fn make_repository(root: &Path) -> Outcome<PathBuf> {
    let repository = root.join("v2").join(REPOSITORY);
    for folder in ["blobs", "manifests"] {
        std::fs::create_dir_all(repository.join(folder))?;
    }
    Ok(repository)
}

/// Writes a manifest under its digest and a tag, and its config. Returns the digests of both.
fn write_manifest(
    repository: &Path,
    tag: &str,
    layers: &[&str],
    layer_bytes: u64,
) -> Outcome<(String, String)> {
    let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let config_digest = digest_of(config);
    std::fs::write(repository.join("blobs").join(&config_digest), config)?;
    let layers: Vec<String> = layers
        .iter()
        .map(|layer| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer}","size":{layer_bytes}}}"#
            )
        })
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_TYPE}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},"layers":[{}]}}"#,
        config.len(),
        layers.join(","),
    );
    let digest = digest_of(manifest.as_bytes());
    std::fs::write(repository.join("manifests").join(tag), &manifest)?;
    std::fs::write(repository.join("manifests").join(&digest), &manifest)?;
    Ok((digest, config_digest))
}

/// The path of a manifest by its tag.
pub(crate) fn manifest_by_tag(tag: &str) -> String {
    format!("/v2/{REPOSITORY}/manifests/{tag}")
}

/// The path of a manifest by its digest.
pub(crate) fn manifest_by_digest(digest: &str) -> String {
    format!("/v2/{REPOSITORY}/manifests/{digest}")
}

/// The path of a blob.
pub(crate) fn blob(digest: &str) -> String {
    format!("/v2/{REPOSITORY}/blobs/{digest}")
}

/// Writes xorshift64* bytes from `seed` under their digest, which is returned.
pub(crate) fn write_noise(folder: &Path, seed: u64, bytes: u64) -> Outcome<String> {
    let unnamed = folder.join("unnamed");
    let mut file = std::fs::File::create(&unnamed)?;
    let mut hash = Sha256::new();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut chunk = vec![0_u8; 1024 * 1024];
    let mut left = bytes;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
        }
        let part = chunk
            .get(..usize::try_from(left)?.min(chunk.len()))
            .ok_or("a chunk is never short")?;
        hash.update(part);
        file.write_all(part)?;
        left -= part.len() as u64;
    }
    let digest = named(&hash.finalize());
    std::fs::rename(unnamed, folder.join(&digest))?;
    Ok(digest)
}

/// `sha256:…` of some bytes.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    named(&Sha256::digest(bytes))
}

/// `sha256:…` of a finished hash.
pub(crate) fn named(hash: &[u8]) -> String {
    hash.iter().fold(String::from("sha256:"), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}
