//! Content digests, and the hashing that verifies them.
//!
//! A [`Digest`] can be verified. An [`UnsupportedDigest`] is well formed, but of an unsupported algorithm: it
//! may be forwarded to an upstream and is never stored. This is the only module that hashes.

use std::fmt;
use std::str::FromStr;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest as _, Sha256, Sha512};

/// Longest accepted digest text, in bytes. The longest supported one (sha512) has 135.
pub const DIGEST_BYTES_MAX: usize = 255;

/// Supported hash algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// SHA-256, 64 hex digits.
    Sha256,
    /// SHA-512, 128 hex digits.
    Sha512,
}

impl Algorithm {
    /// Name before the colon.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Number of hex digits after the colon.
    pub const fn hex_digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Algorithm {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        match text {
            "sha256" => Ok(Self::Sha256),
            "sha512" => Ok(Self::Sha512),
            _ => Err(DigestError::Unsupported),
        }
    }
}

/// A digest of a supported algorithm. Stored as bytes and formatted on output.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Digest {
    /// SHA-256.
    Sha256([u8; 32]),
    /// SHA-512.
    Sha512([u8; 64]),
}

impl Digest {
    /// Hashes `content`.
    pub fn of(algorithm: Algorithm, content: &[u8]) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::digest(content).into()),
            Algorithm::Sha512 => Self::Sha512(Sha512::digest(content).into()),
        }
    }

    /// Parses the part after the colon: exactly as many lower-case hex digits as the algorithm has.
    pub fn from_hex(algorithm: Algorithm, hex: &str) -> Result<Self, DigestError> {
        let expected = algorithm.hex_digits();
        if hex.len() != expected {
            return Err(DigestError::Length {
                algorithm,
                expected,
                found: hex.len(),
            });
        }
        match algorithm {
            Algorithm::Sha256 => parse_hex(hex).map(Self::Sha256),
            Algorithm::Sha512 => parse_hex(hex).map(Self::Sha512),
        }
        .ok_or(DigestError::Hex { algorithm })
    }

    /// Its algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        match self {
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// Raw bytes, 32 or 64.
    pub const fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Sha256(bytes) => bytes,
            Self::Sha512(bytes) => bytes,
        }
    }

    /// Lower-case hex digits after the colon.
    pub fn hex(&self) -> String {
        self.as_bytes()
            .iter()
            .flat_map(|byte| hex_pair(*byte))
            .map(char::from)
            .collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Written as one text, so that a `String` grows once.
        let mut text = [0; 7 + 128];
        let (prefix, hex) = text.split_at_mut(7);
        prefix.copy_from_slice(match self.algorithm() {
            Algorithm::Sha256 => b"sha256:",
            Algorithm::Sha512 => b"sha512:",
        });
        let (pairs, _) = hex.as_chunks_mut();
        for (pair, byte) in pairs.iter_mut().zip(self.as_bytes()) {
            *pair = hex_pair(*byte);
        }
        let text = text.get(..7 + self.algorithm().hex_digits()).ok_or(fmt::Error)?;
        f.write_str(std::str::from_utf8(text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        match text.parse()? {
            AnyDigest::Supported(digest) => Ok(digest),
            AnyDigest::Unsupported(_) => Err(DigestError::Unsupported),
        }
    }
}

/// A well-formed digest of an unsupported algorithm (`blake3:…`): forwarded, never stored.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnsupportedDigest(Box<str>);

impl UnsupportedDigest {
    /// The complete text, `algorithm:encoded`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UnsupportedDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for UnsupportedDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Any digest that the grammar allows (image-spec, descriptor.md, "Digests").
///
/// A malformed sha256 or sha512 digest (short, upper-case) is an error, never an unsupported digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AnyDigest {
    /// A digest that can be verified.
    Supported(Digest),
    /// A digest that can only be forwarded.
    Unsupported(UnsupportedDigest),
}

impl AnyDigest {
    /// The digest, if it can be verified.
    pub const fn supported(&self) -> Option<&Digest> {
        match self {
            Self::Supported(digest) => Some(digest),
            Self::Unsupported(_) => None,
        }
    }
}

impl From<Digest> for AnyDigest {
    fn from(digest: Digest) -> Self {
        Self::Supported(digest)
    }
}

impl fmt::Display for AnyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Supported(digest) => digest.fmt(f),
            Self::Unsupported(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

impl FromStr for AnyDigest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        if text.len() > DIGEST_BYTES_MAX {
            return Err(DigestError::TooLong { found: text.len() });
        }
        let (algorithm, encoded) = text.split_once(':').ok_or(DigestError::Grammar)?;
        match algorithm.parse() {
            Ok(algorithm) => Digest::from_hex(algorithm, encoded).map(Self::Supported),
            Err(_) if is_algorithm(algorithm) && is_encoded(encoded) => {
                Ok(Self::Unsupported(UnsupportedDigest(text.into())))
            }
            Err(_) => Err(DigestError::Grammar),
        }
    }
}

/// Incremental hasher.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    /// A hasher without input.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Sha512::new()),
        })
    }

    /// Hashes the next bytes of the content.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
        }
    }

    /// Digest of all input.
    pub fn finish(self) -> Digest {
        match self.0 {
            State::Sha256(state) => Digest::Sha256(state.finalize().into()),
            State::Sha512(state) => Digest::Sha512(state.finalize().into()),
        }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let algorithm = match self.0 {
            State::Sha256(_) => Algorithm::Sha256,
            State::Sha512(_) => Algorithm::Sha512,
        };
        f.debug_tuple("Hasher").field(&algorithm).finish()
    }
}

/// HMAC-SHA-256 (RFC 2104) of `message` under `secret`. It identifies a principal without storing its
/// credential.
pub fn hmac_sha256(secret: &[u8], message: &[u8]) -> [u8; 32] {
    // A key longer than a block counts as its hash, a shorter one as padded with zeros (RFC 2104 §2). Done
    // here, because `hmac` takes a key of exactly one block without a possible error.
    let hashed: [u8; 32];
    let short = if secret.len() > 64 {
        hashed = Sha256::digest(secret).into();
        &hashed[..]
    } else {
        secret
    };
    let mut block = [0; 64];
    for (slot, byte) in block.iter_mut().zip(short) {
        *slot = *byte;
    }
    let mut mac = Hmac::<Sha256>::new(&block.into());
    mac.update(message);
    mac.finalize().into_bytes().into()
}

/// Error in a digest's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum DigestError {
    /// Not `algorithm:encoded`.
    #[error("a digest is written algorithm:encoded, for example sha256:<64 hex digits>")]
    Grammar,
    /// Supported algorithm with a wrong number of digits.
    #[error("a {algorithm} digest has {expected} hex digits, not {found}")]
    Length {
        /// The named algorithm.
        algorithm: Algorithm,
        /// Its number of digits.
        expected: usize,
        /// The given number of digits.
        found: usize,
    },
    /// Supported algorithm with other characters than lower-case hex digits.
    #[error("a {algorithm} digest is written in lower-case hex digits")]
    Hex {
        /// The named algorithm.
        algorithm: Algorithm,
    },
    /// An unsupported algorithm where a verifiable digest is required.
    #[error("only sha256 and sha512 digests can be verified")]
    Unsupported,
    /// Longer than [`DIGEST_BYTES_MAX`].
    #[error("a digest of {found} bytes is too long")]
    TooLong {
        /// Length in bytes.
        found: usize,
    },
}

/// `algorithm ::= component (separator component)*`, lower-case components, separators `+._-`.
fn is_algorithm(text: &str) -> bool {
    text.split(['+', '.', '_', '-']).all(|component| {
        !component.is_empty()
            && component
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9'))
    })
}

fn is_encoded(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'=' | b'_' | b'-'))
}

const NOT_HEX: u8 = 0xff;

/// Value of each lower-case hex digit.
#[expect(
    clippy::indexing_slicing,
    reason = "runs at compile time, where a wrong index is an error"
)]
const HEX_VALUE: [u8; 256] = {
    let mut table = [NOT_HEX; 256];
    let mut value: u8 = 0;
    while value < 16 {
        let digit = if value < 10 {
            b'0' + value
        } else {
            b'a' + value - 10
        };
        table[digit as usize] = value;
        value += 1;
    }
    table
};

fn hex_value(digit: u8) -> u8 {
    HEX_VALUE.get(usize::from(digit)).copied().unwrap_or(NOT_HEX)
}

fn hex_pair(byte: u8) -> [u8; 2] {
    // Without a branch, so that the compiler converts several digits at once.
    let digit = |value: u8| b'0' + value + u8::from(value > 9) * (b'a' - b'9' - 1);
    [digit(byte >> 4), digit(byte & 0x0f)]
}

/// Parses `2 × N` hex digits. Checks them after the loop, so that the loop has no branch.
fn parse_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut wrong = 0;
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        let &[high, low] = pair else { return None };
        let (high, low) = (hex_value(high), hex_value(low));
        wrong |= high | low;
        *byte = high << 4 | low & 0x0f;
    }
    (wrong & 0xf0 == 0).then_some(bytes)
}

#[cfg(test)]
mod tests;
