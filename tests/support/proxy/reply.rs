//! Responses and assertions about them.

use crate::registry::{Blob, Image, sha256};
use bytes::Bytes;
use http::HeaderMap;

/// A response, complete or interrupted.
#[derive(Clone, Debug)]
pub struct Reply {
    pub method: String,
    pub path: String,
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Whether the body is complete.
    pub whole: bool,
}

impl Reply {
    /// The text of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// `Cache-Status` (RFC 9211).
    pub fn cache_status(&self) -> &str {
        self.header("cache-status")
            .unwrap_or_else(|| panic!("no Cache-Status: {self:#?}"))
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:#?}"))
    }

    /// The `code` of the error.
    pub fn code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().unwrap().to_owned()
    }

    /// The `message` of the error.
    pub fn message(&self) -> String {
        self.json()["errors"][0]["message"].as_str().unwrap().to_owned()
    }

    /// The manifest of this image, with every header a client relies on.
    pub fn is_image(&self, image: &Image) -> &Reply {
        assert_eq!(self.status, 200, "{self:#?}");
        assert!(self.whole, "{self:#?}");
        if self.method == "GET" {
            assert_eq!(self.body, image.manifest, "{self:#?}");
        }
        assert_eq!(self.header("content-type"), Some(image.media_type.as_str()));
        assert_eq!(self.header("docker-content-digest"), Some(image.digest.as_str()));
        assert_eq!(
            self.header("etag"),
            Some(format!("\"{}\"", image.digest).as_str())
        );
        assert_eq!(
            self.header("content-length"),
            Some(image.manifest.len().to_string().as_str())
        );
        self
    }

    /// This blob, with every header a client relies on.
    pub fn is_blob(&self, blob: &Blob) -> &Reply {
        assert_eq!(self.status, 200, "{self:#?}");
        assert!(
            self.whole,
            "cut after {} of {} bytes",
            self.body.len(),
            blob.bytes.len()
        );
        if self.method == "GET" {
            assert_eq!(sha256(&self.body), blob.digest);
        }
        assert_eq!(self.header("content-type"), Some("application/octet-stream"));
        assert_eq!(self.header("docker-content-digest"), Some(blob.digest.as_str()));
        assert_eq!(
            self.header("content-length"),
            Some(blob.bytes.len().to_string().as_str())
        );
        self
    }

    /// The parts of a `multipart/byteranges` body: `Content-Range` and bytes of each.
    pub fn parts(&self) -> Vec<(String, Bytes)> {
        let kind = self.header("content-type").unwrap();
        let boundary = kind
            .strip_prefix("multipart/byteranges; boundary=")
            .unwrap_or_else(|| panic!("{kind}"));
        assert!(
            boundary.len() <= 70
                && boundary
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        );
        let find = |bytes: &Bytes, what: &str| {
            bytes
                .windows(what.len())
                .position(|found| found == what.as_bytes())
        };
        let mut rest = self.body.clone();
        let mut parts = Vec::new();
        let opening = format!("--{boundary}\r\n");
        assert!(rest.starts_with(opening.as_bytes()), "no boundary at the start");
        let _ = rest.split_to(opening.len());
        loop {
            let head = rest.split_to(find(&rest, "\r\n\r\n").expect("a part has a head"));
            let _ = rest.split_to(4);
            let head = String::from_utf8(head.to_vec()).unwrap();
            assert!(head.contains("Content-Type: application/octet-stream"), "{head}");
            let range = head
                .lines()
                .find_map(|line| line.strip_prefix("Content-Range: "))
                .unwrap();
            let delimiter = format!("\r\n--{boundary}");
            let bytes = rest.split_to(find(&rest, &delimiter).expect("a part has an end"));
            parts.push((range.to_owned(), bytes));
            let _ = rest.split_to(delimiter.len());
            if rest == "--\r\n" {
                return parts;
            }
            assert_eq!(rest.split_to(2), "\r\n");
        }
    }

    /// Served from the cache after revalidation.
    pub fn is_unchanged(&self) -> &Reply {
        assert_eq!(self.status, 200, "{self:#?}");
        assert!(
            self.cache_status().contains("; hit") && self.cache_status().contains("revalidated"),
            "{self:#?}"
        );
        self.is_not_stale()
    }

    /// Served from the cache for any reason.
    pub fn is_hit(&self) -> &Reply {
        assert!(self.cache_status().starts_with("ifnewer; hit"), "{self:#?}");
        self
    }

    /// Fetched from upstream.
    pub fn is_fetched(&self) -> &Reply {
        assert!(self.cache_status().starts_with("ifnewer; fwd="), "{self:#?}");
        self
    }

    /// Served stale because the upstream is unavailable, with a warning.
    pub fn is_stale(&self) -> &Reply {
        assert_eq!(self.status, 200, "{self:#?}");
        assert!(self.is_hit().cache_status().contains("stale"), "{self:#?}");
        let warning = self
            .header("warning")
            .unwrap_or_else(|| panic!("no Warning: {self:#?}"));
        assert!(warning.starts_with("299 "), "{warning}");
        let age = self.header("age").unwrap_or_else(|| panic!("no Age: {self:#?}"));
        assert!(age.parse::<u64>().is_ok(), "{age}");
        self
    }

    /// Served stale after an import, without an age.
    pub fn is_imported(&self) -> &Reply {
        assert_eq!(self.status, 200, "{self:#?}");
        assert!(self.is_hit().cache_status().contains("stale"), "{self:#?}");
        let warning = self
            .header("warning")
            .unwrap_or_else(|| panic!("no Warning: {self:#?}"));
        assert!(warning.contains("imported and never confirmed"), "{warning}");
        assert_eq!(self.header("age"), None, "{self:#?}");
        self
    }

    /// No staleness is indicated.
    pub fn is_not_stale(&self) -> &Reply {
        assert_eq!(self.header("warning"), None, "{self:#?}");
        assert!(!self.cache_status().contains("stale"), "{self:#?}");
        self
    }

    /// An error with this status and no cached content.
    pub fn is_refused(&self, status: u16) -> &Reply {
        assert_eq!(self.status, status, "{self:#?}");
        assert_eq!(self.header("docker-content-digest"), None, "{self:#?}");
        assert_eq!(self.header("etag"), None, "{self:#?}");
        self
    }

    /// The upstream failed and nothing is cached: 502, 503 or 504, and never 404.
    pub fn is_unreachable(&self) -> &Reply {
        assert!(matches!(self.status, 502..=504), "{self:#?}");
        self.is_refused(self.status)
    }
}
