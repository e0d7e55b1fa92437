//! Manifest parser: media type and descriptors.
//!
//! A manifest is served as the original bytes and never re-serialized, so this is a read-only view. It is
//! tolerant: unknown fields are ignored, and an unparsable descriptor is counted instead of failing, because
//! clients may never use it. Ambiguous manifests are rejected: repeated keys, and `manifests` beside `layers`
//! (CVE-2021-41190).

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};

use super::digest::{AnyDigest, Digest};

mod media_type;

pub use media_type::{MEDIA_TYPE_BYTES_MAX, MediaType, MediaTypeError};

/// Largest manifest read, in bytes: the size that registries should accept (spec, "Pushing manifests"), and
/// podman's limit.
pub const MANIFEST_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most descriptors of a manifest.
pub const DESCRIPTORS_MAX: usize = 10_000;

/// Parsed fields of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Its `mediaType`. Some manifests omit it and rely on `Content-Type`.
    pub media_type: Option<MediaType>,
    /// Required content in this order: config, layers or child manifests.
    pub descriptors: Vec<Descriptor>,
    /// Its `subject`, if that has a supported digest.
    pub subject: Option<Digest>,
    /// Kind of manifest.
    pub kind: ManifestKind,
    /// Number of descriptors that could not be parsed and are missing from `descriptors`.
    pub unparsed: usize,
    /// Whether the bytes contain signatures, as in docker's signed schema 1.
    pub has_signatures: bool,
}

/// Kind of manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ManifestKind {
    /// A list of manifests.
    Index,
    /// Config and layers, of an image or of an artifact packaged as one.
    Image,
    /// Anything else, including docker's schema 1.
    Other,
}

/// A descriptor in a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Stated media type.
    pub media_type: Option<MediaType>,
    /// Its digest.
    pub digest: AnyDigest,
    /// Stated size in bytes.
    pub size: Option<u64>,
    /// Platform, in an index.
    pub platform: Option<Platform>,
    /// Kind of content, which determines the endpoint it is fetched from.
    pub kind: DescriptorKind,
    /// Whether it has `urls` to fetch it from, so the registry may not have it.
    pub has_urls: bool,
    /// If this is an attestation manifest, the digest of the image that it attests. buildx lists both in one index.
    pub attests: Option<Digest>,
}

/// Kind of a descriptor's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DescriptorKind {
    /// The config blob.
    Config,
    /// A layer, or any other blob.
    Layer,
    /// A manifest.
    Manifest,
}

/// Platform of a manifest in an index.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct Platform {
    /// `linux`, `windows`, …
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v7`, …
    #[serde(default)]
    pub variant: Option<String>,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant
            .as_ref()
            .map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl Manifest {
    /// Parses a manifest of at most [`MANIFEST_BYTES_MAX`] and [`DESCRIPTORS_MAX`].
    pub fn read(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge { found: bytes.len() });
        }
        // Serde would read a JSON array as the fields in order.
        if bytes.trim_ascii_start().first() != Some(&b'{') {
            return Err(ManifestError::Json { line: 1, column: 1 });
        }
        let raw: RawManifest = serde_json::from_slice(bytes).map_err(|error| ManifestError::Json {
            line: error.line(),
            column: error.column(),
        })?;
        if raw.manifests.present && (raw.layers.present || raw.config.is_some()) {
            return Err(ManifestError::Ambiguous);
        }
        let lists = [
            raw.manifests.count,
            raw.layers.count,
            raw.blobs.count,
            raw.fs_layers.count,
        ];
        let found = lists.iter().sum();
        if found > DESCRIPTORS_MAX {
            return Err(ManifestError::TooMany { found });
        }
        let media_type = raw.media_type.and_then(|text| text.0?.parse::<MediaType>().ok());
        let kind = if raw.manifests.present || media_type.as_ref().is_some_and(MediaType::is_index) {
            ManifestKind::Index
        } else if raw.layers.present || raw.config.is_some() {
            ManifestKind::Image
        } else {
            ManifestKind::Other
        };
        let subject = raw.subject.and_then(|subject| subject.0?.digest.parse().ok());
        let mut manifest = Self {
            media_type,
            descriptors: Vec::new(),
            subject,
            kind,
            unparsed: 0,
            has_signatures: raw.signatures.present,
        };
        if let Some(config) = raw.config {
            manifest.add(config.0, DescriptorKind::Config);
        }
        manifest.add_all(raw.layers, DescriptorKind::Layer);
        manifest.add_all(raw.blobs, DescriptorKind::Layer);
        manifest.add_all(raw.fs_layers, DescriptorKind::Layer);
        manifest.add_all(raw.manifests, DescriptorKind::Manifest);
        // It stays in memory, and a descriptor has some 300 bytes.
        manifest.descriptors.shrink_to_fit();
        Ok(manifest)
    }

    /// Media type of this manifest, from its own `mediaType` and from `sent`, the response's `Content-Type`. If they
    /// differ, `mediaType` applies, because the digest covers it. Otherwise the result is `sent`, byte for byte. `None`
    /// if neither is a manifest type.
    pub fn media_type_for(&self, sent: Option<&MediaType>) -> Option<MediaType> {
        let stated = self.media_type.as_ref().filter(|stated| stated.is_manifest());
        match (sent, stated) {
            (_, Some(stated)) if sent.is_none_or(|sent| !sent.is_same_as(stated)) => Some(stated.clone()),
            (Some(sent), _) if sent.is_manifest() || self.media_type.as_ref() == Some(sent) => {
                Some(sent.clone())
            }
            _ => None,
        }
    }

    /// Like [`Self::media_type_for`], for bytes that match the requested digest. If the manifest has no `mediaType` and
    /// its structure contradicts `Content-Type`, the structure decides. The result is then an OCI type, because only
    /// OCI manifests may omit `mediaType`.
    pub fn type_by_digest(&self, sent: Option<&MediaType>) -> Option<MediaType> {
        let sent = self.media_type_for(sent);
        if self.media_type.as_ref().is_some_and(MediaType::is_manifest) {
            return sent;
        }
        let by_shape = || match self.kind {
            ManifestKind::Index => media_type::OCI_INDEX.parse().ok(),
            ManifestKind::Image => media_type::OCI_IMAGE.parse().ok(),
            ManifestKind::Other => None,
        };
        sent.filter(|sent| self.has_shape_of(sent)).or_else(by_shape)
    }

    /// Whether it is docker's signed schema 1, whose digest is that of its payload and not of its bytes.
    pub fn is_signed_schema_1(&self, sent: Option<&MediaType>) -> bool {
        let states_another = self
            .media_type
            .as_ref()
            .is_some_and(|stated| stated.is_manifest() && !stated.is_signed());
        let is_labelled = sent.is_some_and(MediaType::is_signed);
        self.kind == ManifestKind::Other && !states_another && (self.has_signatures || is_labelled)
    }

    /// Whether its structure fits `media_type`. A JSON error is recognized by this, because it can have any
    /// `Content-Type`.
    pub fn has_shape_of(&self, media_type: &MediaType) -> bool {
        match self.kind {
            ManifestKind::Index => !media_type.is_image(),
            ManifestKind::Image => !media_type.is_index(),
            ManifestKind::Other => !media_type.is_image() && !media_type.is_index(),
        }
    }

    fn add_all<T: Into<RawDescriptor>>(&mut self, list: List<T>, kind: DescriptorKind) {
        self.unparsed += list.unparsed();
        for raw in list.readable {
            self.add(Some(raw.into()), kind);
        }
    }

    fn add(&mut self, raw: Option<RawDescriptor>, kind: DescriptorKind) {
        match raw.and_then(|raw| raw.read(kind)) {
            Some(child) => self.descriptors.push(child),
            None => self.unparsed += 1,
        }
    }
}

/// Error in a manifest, made by its publisher or by an intermediary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ManifestError {
    /// Larger than [`MANIFEST_BYTES_MAX`].
    #[error("a manifest of {found} bytes is too large, {MANIFEST_BYTES_MAX} are allowed")]
    TooLarge {
        /// Size in bytes.
        found: usize,
    },
    /// Not a JSON object with the fields of a manifest.
    #[error("not the JSON of a manifest (line {line}, column {column})")]
    Json {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// More descriptors than [`DESCRIPTORS_MAX`].
    #[error("a manifest with {found} descriptors is too large, {DESCRIPTORS_MAX} are allowed")]
    TooMany {
        /// Number of descriptors.
        found: usize,
    },
    /// Both an index and an image: two clients could read two different images from it.
    #[error("it is both an index and an image")]
    Ambiguous,
}

/// Parsed fields. A field of an unexpected type counts as absent where that is harmless.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a manifest")]
struct RawManifest {
    media_type: Option<Lenient<String>>,
    config: Option<Lenient<RawDescriptor>>,
    #[serde(default)]
    layers: List<RawDescriptor>,
    #[serde(default)]
    manifests: List<RawDescriptor>,
    /// Of the withdrawn OCI artifact manifest.
    #[serde(default)]
    blobs: List<RawDescriptor>,
    /// Of docker's schema 1.
    #[serde(default)]
    fs_layers: List<Schema1Layer>,
    subject: Option<Lenient<RawDescriptor>>,
    /// Of docker's signed schema 1.
    #[serde(default)]
    signatures: List<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    digest: String,
    media_type: Option<Lenient<String>>,
    size: Option<Lenient<u64>>,
    platform: Option<Lenient<Platform>>,
    urls: Option<Lenient<Vec<IgnoredAny>>>,
    annotations: Option<Lenient<Annotations>>,
}

/// `BuildKit` annotations on the entries of an index.
#[derive(Deserialize)]
struct Annotations {
    #[serde(rename = "vnd.docker.reference.type")]
    reference_type: Option<Lenient<String>>,
    #[serde(rename = "vnd.docker.reference.digest")]
    reference_digest: Option<Lenient<String>>,
}

impl Annotations {
    fn attested(self) -> Option<Digest> {
        let is_attestation = self.reference_type?.0? == "attestation-manifest";
        let digest = self.reference_digest?.0?.parse().ok()?;
        is_attestation.then_some(digest)
    }
}

impl RawDescriptor {
    fn read(self, kind: DescriptorKind) -> Option<Descriptor> {
        let media_type = self.media_type.and_then(|text| text.0?.parse::<MediaType>().ok());
        // An index may list blobs, as build caches do. They are fetched as blobs.
        let kind = match (kind, &media_type) {
            (DescriptorKind::Manifest, Some(media_type)) if !media_type.is_manifest() => {
                DescriptorKind::Layer
            }
            (kind, _) => kind,
        };
        Some(Descriptor {
            digest: self.digest.parse().ok()?,
            size: self.size.and_then(|size| size.0),
            platform: self.platform.and_then(|platform| platform.0),
            has_urls: self
                .urls
                .and_then(|urls| urls.0)
                .is_some_and(|urls| !urls.is_empty()),
            attests: self.annotations.and_then(|annotations| annotations.0?.attested()),
            media_type,
            kind,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Schema1Layer {
    blob_sum: String,
}

impl From<Schema1Layer> for RawDescriptor {
    fn from(layer: Schema1Layer) -> Self {
        Self {
            digest: layer.blob_sum,
            media_type: None,
            size: None,
            platform: None,
            urls: None,
            annotations: None,
        }
    }
}

/// A value of the expected type, or `None` for another type.
struct Lenient<T>(Option<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either<T> {
            Right(T),
            Odd(IgnoredAny),
        }
        Ok(Self(match Either::deserialize(deserializer)? {
            Either::Right(value) => Some(value),
            Either::Odd(_) => None,
        }))
    }
}

/// A list that stores its parsable items up to [`DESCRIPTORS_MAX`] and counts all of them, which bounds the
/// memory for a hostile list.
struct List<T> {
    present: bool,
    count: usize,
    readable: Vec<T>,
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self {
            present: false,
            count: 0,
            readable: Vec::new(),
        }
    }
}

impl<T> List<T> {
    fn unparsed(&self) -> usize {
        self.count - self.readable.len()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
    type Value = List<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of descriptors")
    }

    /// `null`, which Go writes for a nil slice.
    fn visit_unit<E>(self) -> Result<List<T>, E> {
        Ok(List::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<List<T>, A::Error> {
        let mut read = List {
            present: true,
            ..List::default()
        };
        while read.count < DESCRIPTORS_MAX
            && let Some(item) = items.next_element::<Lenient<T>>()?
        {
            read.count += 1;
            read.readable.extend(item.0);
        }
        if read.count == DESCRIPTORS_MAX {
            while items.next_element::<IgnoredAny>()?.is_some() {
                read.count += 1;
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
