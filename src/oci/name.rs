//! Names: repositories, tags, and references (a tag or a digest).
//!
//! The grammar is that of the spec ("Pulling manifests"). A repository name does not include a host: the
//! upstream follows from the routing of the request.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::digest::{AnyDigest, Digest, DigestError};

/// Longest repository name, in bytes. Many clients limit host + `/` + name to this length.
pub const REPOSITORY_BYTES_MAX: usize = 255;
/// Longest tag, in bytes.
pub const TAG_BYTES_MAX: usize = 128;

/// A repository name: components of lower-case letters and digits, joined by `/`.
///
/// Within a component, `.`, `_`, `__` or any number of `-` may separate letters and digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository(Arc<str>);

impl Repository {
    /// The complete name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part before the first `/`, where prefix routing expects the upstream's name.
    pub fn first_component(&self) -> &str {
        self.0.split_once('/').map_or(&*self.0, |(first, _)| first)
    }

    /// Whether it has no `/`, as Docker Hub's short names.
    pub fn is_one_component(&self) -> bool {
        !self.0.contains('/')
    }

    /// The name without the leading components `prefix`, if anything follows them.
    #[must_use]
    pub fn strip_prefix(&self, prefix: &str) -> Option<Self> {
        let rest = self.0.strip_prefix(prefix)?.strip_prefix('/')?;
        // The text after a `/` of a valid name is a valid name, so this cannot fail.
        rest.parse().ok()
    }

    /// The name with `prefix` and a `/` before it: `library` + `alpine` is `library/alpine`.
    pub fn with_prefix(&self, prefix: &str) -> Result<Self, NameError> {
        [prefix, "/", &*self.0].concat().parse()
    }
}

impl FromStr for Repository {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        check_repository(text)?;
        Ok(Self(text.into()))
    }
}

/// A tag: a letter, digit or `_`, then up to 127 letters, digits, `.`, `_` and `-`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(Arc<str>);

impl Tag {
    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it has the form of a referrers tag, which lists the referrers of a manifest at registries
    /// without the referrers API (spec, "Referrers Tag Schema"). Signing tools append `.sig` and the like;
    /// those are ordinary tags.
    pub fn is_referrers_tag(&self) -> bool {
        let encoded = self
            .0
            .strip_prefix("sha256-")
            .or_else(|| self.0.strip_prefix("sha512-"));
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        encoded.is_some_and(|encoded| encoded.len() == 64 && encoded.bytes().all(is_hex))
    }

    /// Subject manifest of a referrers tag. `None` if the tag truncates the digest, as for sha512.
    pub fn subject(&self) -> Option<Digest> {
        let encoded = self
            .0
            .strip_prefix("sha256-")
            .filter(|_| self.is_referrers_tag())?;
        format!("sha256:{encoded}").parse().ok()
    }
}

impl FromStr for Tag {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > TAG_BYTES_MAX {
            return Err(NameError::TooLong {
                found: text.len(),
                max: TAG_BYTES_MAX,
            });
        }
        let wrong = |(at, byte): (usize, u8)| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => None,
            b'.' | b'-' if at > 0 => None,
            b'.' | b'-' => Some(NameError::Separator { at }),
            _ => Some(NameError::Character { at }),
        };
        match text.bytes().enumerate().find_map(wrong) {
            None => Ok(Self(text.into())),
            Some(error) => Err(error),
        }
    }
}

macro_rules! name_is_text {
    ($name:ty) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name_is_text!(Repository);
name_is_text!(Tag);

/// Reference of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    /// A tag, which may move.
    Tag(Tag),
    /// A digest, which identifies the content.
    Digest(AnyDigest),
}

impl From<Tag> for Reference {
    fn from(tag: Tag) -> Self {
        Self::Tag(tag)
    }
}

impl From<Digest> for Reference {
    fn from(digest: Digest) -> Self {
        Self::Digest(AnyDigest::Supported(digest))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    /// Text with a `:` is a digest, because no tag has one. Otherwise it is a tag.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.contains(':') {
            Ok(Self::Digest(text.parse()?))
        } else {
            Ok(Self::Tag(text.parse()?))
        }
    }
}

/// Splits an image reference as users write it into a name and a tag or digest; without either, the tag is `latest`.
pub fn split_image(image: &str) -> (&str, &str) {
    match (image.split_once('@'), image.rsplit_once(':')) {
        (Some((name, digest)), _) => (name, digest),
        (None, Some((name, tag))) if !tag.contains('/') => (name, tag),
        _ => (image, "latest"),
    }
}

/// Error in a text that is neither a tag nor a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ReferenceError {
    /// Without a `:`, and not a tag.
    #[error(transparent)]
    Tag(#[from] NameError),
    /// With a `:`, and not a digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

/// Error in a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NameError {
    /// Empty name.
    #[error("a name cannot be empty")]
    Empty,
    /// Longer than allowed.
    #[error("a name of {found} bytes is too long, {max} are allowed")]
    TooLong {
        /// Length in bytes.
        found: usize,
        /// Longest allowed length.
        max: usize,
    },
    /// A forbidden character.
    #[error("the character at byte {at} is not allowed in a name")]
    Character {
        /// Byte offset.
        at: usize,
    },
    /// A separator at an end or next to another one.
    #[error("a letter or digit is needed at byte {at} of a name")]
    Separator {
        /// Byte offset.
        at: usize,
    },
}

fn check_repository(text: &str) -> Result<(), NameError> {
    /// Class of the previous bytes. A component may end after `Word` only.
    enum Last {
        Start,
        Word,
        Dot,
        Underscore,
        Underscores,
        Dashes,
    }

    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > REPOSITORY_BYTES_MAX {
        return Err(NameError::TooLong {
            found: text.len(),
            max: REPOSITORY_BYTES_MAX,
        });
    }
    let mut last = Last::Start;
    for (at, byte) in text.bytes().enumerate() {
        last = match (byte, last) {
            (b'a'..=b'z' | b'0'..=b'9', _) => Last::Word,
            (b'/', Last::Word) => Last::Start,
            (b'.', Last::Word) => Last::Dot,
            (b'_', Last::Word) => Last::Underscore,
            (b'_', Last::Underscore) => Last::Underscores,
            (b'-', Last::Word | Last::Dashes) => Last::Dashes,
            (b'/' | b'.' | b'_' | b'-', _) => return Err(NameError::Separator { at }),
            _ => return Err(NameError::Character { at }),
        };
    }
    if matches!(last, Last::Word) {
        Ok(())
    } else {
        Err(NameError::Separator { at: text.len() })
    }
}

#[cfg(test)]
mod tests;
