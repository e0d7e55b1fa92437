//! Byte ranges (RFC 9110 §14): parsing of `Range` and `Content-Range`, and resolution for a body of known size.

use std::fmt;

use http::HeaderValue;

/// Most ranges of one request. A request with more is served without ranges. podman requests up to 1024 at a
/// time when it pulls changed chunks only (zstd:chunked), and gives up on a registry that takes fewer than 64.
pub const RANGES_MAX: usize = 1024;

/// A parsed `Range` header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RangeRequest {
    /// The complete body: no header, or one that must be ignored (malformed, another unit, too many ranges;
    /// §14.2).
    #[default]
    None,
    /// One range.
    Single(ByteRange),
    /// Two ranges or more.
    Multi(Vec<ByteRange>),
}

impl RangeRequest {
    /// Parses a `Range` header.
    pub fn read(header: Option<&HeaderValue>) -> Self {
        header
            .and_then(|value| value.to_str().ok())
            .and_then(read_ranges)
            .unwrap_or_default()
    }

    /// Whether a client continues a body that broke off: the range begins after byte 0 and has no end.
    pub fn is_resumption(&self) -> bool {
        matches!(self, Self::Single(ByteRange::FromOffset(first)) if *first > 0)
    }

    /// Upper bound of the bytes in the response with a blob that is not cached, for any size of it. `None` if unbounded, also
    /// for several ranges, because that response is the full blob.
    pub fn uncached_bytes_max(&self) -> Option<u64> {
        match *self {
            Self::Single(ByteRange::Bounded { first, last }) => {
                Some(last.saturating_sub(first).saturating_add(1))
            }
            Self::Single(ByteRange::Suffix(bytes)) => Some(bytes),
            Self::Single(ByteRange::FromOffset(_)) | Self::None | Self::Multi(_) => None,
        }
    }

    /// Bytes to send of a body of `size` bytes.
    pub fn resolve(&self, size: u64) -> ResolvedRange {
        match self {
            Self::None => ResolvedRange::Full,
            Self::Single(range) => range
                .resolve(size)
                .map_or(ResolvedRange::Unsatisfiable, ResolvedRange::Single),
            Self::Multi(ranges) => {
                let spans: Vec<ByteSpan> = ranges.iter().filter_map(|range| range.resolve(size)).collect();
                if spans.is_empty() {
                    ResolvedRange::Unsatisfiable
                } else {
                    ResolvedRange::Multi(coalesce(spans))
                }
            }
        }
    }
}

/// A [`RangeRequest`] resolved for a body of known size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResolvedRange {
    /// Complete body (200).
    Full,
    /// One part (206).
    Single(ByteSpan),
    /// Parts of a `multipart/byteranges` response (206), in the requested order, no byte twice. There may be
    /// only one: a client that requests several ranges accepts that (RFC 9110 §15.3.7.2).
    Multi(Vec<ByteSpan>),
    /// No requested byte exists (416).
    Unsatisfiable,
}

/// Merges overlapping spans, so that no response is larger than the body. Adjacent spans stay separate, because
/// podman counts the parts (§14.2, §15.3.7.2).
fn coalesce(spans: Vec<ByteSpan>) -> Vec<ByteSpan> {
    let mut ordered: Vec<(usize, ByteSpan)> = spans.into_iter().enumerate().collect();
    ordered.sort_by_key(|(_, span)| span.start);
    let mut merged: Vec<(usize, ByteSpan)> = Vec::with_capacity(ordered.len());
    for (position, span) in ordered {
        match merged.last_mut() {
            Some((first_position, last)) if span.start < last.end_exclusive => {
                last.end_exclusive = last.end_exclusive.max(span.end_exclusive);
                *first_position = position.min(*first_position);
            }
            _ => merged.push((position, span)),
        }
    }
    merged.sort_by_key(|(position, _)| *position);
    merged.into_iter().map(|(_, span)| span).collect()
}

/// A requested range. It may lie beyond the end of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ByteRange {
    /// `N-`: from byte N to the end.
    FromOffset(u64),
    /// `N-M`: from byte N to byte M, both included. With M before N it is unsatisfiable: invalid by the
    /// grammar, but the conformance suite expects 416.
    Bounded {
        /// First byte.
        first: u64,
        /// Last byte.
        last: u64,
    },
    /// `-N`: the last N bytes.
    Suffix(u64),
}

impl ByteRange {
    /// The bytes of this range in a body of `size` bytes, or `None` if there are none (416).
    pub fn resolve(self, size: u64) -> Option<ByteSpan> {
        let (start, end_exclusive) = match self {
            Self::FromOffset(first) => (first, size),
            Self::Bounded { first, last } => (first, last.saturating_add(1).min(size)),
            Self::Suffix(bytes) => (size.saturating_sub(bytes), size),
        };
        ByteSpan::new(start, end_exclusive)
    }
}

/// Formats it as in a `Range` header, without the unit.
impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FromOffset(first) => write!(f, "{first}-"),
            Self::Bounded { first, last } => write!(f, "{first}-{last}"),
            Self::Suffix(bytes) => write!(f, "-{bytes}"),
        }
    }
}

/// A non-empty span of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::len_without_is_empty, reason = "a span is never empty")]
pub struct ByteSpan {
    /// First byte.
    pub start: u64,
    /// The byte after the last one.
    pub end_exclusive: u64,
}

impl ByteSpan {
    /// The bytes from `start` up to, not including, `end_exclusive`. `None` if empty.
    pub const fn new(start: u64, end_exclusive: u64) -> Option<Self> {
        if start < end_exclusive {
            Some(Self { start, end_exclusive })
        } else {
            None
        }
    }

    /// Number of bytes.
    pub const fn len(&self) -> u64 {
        self.end_exclusive.saturating_sub(self.start)
    }
}

/// `Content-Range` of a 206: `bytes 0-1/10`.
pub fn content_range(span: ByteSpan, size: u64) -> String {
    format!(
        "bytes {}-{}/{size}",
        span.start,
        span.end_exclusive.saturating_sub(1)
    )
}

/// `Content-Range` of a 416: `bytes */10`.
pub fn unsatisfied_content_range(size: u64) -> String {
    format!("bytes */{size}")
}

/// Parses the `Content-Range` of a 206: its span, and the complete size unless that is `*`.
pub fn parse_content_range(text: &str) -> Option<(ByteSpan, Option<u64>)> {
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, size) = rest.trim_start().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let size = if size == "*" { None } else { Some(parse_u64(size)?) };
    let span = ByteSpan::new(parse_u64(first)?, parse_u64(last)?.checked_add(1)?)?;
    let fits = size.is_none_or(|size| span.end_exclusive <= size);
    (unit.eq_ignore_ascii_case("bytes") && fits).then_some((span, size))
}

fn read_ranges(text: &str) -> Option<RangeRequest> {
    let (unit, set) = text.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let mut ranges = Vec::new();
    // Empty list members are skipped (§5.6.1.2).
    for item in set.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        if ranges.len() == RANGES_MAX {
            return None;
        }
        ranges.push(read_range(item)?);
    }
    match *ranges.as_slice() {
        [] => None,
        [range] => Some(RangeRequest::Single(range)),
        _ => Some(RangeRequest::Multi(ranges)),
    }
}

fn read_range(text: &str) -> Option<ByteRange> {
    let (first, last) = text.split_once('-')?;
    match (first.trim_end(), last.trim_start()) {
        ("", last) => Some(ByteRange::Suffix(parse_u64_saturating(last)?)),
        (first, "") => Some(ByteRange::FromOffset(parse_u64_saturating(first)?)),
        (first, last) => Some(ByteRange::Bounded {
            first: parse_u64_saturating(first)?,
            last: parse_u64_saturating(last)?,
        }),
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A number in a response. One that overflows is an error.
fn parse_u64(text: &str) -> Option<u64> {
    is_number(text).then(|| text.parse().ok()).flatten()
}

/// A number in a request. One that overflows lies beyond the end of every body.
fn parse_u64_saturating(text: &str) -> Option<u64> {
    is_number(text).then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
