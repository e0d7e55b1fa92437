//! Loop detection between caches: `CDN-Loop`, RFC 8586.
//!
//! Each upstream request names the caches that caused it, this process last. A request that names this process has
//! come back: the `url` of an upstream leads here, directly or through other caches.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::header::joined_lines;

/// Header with the caches that a request has passed.
pub const CDN_LOOP: HeaderName = HeaderName::from_static("cdn-loop");

/// Longest list that is forwarded. A longer one counts as a loop: through caches that do not recognize themselves, or that
/// restart.
const LIST_BYTES_MAX: usize = 1024;

/// Pseudonym of this process (RFC 8586 §2). Random, because several processes may share a name and an address.
static OWN_ID: LazyLock<String> =
    LazyLock::new(|| format!("ifnewer-{:016x}", RandomState::new().hash_one(())));

/// The caches that a request has passed, as received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CdnLoop(Option<HeaderValue>);

impl CdnLoop {
    /// The list of a client's request; empty if it exceeds the limit.
    pub fn read(headers: &HeaderMap) -> Self {
        Self(joined_lines(headers, &CDN_LOOP, LIST_BYTES_MAX).unwrap_or_default())
    }

    /// Writes the list, with this process at its end, into the headers of an upstream request.
    pub fn inject(&self, headers: &mut HeaderMap) {
        let received = self.0.as_ref().map(HeaderValue::as_bytes);
        let list = match received {
            Some(received) => [received, b", ", OWN_ID.as_bytes()].concat(),
            None => OWN_ID.as_bytes().to_vec(),
        };
        if let Ok(list) = HeaderValue::from_bytes(&list) {
            headers.insert(CDN_LOOP, list);
        }
    }
}

/// Whether the request has passed this process before, or too many caches.
pub fn is_loop(headers: &HeaderMap) -> bool {
    match joined_lines(headers, &CDN_LOOP, LIST_BYTES_MAX) {
        Ok(None) => false,
        Ok(Some(list)) => list.as_bytes().split(|byte| *byte == b',').any(is_own),
        Err(_) => true,
    }
}

/// Whether a member of the list is this process. Its parameters do not count.
fn is_own(member: &[u8]) -> bool {
    let id = member.split(|byte| *byte == b';').next().unwrap_or_default();
    id.trim_ascii() == OWN_ID.as_bytes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn headers(lines: &[&str]) -> HeaderMap {
        let lines = lines.iter().map(|line| (CDN_LOOP, line.parse().unwrap()));
        lines.collect()
    }

    fn sent_after(lines: &[&str]) -> HeaderMap {
        let mut sent = HeaderMap::new();
        CdnLoop::read(&headers(lines)).inject(&mut sent);
        sent
    }

    #[test]
    fn request_that_passed_this_process_is_a_loop() {
        assert!(!is_loop(&HeaderMap::new()));
        assert!(!is_loop(&headers(&["ifnewer-0123456789abcdef, other.example"])));
        assert!(is_loop(&sent_after(&[])));
        let forwarded = sent_after(&["edge.example; trace=\"a, b\"", "regional"]);
        assert!(is_loop(&forwarded), "{forwarded:?}");
        let list = forwarded.get(CDN_LOOP).unwrap().to_str().unwrap();
        assert!(
            list.starts_with("edge.example; trace=\"a, b\", regional, ifnewer-"),
            "{list}"
        );
        let returned = format!("{list}; trace=7, other");
        assert!(is_loop(&headers(&[&returned])), "{returned}");
    }

    #[test]
    fn list_that_exceeds_its_limit_is_a_loop() {
        let long = "x".repeat(LIST_BYTES_MAX);
        assert!(!is_loop(&headers(&[&long])));
        assert!(is_loop(&headers(&[&long, "y"])));
        assert_eq!(CdnLoop::read(&headers(&[&long, "y"])), CdnLoop::default());
    }
}
