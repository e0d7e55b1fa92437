//! Content of a registry: blobs, images, indexes and artifacts, generated from a few bytes.

use bytes::Bytes;
use serde_json::{Value, json};
use sha2::Digest as _;
use std::fmt::Write as _;

/// An OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// A Docker v2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// A Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// The digest of `bytes` as registries write it. Computed here, not by the program under test.
pub fn sha256(bytes: &[u8]) -> String {
    hex("sha256:", &sha2::Sha256::digest(bytes))
}

/// The same by the other algorithm.
pub fn sha512(bytes: &[u8]) -> String {
    hex("sha512:", &sha2::Sha512::digest(bytes))
}

fn hex(prefix: &str, bytes: &[u8]) -> String {
    bytes.iter().fold(prefix.to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// `size` bytes that do not compress and differ by `seed`.
pub fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Bytes with their digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// `sha256:…`
    pub digest: String,
    /// The content.
    pub bytes: Bytes,
}

impl Blob {
    /// A blob of these bytes.
    pub fn of(bytes: &[u8]) -> Blob {
        Blob {
            digest: sha256(bytes),
            bytes: Bytes::copy_from_slice(bytes),
        }
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.bytes.len()})
    }
}

/// A manifest with its blobs and children.
#[derive(Clone, Debug)]
pub struct Image {
    /// The digest of the manifest.
    pub digest: String,
    /// The exact `Content-Type` of the manifest.
    pub media_type: String,
    /// The bytes of the manifest.
    pub manifest: Bytes,
    /// The config, when there is one, then the layers.
    pub blobs: Vec<Blob>,
    /// The manifests of an index.
    pub children: Vec<Image>,
    /// The subject and the artifact type.
    pub attached: Option<(String, String)>,
}

impl Image {
    /// An OCI image of these layers.
    pub fn with_layers<L: AsRef<[u8]>>(layers: &[L]) -> Image {
        let layers = layers.iter().map(|layer| Blob::of(layer.as_ref())).collect();
        Image::built(OCI_MANIFEST, layers, |config, layers| {
            json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
                "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
                "layers": layers.iter()
                    .map(|layer| layer.descriptor("application/vnd.oci.image.layer.v1.tar")).collect::<Vec<_>>()})
        })
    }

    /// A Docker v2 image of these layers.
    pub fn docker_with_layers<L: AsRef<[u8]>>(layers: &[L]) -> Image {
        let layers = layers.iter().map(|layer| Blob::of(layer.as_ref())).collect();
        Image::built(DOCKER_MANIFEST, layers, |config, layers| {
            json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
                "config": config.descriptor("application/vnd.docker.container.image.v1+json"),
                "layers": layers.iter()
                    .map(|layer| layer.descriptor("application/vnd.docker.image.rootfs.diff.tar")).collect::<Vec<_>>()})
        })
    }

    /// An image with one layer of `size` bytes of noise.
    pub fn of_noise(seed: u64, size: usize) -> Image {
        Image::with_layers(&[noise(seed, size)])
    }

    /// An OCI index over these images, one per architecture.
    pub fn index(children: &[Image]) -> Image {
        let manifests: Vec<_> = children
            .iter()
            .zip(["amd64", "arm64", "riscv64", "s390x"])
            .map(|(child, architecture)| {
                json!({"mediaType": child.media_type, "digest": child.digest, "size": child.manifest.len(),
                    "platform": {"os": "linux", "architecture": architecture}})
            })
            .collect();
        let manifest =
            json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).to_string();
        Image {
            children: children.to_vec(),
            ..Image::raw(OCI_INDEX, manifest.as_bytes())
        }
    }

    /// An index as buildx makes it: beside each image an attestation of it, of an unknown platform.
    pub fn attested(images: &[Image]) -> Image {
        let attestations: Vec<_> = images.iter().map(Image::attestation_of).collect();
        let plain: Value = serde_json::from_slice(&Image::index(images).manifest).unwrap();
        let mut manifests = plain["manifests"].as_array().unwrap().clone();
        manifests.extend(images.iter().zip(&attestations).map(|(image, attestation)| {
            json!({"mediaType": OCI_MANIFEST, "digest": attestation.digest, "size": attestation.manifest.len(),
                "annotations": {"vnd.docker.reference.digest": image.digest,
                    "vnd.docker.reference.type": "attestation-manifest"},
                "platform": {"os": "unknown", "architecture": "unknown"}})
        }));
        let manifest =
            json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).to_string();
        Image {
            children: [images, &attestations].concat(),
            ..Image::raw(OCI_INDEX, manifest.as_bytes())
        }
    }

    /// Provenance as a layer.
    fn attestation_of(image: &Image) -> Image {
        let statement = json!({"_type": "https://in-toto.io/Statement/v0.1",
            "subject": [{"digest": {"sha256": &image.digest["sha256:".len()..]}}]});
        let layer = Blob::of(statement.to_string().as_bytes());
        Image::built(OCI_MANIFEST, vec![layer], |config, layers| {
            json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
                "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
                "layers": [layers[0].descriptor("application/vnd.in-toto+json")]})
        })
    }

    /// An artifact of `kind` attached to `subject`: a signature, an SBOM.
    pub fn attached_to(subject: &Image, kind: &str, content: &[u8]) -> Image {
        let config = Blob::of(b"{}");
        let layer = Blob::of(content);
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind,
            "config": config.descriptor("application/vnd.oci.empty.v1+json"),
            "layers": [layer.descriptor("application/octet-stream")],
            "subject": {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.manifest.len()}})
        .to_string();
        Image {
            blobs: vec![config, layer],
            attached: Some((subject.digest.clone(), kind.to_owned())),
            ..Image::raw(OCI_MANIFEST, manifest.as_bytes())
        }
    }

    /// Arbitrary bytes as a manifest of this type.
    pub fn raw(media_type: &str, manifest: &[u8]) -> Image {
        Image {
            digest: sha256(manifest),
            media_type: media_type.to_owned(),
            manifest: Bytes::copy_from_slice(manifest),
            blobs: Vec::new(),
            children: Vec::new(),
            attached: None,
        }
    }

    /// The config blob.
    pub fn config(&self) -> &Blob {
        &self.blobs[0]
    }

    /// The `n`th layer, from 0.
    pub fn layer(&self, n: usize) -> &Blob {
        &self.blobs[n + 1]
    }

    fn built(media_type: &str, layers: Vec<Blob>, manifest: impl Fn(&Blob, &[Blob]) -> Value) -> Image {
        let history: Vec<_> = layers.iter().map(|layer| layer.digest.clone()).collect();
        let config = Blob::of(
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": history}})
                .to_string()
                .as_bytes(),
        );
        let manifest = manifest(&config, &layers).to_string();
        let mut blobs = vec![config];
        blobs.extend(layers);
        Image {
            blobs,
            ..Image::raw(media_type, manifest.as_bytes())
        }
    }
}
