//! Lists of tags and of referrers.

use super::body::Piped;
use super::serve::{failed, sent, text};
use super::{Seen, Shared};
use http::Response;
use http::header::CONTENT_TYPE;
use serde_json::json;
use std::sync::Arc;

pub(super) fn tags(shared: &Arc<Shared>, seen: &Seen, name: &str) -> Response<Piped> {
    let Some(tags) = shared.state(|state| {
        Some(
            state
                .repositories
                .get(name)?
                .tags
                .keys()
                .cloned()
                .collect::<Vec<_>>(),
        )
    }) else {
        return failed(shared, seen, 404, "NAME_UNKNOWN");
    };
    let last = parameter(seen, "last").unwrap_or_default();
    let mut page: Vec<_> = tags.into_iter().filter(|tag| *tag > last).collect();
    let mut response = Response::builder().header(CONTENT_TYPE, "application/json");
    if let Some(n) = parameter(seen, "n").map(|n| n.parse::<usize>().unwrap_or(usize::MAX)) {
        if n < page.len() && n > 0 {
            let link = format!(
                "<{}/v2/{name}/tags/list?n={n}&last={}>; rel=\"next\"",
                shared.base,
                page[n - 1]
            );
            response = response.header("link", link);
        }
        page.truncate(n);
    }
    if shared.state(|state| state.faults.lists_lead_to_themselves) {
        let query = seen.query.as_deref().unwrap_or_default();
        response = response.header("link", format!("<{}?{query}>; rel=\"next\"", seen.path));
    }
    sent(
        shared,
        seen,
        response,
        text(json!({"name": name, "tags": page}).to_string()),
    )
}

pub(super) fn referrers(shared: &Arc<Shared>, seen: &Seen, name: &str, subject: &str) -> Response<Piped> {
    if shared.state(|state| state.faults.no_referrers) {
        // A registry from before the API: its router knows no such path.
        let response = Response::builder().status(404).header(CONTENT_TYPE, "text/plain");
        return sent(shared, seen, response, text("404 page not found\n".to_owned()));
    }
    let kind = parameter(seen, "artifactType");
    let found = shared.state(|state| {
        let held = state.repositories.get(name)?;
        let attached = held
            .attached
            .iter()
            .filter(|(to, of, _)| to == subject && kind.as_ref().is_none_or(|kind| kind == of));
        let descriptors = attached.map(|(_, of, digest)| {
            let (media_type, bytes) = &held.manifests[digest];
            json!({"mediaType": media_type, "digest": digest, "size": bytes.len(), "artifactType": of})
        });
        Some(descriptors.collect::<Vec<_>>())
    });
    let Some(mut manifests) = found else {
        return failed(shared, seen, 404, "NAME_UNKNOWN");
    };
    let mut response = Response::builder().header(CONTENT_TYPE, super::OCI_INDEX);
    if let Some(page) = shared.state(|state| state.faults.referrers_page) {
        let from: usize = parameter(seen, "from").map_or(0, |from| from.parse().unwrap());
        if manifests.len() > from + page {
            // Relative to the request, as some registries write it.
            let filter = kind
                .as_ref()
                .map_or_else(String::new, |kind| format!("&artifactType={kind}"));
            response = response.header("link", format!("<?from={}{filter}>; rel=\"next\"", from + page));
        }
        manifests = manifests.into_iter().skip(from).take(page).collect();
    }
    if kind.is_some() {
        response = response.header("oci-filters-applied", "artifactType");
    }
    let index = json!({"schemaVersion": 2, "mediaType": super::OCI_INDEX, "manifests": manifests});
    sent(shared, seen, response, text(index.to_string()))
}

fn parameter(seen: &Seen, name: &str) -> Option<String> {
    let pairs = seen
        .query
        .as_deref()?
        .split('&')
        .filter_map(|pair| pair.split_once('='));
    pairs
        .into_iter()
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.replace("%2F", "/").replace("%2f", "/"))
}
