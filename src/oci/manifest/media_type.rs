//! Media types. The exact text is preserved, because clients compare it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest accepted media type, in bytes.
pub const MEDIA_TYPE_BYTES_MAX: usize = 255;

pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_IMAGE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
const DOCKER_SCHEMA_1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// A media type: `type/subtype`, optionally with parameters. The exact text is stored and compared.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MediaType(Arc<str>);

impl MediaType {
    /// Manifest types that current clients accept, for requests that the cache makes without a client's
    /// `Accept`.
    pub const CURRENT_MANIFESTS: [&'static str; 4] = [OCI_INDEX, OCI_IMAGE, DOCKER_INDEX, DOCKER_IMAGE];

    /// Index types.
    pub const INDEXES: [&'static str; 2] = [OCI_INDEX, DOCKER_INDEX];

    /// The exact text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `type/subtype` without parameters, in the original case.
    pub fn essence(&self) -> &str {
        self.0
            .split_once(';')
            .map_or(&*self.0, |(essence, _)| essence.trim_end())
    }

    /// The same type without parameters. A manifest's type has none (spec, "Pulling manifests"), and ggcr
    /// compares the text.
    #[must_use]
    pub fn without_parameters(self) -> Self {
        match self.0.split_once(';') {
            Some((essence, _)) => Self(essence.trim_end().into()),
            None => self,
        }
    }

    /// Whether two types differ in case and parameters only.
    pub fn is_same_as(&self, other: &MediaType) -> bool {
        self.essence().eq_ignore_ascii_case(other.essence())
    }

    /// Whether it is an index type.
    pub fn is_index(&self) -> bool {
        self.is_one_of(&Self::INDEXES)
    }

    /// Whether it is an image manifest type, with config and layers.
    pub fn is_image(&self) -> bool {
        self.is_one_of(&[OCI_IMAGE, DOCKER_IMAGE])
    }

    /// Whether it is any known manifest type, including docker's schema 1.
    pub fn is_manifest(&self) -> bool {
        self.is_index()
            || self.is_image()
            || self.is_one_of(&[OCI_ARTIFACT, DOCKER_SCHEMA_1, DOCKER_SCHEMA_1_SIGNED])
    }

    /// Whether it is docker's signed schema 1, whose digest is that of its payload and not of its bytes.
    pub fn is_signed(&self) -> bool {
        self.is_one_of(&[DOCKER_SCHEMA_1_SIGNED])
    }

    /// Whether it is docker's schema 1, with or without signatures: registries confuse the two labels.
    pub fn is_schema_1(&self) -> bool {
        self.is_one_of(&[DOCKER_SCHEMA_1, DOCKER_SCHEMA_1_SIGNED])
    }

    /// Whether it is HTML, as sent by login pages and captive portals but never by a registry.
    pub fn is_page(&self) -> bool {
        self.is_one_of(&["text/html", "application/xhtml+xml"])
    }

    fn is_one_of(&self, known: &[&str]) -> bool {
        let essence = self.essence();
        known.iter().any(|known| known.eq_ignore_ascii_case(essence))
    }
}

impl fmt::Display for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl FromStr for MediaType {
    type Err = MediaTypeError;

    fn from_str(text: &str) -> Result<Self, MediaTypeError> {
        if text.len() > MEDIA_TYPE_BYTES_MAX {
            return Err(MediaTypeError::TooLong { found: text.len() });
        }
        let printable = text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        if !printable || text.trim() != text {
            return Err(MediaTypeError::Grammar);
        }
        let media_type = Self(text.into());
        match media_type.essence().split_once('/') {
            Some((kind, subtype)) if is_token(kind) && is_token(subtype) => Ok(media_type),
            _ => Err(MediaTypeError::Grammar),
        }
    }
}

/// Error in a media type's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum MediaTypeError {
    /// Not `type/subtype` in printable ASCII.
    #[error("a media type is written type/subtype")]
    Grammar,
    /// Longer than [`MEDIA_TYPE_BYTES_MAX`].
    #[error("a media type of {found} bytes is too long, {MEDIA_TYPE_BYTES_MAX} are allowed")]
    TooLong {
        /// Length in bytes.
        found: usize,
    },
}

/// RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}
