//! Canonical spelling of paths below `/v2/`.
//!
//! A server may decode a path, merge its slashes, cut its parameters and fold its case before it routes the
//! request (RFC 3986 §6.2.2). No repository, tag or digest needs a spelling that such a server would parse
//! differently, so all of those are rejected. The path that is compared with an access list, or with the cache,
//! is then the path that the registry reads.

use percent_encoding::percent_decode;

/// How often a server may decode a path before it routes the request.
const DECODINGS: usize = 3;

/// Characters that may be percent-encoded, in the last segment only: the colon of a digest, and characters of
/// upload identifiers. A tag has none of them.
const ESCAPED: &[u8] = b":=+@,";

/// Error in the spelling of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PathError {
    /// Resolves to `/v2/` and does not begin with it.
    #[error("it resolves to /v2/ but does not begin with it")]
    Prefix,
    /// Names content of a repository below a `/v2/` that is not its beginning.
    #[error(
        "it contains /v2/ and does not begin with it; a registry below a path is requested as /v2/… at its host"
    )]
    Nested,
    /// Unnecessary percent-encoding.
    #[error("below /v2/ nothing may be percent-encoded but the colon of a digest")]
    Encoded,
    /// Two slashes in a row.
    #[error("a segment is empty")]
    Empty,
    /// `.` or `..` is a segment.
    #[error("a segment is `.` or `..`")]
    Dots,
    /// A character that occurs in no name and has a meaning to some servers.
    #[error("it contains a backslash, a semicolon or a non-ASCII byte")]
    Character,
}

/// Segments behind a repository name in the paths of the distribution spec. Those of extensions begin with `_`.
const RESOURCES: [&[u8]; 4] = [b"manifests", b"blobs", b"tags", b"referrers"];

/// Rejects every non-canonical path that some server may resolve to `/v2/`, and the repositories of a registry whose `/v2/` is
/// below a path: under its own host, such a path leads to its API as well, and names no repository to the cache.
pub fn check(path: &str) -> Result<(), PathError> {
    match path.strip_prefix("/v2/") {
        Some(rest) => check_segments(rest),
        None if path == "/v2" => Ok(()),
        None => check_elsewhere(path),
    }
}

fn check_segments(rest: &str) -> Result<(), PathError> {
    if is_plain(rest) {
        Ok(())
    } else {
        check_each_segment(rest)
    }
}

fn check_each_segment(rest: &str) -> Result<(), PathError> {
    let (before, last) = rest.rsplit_once('/').unwrap_or(("", rest));
    let is_parent = rest.contains('/');
    for segment in before.split('/').filter(|_| is_parent) {
        if segment.is_empty() {
            return Err(PathError::Empty);
        }
        if segment.contains('%') {
            return Err(PathError::Encoded);
        }
        check_characters(segment)?;
    }
    let mut escapes = last.split('%').skip(1);
    if !escapes.all(|escape| decoded_byte(escape.as_bytes()).is_some_and(|byte| ESCAPED.contains(&byte))) {
        return Err(PathError::Encoded);
    }
    check_characters(last)
}

/// Whether the path consists of letters, digits and the separators of names, tags and digests, and no segment is empty or
/// begins with a dot. So are nearly all paths, and one pass shows it.
fn is_plain(rest: &str) -> bool {
    let mut previous = b'/';
    rest.bytes().all(|byte| {
        let is_allowed = match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b':' => true,
            b'.' | b'/' => previous != b'/',
            _ => false,
        };
        previous = byte;
        is_allowed
    })
}

fn check_characters(segment: &str) -> Result<(), PathError> {
    let is_wrong = |byte: u8| matches!(byte, b'\\' | b';') || !byte.is_ascii_graphic();
    if matches!(segment, "." | "..") {
        Err(PathError::Dots)
    } else if segment.bytes().any(is_wrong) {
        Err(PathError::Character)
    } else {
        Ok(())
    }
}

/// Checks a path that does not begin with `/v2/`, after decoding and normalization.
fn check_elsewhere(path: &str) -> Result<(), PathError> {
    let mut text = path.as_bytes().to_vec();
    for _ in 0..DECODINGS {
        text = percent_decode(&text).collect();
    }
    let mut segments: Vec<&[u8]> = Vec::new();
    for segment in text.split(|byte| matches!(byte, b'/' | b'\\')) {
        match segment.split(|byte| *byte == b';').next().unwrap_or_default() {
            b"" | b"." => {}
            b".." => drop(segments.pop()),
            segment => segments.push(segment),
        }
    }
    let is_root = |segment: &&[u8]| segment.eq_ignore_ascii_case(b"v2");
    let Some(root) = segments.iter().position(is_root) else {
        return Ok(());
    };
    let names_content = || segments.iter().skip(root + 2).any(|segment| is_resource(segment));
    if root == 0 {
        Err(PathError::Prefix)
    } else if names_content() {
        Err(PathError::Nested)
    } else {
        Ok(())
    }
}

fn is_resource(segment: &[u8]) -> bool {
    segment.starts_with(b"_") || RESOURCES.iter().any(|name| segment.eq_ignore_ascii_case(name))
}

/// The byte that the first two hex digits of `text` encode.
fn decoded_byte(text: &[u8]) -> Option<u8> {
    let digit = |at: usize| char::from(*text.get(at)?).to_digit(16);
    u8::try_from(digit(0)? << 4 | digit(1)?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn plain_path_has_valid_segments(rest in "[a-zA-Z0-9._:/%;~\\\\-]{0,12}") {
            prop_assert!(!is_plain(&rest) || check_each_segment(&rest).is_ok());
        }
    }

    #[test]
    fn t19_v2_path_has_one_spelling() {
        for path in [
            "/v2",
            "/v2/",
            "/v2/_catalog",
            "/v2/secret/app/manifests/1",
            "/v2/reg.test:5000/a_b/c--d/tags/list",
            "/v2/app/blobs/sha256:00",
            "/v2/app/blobs/sha256%3a00",
            "/v2/app/blobs/uploads/",
            "/v2/app/blobs/uploads/1:Xc-_~f%3D%3D",
            "/token",
            "/healthz",
            "/v20/x",
            "/api/v2.0/%2Fx//y",
            "/artifactory/api/docker/x/v2/token",
            "/artifactory/api/docker/x/v2/_catalog",
            "/auth/v2/tokens/issue",
            "/service/v1/manifests/tags",
        ] {
            assert_eq!(check(path), Ok(()), "{path}");
        }
        for (path, error) in [
            ("/V2", PathError::Prefix),
            ("/V2/secret/app/manifests/1", PathError::Prefix),
            ("//v2/secret/app/manifests/1", PathError::Prefix),
            ("/%762/secret/app/manifests/1", PathError::Prefix),
            ("/%25762/secret/app/manifests/1", PathError::Prefix),
            ("/%2525762/secret/app/manifests/1", PathError::Prefix),
            ("/v2%2Fsecret/app/manifests/1", PathError::Prefix),
            ("/v2;x/secret/app/manifests/1", PathError::Prefix),
            ("/v2\\secret/app/manifests/1", PathError::Prefix),
            ("/./v2/secret/app/manifests/1", PathError::Prefix),
            ("/x/%2e%2e/v2/secret/app/manifests/1", PathError::Prefix),
            ("/repository/docker/v2/secret/app/manifests/1", PathError::Nested),
            ("/repository/docker/V2/secret/MANIFESTS/1", PathError::Nested),
            (
                "/repository/docker/v2/secret/app/blobs/uploads/",
                PathError::Nested,
            ),
            ("/repository/docker/v2/secret/app/tags/list", PathError::Nested),
            (
                "/repository/docker/v2/secret/app/referrers/sha256:00",
                PathError::Nested,
            ),
            (
                "/repository/docker/v2/secret/app/_trust/tuf/root.json",
                PathError::Nested,
            ),
            (
                "/repository/v2/docker/v2/secret/app/manifests/1",
                PathError::Nested,
            ),
            (
                "/repository/docker%2Fv2/secret/app%2Fmanifests/1",
                PathError::Nested,
            ),
            (
                "/repository//docker/%2576%32;x/secret/app/manifests/1",
                PathError::Nested,
            ),
            ("/v2/secret/app/manifests%2F1", PathError::Encoded),
            ("/v2/secret/app%2Fmanifests/1", PathError::Encoded),
            ("/v2/secret/app/%6danifests/1", PathError::Encoded),
            ("/v2/secret/app/manifests/%31", PathError::Encoded),
            ("/v2/secret/app/manifests/1%", PathError::Encoded),
            ("/v2/secret/app/manifests/1%3Fx", PathError::Encoded),
            ("/v2/secret/app/manifests/sha256%253A00", PathError::Encoded),
            ("/v2/app%3A/manifests/1", PathError::Encoded),
            ("/v2/secret%2Fapp", PathError::Encoded),
            ("/v2//secret/app/manifests/1", PathError::Empty),
            ("/v2//", PathError::Empty),
            ("/v2/secret/app//manifests/1", PathError::Empty),
            ("/v2/ok/app/../../secret/app/manifests/1", PathError::Dots),
            ("/v2/..", PathError::Dots),
            ("/v2/./secret/app/manifests/1", PathError::Dots),
            ("/v2/secret/app/manifests;x/1", PathError::Character),
            ("/v2/secret/app\\manifests\\1", PathError::Character),
            ("/v2/secret/app/manifésts/1", PathError::Character),
        ] {
            assert_eq!(check(path), Err(error), "{path}");
        }
    }
}
