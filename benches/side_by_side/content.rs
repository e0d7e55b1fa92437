//! What is served: one repository laid out as files, so that a plain nginx can be its registry.

use crate::Outcome;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

const REPOSITORY: &str = "library/bench";
/// The type of the one manifest.
pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// The digests of everything under `root`.
pub(crate) struct Content {
    /// nginx's document root.
    pub(crate) root: PathBuf,
    /// The manifest, tagged `latest`, with every blob as a layer.
    pub(crate) manifest: String,
    /// Asked for again and again.
    pub(crate) warm: String,
    /// Asked for by many at once, the first time.
    pub(crate) herd: String,
    /// Asked for once each.
    pub(crate) cold: Vec<String>,
}

impl Content {
    /// Writes the repository below `scratch`. Every blob is incompressible and of its own bytes.
    pub(crate) fn make(scratch: &Path, blob_bytes: u64, cold: usize) -> Outcome<Self> {
        let root = scratch.join("www");
        let blobs = root.join("v2").join(REPOSITORY).join("blobs");
        let manifests = root.join("v2").join(REPOSITORY).join("manifests");
        std::fs::create_dir_all(&blobs)?;
        std::fs::create_dir_all(&manifests)?;

        let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
        let config_digest = digest_of(config);
        std::fs::write(blobs.join(&config_digest), config)?;
        let mut layers = Vec::new();
        for seed in 1..=(cold as u64 + 2) {
            layers.push(write_noise(&blobs, seed, blob_bytes)?);
        }

        let listed: Vec<String> = layers
            .iter()
            .map(|digest| format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{digest}","size":{blob_bytes}}}"#))
            .collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_TYPE}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},"layers":[{}]}}"#,
            config.len(),
            listed.join(",")
        );
        let digest = digest_of(manifest.as_bytes());
        std::fs::write(manifests.join("latest"), &manifest)?;
        std::fs::write(manifests.join(&digest), &manifest)?;

        let (warm, herd) = (layers.remove(0), layers.remove(0));
        Ok(Content {
            root,
            manifest: digest,
            warm,
            herd,
            cold: layers,
        })
    }
}

/// The path of the manifest by its tag.
pub(crate) fn manifest_by_tag() -> String {
    format!("/v2/{REPOSITORY}/manifests/latest")
}

/// The path of a manifest by its digest.
pub(crate) fn manifest_by_digest(digest: &str) -> String {
    format!("/v2/{REPOSITORY}/manifests/{digest}")
}

/// The path of a blob.
pub(crate) fn blob(digest: &str) -> String {
    format!("/v2/{REPOSITORY}/blobs/{digest}")
}

/// The bytes of xorshift64* from `seed`, written under their digest, which is the answer.
fn write_noise(folder: &Path, seed: u64, bytes: u64) -> Outcome<String> {
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
