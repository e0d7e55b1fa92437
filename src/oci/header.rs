//! Header names that the `http` crate lacks, and parsers of small headers.

use http::header::{AGE, LINK, WARNING};
use http::{HeaderMap, HeaderName, HeaderValue};

/// Digest of the response's content.
pub const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// `registry/2.0`, for old docker versions.
pub const DOCKER_DISTRIBUTION_API_VERSION: HeaderName =
    HeaderName::from_static("docker-distribution-api-version");
/// Filters applied to a list of referrers.
pub const OCI_FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");
/// The `ns` that was used.
pub const OCI_NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");
/// Subject of an uploaded manifest.
pub const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// Cache handling of the request (RFC 9211).
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// When the digest that the tag names will be old enough for `min_age` (RFC 9110 §5.6.7). Sent with an older digest.
pub const COOLING_UNTIL: HeaderName = HeaderName::from_static("ifnewer-cooling-until");
/// Docker Hub: pulls per window.
pub const RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
/// Docker Hub: remaining pulls in the window.
pub const RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
/// Seconds until the window ends (draft-ietf-httpapi-ratelimit-headers-05).
pub const RATELIMIT_RESET: HeaderName = HeaderName::from_static("ratelimit-reset");
/// Docker Hub: address or account that pulls are counted for.
pub const DOCKER_RATELIMIT_SOURCE: HeaderName = HeaderName::from_static("docker-ratelimit-source");

/// Longest `Link` header read, in bytes.
pub const LINK_BYTES_MAX: usize = 4096;
/// Longest rate-limit source read, in bytes.
pub const RATE_SOURCE_BYTES_MAX: usize = 128;

/// Longest `Cache-Status` of an upstream that is forwarded, in bytes, and longest `Warning`.
pub const CACHE_HEADER_BYTES_MAX: usize = 1024;

/// What the caches before this one say about a response. Read only if it has a `Cache-Status`, of any content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheHeaders {
    /// `Cache-Status` (RFC 9211): a member for each cache, the one closest to the registry first. `None` if it is too long
    /// or cannot be continued.
    pub status: Option<HeaderValue>,
    /// `Age` in seconds.
    pub age_s: Option<u64>,
    /// `Warning` (RFC 7234 §5.5): the content may be stale.
    pub warning: Option<HeaderValue>,
}

impl CacheHeaders {
    /// Reads a response's headers. `None` if no cache describes itself.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let read = |name| {
            let lines = joined_lines(headers, name, CACHE_HEADER_BYTES_MAX).ok().flatten();
            lines.filter(is_complete_list)
        };
        if headers.get_all(CACHE_STATUS).iter().all(HeaderValue::is_empty) {
            return None;
        }
        let age = headers.get(AGE).and_then(|age| age.to_str().ok());
        Some(Self {
            status: read(&CACHE_STATUS),
            age_s: age.and_then(|age| age.trim().parse().ok()),
            warning: read(&WARNING),
        })
    }
}

/// The lines of a list header joined by commas (RFC 9110 §5.3). `None` without any.
///
/// # Errors
///
/// They have more than `bytes_max` bytes.
pub fn joined_lines(
    headers: &HeaderMap,
    name: &HeaderName,
    bytes_max: usize,
) -> Result<Option<HeaderValue>, TooLong> {
    let mut joined = Vec::new();
    for line in headers.get_all(name) {
        if !joined.is_empty() {
            joined.extend_from_slice(b", ");
        }
        joined.extend_from_slice(line.as_bytes());
        if joined.len() > bytes_max {
            return Err(TooLong);
        }
    }
    Ok(HeaderValue::from_bytes(&joined)
        .ok()
        .filter(|joined| !joined.is_empty()))
}

/// The lines of a header exceed their limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

/// Whether a member can be appended: the list is visible ASCII and ends outside of a quoted string.
fn is_complete_list(list: &HeaderValue) -> bool {
    let Ok(text) = list.to_str() else { return false };
    let (mut in_quotes, mut is_escaped) = (false, false);
    for c in text.chars() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if in_quotes => is_escaped = true,
            '"' => in_quotes = !in_quotes,
            _ => {}
        }
    }
    !in_quotes
}

/// Pull quota of an upstream, as far as it states one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Pulls per window.
    pub limit: Option<u64>,
    /// Remaining pulls in the window.
    pub remaining: Option<u64>,
    /// Length of the window, in seconds.
    pub window_s: Option<u64>,
    /// Seconds until the window ends, if stated.
    pub reset_s: Option<u64>,
    /// Address or account that pulls are counted for.
    pub source: Option<String>,
}

impl RateLimit {
    /// Reads a response's headers. Missing and malformed fields are `None`.
    pub fn read(headers: &HeaderMap) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let (limit, limit_window) = text(&RATELIMIT_LIMIT).map_or((None, None), read_quota);
        let (remaining, remaining_window) = text(&RATELIMIT_REMAINING).map_or((None, None), read_quota);
        let source = text(&DOCKER_RATELIMIT_SOURCE).map(str::trim);
        Self {
            limit,
            remaining,
            window_s: limit_window.or(remaining_window),
            reset_s: text(&RATELIMIT_RESET).and_then(|text| text.trim().parse().ok()),
            source: source
                .filter(|source| !source.is_empty() && source.len() <= RATE_SOURCE_BYTES_MAX)
                .map(str::to_owned),
        }
    }

    /// Upper bound of the seconds until all pulls are allowed again, if stated.
    pub fn reset_after_s(&self) -> Option<u64> {
        self.reset_s.or(self.window_s)
    }

    /// Whether the response stated no quota.
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

/// Next page of a list: the target of `rel="next"` (RFC 8288) without host and fragment, so that a client which
/// follows it returns to this cache. A relative target stays relative.
pub fn next_link(headers: &HeaderMap) -> Option<String> {
    let lines = headers
        .get_all(LINK)
        .iter()
        .filter_map(|value| value.to_str().ok());
    lines
        .filter(|line| line.len() <= LINK_BYTES_MAX)
        .find_map(next_of_line)
}

/// `100;w=21600`: a number, and the window in seconds.
fn read_quota(text: &str) -> (Option<u64>, Option<u64>) {
    let mut parts = text.split(';').map(str::trim);
    let quota = parts.next().and_then(|quota| quota.parse().ok());
    let window = parts.find_map(|part| part.strip_prefix("w=")?.parse().ok());
    (quota, window)
}

fn next_of_line(line: &str) -> Option<String> {
    let mut rest = line;
    while let Some((_, link)) = rest.split_once('<') {
        let (target, after) = link.split_once('>')?;
        let (parameters, following) = split_at_comma(after);
        rest = following;
        if parameters.split(';').any(is_next) {
            return path_and_query(target);
        }
    }
    None
}

fn split_at_comma(text: &str) -> (&str, &str) {
    let mut in_quotes = false;
    let comma = text.find(|c| {
        in_quotes ^= c == '"';
        c == ',' && !in_quotes
    });
    comma
        .and_then(|at| text.split_at_checked(at))
        .unwrap_or((text, ""))
}

fn is_next(parameter: &str) -> bool {
    parameter.split_once('=').is_some_and(|(name, value)| {
        let mut relations = value.trim().trim_matches('"').split_ascii_whitespace();
        name.trim().eq_ignore_ascii_case("rel") && relations.any(|word| word.eq_ignore_ascii_case("next"))
    })
}

fn path_and_query(target: &str) -> Option<String> {
    let target = target.trim().split('#').next().unwrap_or_default();
    let after_scheme = match target.split_once("://") {
        Some((scheme, rest)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => Some(rest),
        _ => target.strip_prefix("//"),
    };
    let local = match after_scheme {
        Some(rest) => rest.get(rest.find(['/', '?'])?..)?,
        None => target,
    };
    // The result must not name a host: `https://a//b`, `/\b` to a browser, `odd+scheme://b`.
    let first = local.split(['/', '?']).next().unwrap_or_default();
    let names_host = local.starts_with("//") || first.contains(':');
    let is_plain = local.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\');
    let is_safe = !local.is_empty() && !names_host && is_plain;
    is_safe.then(|| local.to_owned())
}

#[cfg(test)]
mod tests;
