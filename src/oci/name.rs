//! Names: repositories, tags, and the reference that is either a tag or a digest.
//!
//! The grammar is the spec's ("Pulling manifests"). Host names are not part of a repository's name here:
//! which upstream a name belongs to is decided by the door a request came through.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::digest::{AnyDigest, Digest, DigestError};

/// Longest repository name, in bytes: many clients cap host + `/` + name there.
pub const REPOSITORY_BYTES_MAX: usize = 255;
/// Longest tag, in bytes.
pub const TAG_BYTES_MAX: usize = 128;

/// The name of a repository: components of lower-case letters and digits, joined by `/`.
///
/// Within a component `.`, `_`, `__` or any number of `-` may stand between letters and digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository(Arc<str>);

impl Repository {
    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Everything before the first `/`: where the prefix door looks for an upstream's name.
    pub fn first_component(&self) -> &str {
        self.0.split_once('/').map_or(&*self.0, |(first, _)| first)
    }

    /// Whether there is no `/` in it, as in Docker Hub's short names.
    pub fn is_one_component(&self) -> bool {
        !self.0.contains('/')
    }

    /// The rest of the name, if it begins with the whole components `prefix` and goes on after them.
    #[must_use]
    pub fn strip_prefix(&self, prefix: &str) -> Option<Self> {
        let rest = self.0.strip_prefix(prefix)?.strip_prefix('/')?;
        // What follows a `/` in a right name is a right name, so this cannot fail.
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

/// A tag: a letter, digit or `_`, then up to 127 of letters, digits, `.`, `_` and `-`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(Arc<str>);

impl Tag {
    /// The tag's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it has the form of a referrers tag: the list of what refers to a manifest, at registries without the
    /// referrers API (spec, "Referrers Tag Schema"). Tools that sign append `.sig` and the like; those are ordinary tags.
    pub fn is_referrers_tag(&self) -> bool {
        let encoded = self
            .0
            .strip_prefix("sha256-")
            .or_else(|| self.0.strip_prefix("sha512-"));
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        encoded.is_some_and(|encoded| encoded.len() == 64 && encoded.bytes().all(is_hex))
    }

    /// The manifest that a referrers tag is about; none where the tag cuts its digest short, as for sha512.
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

/// What a manifest is asked for by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    /// A name that may move.
    Tag(Tag),
    /// The content itself.
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

    /// With a `:` it is a digest, since no tag has one; otherwise a tag.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.contains(':') {
            Ok(Self::Digest(text.parse()?))
        } else {
            Ok(Self::Tag(text.parse()?))
        }
    }
}

/// Why a text is neither a tag nor a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ReferenceError {
    /// It has no `:`, and is no tag.
    #[error(transparent)]
    Tag(#[from] NameError),
    /// It has a `:`, and is no digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

/// Why a text is not a name. The fault of whoever wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NameError {
    /// There is nothing.
    #[error("a name cannot be empty")]
    Empty,
    /// Longer than a name may be.
    #[error("a name of {found} bytes is too long, {max} are allowed")]
    TooLong {
        /// Its length in bytes.
        found: usize,
        /// The most that is allowed.
        max: usize,
    },
    /// A character no such name may have.
    #[error("the character at byte {at} is not allowed in a name")]
    Character {
        /// Where, in bytes from the start.
        at: usize,
    },
    /// A separator at an end, or next to another.
    #[error("a letter or digit is needed at byte {at} of a name")]
    Separator {
        /// Where, in bytes from the start.
        at: usize,
    },
}

fn check_repository(text: &str) -> Result<(), NameError> {
    /// What the bytes just read were; a component may end only after `Word`.
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
