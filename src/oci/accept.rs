//! The set of media types a client takes.
//!
//! It comes in several `Accept` lines, in any order (docker shuffles them on every request), so it is kept
//! twice: as the lines to pass on untouched, and as a sorted set that two askers can be compared by. Weights
//! are not weighed, as no registry does; only `q=0` counts, as "not this".

use std::sync::Arc;

use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue};

use super::digest::{Algorithm, Hasher};
use super::manifest::MediaType;

/// Most media types taken.
pub const ACCEPT_TYPES_MAX: usize = 64;
/// Most bytes of `Accept` lines taken, all lines together.
pub const ACCEPT_BYTES_MAX: usize = 8 * 1024;

/// What a client takes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Accept(Arc<Set>);

#[derive(Debug)]
struct Set {
    lines: Vec<HeaderValue>,
    /// Lower-case `type/subtype`, sorted, each once.
    types: Vec<Box<str>>,
    key: u64,
}

impl Accept {
    /// Reads all `Accept` lines of a request. What is not a media type in them is passed on, and means
    /// nothing here.
    pub fn read(headers: &HeaderMap) -> Result<Self, AcceptError> {
        Self::of(headers.get_all(ACCEPT).iter().cloned().collect())
    }

    /// The set of someone who said nothing: anything will do.
    pub fn any() -> Self {
        Self::new(Vec::new(), Vec::new())
    }

    /// The set for requests of our own: every type of manifest that clients of today take.
    pub fn manifests() -> Self {
        let lines = MediaType::CURRENT_MANIFESTS
            .map(HeaderValue::from_static)
            .to_vec();
        Self::new(lines, MediaType::CURRENT_MANIFESTS.map(Box::from).to_vec())
    }

    fn of(lines: Vec<HeaderValue>) -> Result<Self, AcceptError> {
        let bytes = lines.iter().map(HeaderValue::len).sum();
        if bytes > ACCEPT_BYTES_MAX {
            return Err(AcceptError::TooLong { found: bytes });
        }
        let types: Vec<_> = lines
            .iter()
            .filter_map(|line| line.to_str().ok())
            .flat_map(read_value)
            .collect();
        if types.len() > ACCEPT_TYPES_MAX {
            return Err(AcceptError::TooMany { found: types.len() });
        }
        Ok(Self::new(lines, types))
    }

    fn new(lines: Vec<HeaderValue>, mut types: Vec<Box<str>>) -> Self {
        types.sort_unstable();
        types.dedup();
        let key = key_of(&types);
        Self(Arc::new(Set { lines, types, key }))
    }

    /// Whether a manifest of this type may be given to the client.
    pub fn accepts(&self, media_type: &MediaType) -> bool {
        let essence = media_type.essence();
        self.0.types.is_empty()
            || self.0.types.iter().any(|known| match known.strip_suffix("/*") {
                Some("*") => true,
                Some(kind) => essence
                    .split_once('/')
                    .is_some_and(|(of, _)| of.eq_ignore_ascii_case(kind)),
                None => known.eq_ignore_ascii_case(essence),
            })
    }

    /// Whether this very type stands in the set, and not only a wildcard that covers it.
    pub fn lists(&self, media_type: &MediaType) -> bool {
        let essence = media_type.essence();
        self.0
            .types
            .iter()
            .any(|known| known.eq_ignore_ascii_case(essence))
    }

    /// Whether every type of index stands in the set, so that a registry has no reason to give an image in place of one.
    pub fn lists_indexes(&self) -> bool {
        let listed = |wanted: &str| {
            self.0
                .types
                .iter()
                .any(|known| known.eq_ignore_ascii_case(wanted))
        };
        MediaType::INDEXES.into_iter().all(listed)
    }

    /// A number equal for equal sets, whatever their order, spelling or lines; the same in every run.
    pub fn key(&self) -> u64 {
        self.0.key
    }

    /// The lines as they came, to pass on.
    pub fn header_values(&self) -> impl Iterator<Item = &HeaderValue> {
        self.0.lines.iter()
    }
}

/// By what is taken, not by how it was said.
impl PartialEq for Accept {
    fn eq(&self, other: &Self) -> bool {
        self.0.types == other.0.types
    }
}

impl Eq for Accept {}

/// Why an `Accept` is not taken. The fault of the client; worth 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AcceptError {
    /// More types than [`ACCEPT_TYPES_MAX`].
    #[error("Accept lists {found} media types, {ACCEPT_TYPES_MAX} are allowed")]
    TooMany {
        /// How many there are.
        found: usize,
    },
    /// More bytes than [`ACCEPT_BYTES_MAX`].
    #[error("Accept has {found} bytes, {ACCEPT_BYTES_MAX} are allowed")]
    TooLong {
        /// How many there are.
        found: usize,
    },
}

fn read_value(line: &str) -> impl Iterator<Item = Box<str>> {
    line.split(',').filter_map(|item| {
        let (essence, parameters) = item.split_once(';').unwrap_or((item, ""));
        let essence = essence.trim();
        // `*` alone is what old Java clients send.
        let essence = if essence == "*" { "*/*" } else { essence };
        (essence.contains('/') && !is_excluded(parameters)).then(|| essence.to_ascii_lowercase().into())
    })
}

/// Whether one of the parameters is `q=0`.
fn is_excluded(parameters: &str) -> bool {
    parameters
        .split(';')
        .filter_map(|parameter| parameter.split_once('='))
        .any(|(name, value)| {
            name.trim().eq_ignore_ascii_case("q")
                && value.trim().parse::<f32>().is_ok_and(|weight| weight <= 0.0)
        })
}

/// The first 8 bytes of SHA-256 over the types, each ended by a line feed.
fn key_of(types: &[Box<str>]) -> u64 {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    for name in types {
        hasher.update(name.as_bytes());
        hasher.update(b"\n");
    }
    hasher
        .finish()
        .as_bytes()
        .iter()
        .take(8)
        .fold(0, |key, byte| key << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
