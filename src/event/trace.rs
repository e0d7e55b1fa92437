//! W3C Trace Context: names one request across programs.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};

use http::HeaderMap;

/// The header of the trace context, <https://www.w3.org/TR/trace-context/>.
pub const TRACEPARENT: &str = "traceparent";

/// A trace and, within it, this program's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    span: u64,
    flags: u8,
}

impl Trace {
    /// The trace that the client says its request belongs to; a new one where it says none.
    pub fn of_request(headers: &HeaderMap) -> Self {
        let told = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
        let (id, flags) = told.and_then(parse).unwrap_or_else(|| {
            let id = u128::from(random()) << 64 | u128::from(random());
            (id.max(1), 0)
        });
        Self {
            id,
            span: random().max(1),
            flags,
        }
    }

    /// The trace's id, as it stands in logs: 32 hexadecimal digits.
    pub fn id(&self) -> String {
        format!("{:032x}", self.id)
    }

    /// The value of [`TRACEPARENT`] for requests made because of this one.
    pub fn header(&self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.id, self.span, self.flags)
    }

    #[cfg(test)]
    pub(super) fn of_number(id: u128) -> Self {
        Self {
            id,
            span: 1,
            flags: 0,
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

/// Trace id and flags of `version-traceid-parentid-flags`. Later versions may say more after the flags.
fn parse(text: &str) -> Option<(u128, u8)> {
    let mut parts = text.trim().split('-');
    let (version, id, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |part: &str, digits| {
        part.len() == digits
            && part
                .bytes()
                .all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
    };
    let well_formed = is_hex(version, 2) && is_hex(id, 32) && is_hex(parent, 16) && is_hex(flags, 2);
    if !well_formed || version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let id = u128::from_str_radix(id, 16).ok().filter(|id| *id != 0)?;
    let parent = u64::from_str_radix(parent, 16).ok()?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    (parent != 0).then_some((id, flags))
}

/// Good enough to tell requests apart; nothing secret rests on it.
fn random() -> u64 {
    RandomState::new().hash_one(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use http::HeaderValue;

    fn of(text: &'static str) -> Trace {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, HeaderValue::from_static(text));
        Trace::of_request(&headers)
    }

    #[test]
    fn a_clients_trace_goes_on_under_a_part_of_our_own() {
        let trace = of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert_eq!(trace.id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        let header = trace.header();
        assert!(header.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && header.ends_with("-01"));
        assert!(!header.contains("00f067aa0ba902b7"));
        assert_eq!(parse(&header).unwrap().1, 1);
    }

    #[test]
    fn what_is_malformed_begins_a_new_trace() {
        for text in [
            "",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_ne!(of("nonsense").id(), of("nonsense").id());
    }
}
