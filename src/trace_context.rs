//! W3C Trace Context: names one request across programs, <https://www.w3.org/TR/trace-context/>.
//!
//! A client's request belongs to the trace that the client names, or begins one. What is asked upstream because of it
//! carries the same trace, under a part of its own. What a client says of itself beyond that (`tracestate`) is handed on
//! unread, or not at all if it is long.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroU64;

use http::{HeaderMap, HeaderName, HeaderValue};

/// The header of the trace context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The header of what the tracing systems on the way have to say to each other.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// §3.3.1.5 asks for at least so much to be handed on; nothing asks for more.
const TRACESTATE_BYTES_MAX: usize = 512;

/// §3.3.1.1
const TRACESTATE_MEMBERS_MAX: usize = 32;

/// §3.3.2: whoever began the trace wants it recorded.
const SAMPLED: u8 = 1;

/// Which trace: 32 hexadecimal digits, as they stand in logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(u128);

impl TraceId {
    /// The id that is this number.
    pub fn from_u128(id: u128) -> Self {
        Self(id)
    }

    /// The bytes on the wire, the first digit first.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A trace and, within it, one part of what this program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    id: TraceId,
    span_id: NonZeroU64,
    parent_span_id: Option<NonZeroU64>,
    flags: u8,
    state: Option<HeaderValue>,
}

impl TraceContext {
    /// A trace of our own, for what no client's request is the reason of. Nobody records it.
    pub fn new_root() -> Self {
        let id = u128::from(random().get()) << 64 | u128::from(random().get());
        Self {
            id: TraceId(id),
            span_id: random(),
            parent_span_id: None,
            flags: 0,
            state: None,
        }
    }

    /// The trace that a client's request belongs to; where it names none, one begun here, which is to be `recorded` or not.
    pub fn extract(headers: &HeaderMap, recorded: bool) -> Self {
        let mut named = headers.get_all(TRACEPARENT).iter();
        let told = named.next().and_then(|value| parse(value.to_str().ok()?));
        match told {
            // §3.2: who finds several of them has none.
            Some((id, parent, flags)) if named.next().is_none() => Self {
                id,
                span_id: random(),
                parent_span_id: Some(parent),
                flags,
                state: state(headers),
            },
            _ => Self {
                flags: if recorded { SAMPLED } else { 0 },
                ..Self::new_root()
            },
        }
    }

    /// A part within this one.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            span_id: random(),
            parent_span_id: Some(self.span_id),
            ..self.clone()
        }
    }

    /// Which trace it is.
    pub fn id(&self) -> TraceId {
        self.id
    }

    /// This part's own number.
    pub fn span_id(&self) -> NonZeroU64 {
        self.span_id
    }

    /// The part that this one is within, here or at the client.
    pub fn parent_span_id(&self) -> Option<NonZeroU64> {
        self.parent_span_id
    }

    /// Whether whoever began the trace wants it recorded.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Names this part as the reason of a request, in its headers.
    pub fn inject(&self, headers: &mut HeaderMap) {
        let parent = format!("00-{}-{:016x}-{:02x}", self.id, self.span_id, self.flags);
        headers.remove(TRACESTATE);
        if let Ok(parent) = HeaderValue::try_from(parent) {
            headers.insert(TRACEPARENT, parent);
            headers.extend(self.state.clone().map(|state| (TRACESTATE, state)));
        }
    }
}

/// Trace id, parent and flags of `version-traceid-parentid-flags`. Later versions may say more after the flags.
fn parse(text: &str) -> Option<(TraceId, NonZeroU64, u8)> {
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
    let parent = NonZeroU64::new(u64::from_str_radix(parent, 16).ok()?)?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    Some((TraceId(id), parent, flags))
}

/// All lines as one (§3.3.1.4), unread; none where they are more than is worth carrying.
fn state(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut joined = Vec::new();
    for line in headers.get_all(TRACESTATE) {
        if !joined.is_empty() {
            joined.push(b',');
        }
        joined.extend_from_slice(line.as_bytes());
        if joined.len() > TRACESTATE_BYTES_MAX {
            return None;
        }
    }
    let members = joined.split(|byte| *byte == b',').count();
    if joined.is_empty() || members > TRACESTATE_MEMBERS_MAX {
        return None;
    }
    HeaderValue::from_bytes(&joined).ok()
}

/// Good enough to tell requests apart; nothing secret rests on it.
fn random() -> NonZeroU64 {
    NonZeroU64::new(RandomState::new().hash_one(())).unwrap_or(NonZeroU64::MIN)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn of(text: &'static str) -> TraceContext {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, HeaderValue::from_static(text));
        TraceContext::extract(&headers, false)
    }

    fn written(trace: &TraceContext) -> HeaderMap {
        let mut headers = HeaderMap::new();
        trace.inject(&mut headers);
        headers
    }

    #[test]
    fn a_clients_trace_goes_on_under_a_part_of_our_own() {
        let trace = of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert_eq!(trace.id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(
            trace.parent_span_id().map(NonZeroU64::get),
            Some(0x00f0_67aa_0ba9_02b7)
        );
        assert!(trace.is_sampled());

        let asking = trace.child();
        let headers = written(&asking);
        let told = parse(headers[TRACEPARENT].to_str().unwrap()).unwrap();
        assert_eq!(told, (trace.id(), asking.span_id(), 1));
        assert_eq!(asking.parent_span_id(), Some(trace.span_id()));
        assert_ne!(asking.span_id(), trace.span_id());
    }

    #[test]
    fn a_trace_begun_here_is_recorded_only_where_someone_records() {
        assert!(TraceContext::extract(&HeaderMap::new(), true).is_sampled());
        assert!(!TraceContext::extract(&HeaderMap::new(), false).is_sampled());
        assert!(!of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").is_sampled());
    }

    #[test]
    fn what_is_malformed_begins_a_new_trace() {
        for text in [
            "",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_ne!(of("nonsense").id(), of("nonsense").id());
        let mut twice = HeaderMap::new();
        let one = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        twice.append(TRACEPARENT, HeaderValue::from_static(one));
        twice.append(TRACEPARENT, HeaderValue::from_static(one));
        assert_eq!(TraceContext::extract(&twice, false).parent_span_id(), None);
    }

    #[test]
    fn what_tracing_systems_tell_each_other_is_handed_on_unless_it_is_long() {
        let state_of = |lines: &[&str]| {
            let mut headers = HeaderMap::new();
            let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
            headers.insert(TRACEPARENT, HeaderValue::from_static(parent));
            for line in lines {
                headers.append(TRACESTATE, HeaderValue::from_str(line).unwrap());
            }
            let headers = written(&TraceContext::extract(&headers, false).child());
            headers
                .get(TRACESTATE)
                .map(|state| state.to_str().unwrap().to_owned())
        };
        assert_eq!(
            state_of(&["one=1,two=2", "three=3"]).as_deref(),
            Some("one=1,two=2,three=3")
        );
        assert_eq!(state_of(&[]), None);
        assert_eq!(state_of(&[&format!("long={}", "x".repeat(600))]), None);
        assert_eq!(state_of(&[&vec!["a=1"; 33].join(",")]), None);
        // Without a trace there is nothing that it could belong to.
        let mut headers = HeaderMap::new();
        headers.insert(TRACESTATE, HeaderValue::from_static("one=1"));
        let headers = written(&TraceContext::extract(&headers, false));
        assert_eq!(headers.get(TRACESTATE), None);
    }
}
