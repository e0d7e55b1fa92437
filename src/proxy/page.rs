//! Pages of a list of tags made from pages that are kept, for an outage: the kept list was asked for with another `n` or
//! `last`. Pure but for the look-up of kept pages.
//!
//! protocol: distribution-spec "Listing Tags": `n` is the most tags of a page, `last` the tag after which it begins, and
//! `Link` names the next page where tags are left.

use std::sync::Arc;

use serde_json::{Value, json};

use super::listing::Listing;
use crate::oci::{Endpoint, Query, Repository};
use crate::store::listings::StoredListing;

/// Kept pages put together for one.
const PAGES_MAX: usize = 256;

/// Tags put together for one page; a list that is kept has fewer.
const TAGS_MAX: usize = 1_000_000;

/// What is asked of the list.
struct PageRequest {
    /// `None`: all tags.
    n: Option<usize>,
    last: Option<String>,
}

impl PageRequest {
    /// `None` if something else is asked as well, which a kept list cannot answer.
    fn of(query: &Query) -> Option<PageRequest> {
        query.has_only_of(&["n", "last"]).then(|| PageRequest {
            // Too large a number is more than any list has.
            n: query.get("n").map(|n| n.parse().unwrap_or(usize::MAX)),
            last: query
                .get("last")
                .filter(|last| !last.is_empty())
                .map(str::to_owned),
        })
    }
}

/// The page that `query` asks for, from the whole list or the chain of pages that begins it. With it, the page of the
/// chain that was confirmed longest ago. `None` where not enough is kept.
pub(super) fn derived(
    repository: &Repository,
    query: &Query,
    kept: impl Fn(&str) -> Option<Arc<StoredListing>>,
) -> Option<(Listing, Arc<StoredListing>)> {
    let wish = PageRequest::of(query)?;
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
        let page = kept(&from)?;
        let mut list: Value = serde_json::from_slice(&page.bytes).ok()?;
        name = list.get_mut("name").map(Value::take).unwrap_or_default();
        // The spec's `null` of old registries is an empty list.
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
    // The end of the chain is not kept.
    if next.is_some() {
        return None;
    }
    let (page, more) = page_of(&tags, &wish);
    let link = more.then(|| {
        let mut text = "?".to_owned();
        let n = wish.n.unwrap_or_default().to_string();
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

/// The tags after `last`, at most `n`, and whether there are more. `last` need not exist: then those that sort after it
/// are meant. Registries sort differently, so where it does, its place in the list counts.
fn page_of<'a>(tags: &'a [String], wish: &PageRequest) -> (&'a [String], bool) {
    let after = match &wish.last {
        None => 0,
        Some(last) => tags.iter().position(|tag| tag == last).map_or_else(
            || tags.iter().position(|tag| tag > last).unwrap_or(tags.len()),
            |place| place + 1,
        ),
    };
    let rest = tags.get(after..).unwrap_or_default();
    let n = wish.n.unwrap_or(usize::MAX);
    let page = rest.get(..n).unwrap_or(rest);
    (page, n > 0 && page.len() < rest.len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::collections::HashMap;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn kept(pages: &[(&str, &str, Option<&str>)]) -> HashMap<String, Arc<StoredListing>> {
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
        let (listing, _) = derived(&"team/app".parse().unwrap(), &query, |path| {
            pages.get(path).cloned()
        })?;
        let list: Value = serde_json::from_slice(&listing.bytes).unwrap();
        assert_eq!(list["name"], "team/app");
        Some((list["tags"].clone(), listing.next))
    }

    #[test]
    fn r10_pages_are_cut_from_a_kept_list_with_their_links() {
        let whole = kept(&[(
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
    fn r10_a_chain_of_kept_pages_is_a_list_and_a_broken_one_is_none() {
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
        let chain = kept(&[first, second]);
        assert_eq!(ask(&chain, "n=3"), Some((json!(["b", "a", "c"]), None)));
        assert_eq!(
            ask(&chain, "last=b"),
            Some((json!(["a", "c"]), None)),
            "in the registry's own order"
        );
        assert_eq!(ask(&kept(&[first]), "n=1"), None);
        let circle = (
            "/v2/team/app/tags/list",
            r#"{"name":"team/app","tags":["a"]}"#,
            Some("/v2/team/app/tags/list"),
        );
        assert_eq!(ask(&kept(&[circle]), "n=1"), None, "a circle has no end");
        assert_eq!(ask(&kept(&[]), "n=1"), None);
    }
}
