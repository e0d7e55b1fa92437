//! The URLs of one upstream: which of their responses is the upstream's.
//!
//! URLs are asked in the order of the configuration. The first that has the thing gives the response. A URL that lacks
//! it, or refuses everybody, is passed over, so a no is the no of the last URL. One no is not passed over: that of a
//! URL which has served the repository before. It knows the repository, so it denies this caller.

use std::sync::Arc;

use http::StatusCode;
use quick_cache::sync::Cache;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::origin::Origin;
use super::rate_limit::Pause;
use super::response::{ResponseKind, UpstreamResponse};
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::name::Repository;

/// Pairs of URL and repository kept in memory, per upstream.
const SERVED_MAX: usize = 4096;

/// What the response of one URL comes down to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UrlOutcome {
    /// It has what was asked for, and this caller may read it.
    Yes,
    /// It lacks it, refuses everybody, or does not support the request.
    No,
    /// It denies this caller something of a repository that it has served before.
    Denied,
    /// No usable response.
    Unavailable,
}

/// Whether the request is the first for this content, or goes on where another URL broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    First,
    /// A URL has said yes before. A no of the others means only that they lack it.
    Resumed,
}

/// Whether `outcome` ends the round, so that no other URL is asked.
fn is_final(outcome: UrlOutcome, attempt: Attempt) -> bool {
    match outcome {
        UrlOutcome::Yes => true,
        UrlOutcome::Denied => attempt == Attempt::First,
        UrlOutcome::No | UrlOutcome::Unavailable => false,
    }
}

/// The position of the response that is the upstream's, among all responses of a round. `None` if there was none.
///
/// | request | responses, in order | the upstream's |
/// | --- | --- | --- |
/// | any | …, yes | the yes |
/// | first | …, denied | the denial |
/// | first | …, no | that last no |
/// | first | …, unavailable | the first unavailable one |
/// | resumed | one unavailable among them | the first unavailable one |
/// | resumed | nothing but noes | the first no |
fn choose(outcomes: &[UrlOutcome], attempt: Attempt) -> Option<usize> {
    let last = outcomes.len().checked_sub(1)?;
    let unavailable = || outcomes.iter().position(|one| *one == UrlOutcome::Unavailable);
    match (outcomes.last()?, attempt) {
        (UrlOutcome::Yes, _) | (UrlOutcome::No | UrlOutcome::Denied, Attempt::First) => Some(last),
        // The first URL is the one that the operator means; its trouble is the one to report.
        (UrlOutcome::Unavailable, Attempt::First) => unavailable(),
        (_, Attempt::Resumed) => unavailable().or(Some(0)),
    }
}

/// The responses of one request to the URLs of an upstream, none of them a yes so far.
pub(super) struct FailoverRound {
    attempt: Attempt,
    responses: Vec<(UrlOutcome, UpstreamResponse)>,
    unavailable: Vec<Origin>,
    /// The rate-limit pause that is over first.
    pause: Option<Pause>,
}

/// The upstream's response, where no URL said yes.
pub(super) struct RoundResult {
    pub(super) answer: UpstreamResponse,
    /// No URL gave a usable response, or the one that has the last word gave none.
    pub(super) is_unavailable: bool,
    /// The URLs that gave none.
    pub(super) unavailable: Vec<Origin>,
    /// A request was sent; not so within a rate-limit pause.
    pub(super) is_sent: bool,
}

impl FailoverRound {
    pub(super) fn new(attempt: Attempt) -> Self {
        Self {
            attempt,
            responses: Vec::new(),
            unavailable: Vec::new(),
            pause: None,
        }
    }

    /// Takes in the response of `origin`; `true` if no other URL is to be asked.
    pub(super) fn add(&mut self, origin: &Origin, outcome: UrlOutcome, answer: UpstreamResponse) -> bool {
        if outcome == UrlOutcome::Unavailable {
            self.unavailable.push(origin.clone());
        }
        let now = Instant::now();
        let pauses = self.pause.take().into_iter().chain(answer.pause.clone());
        self.pause = pauses.min_by_key(|pause| pause.left(now));
        self.responses.push((outcome, answer));
        is_final(outcome, self.attempt)
    }

    pub(super) fn finish(mut self) -> RoundResult {
        let outcomes: Vec<_> = self.responses.iter().map(|(outcome, _)| *outcome).collect();
        let answered = outcomes.iter().any(|one| *one != UrlOutcome::Unavailable);
        let mut answer = choose(&outcomes, self.attempt).map_or_else(
            || UpstreamResponse::unavailable(UpstreamFailure::Unreachable),
            |position| self.responses.swap_remove(position).1,
        );
        let is_sent = answer.pause.is_none() || answer.status.is_some();
        if answer.failure().is_some() {
            answer.pause = self.pause;
        }
        RoundResult {
            is_unavailable: answer.failure().is_some() && !(answered && self.attempt == Attempt::Resumed),
            answer,
            unavailable: self.unavailable,
            is_sent,
        }
    }
}

/// A durable memory of which URLs have served which repositories. Its calls may block.
pub trait ServedStore: Send + Sync {
    /// Whether `url` has served `repository` of `upstream`.
    fn has_served(&self, upstream: &str, url: &str, repository: &Repository) -> bool;
    /// Keeps that it has.
    fn record_served(&self, upstream: &str, url: &str, repository: &Repository);
}

/// Which URLs of an upstream have served which repositories. Kept only where there are several URLs.
pub(super) struct ServedHistory {
    known: Cache<(String, Repository), ()>,
    durable: Option<Arc<dyn ServedStore>>,
}

impl ServedHistory {
    pub(super) fn new(durable: Option<Arc<dyn ServedStore>>) -> Self {
        Self {
            known: Cache::new(SERVED_MAX),
            durable,
        }
    }

    /// What `answer` to `endpoint` comes down to, given by the URL `origin` of `upstream`.
    pub(super) async fn outcome(
        &self,
        (upstream, origin): (&str, &Origin),
        endpoint: &Endpoint,
        answer: &UpstreamResponse,
    ) -> UrlOutcome {
        match answer.kind {
            ResponseKind::Digest(_) | ResponseKind::UnprovenDigest(_) | ResponseKind::NoDigest => {
                UrlOutcome::Yes
            }
            ResponseKind::Unavailable(_) => UrlOutcome::Unavailable,
            ResponseKind::NotFound => UrlOutcome::No,
            ResponseKind::Other(status) if is_unsupported_request(status) => UrlOutcome::No,
            ResponseKind::Denied | ResponseKind::Other(_) => match endpoint.repository() {
                Some(repository) if self.has_served(upstream, origin, repository).await => UrlOutcome::Denied,
                Some(_) | None => UrlOutcome::No,
            },
        }
    }

    /// Keeps that `origin` has served the repository of `endpoint`: before anything follows from it.
    pub(super) async fn record(&self, upstream: &str, origin: &Origin, endpoint: &Endpoint) {
        let (Endpoint::Manifest { repository, .. } | Endpoint::Blob { repository, .. }) = endpoint else {
            return;
        };
        let key = (origin.to_string(), repository.clone());
        if self.known.get(&key).is_some() {
            return;
        }
        self.known.insert(key.clone(), ());
        if let Some(durable) = self.durable.clone() {
            let upstream = upstream.to_owned();
            let noting = spawn_blocking(move || durable.record_served(&upstream, &key.0, &key.1));
            if noting.await.is_err() {
                tracing::error!(%origin, "the note that a URL has served a repository was not kept");
            }
        }
    }

    async fn has_served(&self, upstream: &str, origin: &Origin, repository: &Repository) -> bool {
        let key = (origin.to_string(), repository.clone());
        if self.known.get(&key).is_some() {
            return true;
        }
        let Some(durable) = self.durable.clone() else {
            return false;
        };
        let upstream = upstream.to_owned();
        let has = spawn_blocking(move || durable.has_served(&upstream, &key.0, &key.1).then_some(key));
        // A memory that fails is no reason to pass a denial over.
        let Ok(has) = has.await else { return true };
        if let Some(key) = has {
            self.known.insert(key, ());
            return true;
        }
        false
    }
}

/// The URL does not support the request as such, whatever it has.
fn is_unsupported_request(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 405 | 406 | 416)
}

#[cfg(test)]
mod tests {
    use super::UrlOutcome::{Denied, No, Unavailable, Yes};
    use super::*;

    const ALL: [UrlOutcome; 4] = [Yes, No, Denied, Unavailable];

    /// What is asked of three URLs that would respond like that, and which position is the upstream's response.
    fn round(urls: &[UrlOutcome], attempt: Attempt) -> (usize, usize) {
        let mut asked = Vec::new();
        for outcome in urls {
            asked.push(*outcome);
            if is_final(*outcome, attempt) {
                break;
            }
        }
        (asked.len(), choose(&asked, attempt).unwrap_or(usize::MAX))
    }

    #[test]
    fn r06_the_table_of_responses_of_several_urls() {
        for (urls, attempt, expected) in [
            (&[Yes, No][..], Attempt::First, (1, 0)),
            (&[No, Yes], Attempt::First, (2, 1)),
            (&[Unavailable, Yes], Attempt::First, (2, 1)),
            (&[Denied, Yes], Attempt::First, (1, 0)),
            (&[No, No], Attempt::First, (2, 1)),
            (&[No, Denied], Attempt::First, (2, 1)),
            (&[Unavailable, No], Attempt::First, (2, 1)),
            (&[No, Unavailable], Attempt::First, (2, 1)),
            (&[Unavailable, Unavailable], Attempt::First, (2, 0)),
            (&[Unavailable, No, Unavailable], Attempt::First, (3, 0)),
            (&[Denied, Yes], Attempt::Resumed, (2, 1)),
            (&[No, Unavailable], Attempt::Resumed, (2, 1)),
            (&[Unavailable, No], Attempt::Resumed, (2, 0)),
            (&[Denied, No], Attempt::Resumed, (2, 0)),
        ] {
            assert_eq!(round(urls, attempt), expected, "{urls:?} {attempt:?}");
        }
    }

    #[test]
    fn r06_laws_over_all_responses_of_three_urls() {
        for attempt in [Attempt::First, Attempt::Resumed] {
            for a in ALL {
                for b in ALL {
                    for c in ALL {
                        let urls = [a, b, c];
                        let (asked, chosen) = round(&urls, attempt);
                        let responses = urls.get(..asked).unwrap_or_default();
                        let chosen = responses.get(chosen).copied();
                        let first = |one| urls.iter().position(|url| *url == one).unwrap_or(urls.len());
                        let is_reached = attempt == Attempt::Resumed || first(Yes) < first(Denied);
                        let expected_yes = first(Yes) < urls.len() && is_reached;
                        assert_eq!(
                            chosen == Some(Yes),
                            expected_yes,
                            "{urls:?}: a yes that is reached wins"
                        );
                        if attempt == Attempt::First && first(Denied) < first(Yes) {
                            assert_eq!(chosen, Some(Denied), "{urls:?}: a denial is not passed over");
                        }
                        assert!(
                            !matches!(chosen, Some(No | Denied)) || responses.last() != Some(&Unavailable),
                            "{urls:?}: an unavailable URL may yet say yes"
                        );
                        if chosen == Some(Unavailable) {
                            assert!(responses.contains(&Unavailable), "{urls:?}");
                            assert!(
                                attempt == Attempt::Resumed || responses.last() == Some(&Unavailable),
                                "{urls:?}: the last URL has the last word"
                            );
                        }
                    }
                }
            }
        }
    }
}
