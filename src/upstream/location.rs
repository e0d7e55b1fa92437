//! Where a `Location` header points, seen from the request it answers. Pure.

use http::Uri;

/// RFC 3986 §5.2 for what a `Location` may be. `None`: not a URL we would ever follow.
pub(super) fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    // An empty one would lead to where it came from.
    let location = location
        .split('#')
        .next()
        .filter(|location| !location.is_empty())?;
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let absolute = |text: &str| {
        text.split_once("://")
            .is_some_and(|(scheme, _)| scheme.bytes().all(|b| b.is_ascii_alphanumeric()))
    };
    let text = if absolute(location) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
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

/// RFC 3986 §5.2.4 on the path, the query left alone.
fn without_dots(path_and_query: &str) -> String {
    let (path, query) = match path_and_query.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (path_and_query, None),
    };
    let mut kept: Vec<&str> = Vec::new();
    for segment in path.split('/').skip(1) {
        match segment {
            "." => {}
            ".." => {
                kept.pop();
            }
            segment => kept.push(segment),
        }
    }
    let path = kept.join("/");
    query.map_or_else(|| format!("/{path}"), |query| format!("/{path}?{query}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_resolved_against_the_request() {
        let base = Uri::from_static("https://reg.example:5000/v2/a/blobs/b?x=1");
        for (location, target) in [
            ("https://cdn.example/x?y=/z", Some("https://cdn.example/x?y=/z")),
            ("http://cdn.example", Some("http://cdn.example/")),
            ("//cdn.example/x#part", Some("https://cdn.example/x")),
            ("/store/x", Some("https://reg.example:5000/store/x")),
            (
                "/login?to=https://a/b",
                Some("https://reg.example:5000/login?to=https://a/b"),
            ),
            ("c", Some("https://reg.example:5000/v2/a/blobs/c")),
            ("../../c?q=..", Some("https://reg.example:5000/v2/c?q=..")),
            ("../../../../../c", Some("https://reg.example:5000/c")),
            ("?x=2", Some("https://reg.example:5000/v2/a/blobs/b?x=2")),
            ("https://user@cdn.example/", None),
            ("ftp://cdn.example/", None),
            ("https://", None),
            ("https://cdn example/", None),
        ] {
            assert_eq!(
                resolve(&base, location).map(|uri| uri.to_string()).as_deref(),
                target,
                "{location}"
            );
        }
    }
}
