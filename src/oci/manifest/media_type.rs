//! Media types, kept to the letter: clients compare the text they get.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest media type taken, in bytes.
pub const MEDIA_TYPE_BYTES_MAX: usize = 255;

pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_IMAGE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
const DOCKER_SCHEMA_1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// A media type: `type/subtype`, perhaps with parameters. The exact text is kept and compared.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MediaType(Arc<str>);

impl MediaType {
    /// The types of manifest a client of today takes, for requests that no client's own `Accept` stands
    /// behind.
    pub const CURRENT_MANIFESTS: [&'static str; 4] = [OCI_INDEX, OCI_IMAGE, DOCKER_INDEX, DOCKER_IMAGE];

    /// The types of a list of manifests.
    pub const INDEXES: [&'static str; 2] = [OCI_INDEX, DOCKER_INDEX];

    /// The exact text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `type/subtype` without parameters, in the case it was written in.
    pub fn essence(&self) -> &str {
        self.0
            .split_once(';')
            .map_or(&*self.0, |(essence, _)| essence.trim_end())
    }

    /// The same type without parameters. A manifest has none (spec, "Pulling manifests"), and ggcr compares the text.
    #[must_use]
    pub fn without_parameters(self) -> Self {
        match self.0.split_once(';') {
            Some((essence, _)) => Self(essence.trim_end().into()),
            None => self,
        }
    }

    /// Whether the two differ at most in case and parameters.
    pub fn is_same_as(&self, other: &MediaType) -> bool {
        self.essence().eq_ignore_ascii_case(other.essence())
    }

    /// Whether it is a list of manifests.
    pub fn is_index(&self) -> bool {
        self.is_one_of(&Self::INDEXES)
    }

    /// Whether it is a manifest with config and layers.
    pub fn is_image(&self) -> bool {
        self.is_one_of(&[OCI_IMAGE, DOCKER_IMAGE])
    }

    /// Whether it is a manifest of any known kind, docker's schema 1 included.
    pub fn is_manifest(&self) -> bool {
        self.is_index()
            || self.is_image()
            || self.is_one_of(&[OCI_ARTIFACT, DOCKER_SCHEMA_1, DOCKER_SCHEMA_1_SIGNED])
    }

    /// Whether it is docker's schema 1 with signatures, whose digest is that of its payload and not of its bytes.
    pub fn is_signed(&self) -> bool {
        self.is_one_of(&[DOCKER_SCHEMA_1_SIGNED])
    }

    /// Whether it is docker's schema 1, with signatures or by its label without: registries confuse the two.
    pub fn is_schema_1(&self) -> bool {
        self.is_one_of(&[DOCKER_SCHEMA_1, DOCKER_SCHEMA_1_SIGNED])
    }

    /// Whether it is a web page: what logs in, blocks or sells, and no registry.
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

/// Why a text is not a media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum MediaTypeError {
    /// Not `type/subtype` in printable ASCII.
    #[error("a media type is written type/subtype")]
    Grammar,
    /// Longer than [`MEDIA_TYPE_BYTES_MAX`].
    #[error("a media type of {found} bytes is too long, {MEDIA_TYPE_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length in bytes.
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
