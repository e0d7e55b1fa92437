//! Rate-limit detection: which responses are rate limited, and the wait that they state. No I/O.
//!
//! The standards define 429 (RFC 6585) and `Retry-After` (RFC 9110 §10.2.3). Registries also use the OCI error code
//! with another status, 403 with an exhausted quota (GitHub), or 420 and 509. Some state the wait in the error
//! message (GHCR: `retry-after: 1.5s, allowed: 44000/minute`).
//!
//! A rate limit counts as unavailable, so a cached copy may be served; a denial must never be taken for one. Besides
//! the status, only an error code or a documented header indicates a rate limit, never the wording of a message. The
//! wording is used only for the wait of a response that is a rate limit already.

use std::time::Duration;

use http::header::{DATE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, StatusCode};

use crate::oci::error::ErrorCode;
use crate::oci::header::RATELIMIT_REMAINING;

/// Docker Hub's API: seconds, or the Unix time from which requests are allowed again.
const X_RETRY_AFTER: HeaderName = HeaderName::from_static("x-retry-after");
/// GitHub and others: remaining requests.
const X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
/// When the quota is reset: seconds from now (the draft), or Unix time (GitHub, GitLab).
const RESETS: [HeaderName; 2] = [
    HeaderName::from_static("ratelimit-reset"),
    HeaderName::from_static("x-ratelimit-reset"),
];
/// Messages of Artifact Registry for an exhausted quota, sent with 403 and `DENIED`.
const GOOGLE_QUOTAS: [&str; 2] = [
    "Quota exceeded for quota metric ",
    "Quota exceeded for quota group ",
];
/// Larger numbers are Unix times, not waits.
const EPOCH_S_MIN: u64 = 1_000_000_000;
/// Bytes of an error body that are searched for a wait.
const TEXT_BYTES_MAX: usize = 4096;

/// Whether status and headers indicate a rate limit, before the body is read.
pub(super) fn is_limit(status: StatusCode, headers: &HeaderMap) -> bool {
    match status.as_u16() {
        429 | 420 | 509 => true,
        // GitHub documents 403 with no remaining requests. A registry that requires a credential sends a challenge.
        403 => {
            let is_used_up = |name: HeaderName| number(headers, &name) == Some(0);
            !headers.contains_key(WWW_AUTHENTICATE)
                && (is_used_up(X_RATELIMIT_REMAINING) || is_used_up(RATELIMIT_REMAINING))
        }
        _ => false,
    }
}

/// Like [`is_limit`], and also by the error code and message of the body.
pub(super) fn is_limit_by_body(
    status: StatusCode,
    headers: &HeaderMap,
    code: Option<&str>,
    message: Option<&str>,
) -> bool {
    let is = |wanted: ErrorCode| code.is_some_and(|code| code.eq_ignore_ascii_case(wanted.as_str()));
    if is(ErrorCode::TooManyRequests) {
        return true;
    }
    if status == StatusCode::FORBIDDEN && (is(ErrorCode::Denied) || is(ErrorCode::Unauthorized)) {
        let starts = |quota: &&str| message.is_some_and(|message| message.starts_with(*quota));
        return GOOGLE_QUOTAS.iter().any(starts);
    }
    is_limit(status, headers)
}

/// The wait stated by a rate limit or a 503. Dates are compared with the response's own `Date`, so the local clock is
/// not needed. Not clamped.
pub(super) fn stated_wait(headers: &HeaderMap, body: &[u8]) -> Option<Duration> {
    let header = |name: &HeaderName| headers.get(name)?.to_str().ok();
    let stated = header(&RETRY_AFTER)
        .or_else(|| header(&X_RETRY_AFTER))
        .and_then(|text| wait_or_date(text, headers))
        .or_else(|| in_text(body));
    stated.or_else(|| {
        let used_up = [&RATELIMIT_REMAINING, &X_RATELIMIT_REMAINING]
            .into_iter()
            .find_map(|name| number(headers, name));
        let text = RESETS.iter().find_map(header)?;
        used_up
            .is_none_or(|left| left == 0)
            .then(|| wait_or_date(text, headers))?
    })
}

/// The number before any parameter: `100`, `0;w=21600`.
fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    let text = headers.get(name)?.to_str().ok()?;
    text.split([';', ',']).next()?.trim().parse().ok()
}

fn wait_or_date(text: &str, headers: &HeaderMap) -> Option<Duration> {
    let text = text.trim().trim_matches('"').trim();
    let now = || httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok();
    if let Ok(then) = httpdate::parse_http_date(text) {
        return Some(then.duration_since(now()?).unwrap_or_default());
    }
    let (wait, rest) = duration(text)?;
    if !rest.is_empty() {
        return None;
    }
    if wait.as_secs() < EPOCH_S_MIN || wait == Duration::MAX {
        return Some(wait);
    }
    let now = now()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(wait.saturating_sub(now))
}

/// The wait in an error message: `retry-after: 1.5s`, `Retry after 30 seconds`, `try again in 1 minute`,
/// `"retry_after": 7`.
fn in_text(body: &[u8]) -> Option<Duration> {
    let body = body.get(..TEXT_BYTES_MAX).unwrap_or(body);
    let text = String::from_utf8_lossy(body)
        .to_ascii_lowercase()
        .replace("\\u00b5", "µ")
        .replace("\\u03bc", "µ");
    let markers = [
        "retry-after",
        "retry after",
        "retry_after",
        "retryafter",
        "retry in",
        "again in",
    ];
    markers.into_iter().find_map(|marker| {
        text.match_indices(marker).find_map(|(at, found)| {
            let after = text.get(at + found.len()..)?;
            let (wait, rest) = duration(after.trim_start_matches([' ', ':', '=', '"', '\'', '\\']))?;
            // `2026-11-28`, `12:30` and `5th` are not waits.
            let ends =
                !rest.starts_with(|next: char| next.is_alphanumeric() || matches!(next, '-' | ':' | '/'));
            ends.then_some(wait)
        })
    })
}

/// Parses a number with a unit, several of them (`1m30s`), or a number of seconds. Returns the rest of the text too.
fn duration(text: &str) -> Option<(Duration, &str)> {
    let (mut whole, mut rest, mut parts) = (Duration::ZERO, text, 0);
    while let Some((number, after)) = decimal(rest) {
        let Some((seconds, after)) = unit(after) else {
            if parts > 0 {
                break;
            }
            return Some((seconds_of(number), after));
        };
        whole = whole.saturating_add(seconds_of(number * seconds));
        (rest, parts) = (after, parts + 1);
    }
    (parts > 0).then_some((whole, rest))
}

/// A number out of range becomes the longest wait.
fn seconds_of(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

fn decimal(text: &str) -> Option<(f64, &str)> {
    let is_digit = |c: char| c.is_ascii_digit();
    let digits = |text: &str| text.find(|c| !is_digit(c)).unwrap_or(text.len());
    let mut end = digits(text);
    if end == 0 {
        return None;
    }
    if let Some(fraction) = text.get(end..)?.strip_prefix('.')
        && digits(fraction) > 0
    {
        end += 1 + digits(fraction);
    }
    let (number, rest) = text.split_at_checked(end)?;
    Some((number.parse().ok()?, rest))
}

/// Parses a unit and returns its seconds.
fn unit(text: &str) -> Option<(f64, &str)> {
    let text = text.strip_prefix(' ').unwrap_or(text);
    let end = text.find(|c: char| !c.is_alphabetic()).unwrap_or(text.len());
    let (name, rest) = text.split_at_checked(end)?;
    let seconds = match name.to_ascii_lowercase().as_str() {
        "h" | "hour" | "hours" => 3600.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "ms" | "millisecond" | "milliseconds" => 1e-3,
        "us" | "µs" | "μs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    };
    Some((seconds, rest))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let lines = lines.iter();
        lines
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn r02_retry_after_parses_all_registry_formats() {
        const DATED: (&str, &str) = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        let ms = |ms: u64| Some(Duration::from_millis(ms));
        for (value, wait) in [
            ("7", ms(7000)),
            (" 7 ", ms(7000)),
            ("0", ms(0)),
            ("0.5", ms(500)),
            ("1s", ms(1000)),
            ("500ms", ms(500)),
            ("1m30s", ms(90_000)),
            ("1h", ms(3_600_000)),
            ("\"2s\"", ms(2000)),
            ("30 seconds", ms(30_000)),
            ("Sun, 06 Nov 1994 08:51:17 GMT", ms(100_000)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", ms(0)),
            // Unix time, as Docker Hub's API sends.
            ("784111790", ms(784_111_790_000)),
            ("99999999999999999999999999", Some(Duration::MAX)),
            ("soon", None),
            ("-5", None),
            ("1e3", None),
            (".5", None),
            ("5 apples", None),
            ("", None),
        ] {
            let headers = headers(&[DATED, ("retry-after", value)]);
            assert_eq!(stated_wait(&headers, b""), wait, "{value:?}");
        }
        let epoch = [
            ("date", "Sat, 28 Nov 2026 12:00:00 GMT"),
            ("x-retry-after", "1795867209"),
        ];
        assert_eq!(stated_wait(&headers(&epoch), b""), ms(9000));
        let undated = [("retry-after", "Sun, 06 Nov 1994 08:51:17 GMT")];
        assert_eq!(
            stated_wait(&headers(&undated), b""),
            None,
            "a date needs the response's Date"
        );
    }

    #[test]
    fn r02_wait_is_parsed_from_error_messages() {
        let us = |us: u64| Some(Duration::from_micros(us));
        for (body, wait) in [
            (
                r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"retry-after: 1.5s, allowed: 44000/minute"}]}"#,
                us(1_500_000),
            ),
            (
                r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"retry-after: 346.671µs, allowed: 44000/minute"}]}"#,
                Some(Duration::from_nanos(346_671)),
            ),
            (
                r#"{"errors":[{"message":"retry-after: 20\u00b5s, allowed"}]}"#,
                us(20),
            ),
            ("Too many requests, retry after 1.2s", us(1_200_000)),
            (
                "Rate limit exceeded. Please try again in 30 seconds.",
                us(30_000_000),
            ),
            ("Please try again in 1 minute", us(60_000_000)),
            (r#"{"message":"slow down","retry_after": 7}"#, us(7_000_000)),
            ("Retry later\n", None),
            (
                r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"Data limit exceeded"}]}"#,
                None,
            ),
            ("retry after 2026-11-28T12:00:00Z", None),
            ("retry after 12:30", None),
            ("retry after", None),
            ("", None),
        ] {
            assert_eq!(stated_wait(&HeaderMap::new(), body.as_bytes()), wait, "{body}");
        }
        let header = headers(&[("retry-after", "3")]);
        assert_eq!(
            stated_wait(&header, b"retry after 9s"),
            us(3_000_000),
            "the header takes precedence"
        );
    }

    #[test]
    fn r02_quota_reset_is_a_wait_only_if_exhausted() {
        let dated = ("date", "Sat, 28 Nov 2026 12:00:00 GMT");
        for (lines, wait) in [
            (&[("ratelimit-reset", "12")][..], Some(12)),
            (
                &[("ratelimit-reset", "12"), ("ratelimit-remaining", "0;w=60")],
                Some(12),
            ),
            (&[("ratelimit-reset", "12"), ("ratelimit-remaining", "5")], None),
            (
                &[
                    ("x-ratelimit-reset", "1795867260"),
                    ("x-ratelimit-remaining", "0"),
                ],
                Some(60),
            ),
            (&[("ratelimit-remaining", "0;w=21600")], None),
        ] {
            let lines: Vec<_> = lines.iter().copied().chain([dated]).collect();
            let wait = wait.map(Duration::from_secs);
            assert_eq!(stated_wait(&headers(&lines), b""), wait, "{lines:?}");
        }
    }

    #[test]
    fn k7_rate_limit_by_other_status_and_denial_is_none() {
        let none = HeaderMap::new();
        let used_up = headers(&[("x-ratelimit-remaining", "0")]);
        let left = headers(&[("x-ratelimit-remaining", "1")]);
        let hub = headers(&[("ratelimit-remaining", "0;w=21600")]);
        let asks = headers(&[
            ("x-ratelimit-remaining", "0"),
            ("www-authenticate", "Bearer realm=\"x\""),
        ]);
        let waits = headers(&[("retry-after", "5")]);
        let quota = "Quota exceeded for quota metric 'Requests per project per user'";
        for (status, headers, code, message, limit) in [
            (429, &none, None, None, true),
            (420, &none, None, None, true),
            (509, &none, None, None, true),
            (403, &none, Some("TOOMANYREQUESTS"), None, true),
            (403, &none, Some("toomanyrequests"), None, true),
            (404, &none, Some("TOOMANYREQUESTS"), None, true),
            (503, &none, Some("TOOMANYREQUESTS"), None, true),
            (403, &used_up, None, Some("API rate limit exceeded"), true),
            (403, &hub, None, None, true),
            (403, &none, Some("DENIED"), Some(quota), true),
            // Denials, even if the message mentions limits.
            (403, &none, None, Some("secondary rate limit"), false),
            (
                403,
                &none,
                Some("DENIED"),
                Some("rate limit exceeded for you, too many requests"),
                false,
            ),
            (403, &none, Some("DENIED"), Some("no quota"), false),
            (404, &none, Some("DENIED"), Some(quota), false),
            (403, &left, None, None, false),
            (403, &asks, None, None, false),
            (
                403,
                &used_up,
                Some("DENIED"),
                Some("requested access to the resource is denied"),
                false,
            ),
            (403, &waits, None, None, false),
            (401, &used_up, None, None, false),
            (401, &waits, Some("UNAUTHORIZED"), None, false),
            (404, &used_up, Some("MANIFEST_UNKNOWN"), None, false),
            (503, &none, None, None, false),
            (451, &waits, None, None, false),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let found = is_limit_by_body(status, headers, code, message);
            assert_eq!(found, limit, "{status} {headers:?} {code:?} {message:?}");
        }
    }
}
