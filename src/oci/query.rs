//! The query of a request, decoded, with `ns` taken out.
//!
//! `ns` says which upstream is meant (spec, "Registry Proxying") and concerns us alone; the rest is for the
//! upstream.

use std::fmt;

/// Longest query taken, in bytes as sent. Links to next pages hold tokens of some length.
pub const QUERY_BYTES_MAX: usize = 4096;
/// Most parameters taken, `ns` not counted.
pub const QUERY_PAIRS_MAX: usize = 8;

/// The parameters of a request for the upstream, in the order sent.
///
/// [`Display`](fmt::Display) gives them with the leading `?`, or nothing when there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Reads a query without its `?`; gives it without `ns`, and the value of `ns` apart (an empty one is
    /// none).
    pub fn parse(query: Option<&str>) -> Result<(Self, Option<String>), QueryError> {
        let text = query.unwrap_or_default();
        if text.len() > QUERY_BYTES_MAX {
            return Err(QueryError::TooLong { found: text.len() });
        }
        let (mut pairs, mut namespace) = (Vec::new(), None);
        for part in text.split('&').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let (key, value) = (decode(key)?, decode(value)?);
            if key == "ns" {
                if namespace.replace(value).is_some() {
                    return Err(QueryError::TwoNamespaces);
                }
            } else if pairs.len() == QUERY_PAIRS_MAX {
                return Err(QueryError::TooMany);
            } else {
                pairs.push((key, value));
            }
        }
        Ok((Self(pairs), namespace.filter(|namespace| !namespace.is_empty())))
    }

    /// Every value of `key`, decoded. A key in another case and a `;` between parameters count too: some servers read so.
    pub fn values(query: Option<&str>, key: &str) -> Result<Vec<String>, QueryError> {
        let parts = query.unwrap_or_default().split(['&', ';']);
        let pairs = parts.map(|part| part.split_once('=').unwrap_or((part, "")));
        pairs
            .filter(|(known, _)| decode(known).is_ok_and(|known| known.eq_ignore_ascii_case(key)))
            .map(|(_, value)| decode(value))
            .collect()
    }

    /// The first value of `key`, decoded.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == key)
            .map(|(_, value)| value.as_str())
    }

    /// Whether no parameter but `key` is given.
    pub fn has_only(&self, key: &str) -> bool {
        self.0.iter().all(|(known, _)| known == key)
    }

    /// Whether each parameter is one of `keys`, and none is given twice.
    pub fn has_only_of(&self, keys: &[&str]) -> bool {
        let times = |key: &str| self.0.iter().filter(|(known, _)| known == key).count();
        self.0
            .iter()
            .all(|(known, _)| keys.contains(&known.as_str()) && times(known) == 1)
    }

    /// These parameters.
    pub fn from_pairs(pairs: &[(&str, &str)]) -> Self {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        Self(pairs.iter().map(owned).collect())
    }

    /// Whether there is no parameter.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Percent-encoded, without a leading `?`.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (key, value) in &self.0 {
            if !text.is_empty() {
                text.push('&');
            }
            encode(key, &mut text);
            text.push('=');
            encode(value, &mut text);
        }
        text
    }

    /// As a further parameter, what says which upstream is meant: `&ns=ghcr.io`, or nothing.
    pub fn ns_suffix(namespace: Option<&str>) -> String {
        let mut text = String::new();
        if let Some(namespace) = namespace {
            text.push_str("&ns=");
            encode(namespace, &mut text);
        }
        text
    }

    /// The same query, if `n` (tags in a page) is a number. It is for the upstream to say how many it gives.
    pub(super) fn with_page_size(self) -> Result<Self, QueryError> {
        let is_number = |value: &str| !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
        let mut sizes = self.0.iter().filter(|(key, _)| key == "n");
        if sizes.all(|(_, value)| is_number(value)) {
            Ok(self)
        } else {
            Err(QueryError::PageSize)
        }
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            Ok(())
        } else {
            write!(f, "?{}", self.render())
        }
    }
}

/// Why a query is not taken. The fault of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum QueryError {
    /// Longer than [`QUERY_BYTES_MAX`].
    #[error("a query of {found} bytes is too long, {QUERY_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// More parameters than [`QUERY_PAIRS_MAX`].
    #[error("more than {QUERY_PAIRS_MAX} parameters")]
    TooMany,
    /// More tags than one push may have.
    #[error("more tags than one push may have")]
    TooManyTags,
    /// A `%` without two hex digits, or bytes that are not UTF-8.
    #[error("a parameter is not percent-encoded UTF-8")]
    Encoding,
    /// `ns` is given twice: which upstream is meant is nobody's guess.
    #[error("ns is given twice")]
    TwoNamespaces,
    /// `n` is not a number.
    #[error("n is not a number")]
    PageSize,
}

/// Decodes as forms do (`+` is a space), because that is how registries read it.
pub(super) fn decode(text: &str) -> Result<String, QueryError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                let (high, low) = digit().zip(digit()).ok_or(QueryError::Encoding)?;
                u8::try_from(high << 4 | low).map_err(|_| QueryError::Encoding)?
            }
            plain => plain,
        });
    }
    String::from_utf8(bytes).map_err(|_| QueryError::Encoding)
}

/// Encodes all but the unreserved characters (RFC 3986 §2.3), and `/` and `:`, which queries may hold.
fn encode(text: &str, into: &mut String) {
    let digit = |value: u8| {
        char::from(if value < 10 {
            b'0' + value
        } else {
            b'A' + value - 10
        })
    };
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                into.push(char::from(byte));
            }
            _ => into.extend(['%', digit(byte >> 4), digit(byte & 0x0f)]),
        }
    }
}

#[cfg(test)]
mod tests;
