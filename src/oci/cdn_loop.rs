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

/// Longest list of a request that several clients share. The next caches refuse no such list for its length: it leaves
/// room for 20 of them.
const SHARED_LIST_BYTES_MAX: usize = 512;

/// What the pseudonym of each process begins with.
const ID_PREFIX: &[u8] = b"ifnewer-";

/// Pseudonym of this process (RFC 8586 §2). Random, because several processes may share a name and an address.
static OWN_ID: LazyLock<String> =
    LazyLock::new(|| format!("ifnewer-{:016x}", RandomState::new().hash_one(())));

/// The caches that a request has passed, as received.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct CdnLoop(Option<HeaderValue>);

impl CdnLoop {
    /// The list of a client's request; empty if it exceeds the limit.
    pub fn read(headers: &HeaderMap) -> Self {
        Self(joined_lines(headers, &CDN_LOOP, LIST_BYTES_MAX).unwrap_or_default())
    }

    /// Whether an upstream may refuse the request for its list, although the request is in no loop. Such a request is not
    /// shared with clients that sent another list. A short list of these caches alone is refused only in a loop.
    pub fn may_be_refused(&self) -> bool {
        let Self(Some(list)) = self else { return false };
        let list = list.as_bytes();
        list.len() > SHARED_LIST_BYTES_MAX || !list.split(|byte| *byte == b',').all(is_id)
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

/// Whether a member of the list is a process of this program, without parameters.
fn is_id(member: &[u8]) -> bool {
    let random = member.trim_ascii().strip_prefix(ID_PREFIX);
    random.is_some_and(|random| random.len() == 16 && random.iter().all(u8::is_ascii_hexdigit))
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
    fn list_of_other_caches_may_be_refused() {
        let may_be_refused = |lines: &[&str]| CdnLoop::read(&headers(lines)).may_be_refused();
        let id = "ifnewer-0123456789abcdef";
        for shared in [
            &[][..],
            &[id],
            &[id, "ifnewer-fedcba9876543210,ifnewer-0000000000000000"],
        ] {
            assert!(!may_be_refused(shared), "{shared:?}");
        }
        let long = [id; 20].join(", ");
        for refused in [
            &["cdn.example; loops=9"][..],
            &[id, "edge"],
            &["ifnewer-0"],
            &["ifnewer-0123456789abcdef; a=b"],
            &[&long],
        ] {
            assert!(may_be_refused(refused), "{refused:?}");
        }
    }

    #[test]
    fn list_that_exceeds_its_limit_is_a_loop() {
        let long = "x".repeat(LIST_BYTES_MAX);
        assert!(!is_loop(&headers(&[&long])));
        assert!(is_loop(&headers(&[&long, "y"])));
        assert_eq!(CdnLoop::read(&headers(&[&long, "y"])), CdnLoop::default());
    }
}
