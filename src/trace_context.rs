//! W3C Trace Context, <https://www.w3.org/TR/trace-context/>.
//!
//! A request continues the trace in the client's `traceparent`, or begins one. The upstream requests that it causes
//! carry the same trace id, each with its own span id. `tracestate` is forwarded unparsed, or dropped if it exceeds a
//! limit. The caches that the request has passed ([`CdnLoop`]) go with it.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroU64;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::oci::cdn_loop::CdnLoop;

/// Header with trace id, parent span id and flags.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Header with data of tracing systems.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// §3.3.1.5 requires at least this much to be forwarded, and nothing requires more.
const TRACESTATE_BYTES_MAX: usize = 512;

/// §3.3.1.1
const TRACESTATE_MEMBERS_MAX: usize = 32;

/// §3.2.2.5.1, the flag `sampled`: the caller may have recorded trace data.
const SAMPLED: u8 = 1;

/// Trace id. Logs show it as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(u128);

impl TraceId {
    /// The id with this value.
    pub fn from_u128(id: u128) -> Self {
        Self(id)
    }

    /// Big-endian bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A span of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    id: TraceId,
    span_id: NonZeroU64,
    parent_span_id: Option<NonZeroU64>,
    flags: u8,
    state: Option<HeaderValue>,
    passed: CdnLoop,
}

impl TraceContext {
    /// A new, unsampled trace, for work without a client request.
    pub fn new_root() -> Self {
        let id = u128::from(random().get()) << 64 | u128::from(random().get());
        Self {
            id: TraceId(id),
            span_id: random(),
            parent_span_id: None,
            flags: 0,
            state: None,
            passed: CdnLoop::default(),
        }
    }

    /// Continues the trace in the headers of a client's request. Without one, begins a trace, which is sampled if
    /// `recorded`: if this process exports traces.
    pub fn extract(headers: &HeaderMap, recorded: bool) -> Self {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let parsed = values.next().and_then(|value| parse(value.to_str().ok()?));
        match parsed {
            // §3.2: several `traceparent` headers count as none.
            Some((id, parent, flags)) if values.next().is_none() => Self {
                id,
                span_id: random(),
                parent_span_id: Some(parent),
                flags,
                state: state(headers),
                passed: CdnLoop::read(headers),
            },
            _ => Self {
                flags: if recorded { SAMPLED } else { 0 },
                passed: CdnLoop::read(headers),
                ..Self::new_root()
            },
        }
    }

    /// A child span.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            span_id: random(),
            parent_span_id: Some(self.span_id),
            ..self.clone()
        }
    }

    /// The caches in the client's request, if an upstream may refuse a request that names them.
    pub fn refusable_caches(&self) -> Option<&CdnLoop> {
        Some(&self.passed).filter(|passed| passed.may_be_refused())
    }

    /// The same span, for a request whose response other clients share: without [`Self::refusable_caches`].
    #[must_use]
    pub fn shared(self) -> Self {
        if self.passed.may_be_refused() {
            self.without_caches()
        } else {
            self
        }
    }

    /// The same span without the caches in the client's request.
    #[must_use]
    pub fn without_caches(self) -> Self {
        Self {
            passed: CdnLoop::default(),
            ..self
        }
    }

    /// Trace id.
    pub fn id(&self) -> TraceId {
        self.id
    }

    /// Id of this span.
    pub fn span_id(&self) -> NonZeroU64 {
        self.span_id
    }

    /// Id of the parent span, here or at the client.
    pub fn parent_span_id(&self) -> Option<NonZeroU64> {
        self.parent_span_id
    }

    /// Whether the trace is sampled.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Writes this span into the headers of an upstream request.
    pub fn inject(&self, headers: &mut HeaderMap) {
        let parent = format!("00-{}-{:016x}-{:02x}", self.id, self.span_id, self.flags);
        headers.remove(TRACESTATE);
        self.passed.inject(headers);
        if let Ok(parent) = HeaderValue::try_from(parent) {
            headers.insert(TRACEPARENT, parent);
            headers.extend(self.state.clone().map(|state| (TRACESTATE, state)));
        }
    }
}

/// Parses `version-traceid-parentid-flags`. Later versions may have more fields after the flags.
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

/// All `tracestate` lines joined (§3.3.1.4), unparsed. `None` without any, or if they exceed the limits.
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

/// Random enough to distinguish requests; not used for secrets.
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

    fn injected(trace: &TraceContext) -> HeaderMap {
        let mut headers = HeaderMap::new();
        trace.inject(&mut headers);
        headers
    }

    #[test]
    fn client_trace_continues_with_a_new_span_id() {
        let trace = of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert_eq!(trace.id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(
            trace.parent_span_id().map(NonZeroU64::get),
            Some(0x00f0_67aa_0ba9_02b7)
        );
        assert!(trace.is_sampled());

        let child = trace.child();
        let headers = injected(&child);
        let parsed = parse(headers[TRACEPARENT].to_str().unwrap()).unwrap();
        assert_eq!(parsed, (trace.id(), child.span_id(), 1));
        assert_eq!(child.parent_span_id(), Some(trace.span_id()));
        assert_ne!(child.span_id(), trace.span_id());
    }

    #[test]
    fn new_trace_is_sampled_only_if_recorded() {
        assert!(TraceContext::extract(&HeaderMap::new(), true).is_sampled());
        assert!(!TraceContext::extract(&HeaderMap::new(), false).is_sampled());
        assert!(!of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").is_sampled());
    }

    #[test]
    fn malformed_traceparent_begins_a_new_trace() {
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
    fn tracestate_is_forwarded_unless_too_long() {
        let state_of = |lines: &[&str]| {
            let mut headers = HeaderMap::new();
            let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
            headers.insert(TRACEPARENT, HeaderValue::from_static(parent));
            for line in lines {
                headers.append(TRACESTATE, HeaderValue::from_str(line).unwrap());
            }
            let headers = injected(&TraceContext::extract(&headers, false).child());
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
        // Without a `traceparent` the `tracestate` belongs to no trace.
        let mut headers = HeaderMap::new();
        headers.insert(TRACESTATE, HeaderValue::from_static("one=1"));
        let headers = injected(&TraceContext::extract(&headers, false));
        assert_eq!(headers.get(TRACESTATE), None);
    }
}
