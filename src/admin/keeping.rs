//! What stays and what goes at the operator's wish.

use std::ops::ControlFlow;

use http::StatusCode;
use serde_json::json;

use super::images::not_held;
use super::named::{Named, name_of};
use super::reply::{Problem, Reply, answer};
use crate::oci::{AnyDigest, Reference, Repository};
use crate::server::Registry;
use crate::store::Store;
use crate::store::pins::Pin;
use crate::store::refs::TagKey;

/// Lets go of a tag, or of all tags of a repository; with `is_trial`, only says what that would free.
pub(super) fn remove(
    registry: &Registry,
    named: &Named,
    all_tags: bool,
    is_trial: bool,
) -> Result<Reply, Problem> {
    let store = registry.pull.store().blocking();
    let (upstream, repository) = (named.site.name(), &named.repository);
    let keys: Vec<TagKey> = match (all_tags, &named.reference) {
        (true, _) => tags_of(store, upstream, repository),
        (false, Reference::Tag(_)) => {
            let key = named.key();
            let held = key.filter(|key| matches!(store.tag(key), Ok(Some(_))));
            held.into_iter().collect()
        }
        (false, Reference::Digest(_)) => {
            return Err(Problem::bad("name a tag, or a repository with all_tags=true"));
        }
    };
    if keys.is_empty() {
        return Err(match named.key() {
            Some(key) => not_held(&key, store),
            None => Problem::absent(format!("no tag of {upstream}/{repository} is held")),
        });
    }
    let pinned = keys.iter().find(|key| store.is_pinned(&Pin::Tag((*key).clone())));
    if let (Some(key), false) = (pinned, is_trial) {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            format!("{} is pinned; unpin it first", name_of(key)),
        ));
    }
    let freed = store.let_go(&keys, is_trial)?;
    if !is_trial {
        tracing::info!(image = %named, tags = freed.tags, bytes = freed.bytes, "let go of at the operator's wish");
    }
    Ok(answer(&json!({
        "dry_run": is_trial,
        "images": keys.iter().map(name_of).collect::<Vec<_>>(),
        "tags": freed.tags,
        "manifests": freed.manifests,
        "blobs": freed.blobs,
        "bytes_freed": freed.bytes,
    })))
}

fn tags_of(store: &Store, upstream: &str, repository: &Repository) -> Vec<TagKey> {
    let mut keys = Vec::new();
    store.each_tag(|key, _| {
        if &*key.upstream == upstream && key.repository == *repository {
            keys.push(key);
        }
        ControlFlow::Continue(())
    });
    keys
}

/// Everything pinned, as it is named.
pub(super) fn pins(registry: &Registry) -> Vec<String> {
    let pins = registry.pull.store().blocking().pins();
    let name = |pin: &Pin| match pin {
        Pin::Tag(key) => name_of(key),
        Pin::Digest(digest) => digest.to_string(),
    };
    pins.iter().map(name).collect()
}

/// Keeps a tag, with what it names now and later, or a digest, from eviction; or ends that. Says how it was. It need not
/// be held yet.
pub(super) fn pin(registry: &Registry, named: &Named, pinned: bool) -> Result<bool, Problem> {
    let pin = match (named.key(), &named.reference) {
        (Some(key), _) => Pin::Tag(key),
        (None, Reference::Digest(AnyDigest::Known(digest))) => Pin::Digest(*digest),
        (None, _) => {
            return Err(Problem::bad(
                "such a digest cannot be verified, so it is never held",
            ));
        }
    };
    let store = registry.pull.store().blocking();
    let was_news = if pinned {
        store.pin(&pin)?
    } else {
        store.unpin(&pin)?
    };
    Ok(was_news != pinned)
}
