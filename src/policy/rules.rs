//! Which rule holds for an image. Pure: globs over `upstream/repository:tag`, the first match wins.
//!
//! How a glob reads:
//! * `*` matches any text, `/` included, so `ghcr.io/acme/*` covers `ghcr.io/acme/web` and `ghcr.io/acme/web/api`.
//!   `?` is one character, `[ab]` a set, `{a,b}` a choice.
//! * What follows the last `:` (unless a `/` comes after it) is matched against the tag alone, what stands before it
//!   against `upstream/repository` alone.
//! * A glob without a tag holds for every tag and for pulls by digest. A glob with a tag never holds for a pull by
//!   digest: nothing says which tag the client had in mind.
//! * Docker Hub's one-component images answer to both names: `docker.io/nginx` and `docker.io/library/nginx`.
//!
//! A rule states only what it changes; the rest comes from the upstream's own settings, then from the default.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use globset::{Candidate, Glob, GlobBuilder, GlobMatcher, GlobSet, GlobSetBuilder};

use super::{OnNotFound, Policy};
use crate::oci::{Repository, Tag};

/// Docker Hub, where a one-component name is short for one under [`HUB_LIBRARY`].
const HUB: &str = "docker.io";
const HUB_LIBRARY: &str = "library/";

/// Longest accepted text of a glob. Longer than any image name, and short enough to compile at once.
const GLOB_BYTES_MAX: usize = 512;

/// What holds for an image, complete: every setting has a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffectivePolicy {
    /// Which rule this is, for the log and the admin API: `default`, `upstream docker.io`,
    /// `rule 2: ghcr.io/acme/*:nightly-*`.
    pub name: Arc<str>,
    /// The pull policy.
    pub policy: Policy,
    /// For how long after a confirmation a tag is served without asking.
    pub max_age: Duration,
    /// For how long after a confirmation a tag is served while the upstream is silent; `None`: forever.
    pub stale_if_error: Option<Duration>,
    /// How long a client that could get a held copy waits for the upstream's word.
    pub revalidate_timeout: Duration,
    /// What to do with a held tag that the upstream says is gone.
    pub on_not_found: OnNotFound,
    /// How long the upstream's yes to a principal is good while the upstream answers.
    pub grant_ttl: Duration,
    /// How long it is good while the upstream is silent.
    pub grant_ttl_offline: Duration,
    /// Whether the layers of an image are begun once one of them is asked for.
    pub prefetch: bool,
}

/// What a `[[rule]]` or an upstream's own settings change; what is `None` stays as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyOverrides {
    /// See [`EffectivePolicy::policy`].
    pub policy: Option<Policy>,
    /// See [`EffectivePolicy::fresh`].
    pub max_age: Option<Duration>,
    /// See [`EffectivePolicy::stale`].
    pub stale_if_error: Option<StaleLimit>,
    /// See [`EffectivePolicy::budget`].
    pub revalidate_timeout: Option<Duration>,
    /// See [`EffectivePolicy::absent`].
    pub on_not_found: Option<OnNotFound>,
    /// See [`EffectivePolicy::grant`].
    pub grant_ttl: Option<Duration>,
    /// See [`EffectivePolicy::offline_grant`].
    pub grant_ttl_offline: Option<Duration>,
    /// See [`EffectivePolicy::prefetch`].
    pub prefetch: Option<bool>,
}

/// How old a copy may be that is served while the upstream is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleLimit {
    /// Confirmed less than this ago.
    Within(Duration),
    /// However old it is.
    Unlimited,
}

impl StaleLimit {
    /// The limit, if there is one.
    pub fn limit(self) -> Option<Duration> {
        match self {
            Self::Within(limit) => Some(limit),
            Self::Unlimited => None,
        }
    }
}

impl EffectivePolicy {
    /// This rule with `changes`, under another name.
    #[must_use]
    pub fn changed(&self, name: Arc<str>, changes: &PolicyOverrides) -> Self {
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
        }
    }
}

/// A glob over `upstream/repository:tag`, compiled.
#[derive(Clone, Debug)]
pub struct ImagePattern {
    text: Arc<str>,
    name: Glob,
    tag: Option<GlobMatcher>,
}

impl ImagePattern {
    /// The text as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The upstream it names, unless that part is itself a glob.
    pub fn upstream(&self) -> Option<&str> {
        let (upstream, _) = self.name.glob().split_once('/')?;
        (!upstream.contains(['*', '?', '[', ']', '{', '}', '\\'])).then_some(upstream)
    }

    /// Whether it holds for some tags only.
    pub fn has_tag(&self) -> bool {
        self.tag.is_some()
    }

    fn admits(&self, tag: Option<&Tag>) -> bool {
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

/// Images by their names, whatever the tag: `docker.io/library/*`.
#[derive(Clone, Debug)]
pub struct ImageMatcher(GlobSet);

impl ImageMatcher {
    /// Those whose name one of the globs matches. What a glob says about tags does not count.
    pub fn new(globs: &[ImagePattern]) -> Result<Self, ImagePatternError> {
        let mut names = GlobSetBuilder::new();
        for glob in globs {
            names.add(glob.name.clone());
        }
        let names = names.build();
        names
            .map(Self)
            .map_err(|error| ImagePatternError::Together(error.kind().to_string()))
    }

    /// Whether this repository is among them. Docker Hub's one-component images answer to both names.
    pub fn contain(&self, upstream: &str, repository: &Repository) -> bool {
        let has = |name: &str| self.0.is_match(format!("{upstream}/{name}"));
        let short = repository.as_str().strip_prefix(HUB_LIBRARY);
        has(repository.as_str()) || (upstream == HUB && short.is_some_and(has))
    }
}

/// Why a text is not a glob over images. The operator's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImagePatternError {
    /// Nothing before or after the `:`.
    #[error("the glob has an empty part")]
    Empty,
    /// Longer than any image name.
    #[error("the glob is longer than {GLOB_BYTES_MAX} bytes")]
    TooLong,
    /// A digest in it.
    #[error("a rule cannot name a digest: what a digest names never changes")]
    Digest,
    /// A URL instead of an image.
    #[error("a rule names images, not URLs")]
    Url,
    /// A `/` after the `:` of the tag; also a choice in braces over whole images.
    #[error("a tag has no `/`; for several images, write several globs")]
    SlashInTag,
    /// An upstream's name alone, or a repository's alone.
    #[error("the glob can match no image: an image is `upstream/repository`")]
    NoRepository,
    /// The glob's own grammar is broken.
    #[error("not a glob: {0}")]
    Glob(String),
    /// All globs together compile to more than the library allows.
    #[error("the globs are too large together: {0}")]
    Together(String),
}

/// The rules, ready to be asked. Cheap to ask, and free where there are no rules.
#[derive(Clone)]
pub struct Rules {
    default: EffectivePolicy,
    upstreams: HashMap<Arc<str>, UpstreamPolicies>,
    names: GlobSet,
    rule_names: Vec<Arc<str>>,
    /// In the order of `names`; the number is the rule's.
    patterns: Vec<(ImagePattern, usize)>,
}

/// What holds at one upstream: without a matching rule, and with each.
#[derive(Clone, Debug)]
struct UpstreamPolicies {
    otherwise: EffectivePolicy,
    by_rule: Vec<EffectivePolicy>,
}

impl Rules {
    /// Merges the default, what each upstream changes, and the rules in their order.
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
                let named = rule_names.iter().zip(rules.iter().map(|(_, changes)| changes));
                let terms = UpstreamPolicies::new(&default, &upstream, &changes, named);
                (upstream, terms)
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
            .map_err(|error| ImagePatternError::Together(error.kind().to_string()))?;
        Ok(Self {
            default,
            upstreams,
            names,
            rule_names,
            patterns,
        })
    }

    /// One rule for everything.
    pub fn only(default: EffectivePolicy) -> Self {
        Self {
            default,
            upstreams: HashMap::new(),
            names: GlobSet::empty(),
            rule_names: Vec::new(),
            patterns: Vec::new(),
        }
    }

    /// What holds for an image; `tag` is `None` for what is asked by digest. At an upstream that was not given to
    /// [`Rules::new`], the default.
    pub fn find(&self, upstream: &str, repository: &Repository, tag: Option<&Tag>) -> &EffectivePolicy {
        let Some(terms) = self.upstreams.get(upstream) else {
            return &self.default;
        };
        if self.patterns.is_empty() {
            return &terms.otherwise;
        }
        self.first_match(upstream, repository.as_str(), tag)
            .and_then(|number| terms.by_rule.get(number))
            .unwrap_or(&terms.otherwise)
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
            .filter(|(pattern, _)| pattern.admits(tag))
            .map(|&(_, number)| number)
            .min()
    }

    /// The names of the rules, in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.rule_names.iter().map(|name| &**name)
    }

    /// The default that holds at an upstream where no rule matches.
    pub fn otherwise(&self, upstream: &str) -> &EffectivePolicy {
        self.upstreams
            .get(upstream)
            .map_or(&self.default, |terms| &terms.otherwise)
    }
}

impl UpstreamPolicies {
    fn new<'a>(
        default: &EffectivePolicy,
        upstream: &str,
        changes: &PolicyOverrides,
        rules: impl Iterator<Item = (&'a Arc<str>, &'a PolicyOverrides)>,
    ) -> Self {
        let otherwise = if *changes == PolicyOverrides::default() {
            default.clone()
        } else {
            default.changed(Arc::from(format!("upstream {upstream}")), changes)
        };
        let by_rule = rules
            .map(|(name, changes)| otherwise.changed(Arc::clone(name), changes))
            .collect();
        Self { otherwise, by_rule }
    }
}

/// Operators count from one.
fn rule_name(number: usize, patterns: &[ImagePattern]) -> Arc<str> {
    let images: Vec<&str> = patterns.iter().map(ImagePattern::as_str).collect();
    Arc::from(format!("rule {}: {}", number + 1, images.join(", ")))
}

/// Says what was configured; the compiled automata say nothing to a reader.
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
