//! The documents of an OCI image layout, and the names of its files (image-spec, image-layout.md).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::oci::manifest::DESCRIPTORS_MAX;
use crate::oci::{Algorithm, Digest, MediaType};

/// Marker file of the layout.
pub const LAYOUT_FILE: &str = "oci-layout";
/// Index of the images.
pub const INDEX_FILE: &str = "index.json";

/// Maximum size of `oci-layout` in bytes.
pub const LAYOUT_BYTES_MAX: u64 = 4096;

/// Image name annotation of containerd, docker and `BuildKit`.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// Image name annotation of image-spec, annotations.md.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

const VERSION: &str = "1.0.0";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// Kind of an archive entry in a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// `oci-layout`.
    Layout,
    /// `index.json`.
    Index,
    /// `blobs/<algorithm>/<hex>`.
    Blob(Digest),
    /// `.`, `blobs`, `blobs/<algorithm>`: a folder.
    Folder,
    /// Additional files that docker writes for older versions.
    Docker,
}

impl EntryKind {
    /// Classifies a name; `None` if it is not part of a layout, including paths that lead outside.
    pub fn of(name: &str) -> Option<Self> {
        let name = name.strip_prefix("./").unwrap_or(name);
        match name.strip_suffix('/').unwrap_or(name) {
            LAYOUT_FILE => Some(Self::Layout),
            INDEX_FILE => Some(Self::Index),
            "" | "." | "blobs" | "blobs/sha256" | "blobs/sha512" => Some(Self::Folder),
            "manifest.json" | "repositories" => Some(Self::Docker),
            _ => {
                let (algorithm, hex) = name.strip_prefix("blobs/")?.split_once('/')?;
                let algorithm: Algorithm = algorithm.parse().ok()?;
                Digest::from_hex(algorithm, hex).ok().map(Self::Blob)
            }
        }
    }
}

/// The file name of a blob.
pub fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// An entry of `index.json`: the descriptor of one manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Media type of the manifest.
    pub media_type: MediaType,
    /// Its size in bytes.
    pub size: u64,
    /// The image name. Referrers have none.
    pub name: Option<String>,
    /// The descriptor as it was read, for the referrers list of its subject.
    pub descriptor: Value,
}

impl Entry {
    /// A named image.
    pub fn named(digest: Digest, media_type: MediaType, size: u64, name: &str) -> Self {
        let mut annotations = serde_json::Map::new();
        for key in [IMAGE_NAME, REF_NAME] {
            annotations.insert(key.to_owned(), name.into());
        }
        let descriptor = serde_json::json!({
            "mediaType": media_type.as_str(),
            "digest": digest.to_string(),
            "size": size,
            "annotations": annotations,
        });
        Self {
            digest,
            media_type,
            size,
            name: Some(name.to_owned()),
            descriptor,
        }
    }

    /// The entry of a referrer, without a name. The client that pushed it chose its annotations, and these must not
    /// name an image of the archive.
    #[must_use]
    pub fn without_name(mut self) -> Self {
        if let Some(annotations) = self
            .descriptor
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.retain(|key, _| key != IMAGE_NAME && key != REF_NAME);
        }
        self.name = None;
        self
    }

    /// Reads a descriptor.
    pub fn of_descriptor(descriptor: Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            media_type: String,
            digest: String,
            size: u64,
        }
        let raw = Raw::deserialize(&descriptor).map_err(|error| error.to_string())?;
        let digest = raw.digest.parse::<Digest>();
        let media_type = raw.media_type.parse::<MediaType>();
        Ok(Self {
            digest: digest.map_err(|error| format!("{}: {error}", raw.digest))?,
            media_type: media_type.map_err(|error| error.to_string())?,
            size: raw.size,
            name: name_of(&descriptor),
            descriptor,
        })
    }
}

fn name_of(descriptor: &Value) -> Option<String> {
    let annotations = descriptor.get("annotations")?;
    let named = |key: &str| annotations.get(key).and_then(Value::as_str);
    named(IMAGE_NAME).or_else(|| named(REF_NAME)).map(str::to_owned)
}

/// Content of an `oci-layout` file.
pub fn layout_document() -> Vec<u8> {
    serde_json::json!({ "imageLayoutVersion": VERSION })
        .to_string()
        .into_bytes()
}

/// Whether this is an `oci-layout` of a version that can be read.
pub fn is_layout(bytes: &[u8]) -> bool {
    let document: Option<Value> = serde_json::from_slice(bytes).ok();
    let version = document
        .as_ref()
        .and_then(|document| document.get("imageLayoutVersion"));
    version.and_then(Value::as_str) == Some(VERSION)
}

/// Content of an image index with these entries: of `index.json`, or of a referrers list.
pub fn index_document<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Index<'a> {
        schema_version: u32,
        media_type: &'static str,
        manifests: Vec<&'a Value>,
    }
    let index = Index {
        schema_version: 2,
        media_type: INDEX_TYPE,
        manifests: entries.map(|entry| &entry.descriptor).collect(),
    };
    // Strings, numbers and JSON values can always be serialized.
    serde_json::to_vec(&index).unwrap_or_default()
}

/// The entries of a list of manifests.
pub fn read_index(bytes: &[u8]) -> Result<Vec<Entry>, String> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Value>,
    }
    let index: Index = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if index.manifests.len() > DESCRIPTORS_MAX {
        return Err(format!("it lists more than {DESCRIPTORS_MAX} manifests"));
    }
    index.manifests.into_iter().map(Entry::of_descriptor).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn only_what_a_layout_has_has_a_place() {
        let blob = EntryKind::Blob(Digest::from_hex(Algorithm::Sha256, HEX).unwrap());
        for (name, kind) in [
            ("oci-layout", Some(EntryKind::Layout)),
            ("./index.json", Some(EntryKind::Index)),
            ("./", Some(EntryKind::Folder)),
            ("blobs/sha256/", Some(EntryKind::Folder)),
            ("manifest.json", Some(EntryKind::Docker)),
            (&format!("blobs/sha256/{HEX}"), Some(blob)),
            (&format!("./blobs/sha256/{HEX}"), Some(blob)),
            (&format!("blobs/sha256/{}", HEX.to_uppercase()), None),
            (&format!("blobs/sha256/../sha256/{HEX}"), None),
            (&format!("/blobs/sha256/{HEX}"), None),
            (&format!("../blobs/sha256/{HEX}"), None),
            (&format!("blobs/md5/{HEX}"), None),
            ("blobs/sha256/x", None),
            ("../oci-layout", None),
            ("/etc/passwd", None),
            ("layer.tar", None),
        ] {
            assert_eq!(EntryKind::of(name), kind, "{name}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let digest = Digest::from_hex(Algorithm::Sha256, HEX).unwrap();
        let media_type: MediaType = INDEX_TYPE.parse().unwrap();
        let entry = Entry::named(digest, media_type, 7, "docker.io/library/a:1");
        let read = read_index(&index_document([&entry].into_iter())).unwrap();
        assert_eq!(read, [entry]);
        assert!(is_layout(&layout_document()));
        assert!(!is_layout(br#"{"imageLayoutVersion":"2.0.0"}"#));
    }

    #[test]
    fn an_index_that_is_none_is_refused() {
        for text in [
            "",
            "[]",
            r#"{"manifests":[{}]}"#,
            r#"{"manifests":[{"mediaType":"a/b","digest":"sha256:12","size":1}]}"#,
            r#"{"manifests":[{"mediaType":"a/b","digest":"md5:00","size":-1}]}"#,
        ] {
            assert!(read_index(text.as_bytes()).is_err(), "{text}");
        }
    }
}
