//! `Accept` header: the set of media types that a client accepts.
//!
//! It comes in several header lines, in any order: docker shuffles them on every request. So it is stored
//! twice: as the original lines to forward, and as a sorted set to compare two requests by. Weights are
//! ignored, as by every registry, except `q=0`, which excludes a type.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue};

use super::digest::{Algorithm, Hasher};
use super::manifest::MediaType;

/// Most media types accepted in one request.
pub const ACCEPT_TYPES_MAX: usize = 64;
/// Most bytes of `Accept` lines, all lines together.
pub const ACCEPT_BYTES_MAX: usize = 8 * 1024;

/// Accepted media types. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Accept(Arc<Set>);

#[derive(Debug)]
struct Set {
    lines: Vec<HeaderValue>,
    /// Lower-case `type/subtype`, sorted and unique. Types and key are computed when they are first needed, which cached
    /// content by digest does not.
    types: OnceLock<Vec<Box<str>>>,
    key: OnceLock<u64>,
}

thread_local! {
    /// The last header that this thread read. Most clients send the same lines with each request, and so share its types and
    /// its key.
    static LAST: RefCell<Option<Accept>> = const { RefCell::new(None) };
}

impl Accept {
    /// Reads all `Accept` lines of a request. An item that is not a media type is forwarded and otherwise
    /// ignored.
    pub fn read(headers: &HeaderMap) -> Result<Self, AcceptError> {
        LAST.with_borrow_mut(|last| {
            let lines = headers.get_all(ACCEPT);
            if let Some(last) = last
                && last.header_values().eq(&lines)
            {
                return Ok(last.clone());
            }
            // Clones would keep the whole request header, with its credential.
            let copy = |line: &HeaderValue| HeaderValue::from_bytes(line.as_bytes()).ok();
            let read = Self::of(lines.iter().filter_map(copy).collect())?;
            Ok(last.insert(read).clone())
        })
    }

    /// The set of a request without `Accept`: everything is accepted.
    pub fn any() -> Self {
        Self::new(Vec::new())
    }

    /// The set for the cache's own requests: every manifest type that current clients accept.
    pub fn manifests() -> Self {
        let lines = MediaType::CURRENT_MANIFESTS.map(HeaderValue::from_static);
        Self::new(lines.to_vec())
    }

    fn of(lines: Vec<HeaderValue>) -> Result<Self, AcceptError> {
        let bytes = lines.iter().map(HeaderValue::len).sum();
        if bytes > ACCEPT_BYTES_MAX {
            return Err(AcceptError::TooLong { found: bytes });
        }
        let found = read_lines(&lines).count();
        if found > ACCEPT_TYPES_MAX {
            return Err(AcceptError::TooMany { found });
        }
        Ok(Self::new(lines))
    }

    fn new(lines: Vec<HeaderValue>) -> Self {
        Self(Arc::new(Set {
            lines,
            types: OnceLock::new(),
            key: OnceLock::new(),
        }))
    }

    fn types(&self) -> &[Box<str>] {
        self.0.types.get_or_init(|| {
            let types = read_lines(&self.0.lines);
            let mut types: Vec<Box<str>> = types.map(|name| name.to_ascii_lowercase().into()).collect();
            types.sort_unstable();
            types.dedup();
            types
        })
    }

    /// Whether the client accepts a manifest of this type.
    pub fn accepts(&self, media_type: &MediaType) -> bool {
        let essence = media_type.essence();
        self.types().is_empty()
            || self.types().iter().any(|known| match known.strip_suffix("/*") {
                Some("*") => true,
                Some(kind) => essence
                    .split_once('/')
                    .is_some_and(|(of, _)| of.eq_ignore_ascii_case(kind)),
                None => known.eq_ignore_ascii_case(essence),
            })
    }

    /// Whether the set contains this exact type. A wildcard does not count.
    pub fn lists(&self, media_type: &MediaType) -> bool {
        let essence = media_type.essence();
        self.types()
            .iter()
            .any(|known| known.eq_ignore_ascii_case(essence))
    }

    /// Whether the set contains every index type, so a registry has no reason to send an image in place of an
    /// index.
    pub fn lists_indexes(&self) -> bool {
        let listed = |index: &str| self.types().iter().any(|known| known.eq_ignore_ascii_case(index));
        MediaType::INDEXES.into_iter().all(listed)
    }

    /// Hash of the set. It is independent of order, spelling and lines, and stable across processes.
    pub fn key(&self) -> u64 {
        *self.0.key.get_or_init(|| key_of(self.types()))
    }

    /// The original lines, to forward.
    pub fn header_values(&self) -> impl Iterator<Item = &HeaderValue> {
        self.0.lines.iter()
    }
}

/// Compares the sets, not the original lines.
impl PartialEq for Accept {
    fn eq(&self, other: &Self) -> bool {
        self.types() == other.types()
    }
}

impl Eq for Accept {}

/// Error in an `Accept` header, made by the client (400).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AcceptError {
    /// More types than [`ACCEPT_TYPES_MAX`].
    #[error("Accept lists {found} media types, {ACCEPT_TYPES_MAX} are allowed")]
    TooMany {
        /// Number of types.
        found: usize,
    },
    /// More bytes than [`ACCEPT_BYTES_MAX`].
    #[error("Accept has {found} bytes, {ACCEPT_BYTES_MAX} are allowed")]
    TooLong {
        /// Number of bytes.
        found: usize,
    },
}

/// The types in all lines, as the client spelled them.
fn read_lines(lines: &[HeaderValue]) -> impl Iterator<Item = &str> {
    lines
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(read_value)
}

fn read_value(line: &str) -> impl Iterator<Item = &str> {
    line.split(',').filter_map(|item| {
        let (essence, parameters) = item.split_once(';').unwrap_or((item, ""));
        let essence = essence.trim();
        // Old Java clients send `*` alone.
        let essence = if essence == "*" { "*/*" } else { essence };
        (essence.contains('/') && !is_excluded(parameters)).then_some(essence)
    })
}

/// Whether the parameters contain `q=0`.
fn is_excluded(parameters: &str) -> bool {
    parameters
        .split(';')
        .filter_map(|parameter| parameter.split_once('='))
        .any(|(name, value)| {
            name.trim().eq_ignore_ascii_case("q")
                && value.trim().parse::<f32>().is_ok_and(|weight| weight <= 0.0)
        })
}

/// The first 8 bytes of SHA-256 over the types, each followed by a line feed.
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
