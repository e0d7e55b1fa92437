//! Query of a request, decoded, without `ns`.
//!
//! `ns` selects the upstream (spec, "Registry Proxying") and is used by the cache only. The other parameters
//! are for the upstream.

use std::fmt;

use super::percent;

/// Longest accepted query, in bytes as sent. Links to next pages contain tokens.
pub const QUERY_BYTES_MAX: usize = 4096;
/// Most parameters, `ns` not counted.
pub const QUERY_PAIRS_MAX: usize = 8;

/// Query parameters for the upstream, in their original order.
///
/// [`Display`](fmt::Display) writes them with the leading `?`, or nothing if there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Parses a query without its `?`. Returns it without `ns`, and the value of `ns` (an empty value counts as
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

    /// All decoded values of `key`. Keys of another case and `;` as separator count too, because some servers
    /// read queries so.
    pub fn values(query: Option<&str>, key: &str) -> Result<Vec<String>, QueryError> {
        let parts = query.unwrap_or_default().split(['&', ';']);
        let pairs = parts.map(|part| part.split_once('=').unwrap_or((part, "")));
        pairs
            .filter(|(known, _)| decode(known).is_ok_and(|known| known.eq_ignore_ascii_case(key)))
            .map(|(_, value)| decode(value))
            .collect()
    }

    /// First value of `key`, decoded.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == key)
            .map(|(_, value)| value.as_str())
    }

    /// Whether there is no parameter except `key`.
    pub fn has_only(&self, key: &str) -> bool {
        self.0.iter().all(|(known, _)| known == key)
    }

    /// Whether all parameters are among `keys`, each at most once.
    pub fn has_only_of(&self, keys: &[&str]) -> bool {
        let times = |key: &str| self.0.iter().filter(|(known, _)| known == key).count();
        self.0
            .iter()
            .all(|(known, _)| keys.contains(&known.as_str()) && times(known) == 1)
    }

    /// A query of these parameters.
    pub fn from_pairs(pairs: &[(&str, &str)]) -> Self {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        Self(pairs.iter().map(owned).collect())
    }

    /// Whether there are no parameters.
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
            text.extend(percent::query_value(key));
            text.push('=');
            text.extend(percent::query_value(value));
        }
        text
    }

    /// The `ns` parameter as a suffix, `&ns=ghcr.io`, or nothing.
    pub fn ns_suffix(namespace: Option<&str>) -> String {
        let mut text = String::new();
        if let Some(namespace) = namespace {
            text.push_str("&ns=");
            text.extend(percent::query_value(namespace));
        }
        text
    }

    /// The same query, if `n` (the page size) is a number. The upstream chooses the actual size.
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

/// Error in a query, made by the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum QueryError {
    /// Longer than [`QUERY_BYTES_MAX`].
    #[error("a query of {found} bytes is too long, {QUERY_BYTES_MAX} are allowed")]
    TooLong {
        /// Length in bytes.
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
    /// `ns` occurs twice, so the upstream is ambiguous.
    #[error("ns is given twice")]
    TwoNamespaces,
    /// `n` is not a number.
    #[error("n is not a number")]
    PageSize,
}

/// Decodes like a form (`+` is a space), as registries do.
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

#[cfg(test)]
mod tests;
