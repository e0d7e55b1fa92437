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

use super::answer::{Answer, Said};
use super::limits::Pause;
use super::origin::Origin;
use crate::oci::cause::Cause;
use crate::oci::name::Repository;
use crate::oci::operation::Operation;

/// Pairs of URL and repository kept in memory, per upstream.
const SERVED_MAX: usize = 4096;

/// What the response of one URL comes down to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
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
pub(super) enum Request {
    First,
    /// A URL has said yes before. A no of the others means only that they lack it.
    Resumed,
}

/// Whether `outcome` ends the round, so that no other URL is asked.
fn ends(outcome: Outcome, request: Request) -> bool {
    match outcome {
        Outcome::Yes => true,
        Outcome::Denied => request == Request::First,
        Outcome::No | Outcome::Unavailable => false,
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
fn chosen(outcomes: &[Outcome], request: Request) -> Option<usize> {
    let last = outcomes.len().checked_sub(1)?;
    let unavailable = || outcomes.iter().position(|one| *one == Outcome::Unavailable);
    match (outcomes.last()?, request) {
        (Outcome::Yes, _) | (Outcome::No | Outcome::Denied, Request::First) => Some(last),
        // The first URL is the one that the operator means; its trouble is the one to report.
        (Outcome::Unavailable, Request::First) => unavailable(),
        (_, Request::Resumed) => unavailable().or(Some(0)),
    }
}

/// The responses of one request to the URLs of an upstream, none of them a yes so far.
pub(super) struct Round {
    request: Request,
    responses: Vec<(Outcome, Answer)>,
    unavailable: Vec<Origin>,
    /// The rate-limit pause that is over first.
    pause: Option<Pause>,
}

/// The upstream's response, where no URL said yes.
pub(super) struct Reported {
    pub(super) answer: Answer,
    /// No URL gave a usable response, or the one that has the last word gave none.
    pub(super) is_unavailable: bool,
    /// The URLs that gave none.
    pub(super) unavailable: Vec<Origin>,
    /// A request was sent; not so within a rate-limit pause.
    pub(super) asked: bool,
}

impl Round {
    pub(super) fn new(request: Request) -> Self {
        Self {
            request,
            responses: Vec::new(),
            unavailable: Vec::new(),
            pause: None,
        }
    }

    /// Takes in the response of `origin`; `true` if no other URL is to be asked.
    pub(super) fn take(&mut self, origin: &Origin, outcome: Outcome, answer: Answer) -> bool {
        if outcome == Outcome::Unavailable {
            self.unavailable.push(origin.clone());
        }
        let now = Instant::now();
        let pauses = self.pause.take().into_iter().chain(answer.pause.clone());
        self.pause = pauses.min_by_key(|pause| pause.left(now));
        self.responses.push((outcome, answer));
        ends(outcome, self.request)
    }

    pub(super) fn end(mut self) -> Reported {
        let outcomes: Vec<_> = self.responses.iter().map(|(outcome, _)| *outcome).collect();
        let answered = outcomes.iter().any(|one| *one != Outcome::Unavailable);
        let mut answer = chosen(&outcomes, self.request).map_or_else(
            || Answer::silent(Cause::Unreachable),
            |position| self.responses.swap_remove(position).1,
        );
        let asked = answer.pause.is_none() || answer.status.is_some();
        if answer.silence().is_some() {
            answer.pause = self.pause;
        }
        Reported {
            is_unavailable: answer.silence().is_some() && !(answered && self.request == Request::Resumed),
            answer,
            unavailable: self.unavailable,
            asked,
        }
    }
}

/// A durable memory of which URLs have served which repositories. Its calls may block.
pub trait Memory: Send + Sync {
    /// Whether `url` has served `repository` of `upstream`.
    fn has_served(&self, upstream: &str, url: &str, repository: &Repository) -> bool;
    /// Keeps that it has.
    fn note_served(&self, upstream: &str, url: &str, repository: &Repository);
}

/// Which URLs of an upstream have served which repositories. Kept only where there are several URLs.
pub(super) struct Served {
    known: Cache<(String, Repository), ()>,
    durable: Option<Arc<dyn Memory>>,
}

impl Served {
    pub(super) fn new(durable: Option<Arc<dyn Memory>>) -> Self {
        Self {
            known: Cache::new(SERVED_MAX),
            durable,
        }
    }

    /// What `answer` to `operation` comes down to, given by the URL `origin` of `upstream`.
    pub(super) async fn outcome(
        &self,
        (upstream, origin): (&str, &Origin),
        operation: &Operation,
        answer: &Answer,
    ) -> Outcome {
        match answer.said {
            Said::Is(_) | Said::Unproven(_) | Said::Unnamed => Outcome::Yes,
            Said::Silent(_) => Outcome::Unavailable,
            Said::Absent => Outcome::No,
            Said::Other(status) if is_about_the_request(status) => Outcome::No,
            Said::Forbidden | Said::Other(_) => match operation.repository() {
                Some(repository) if self.has(upstream, origin, repository).await => Outcome::Denied,
                Some(_) | None => Outcome::No,
            },
        }
    }

    /// Keeps that `origin` has served the repository of `operation`: before anything follows from it.
    pub(super) async fn note(&self, upstream: &str, origin: &Origin, operation: &Operation) {
        let (Operation::Manifest { repository, .. } | Operation::Blob { repository, .. }) = operation else {
            return;
        };
        let key = (origin.to_string(), repository.clone());
        if self.known.get(&key).is_some() {
            return;
        }
        self.known.insert(key.clone(), ());
        if let Some(durable) = self.durable.clone() {
            let upstream = upstream.to_owned();
            let noting = spawn_blocking(move || durable.note_served(&upstream, &key.0, &key.1));
            if noting.await.is_err() {
                tracing::error!(%origin, "the note that a URL has served a repository was not kept");
            }
        }
    }

    async fn has(&self, upstream: &str, origin: &Origin, repository: &Repository) -> bool {
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
fn is_about_the_request(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 405 | 406 | 416)
}

#[cfg(test)]
mod tests {
    use super::Outcome::{Denied, No, Unavailable, Yes};
    use super::*;

    const ALL: [Outcome; 4] = [Yes, No, Denied, Unavailable];

    /// What is asked of three URLs that would respond like that, and which position is the upstream's response.
    fn round(urls: &[Outcome], request: Request) -> (usize, usize) {
        let mut asked = Vec::new();
        for outcome in urls {
            asked.push(*outcome);
            if ends(*outcome, request) {
                break;
            }
        }
        (asked.len(), chosen(&asked, request).unwrap_or(usize::MAX))
    }

    #[test]
    fn r06_the_table_of_responses_of_several_urls() {
        for (urls, request, expected) in [
            (&[Yes, No][..], Request::First, (1, 0)),
            (&[No, Yes], Request::First, (2, 1)),
            (&[Unavailable, Yes], Request::First, (2, 1)),
            (&[Denied, Yes], Request::First, (1, 0)),
            (&[No, No], Request::First, (2, 1)),
            (&[No, Denied], Request::First, (2, 1)),
            (&[Unavailable, No], Request::First, (2, 1)),
            (&[No, Unavailable], Request::First, (2, 1)),
            (&[Unavailable, Unavailable], Request::First, (2, 0)),
            (&[Unavailable, No, Unavailable], Request::First, (3, 0)),
            (&[Denied, Yes], Request::Resumed, (2, 1)),
            (&[No, Unavailable], Request::Resumed, (2, 1)),
            (&[Unavailable, No], Request::Resumed, (2, 0)),
            (&[Denied, No], Request::Resumed, (2, 0)),
        ] {
            assert_eq!(round(urls, request), expected, "{urls:?} {request:?}");
        }
    }

    #[test]
    fn r06_laws_over_all_responses_of_three_urls() {
        for request in [Request::First, Request::Resumed] {
            for a in ALL {
                for b in ALL {
                    for c in ALL {
                        let urls = [a, b, c];
                        let (asked, chosen) = round(&urls, request);
                        let responses = urls.get(..asked).unwrap_or_default();
                        let chosen = responses.get(chosen).copied();
                        let first = |one| urls.iter().position(|url| *url == one).unwrap_or(urls.len());
                        let is_reached = request == Request::Resumed || first(Yes) < first(Denied);
                        let expected_yes = first(Yes) < urls.len() && is_reached;
                        assert_eq!(
                            chosen == Some(Yes),
                            expected_yes,
                            "{urls:?}: a yes that is reached wins"
                        );
                        if request == Request::First && first(Denied) < first(Yes) {
                            assert_eq!(chosen, Some(Denied), "{urls:?}: a denial is not passed over");
                        }
                        assert!(
                            !matches!(chosen, Some(No | Denied)) || responses.last() != Some(&Unavailable),
                            "{urls:?}: an unavailable URL may yet say yes"
                        );
                        if chosen == Some(Unavailable) {
                            assert!(responses.contains(&Unavailable), "{urls:?}");
                            assert!(
                                request == Request::Resumed || responses.last() == Some(&Unavailable),
                                "{urls:?}: the last URL has the last word"
                            );
                        }
                    }
                }
            }
        }
    }
}
