//! Per-image policy rules: globs over `upstream/repository:tag`, first match wins. Pure.
//!
//! Glob syntax:
//! * `*` matches any text, `/` included, so `ghcr.io/acme/*` covers `ghcr.io/acme/web` and
//!   `ghcr.io/acme/web/api`. `?` is one character, `[ab]` a set, `{a,b}` a choice.
//! * The text after the last `:` (unless a `/` comes after it) matches the tag, the text before it
//!   `upstream/repository`.
//! * A glob without a tag applies to every tag and to pulls by digest. A glob with a tag never applies to a
//!   pull by digest, because a digest does not state the tag.
//! * Docker Hub's one-component images match under both names: `docker.io/nginx` and `docker.io/library/nginx`.
//!
//! A rule overrides single settings. The others come from the upstream's section, then from the default.

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use globset::{Candidate, Glob, GlobBuilder, GlobMatcher, GlobSet, GlobSetBuilder};

use super::authz::GrantTtls;
use super::min_age::{AgeLimit, AgeOverrides};
use super::refresh::{RefreshOverrides, RefreshPolicy};
use super::{OnNotFound, Policy};
use crate::fast_map::FastMap;
use crate::oci::{Repository, Tag};

/// Docker Hub, where a one-component name is short for one under [`HUB_LIBRARY`].
const HUB: &str = "docker.io";
const HUB_LIBRARY: &str = "library/";

/// Longest accepted glob. Longer than any image name, and short enough to compile quickly.
const GLOB_BYTES_MAX: usize = 512;

/// Effective policy of an image: every setting has a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffectivePolicy {
    /// Name of the matching rule, for the log and the admin API: `default`, `upstream docker.io`, `rule 2:
    /// ghcr.io/acme/*:nightly-*`.
    pub name: Arc<str>,
    /// Pull policy.
    pub policy: Policy,
    /// Time after a confirmation during which a tag is served without revalidation.
    pub max_age: Duration,
    /// Time after a confirmation during which a tag is served while the upstream is unavailable. `None`:
    /// unlimited.
    pub stale_if_error: Option<Duration>,
    /// Longest wait for a revalidation while a cached copy can be served.
    pub revalidate_timeout: Duration,
    /// Action for a cached tag that the upstream answers with 404.
    pub on_not_found: OnNotFound,
    /// Lifetime of a grant while the upstream is available.
    pub grant_ttl: Duration,
    /// Lifetime of a grant while the upstream is unavailable.
    pub grant_ttl_offline: Duration,
    /// Whether a request for one layer of an image starts the downloads of the others.
    pub prefetch: bool,
    /// Scheduled refreshes as configured; [`EffectivePolicy::scheduled_refresh`] is what applies.
    pub refresh: RefreshPolicy,
    /// Minimum age of a digest that a tag is answered with.
    pub age_limit: AgeLimit,
}

/// Settings that a `[[rule]]` or an upstream's section overrides. `None` keeps the value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyOverrides {
    /// See [`EffectivePolicy::policy`].
    pub policy: Option<Policy>,
    /// See [`EffectivePolicy::max_age`].
    pub max_age: Option<Duration>,
    /// See [`EffectivePolicy::stale_if_error`].
    pub stale_if_error: Option<StaleLimit>,
    /// See [`EffectivePolicy::revalidate_timeout`].
    pub revalidate_timeout: Option<Duration>,
    /// See [`EffectivePolicy::on_not_found`].
    pub on_not_found: Option<OnNotFound>,
    /// See [`EffectivePolicy::grant_ttl`].
    pub grant_ttl: Option<Duration>,
    /// See [`EffectivePolicy::grant_ttl_offline`].
    pub grant_ttl_offline: Option<Duration>,
    /// See [`EffectivePolicy::prefetch`].
    pub prefetch: Option<bool>,
    /// See [`EffectivePolicy::refresh`].
    pub refresh: RefreshOverrides,
    /// See [`EffectivePolicy::age_limit`].
    pub age_limit: AgeOverrides,
}

/// Limit for the age of a copy that is served while the upstream is unavailable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleLimit {
    /// Confirmed less than this ago.
    Within(Duration),
    /// Any age.
    Unlimited,
}

impl StaleLimit {
    /// The limit, or `None` if unlimited.
    pub fn limit(self) -> Option<Duration> {
        match self {
            Self::Within(limit) => Some(limit),
            Self::Unlimited => None,
        }
    }
}

impl EffectivePolicy {
    /// Lifetimes of a grant.
    pub fn grant_ttls(&self) -> GrantTtls {
        GrantTtls {
            grant_ttl: self.grant_ttl,
            grant_ttl_offline: self.grant_ttl_offline,
        }
    }

    /// Returns this policy with `changes`, under another name.
    #[must_use]
    pub fn with_overrides(&self, name: Arc<str>, changes: &PolicyOverrides) -> Self {
        Self {
            name,
            policy: changes.policy.unwrap_or(self.policy),
            max_age: changes.max_age.unwrap_or(self.max_age),
            stale_if_error: changes
                .stale_if_error
                .map_or(self.stale_if_error, StaleLimit::limit),
            revalidate_timeout: changes.revalidate_timeout.unwrap_or(self.revalidate_timeout),
            on_not_found: changes.on_not_found.unwrap_or(self.on_not_found),
            grant_ttl: changes.grant_ttl.unwrap_or(self.grant_ttl),
            grant_ttl_offline: changes.grant_ttl_offline.unwrap_or(self.grant_ttl_offline),
            prefetch: changes.prefetch.unwrap_or(self.prefetch),
            refresh: self.refresh.with_overrides(&changes.refresh),
            age_limit: self.age_limit.with_overrides(&changes.age_limit),
        }
    }

    /// Settings of scheduled refreshes. Under the policy `never` the cache sends no request, so nothing is refreshed.
    pub fn scheduled_refresh(&self) -> RefreshPolicy {
        let interval = self.refresh.interval.filter(|_| self.policy != Policy::Never);
        RefreshPolicy {
            interval,
            ..self.refresh
        }
    }
}

/// A compiled glob over `upstream/repository:tag`.
#[derive(Clone, Debug)]
pub struct ImagePattern {
    text: Arc<str>,
    name: Glob,
    tag: Option<GlobMatcher>,
}

impl ImagePattern {
    /// The glob as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The upstream it names, unless that part contains wildcards.
    pub fn upstream(&self) -> Option<&str> {
        let (upstream, _) = self.name.glob().split_once('/')?;
        (!upstream.contains(['*', '?', '[', ']', '{', '}', '\\'])).then_some(upstream)
    }

    /// Whether it restricts the tag.
    pub fn has_tag(&self) -> bool {
        self.tag.is_some()
    }

    fn matches_tag(&self, tag: Option<&Tag>) -> bool {
        match (&self.tag, tag) {
            (None, _) => true,
            (Some(glob), Some(tag)) => glob.is_match(tag.as_str()),
            (Some(_), None) => false,
        }
    }
}

impl fmt::Display for ImagePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for ImagePattern {
    type Err = ImagePatternError;

    fn from_str(text: &str) -> Result<Self, ImagePatternError> {
        if text.is_empty() {
            return Err(ImagePatternError::Empty);
        }
        if text.len() > GLOB_BYTES_MAX {
            return Err(ImagePatternError::TooLong);
        }
        if text.contains('@') {
            return Err(ImagePatternError::Digest);
        }
        if text.contains("://") {
            return Err(ImagePatternError::Url);
        }
        let (name, tag) = match text.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (text, None),
        };
        if name.is_empty() || tag == Some("") {
            return Err(ImagePatternError::Empty);
        }
        if name
            .split_once('/')
            .is_some_and(|(_, repository)| repository.contains(':'))
        {
            return Err(ImagePatternError::SlashInTag);
        }
        if !name.contains(['/', '*']) {
            return Err(ImagePatternError::NoRepository);
        }
        let tag = tag
            .map(|tag| compile(tag).map(|glob| glob.compile_matcher()))
            .transpose()?;
        Ok(Self {
            text: Arc::from(text),
            name: compile(name)?,
            tag,
        })
    }
}

fn compile(glob: &str) -> Result<Glob, ImagePatternError> {
    GlobBuilder::new(glob)
        .literal_separator(false)
        .build()
        .map_err(|error| ImagePatternError::Glob(error.kind().to_string()))
}

/// A set of image names, tags ignored: `docker.io/library/*`.
#[derive(Clone, Debug)]
pub struct ImageMatcher(GlobSet);

impl ImageMatcher {
    /// Matches names that one of the globs matches. The tag part of a glob is ignored.
    pub fn new(globs: &[ImagePattern]) -> Result<Self, ImagePatternError> {
        let mut names = GlobSetBuilder::new();
        for glob in globs {
            names.add(glob.name.clone());
        }
        let names = names.build();
        names
            .map(Self)
            .map_err(|error| ImagePatternError::TooLarge(error.kind().to_string()))
    }

    /// Whether the set contains this repository. Docker Hub's one-component images match under both names.
    pub fn contains(&self, upstream: &str, repository: &Repository) -> bool {
        let matches = |name: &str| self.0.is_match(format!("{upstream}/{name}"));
        let short = repository.as_str().strip_prefix(HUB_LIBRARY);
        matches(repository.as_str()) || (upstream == HUB && short.is_some_and(matches))
    }
}

/// Error in a glob over images, made by the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImagePatternError {
    /// Nothing before or after the `:`.
    #[error("the glob has an empty part")]
    Empty,
    /// Longer than any image name.
    #[error("the glob is longer than {GLOB_BYTES_MAX} bytes")]
    TooLong,
    /// Contains a digest.
    #[error("a rule cannot name a digest, because content by digest never changes")]
    Digest,
    /// A URL instead of an image.
    #[error("a rule names images, not URLs")]
    Url,
    /// A `/` after the `:` of the tag, or a choice in braces over complete images.
    #[error("a tag has no `/`; for several images, write several globs")]
    SlashInTag,
    /// An upstream or a repository alone.
    #[error("the glob can match no image: an image is `upstream/repository`")]
    NoRepository,
    /// Invalid glob syntax.
    #[error("invalid glob: {0}")]
    Glob(String),
    /// All globs together exceed the size limit of the regex engine.
    #[error("the globs together are too large: {0}")]
    TooLarge(String),
}

/// Compiled rules. If there are none, a lookup matches no glob and allocates nothing.
#[derive(Clone)]
pub struct Rules {
    default: EffectivePolicy,
    upstreams: FastMap<Arc<str>, UpstreamPolicies>,
    names: GlobSet,
    rule_names: Vec<Arc<str>>,
    /// In the order of `names`, each with the number of its rule.
    patterns: Vec<(ImagePattern, usize)>,
}

/// Effective policies at one upstream: without a matching rule, and for each rule.
#[derive(Clone, Debug)]
struct UpstreamPolicies {
    default_policy: EffectivePolicy,
    by_rule: Vec<EffectivePolicy>,
}

impl Rules {
    /// Merges the default, the overrides of each upstream, and the rules in their order.
    pub fn new(
        default: EffectivePolicy,
        upstreams: impl IntoIterator<Item = (Arc<str>, PolicyOverrides)>,
        rules: Vec<(Vec<ImagePattern>, PolicyOverrides)>,
    ) -> Result<Self, ImagePatternError> {
        let rule_names: Vec<_> = rules
            .iter()
            .enumerate()
            .map(|(number, (patterns, _))| rule_name(number, patterns))
            .collect();
        let upstreams = upstreams
            .into_iter()
            .map(|(upstream, changes)| {
                let overrides = rule_names.iter().zip(rules.iter().map(|(_, changes)| changes));
                let policies = UpstreamPolicies::new(&default, &upstream, &changes, overrides);
                (upstream, policies)
            })
            .collect();
        let patterns: Vec<_> = rules
            .into_iter()
            .enumerate()
            .flat_map(|(number, (patterns, _))| patterns.into_iter().map(move |pattern| (pattern, number)))
            .collect();
        let mut names = GlobSetBuilder::new();
        for (pattern, _) in &patterns {
            names.add(pattern.name.clone());
        }
        let names = names
            .build()
            .map_err(|error| ImagePatternError::TooLarge(error.kind().to_string()))?;
        Ok(Self {
            default,
            upstreams,
            names,
            rule_names,
            patterns,
        })
    }

    /// One policy for all images.
    pub fn single(default: EffectivePolicy) -> Self {
        Self {
            default,
            upstreams: FastMap::default(),
            names: GlobSet::empty(),
            rule_names: Vec::new(),
            patterns: Vec::new(),
        }
    }

    /// Effective policy of an image. `tag` is `None` for a request by digest. An upstream unknown to
    /// [`Rules::new`] has the default.
    pub fn find(&self, upstream: &str, repository: &Repository, tag: Option<&Tag>) -> &EffectivePolicy {
        let Some(policies) = self.upstreams.get(upstream) else {
            return &self.default;
        };
        if self.patterns.is_empty() {
            return &policies.default_policy;
        }
        self.first_match(upstream, repository.as_str(), tag)
            .and_then(|number| policies.by_rule.get(number))
            .unwrap_or(&policies.default_policy)
    }

    fn first_match(&self, upstream: &str, repository: &str, tag: Option<&Tag>) -> Option<usize> {
        let long = self.first_match_of(&format!("{upstream}/{repository}"), tag);
        let short = (upstream == HUB)
            .then(|| repository.strip_prefix(HUB_LIBRARY))
            .flatten()
            .and_then(|short| self.first_match_of(&format!("{upstream}/{short}"), tag));
        [long, short].into_iter().flatten().min()
    }

    fn first_match_of(&self, name: &str, tag: Option<&Tag>) -> Option<usize> {
        self.names
            .matches_candidate(&Candidate::new(name))
            .into_iter()
            .filter_map(|index| self.patterns.get(index))
            .filter(|(pattern, _)| pattern.matches_tag(tag))
            .map(|&(_, number)| number)
            .min()
    }

    /// The shortest interval of scheduled refreshes at this upstream. `None`: nothing is refreshed.
    pub fn shortest_refresh(&self, upstream: &str) -> Option<Duration> {
        let policies = self.upstreams.get(upstream)?;
        let all = policies.by_rule.iter().chain([&policies.default_policy]);
        all.filter_map(|policy| policy.scheduled_refresh().interval).min()
    }

    /// Names of the rules, in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.rule_names.iter().map(|name| &**name)
    }

    /// Names of policies with a minimum age and without scheduled refreshes, in order. Under them a new digest is seen,
    /// and ages, only from the next pull of its tag on.
    pub fn unwatched(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        let mut upstreams: Vec<_> = self.upstreams.iter().collect();
        upstreams.sort_by_key(|(upstream, _)| *upstream);
        for (upstream, policies) in upstreams {
            let by_rule = policies.by_rule.iter().enumerate().filter(|(number, _)| {
                self.patterns.iter().any(|(pattern, of)| {
                    of == number && pattern.upstream().is_none_or(|named| named == &**upstream)
                })
            });
            for policy in std::iter::once(&policies.default_policy).chain(by_rule.map(|(_, policy)| policy)) {
                let is_unwatched = policy.policy != Policy::Never
                    && policy.age_limit.is_on()
                    && policy.scheduled_refresh().interval.is_none();
                if is_unwatched && !names.contains(&&*policy.name) {
                    names.push(&policy.name);
                }
            }
        }
        names
    }

    /// Policy at this upstream for images that match no rule.
    pub fn default_for(&self, upstream: &str) -> &EffectivePolicy {
        self.upstreams
            .get(upstream)
            .map_or(&self.default, |policies| &policies.default_policy)
    }
}

impl UpstreamPolicies {
    fn new<'a>(
        default: &EffectivePolicy,
        upstream: &str,
        changes: &PolicyOverrides,
        rules: impl Iterator<Item = (&'a Arc<str>, &'a PolicyOverrides)>,
    ) -> Self {
        let default_policy = if *changes == PolicyOverrides::default() {
            default.clone()
        } else {
            default.with_overrides(Arc::from(format!("upstream {upstream}")), changes)
        };
        let by_rule = rules
            .map(|(name, changes)| default_policy.with_overrides(Arc::clone(name), changes))
            .collect();
        Self {
            default_policy,
            by_rule,
        }
    }
}

/// Rule numbers in messages start at 1.
fn rule_name(number: usize, patterns: &[ImagePattern]) -> Arc<str> {
    let images: Vec<&str> = patterns.iter().map(ImagePattern::as_str).collect();
    Arc::from(format!("rule {}: {}", number + 1, images.join(", ")))
}

/// Prints the configuration without the compiled automata.
impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut upstreams: Vec<_> = self.upstreams.iter().collect();
        upstreams.sort_by_key(|(name, _)| *name);
        let patterns: Vec<_> = self
            .patterns
            .iter()
            .map(|(pattern, number)| (number, pattern.as_str()))
            .collect();
        f.debug_struct("Rules")
            .field("default", &self.default)
            .field("upstreams", &upstreams)
            .field("patterns", &patterns)
            .finish_non_exhaustive()
    }
}
