//! Percent-encoding of query values (RFC 3986 §2.1).

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};

/// Encodes all but the unreserved characters (RFC 3986 §2.3), and `/` and `:`, which are allowed in queries.
pub fn query_value(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, QUERY_VALUE)
}

/// Like [`query_value`], but the comma of an authentication scope stays readable too.
pub fn scope(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, SCOPE)
}

const SCOPE: &AsciiSet = &QUERY_VALUE.remove(b',');

const QUERY_VALUE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/')
    .remove(b':');
