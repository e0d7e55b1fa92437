//! `Location` header: resolution against the request URL. No I/O.

use http::Uri;
use percent_encoding::{AsciiSet, CONTROLS, percent_encode};

/// Resolves a `Location` (RFC 3986 §5.2). `None`: not a URL to follow.
///
/// Some storage services send characters that a URL may not contain: spaces and quotes of a file name, `|`, UTF-8.
/// These are percent-encoded, as browsers and Go's HTTP client do. All other characters stay unchanged, because a
/// signature may cover them.
pub(super) fn resolve(base: &Uri, location: &[u8]) -> Option<Uri> {
    // An empty `Location` would redirect to the request itself.
    let location = location.trim_ascii().split(|byte| *byte == b'#').next();
    let location = percent_encode(location.filter(|location| !location.is_empty())?, INVALID).to_string();
    let location = location.as_str();
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let text = if is_absolute(location) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else if is_opaque(location) {
        return None;
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!(
            "{scheme}://{authority}{}",
            without_dots(&format!("{folder}/{location}"))
        )
    };
    let uri: Uri = text.parse().ok()?;
    let authority = uri.authority()?;
    let web = matches!(uri.scheme_str(), Some("http" | "https"));
    (web && !authority.host().is_empty() && !authority.as_str().contains('@')).then_some(uri)
}

/// Characters besides controls that RFC 3986 allows nowhere in a URL. A `%` stays unchanged.
const INVALID: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'<')
    .add(b'>')
    .add(b'\\')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

fn is_absolute(text: &str) -> bool {
    text.split_once("://")
        .is_some_and(|(scheme, _)| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// Whether it is an absolute URL without an authority, such as `https:host`.
fn is_opaque(text: &str) -> bool {
    let scheme = text.split_once(':').map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https"))
}

/// Removes dot segments from the path (RFC 3986 §5.2.4), not from the query.
fn without_dots(path_and_query: &str) -> String {
    let (path, query) = match path_and_query.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (path_and_query, None),
    };
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split('/').skip(1) {
        match segment {
            "." => {}
            ".." => {
                segments.pop();
            }
            segment => segments.push(segment),
        }
    }
    let path = segments.join("/");
    query.map_or_else(|| format!("/{path}"), |query| format!("/{path}?{query}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn location_is_resolved_against_the_request() {
        let base = Uri::from_static("https://reg.example:5000/v2/a/blobs/b?x=1");
        for (location, target) in [
            ("https://cdn.example/x?y=/z", Some("https://cdn.example/x?y=/z")),
            ("http://cdn.example", Some("http://cdn.example/")),
            ("https://cdn.example?sig=1", Some("https://cdn.example/?sig=1")),
            ("HTTPS://CDN.example/X", Some("https://CDN.example/X")),
            ("  https://cdn.example/x \t", Some("https://cdn.example/x")),
            ("//cdn.example/x#part", Some("https://cdn.example/x")),
            ("https://cdn.example/x#a#b?c", Some("https://cdn.example/x")),
            ("/store/x", Some("https://reg.example:5000/store/x")),
            (
                "/login?to=https://a/b",
                Some("https://reg.example:5000/login?to=https://a/b"),
            ),
            ("c", Some("https://reg.example:5000/v2/a/blobs/c")),
            ("sha256:c", Some("https://reg.example:5000/v2/a/blobs/sha256:c")),
            ("../../c?q=..", Some("https://reg.example:5000/v2/c?q=..")),
            ("../../../../../c", Some("https://reg.example:5000/c")),
            ("?x=2", Some("https://reg.example:5000/v2/a/blobs/b?x=2")),
            ("#part", None),
            ("   ", None),
            ("https://user@cdn.example/", None),
            ("https://user:secret@cdn.example/", None),
            ("ftp://cdn.example/", None),
            ("https://", None),
            ("https:cdn.example/x", None),
            ("https:/cdn.example/x", None),
            ("https://cdn example/", None),
            ("https://cdn\\example/", None),
            ("https://cdn.example\\@evil.example/", None),
        ] {
            assert_eq!(
                resolve(&base, location.as_bytes())
                    .map(|uri| uri.to_string())
                    .as_deref(),
                target,
                "{location}"
            );
        }
    }

    #[test]
    fn invalid_characters_in_location_are_encoded() {
        let base = Uri::from_static("https://reg.example/v2/a/blobs/b");
        let at = "https://s3.example";
        for (location, target) in [
            ("/a b.tar", "/a%20b.tar"),
            (
                "/x?response-content-disposition=attachment; filename=\"a b.tar\"",
                "/x?response-content-disposition=attachment;%20filename=%22a%20b.tar%22",
            ),
            ("/a|b?c|d", "/a%7Cb?c%7Cd"),
            ("/a[1]?b[]=c", "/a[1]?b[]=c"),
            ("/{a}/<b>?^`\\", "/%7Ba%7D/%3Cb%3E?%5E%60%5C"),
            ("/größe?ü=✓", "/gr%C3%B6%C3%9Fe?%C3%BC=%E2%9C%93"),
            ("/100%?sig=a%2Fb%zz%", "/100%?sig=a%2Fb%zz%"),
            (
                "/x?sig=a+b/c==&t=2026-01-01T00:00:00Z",
                "/x?sig=a+b/c==&t=2026-01-01T00:00:00Z",
            ),
            ("/a;v=1,2/(b)!*'$&~@:", "/a;v=1,2/(b)!*'$&~@:"),
            ("/a?b?c=d", "/a?b?c=d"),
            ("/a\tb", "/a%09b"),
        ] {
            let found = resolve(&base, format!("{at}{location}").as_bytes());
            let found = found.map(|uri| uri.to_string());
            assert_eq!(found, Some(format!("{at}{target}")), "{location}");
        }
        // ISO 8859-1, as old object stores encode file names.
        let found = resolve(&base, b"/gr\xf6\xdfe").map(|uri| uri.to_string());
        assert_eq!(found.as_deref(), Some("https://reg.example/gr%F6%DFe"));
    }
}
