//! What a write changes: a push or a deletion passed through us, and what is held of it is no longer what the upstream
//! says.
//!
//! The write itself is handed on and not understood; here is only what follows from it. A tag that was pushed or deleted
//! is forgotten, so that the next asker hears of it at once, and so is that a deleted digest was ever seen. An answer
//! that the upstream gave before the write must not bring back what the write ended: who asked in a repository in which
//! something was written meanwhile does not learn from the answer.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::Method;
use tokio::task::spawn_blocking;

use super::asking::report;
use super::fetching::Wanted;
use super::{Pull, Site};
use crate::oci::{AnyDigest, Digest, MediaType, Operation, Reference, Repository, Tag};
use crate::store::Store;
use crate::store::refs::TagKey;

/// Repositories that share a counter only learn a little less than they could.
const COUNTERS: usize = 256;

/// Tags looked through at a time.
const TAGS_PAGE: usize = 1024;

/// What a write changes of what may be held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A tag names something else, or nothing.
    Tag(Repository, Tag),
    /// A manifest or a blob is gone, and with a manifest all tags that named it.
    Gone(Repository, Digest),
    /// A manifest was pushed by digest. It may refer to another, so a list of referrers may have grown.
    Pushed(Repository),
}

impl Change {
    /// What a request changes, if that is anything that may be held. A part of an upload changes nothing.
    pub fn of(method: &Method, path: &str) -> Option<Self> {
        let deletes = *method == Method::DELETE;
        if !deletes && *method != Method::PUT {
            return None;
        }
        match Operation::parse(&Method::GET, path, None).ok()? {
            Operation::Manifest {
                repository,
                reference: Reference::Tag(tag),
            } => Some(Self::Tag(repository, tag)),
            Operation::Manifest {
                repository,
                reference: Reference::Digest(AnyDigest::Known(digest)),
            }
            | Operation::Blob {
                repository,
                digest: AnyDigest::Known(digest),
            } if deletes => Some(Self::Gone(repository, digest)),
            Operation::Manifest { repository, .. } if !deletes => Some(Self::Pushed(repository)),
            _ => None,
        }
    }

    fn repository(&self) -> &Repository {
        match self {
            Self::Tag(repository, _) | Self::Gone(repository, _) | Self::Pushed(repository) => repository,
        }
    }
}

/// How often something was written at an upstream, by repository.
pub(super) struct Writings([AtomicU64; COUNTERS]);

impl Default for Writings {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Writings {
    pub(super) fn count(&self, repository: &Repository) -> u64 {
        self.counter(repository)
            .map_or(0, |counter| counter.load(Ordering::Acquire))
    }

    pub(super) fn note(&self, repository: &Repository) {
        if let Some(counter) = self.counter(repository) {
            counter.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn counter(&self, repository: &Repository) -> Option<&AtomicU64> {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let hash = hasher.hash_one(repository.as_str());
        self.0.get(usize::try_from(hash % COUNTERS as u64).ok()?)
    }
}

impl Pull {
    /// Something was written upstream, or may have been. When this returns, no asker is told what was true before.
    pub async fn written(&self, site: &Arc<Site>, change: Change) {
        // First, so that an answer on its way is not learned from; whoever learned before that is undone below.
        site.note_write(change.repository());
        let (store, site) = (Arc::clone(&self.store), Arc::clone(site));
        let forgotten = spawn_blocking(move || forget(&store, &site, change)).await;
        report(forgotten, "forget what was written upstream");
    }

    /// Keeps which digest a tag names now, unless something was written in the repository since it was asked for.
    pub(super) async fn learn_name_unless_written(
        &self,
        wanted: &Wanted,
        reference: &Reference,
        digest: Digest,
        media_type: Option<&MediaType>,
    ) {
        let Wanted {
            site,
            repository,
            accept,
            ..
        } = wanted;
        let is_same = || site.writes(repository) == wanted.writes;
        if is_same() {
            self.learn_name(site, repository, reference, accept, digest, media_type)
                .await;
        }
        // The write may have come between the look and the learning. Bytes were kept with the proof of where they are
        // from, so that is taken back too; what is still there costs one question to be known again.
        if !is_same() {
            let change = Change::Gone(repository.clone(), digest);
            let (store, site) = (Arc::clone(&self.store), Arc::clone(site));
            let forgotten = spawn_blocking(move || forget(&store, &site, change)).await;
            report(forgotten, "forget what was learned during a write");
        }
    }
}

fn forget(store: &Store, site: &Site, change: Change) -> Result<(), crate::store::Fault> {
    let upstream: Arc<str> = site.name().into();
    match change {
        // What is known of referrers is good only for as long as nothing was written.
        Change::Pushed(_) => Ok(()),
        Change::Tag(repository, tag) => {
            let key = TagKey {
                upstream,
                repository,
                tag,
            };
            store.remove_tag(&key).map(|_| ())
        }
        Change::Gone(repository, digest) => {
            store.note_gone(&upstream, &repository, &digest)?;
            let mut after = None;
            loop {
                let page = store.tags(after.as_ref(), TAGS_PAGE);
                for (key, record) in &page {
                    let names =
                        |digest: &Digest| record.variants.iter().any(|variant| variant.digest == *digest);
                    if key.upstream == upstream && key.repository == repository && names(&digest) {
                        store.remove_tag(key)?;
                    }
                }
                match page.into_iter().last() {
                    Some((last, _)) => after = Some(last),
                    None => return Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn only_what_may_be_held_is_changed() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let tag = |name: &str| Some(Change::Tag("team/demo".parse().unwrap(), name.parse().unwrap()));
        let gone = Some(Change::Gone(
            "team/demo".parse().unwrap(),
            digest.parse().unwrap(),
        ));
        for (method, path, change) in [
            (Method::PUT, "/v2/team/demo/manifests/1".to_owned(), tag("1")),
            (Method::DELETE, "/v2/team/demo/manifests/1".to_owned(), tag("1")),
            (
                Method::DELETE,
                format!("/v2/team/demo/manifests/{digest}"),
                gone.clone(),
            ),
            (Method::DELETE, format!("/v2/team/demo/blobs/{digest}"), gone),
            (
                Method::PUT,
                format!("/v2/team/demo/manifests/{digest}"),
                Some(Change::Pushed("team/demo".parse().unwrap())),
            ),
            (Method::PUT, "/v2/team/demo/blobs/uploads/7".to_owned(), None),
            (Method::DELETE, "/v2/team/demo/blobs/uploads/7".to_owned(), None),
            (Method::POST, "/v2/team/demo/blobs/uploads/".to_owned(), None),
            (Method::GET, "/v2/team/demo/manifests/1".to_owned(), None),
            (Method::POST, "/token".to_owned(), None),
        ] {
            assert_eq!(Change::of(&method, &path), change, "{method} {path}");
        }
    }
}
