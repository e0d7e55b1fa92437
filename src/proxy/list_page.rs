//! Tag list pages derived from cached pages with another `n` or `last`, for an outage. Pure except for the lookup of
//! cached pages.
//!
//! protocol: distribution-spec "Listing Tags": `n` is the maximum number of tags of a page, `last` the tag after
//! which it begins, and `Link` names the next page if tags remain.

use std::sync::Arc;

use serde_json::{Value, json};

use super::listing::Listing;
use crate::oci::{Endpoint, Query, Repository};
use crate::store::listings::StoredListing;

/// Most cached pages that are combined into one.
const PAGES_MAX: usize = 256;

/// Most tags that are combined into one page. A cached list has fewer.
const TAGS_MAX: usize = 1_000_000;

/// Query parameters of a page.
struct PageRequest {
    /// `None`: all tags.
    n: Option<usize>,
    last: Option<String>,
}

impl PageRequest {
    /// `None` if the query has other parameters, which a cached list cannot satisfy.
    fn of(query: &Query) -> Option<PageRequest> {
        query.has_only_of(&["n", "last"]).then(|| PageRequest {
            // A number that overflows exceeds any list.
            n: query.get("n").map(|n| n.parse().unwrap_or(usize::MAX)),
            last: query
                .get("last")
                .filter(|last| !last.is_empty())
                .map(str::to_owned),
        })
    }
}

/// The page for `query`, cut from the complete list: that is the first cached page and all pages that its `next` links
/// lead to. Also returns the oldest of these pages. `None` if one of them is not cached, or if `query` has other
/// parameters.
pub(super) fn derive_page(
    repository: &Repository,
    query: &Query,
    find_page: impl Fn(&str) -> Option<Arc<StoredListing>>,
) -> Option<(Listing, Arc<StoredListing>)> {
    let request = PageRequest::of(query)?;
    let path = |query: Query| {
        let repository = repository.clone();
        Endpoint::Tags { repository, query }.path_and_query()
    };
    let mut next = Some(path(Query::default()));
    let (mut tags, mut oldest) = (Vec::new(), None::<Arc<StoredListing>>);
    let mut name = Value::Null;
    let mut media_type = None;
    for _ in 0..PAGES_MAX {
        let Some(from) = next.take() else { break };
        let page = find_page(&from)?;
        let mut list: Value = serde_json::from_slice(&page.bytes).ok()?;
        name = list.get_mut("name").map(Value::take).unwrap_or_default();
        // Old registries send `null` for an empty list.
        let found = list.get_mut("tags").map(Value::take);
        for tag in found.as_ref().and_then(Value::as_array).into_iter().flatten() {
            tags.push(tag.as_str()?.to_owned());
        }
        media_type.get_or_insert_with(|| page.media_type.clone());
        next = page.next.as_deref().map(|link| {
            let (_, query) = link.split_once('?').unwrap_or((link, ""));
            Query::parse(Some(query))
                .map(|(query, _)| path(query))
                .unwrap_or_default()
        });
        let is_older = |oldest: &Arc<StoredListing>| page.listed_at < oldest.listed_at;
        if oldest.as_ref().is_none_or(is_older) {
            oldest = Some(page);
        }
        if tags.len() > TAGS_MAX {
            return None;
        }
    }
    // The end of the chain is not cached.
    if next.is_some() {
        return None;
    }
    let (page, more) = page_of(&tags, &request);
    let link = more.then(|| {
        let mut text = "?".to_owned();
        let n = request.n.unwrap_or_default().to_string();
        let last = page.last().map(String::as_str).unwrap_or_default();
        text.push_str(&Query::from_pairs(&[("n", &n), ("last", last)]).render());
        text
    });
    let listing = Listing {
        bytes: json!({ "name": name, "tags": page }).to_string().into(),
        media_type: media_type?,
        next: link,
        filters: None,
    };
    Some((listing, oldest?))
}

/// The tags after `last`, at most `n`, and whether more remain. If `last` is in the list, its position counts,
/// because registries sort differently. Otherwise the tags that sort after it are returned.
fn page_of<'a>(tags: &'a [String], request: &PageRequest) -> (&'a [String], bool) {
    let after = match &request.last {
        None => 0,
        Some(last) => tags.iter().position(|tag| tag == last).map_or_else(
            || tags.iter().position(|tag| tag > last).unwrap_or(tags.len()),
            |place| place + 1,
        ),
    };
    let rest = tags.get(after..).unwrap_or_default();
    let n = request.n.unwrap_or(usize::MAX);
    let page = rest.get(..n).unwrap_or(rest);
    (page, n > 0 && page.len() < rest.len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::collections::HashMap;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn cached_pages(pages: &[(&str, &str, Option<&str>)]) -> HashMap<String, Arc<StoredListing>> {
        let mut at = SystemTime::UNIX_EPOCH;
        let page = |(path, bytes, next): &(&str, &str, Option<&str>)| {
            at += Duration::from_secs(1);
            let media_type = "application/json".parse().unwrap();
            let next = next.map(str::to_owned);
            let listing = StoredListing::new(bytes.as_bytes().to_vec().into(), media_type, next, None, at);
            ((*path).to_owned(), Arc::new(listing))
        };
        pages.iter().map(page).collect()
    }

    fn ask(pages: &HashMap<String, Arc<StoredListing>>, query: &str) -> Option<(Value, Option<String>)> {
        let query = Query::parse(Some(query)).unwrap().0;
        let (listing, _) = derive_page(&"team/app".parse().unwrap(), &query, |path| {
            pages.get(path).cloned()
        })?;
        let list: Value = serde_json::from_slice(&listing.bytes).unwrap();
        assert_eq!(list["name"], "team/app");
        Some((list["tags"].clone(), listing.next))
    }

    #[test]
    fn r10_pages_derive_from_cached_list_with_links() {
        let whole = cached_pages(&[(
            "/v2/team/app/tags/list",
            r#"{"name":"team/app","tags":["a","b","c","d","é&x"]}"#,
            None,
        )]);
        for (query, tags, next) in [
            ("n=2", json!(["a", "b"]), Some("?n=2&last=b")),
            ("n=2&last=b", json!(["c", "d"]), Some("?n=2&last=d")),
            ("n=2&last=d", json!(["é&x"]), None),
            ("n=1&last=c", json!(["d"]), Some("?n=1&last=d")),
            ("n=5", json!(["a", "b", "c", "d", "é&x"]), None),
            ("last=c", json!(["d", "é&x"]), None),
            ("last=bb", json!(["c", "d", "é&x"]), None),
            ("last=%C3%A9%26x", json!([]), None),
            ("last=zzz%00%2F", json!(["é&x"]), None),
            ("n=0", json!([]), None),
            (
                "n=99999999999999999999999",
                json!(["a", "b", "c", "d", "é&x"]),
                None,
            ),
            ("n=4&last=", json!(["a", "b", "c", "d"]), Some("?n=4&last=d")),
        ] {
            assert_eq!(
                ask(&whole, query),
                Some((tags, next.map(str::to_owned))),
                "{query}"
            );
        }
        assert_eq!(ask(&whole, "n=2&filter=x"), None);
    }

    #[test]
    fn r10_page_chain_is_a_list_unless_broken() {
        let first = (
            "/v2/team/app/tags/list",
            r#"{"name":"team/app","tags":["b","a"]}"#,
            Some("/v2/team/app/tags/list?last=a&n=2"),
        );
        let second = (
            "/v2/team/app/tags/list?last=a&n=2",
            r#"{"name":"team/app","tags":["c"]}"#,
            None,
        );
        let chain = cached_pages(&[first, second]);
        assert_eq!(ask(&chain, "n=3"), Some((json!(["b", "a", "c"]), None)));
        assert_eq!(
            ask(&chain, "last=b"),
            Some((json!(["a", "c"]), None)),
            "in the order of the registry"
        );
        assert_eq!(ask(&cached_pages(&[first]), "n=1"), None);
        let circle = (
            "/v2/team/app/tags/list",
            r#"{"name":"team/app","tags":["a"]}"#,
            Some("/v2/team/app/tags/list"),
        );
        assert_eq!(ask(&cached_pages(&[circle]), "n=1"), None, "a circle has no end");
        assert_eq!(ask(&cached_pages(&[]), "n=1"), None);
    }
}
