//! Keys of the memory caches. They can be looked up by borrowed parts, so that a hit allocates nothing.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Equivalent, OptionsBuilder, UnitWeighter, Weighter};

use crate::oci::{Digest, Repository};

/// Few enough that a shard holds the largest entries, enough that readers rarely contend.
const SHARDS: usize = 16;

/// Key of a repository of an upstream.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct RepoKey {
    pub(super) upstream: Arc<str>,
    pub(super) repository: Repository,
}

/// [`RepoKey`], borrowed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RepoKeyRef<'a> {
    pub(super) upstream: &'a str,
    pub(super) repository: &'a str,
}

impl RepoKey {
    pub(super) fn of(upstream: &str, repository: &Repository) -> Self {
        Self {
            upstream: upstream.into(),
            repository: repository.clone(),
        }
    }

    pub(super) fn borrowed(&self) -> RepoKeyRef<'_> {
        RepoKeyRef {
            upstream: &self.upstream,
            repository: self.repository.as_str(),
        }
    }
}

impl<'a> RepoKeyRef<'a> {
    pub(super) fn new(upstream: &'a str, repository: &'a Repository) -> Self {
        Self {
            upstream,
            repository: repository.as_str(),
        }
    }
}

impl Hash for RepoKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.borrowed().hash(state);
    }
}

impl Equivalent<RepoKey> for RepoKeyRef<'_> {
    fn equivalent(&self, key: &RepoKey) -> bool {
        *self == key.borrowed()
    }
}

/// Key of a grant: a principal in a repository, or at an upstream's token service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GrantKey {
    pub(super) upstream: Arc<str>,
    pub(super) repository: Option<Repository>,
    pub(super) principal: [u8; 32],
}

/// [`GrantKey`], borrowed; the token service is the empty repository.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GrantRef<'a> {
    pub(super) repo: RepoKeyRef<'a>,
    pub(super) principal: &'a [u8; 32],
}

impl GrantKey {
    pub(super) fn borrowed(&self) -> GrantRef<'_> {
        GrantRef {
            repo: RepoKeyRef {
                upstream: &self.upstream,
                repository: self.repository.as_ref().map_or("", Repository::as_str),
            },
            principal: &self.principal,
        }
    }
}

impl GrantRef<'_> {
    pub(super) fn owned(&self, repository: Option<&Repository>) -> GrantKey {
        GrantKey {
            upstream: self.repo.upstream.into(),
            repository: repository.cloned(),
            principal: *self.principal,
        }
    }
}

impl Hash for GrantKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.borrowed().hash(state);
    }
}

impl Equivalent<GrantKey> for GrantRef<'_> {
    fn equivalent(&self, key: &GrantKey) -> bool {
        *self == key.borrowed()
    }
}

/// Key of a digest in a repository.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct ImageKey {
    pub(super) repo: RepoKey,
    pub(super) digest: Digest,
}

/// [`ImageKey`], borrowed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ImageRef<'a> {
    pub(super) repo: RepoKeyRef<'a>,
    pub(super) digest: &'a Digest,
}

impl ImageKey {
    fn borrowed(&self) -> ImageRef<'_> {
        ImageRef {
            repo: self.repo.borrowed(),
            digest: &self.digest,
        }
    }
}

impl Hash for ImageKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.borrowed().hash(state);
    }
}

impl Equivalent<ImageKey> for ImageRef<'_> {
    fn equivalent(&self, key: &ImageKey) -> bool {
        *self == key.borrowed()
    }
}

/// A cache bounded by weight. `entry_weight` is the typical weight of an entry.
pub(super) fn weighted_cache<K: Eq + Hash, V: Clone, W: Weighter<K, V> + Clone>(
    weight_max: u64,
    entry_weight: u64,
    weighter: W,
) -> Cache<K, V, W> {
    let items = usize::try_from(weight_max / entry_weight.max(1))
        .unwrap_or(usize::MAX)
        .max(1);
    let options = OptionsBuilder::new()
        .estimated_items_capacity(items)
        .weight_capacity(weight_max)
        .shards(SHARDS)
        .build();
    match options {
        Ok(options) => Cache::with_options(
            options,
            weighter,
            DefaultHashBuilder::default(),
            quick_cache::sync::DefaultLifecycle::default(),
        ),
        // Both mandatory options are set above.
        Err(_) => Cache::with_weighter(items, weight_max, weighter),
    }
}

/// A cache bounded by number of entries.
pub(super) fn bounded_cache<K: Eq + Hash, V: Clone>(items_max: usize) -> Cache<K, V, UnitWeighter> {
    weighted_cache(items_max as u64, 1, UnitWeighter)
}
