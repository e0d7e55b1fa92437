//! Failover between the URLs of one upstream: which URL's response counts.
//!
//! URLs are tried in the configured order, and the first success counts. A URL that lacks the content, or denies it
//! to everyone, is skipped. If all URLs are skipped, the last response counts. A denial by a URL that served the
//! repository before is final: this URL has the repository, so it denies this caller.

use std::sync::{Arc, LazyLock};

use http::StatusCode;
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::origin::Origin;
use super::rate_limit::Pause;
use super::response::{ResponseKind, UpstreamResponse};
use crate::blocking::{self, Operation};
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::name::Repository;

/// Pairs of URL and repository cached per upstream.
const SERVED_MAX: usize = 4096;

/// Outcome of the request to one URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UrlOutcome {
    /// The URL has the content, and this caller may read it.
    Success,
    /// The URL lacks the content, denies it to everyone, or does not support the request.
    Negative,
    /// The URL denies this caller, although it has served the repository before.
    Denied,
    /// No usable response.
    Unavailable,
}

/// Whether the request starts a transfer, or resumes one that failed at another URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    First,
    /// Another URL served the content before, so a negative response means only that this URL lacks it.
    Resumed,
}

/// Whether `outcome` is final, so that no further URL is tried.
fn is_final(outcome: UrlOutcome, attempt: Attempt) -> bool {
    match outcome {
        UrlOutcome::Success => true,
        UrlOutcome::Denied => attempt == Attempt::First,
        UrlOutcome::Negative | UrlOutcome::Unavailable => false,
    }
}

/// The index of the response that counts. `None` without any response.
///
/// | request | outcomes, in order | the response that counts |
/// | --- | --- | --- |
/// | any | …, success | the success |
/// | first | …, denied | the denial |
/// | first | …, negative | the last one |
/// | first | …, unavailable | the first unavailable one |
/// | resumed | one unavailable among them | the first unavailable one |
/// | resumed | all negative | the first one |
fn choose(outcomes: &[UrlOutcome], attempt: Attempt) -> Option<usize> {
    let last = outcomes.len().checked_sub(1)?;
    let unavailable = || outcomes.iter().position(|one| *one == UrlOutcome::Unavailable);
    match (outcomes.last()?, attempt) {
        (UrlOutcome::Success, _) | (UrlOutcome::Negative | UrlOutcome::Denied, Attempt::First) => Some(last),
        // The first URL is the primary one, so its failure is reported.
        (UrlOutcome::Unavailable, Attempt::First) => unavailable(),
        (_, Attempt::Resumed) => unavailable().or(Some(0)),
    }
}

/// The responses of one request to an upstream's URLs so far, none of them a success.
pub(super) struct FailoverRound {
    attempt: Attempt,
    responses: Vec<(UrlOutcome, UpstreamResponse)>,
    unavailable: Vec<Origin>,
    /// The rate-limit pause that ends first.
    pause: Option<Pause>,
}

/// The upstream's response if no URL returned a success.
pub(super) struct RoundResult {
    pub(super) response: UpstreamResponse,
    /// No URL gave a usable response, or the final one did not.
    pub(super) is_unavailable: bool,
    /// The URLs without a usable response.
    pub(super) unavailable: Vec<Origin>,
    /// At least one request was sent. False within a rate-limit pause.
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

    /// Adds the response of `origin`. `true` if no further URL is to be tried.
    pub(super) fn add(&mut self, origin: &Origin, outcome: UrlOutcome, response: UpstreamResponse) -> bool {
        if outcome == UrlOutcome::Unavailable {
            self.unavailable.push(origin.clone());
        }
        let now = Instant::now();
        let pauses = self.pause.take().into_iter().chain(response.pause.clone());
        self.pause = pauses.min_by_key(|pause| pause.left(now));
        self.responses.push((outcome, response));
        is_final(outcome, self.attempt)
    }

    pub(super) fn finish(mut self) -> RoundResult {
        let outcomes: Vec<_> = self.responses.iter().map(|(outcome, _)| *outcome).collect();
        let answered = outcomes.iter().any(|one| *one != UrlOutcome::Unavailable);
        let mut response = choose(&outcomes, self.attempt).map_or_else(
            || UpstreamResponse::unavailable(UpstreamFailure::Unreachable),
            |position| self.responses.swap_remove(position).1,
        );
        let is_sent = response.pause.is_none() || response.status.is_some();
        if response.failure().is_some() {
            response.pause = self.pause;
        }
        RoundResult {
            is_unavailable: response.failure().is_some() && !(answered && self.attempt == Attempt::Resumed),
            response,
            unavailable: self.unavailable,
            is_sent,
        }
    }
}

/// Durable record of which URLs have served which repositories. Its methods may block.
pub trait ServedStore: Send + Sync {
    /// Whether `url` has served `repository` of `upstream`.
    fn has_served(&self, upstream: &str, url: &str, repository: &Repository) -> bool;
    /// Records that `url` has served `repository` of `upstream`.
    fn record_served(&self, upstream: &str, url: &str, repository: &Repository);
}

/// Permits of [`Operation::ServedUrlsWrite`], for all upstreams.
static WRITES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Operation::ServedUrlsWrite.permits());

/// Permits of [`Operation::ServedUrlsRead`].
static READS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Operation::ServedUrlsRead.permits());

/// Which URLs of an upstream have served which repositories. Used only with several URLs.
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

    /// The outcome of a response to `endpoint` by the URL `origin` of `upstream`.
    pub(super) async fn outcome(
        &self,
        (upstream, origin): (&str, &Origin),
        endpoint: &Endpoint,
        response: &UpstreamResponse,
    ) -> UrlOutcome {
        match response.kind {
            ResponseKind::Digest(_) | ResponseKind::UnprovenDigest(_) | ResponseKind::NoDigest => {
                UrlOutcome::Success
            }
            ResponseKind::Unavailable(_) => UrlOutcome::Unavailable,
            ResponseKind::NotFound => UrlOutcome::Negative,
            ResponseKind::Other(status) if is_unsupported_request(status) => UrlOutcome::Negative,
            ResponseKind::Denied | ResponseKind::Other(_) => match endpoint.repository() {
                Some(repository) if self.has_served(upstream, origin, repository).await => UrlOutcome::Denied,
                Some(_) | None => UrlOutcome::Negative,
            },
        }
    }

    /// Records that `origin` has served the repository of `endpoint`. Completes before the response is used.
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
            // In a task of its own: no later caller writes it if the client leaves.
            let noting = tokio::spawn(async move {
                blocking::run(&WRITES, move || durable.record_served(&upstream, &key.0, &key.1)).await
            });
            if !matches!(noting.await, Ok(Ok(()))) {
                tracing::error!(%origin, "failed to record that a URL served a repository");
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
        let has = blocking::run(&READS, move || {
            durable.has_served(&upstream, &key.0, &key.1).then_some(key)
        });
        // If the store fails, treat the denial as final: skipping it could reveal another URL's content.
        let Ok(has) = has.await else { return true };
        if let Some(key) = has {
            self.known.insert(key, ());
            return true;
        }
        false
    }
}

/// The URL does not support the request, whatever content it has.
fn is_unsupported_request(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 405 | 406 | 416)
}

#[cfg(test)]
mod tests {
    use super::UrlOutcome::{Denied, Negative, Success, Unavailable};
    use super::*;

    const ALL: [UrlOutcome; 4] = [Success, Negative, Denied, Unavailable];

    /// The number of URLs tried, and the index of the response that counts.
    fn round(urls: &[UrlOutcome], attempt: Attempt) -> (usize, usize) {
        let mut tried = Vec::new();
        for outcome in urls {
            tried.push(*outcome);
            if is_final(*outcome, attempt) {
                break;
            }
        }
        (tried.len(), choose(&tried, attempt).unwrap_or(usize::MAX))
    }

    #[test]
    fn r06_failover_table() {
        for (urls, attempt, expected) in [
            (&[Success, Negative][..], Attempt::First, (1, 0)),
            (&[Negative, Success], Attempt::First, (2, 1)),
            (&[Unavailable, Success], Attempt::First, (2, 1)),
            (&[Denied, Success], Attempt::First, (1, 0)),
            (&[Negative, Negative], Attempt::First, (2, 1)),
            (&[Negative, Denied], Attempt::First, (2, 1)),
            (&[Unavailable, Negative], Attempt::First, (2, 1)),
            (&[Negative, Unavailable], Attempt::First, (2, 1)),
            (&[Unavailable, Unavailable], Attempt::First, (2, 0)),
            (&[Unavailable, Negative, Unavailable], Attempt::First, (3, 0)),
            (&[Denied, Success], Attempt::Resumed, (2, 1)),
            (&[Negative, Unavailable], Attempt::Resumed, (2, 1)),
            (&[Unavailable, Negative], Attempt::Resumed, (2, 0)),
            (&[Denied, Negative], Attempt::Resumed, (2, 0)),
        ] {
            assert_eq!(round(urls, attempt), expected, "{urls:?} {attempt:?}");
        }
    }

    #[test]
    fn r06_failover_rules_over_all_outcomes_of_three_urls() {
        for attempt in [Attempt::First, Attempt::Resumed] {
            for a in ALL {
                for b in ALL {
                    for c in ALL {
                        let urls = [a, b, c];
                        let (tried, chosen) = round(&urls, attempt);
                        let responses = urls.get(..tried).unwrap_or_default();
                        let chosen = responses.get(chosen).copied();
                        let first = |one| urls.iter().position(|url| *url == one).unwrap_or(urls.len());
                        let is_reached = attempt == Attempt::Resumed || first(Success) < first(Denied);
                        let expects_success = first(Success) < urls.len() && is_reached;
                        assert_eq!(
                            chosen == Some(Success),
                            expects_success,
                            "{urls:?}: the first success counts"
                        );
                        if attempt == Attempt::First && first(Denied) < first(Success) {
                            assert_eq!(chosen, Some(Denied), "{urls:?}: a denial is final");
                        }
                        assert!(
                            !matches!(chosen, Some(Negative | Denied))
                                || responses.last() != Some(&Unavailable),
                            "{urls:?}: an unavailable URL may have the content"
                        );
                        if chosen == Some(Unavailable) {
                            assert!(responses.contains(&Unavailable), "{urls:?}");
                            assert!(
                                attempt == Attempt::Resumed || responses.last() == Some(&Unavailable),
                                "{urls:?}: the last response counts"
                            );
                        }
                    }
                }
            }
        }
    }

    #[derive(Default)]
    struct Written(parking_lot::Mutex<usize>, tokio::sync::Notify);

    impl ServedStore for Written {
        fn has_served(&self, _: &str, _: &str, _: &Repository) -> bool {
            false
        }

        fn record_served(&self, _: &str, _: &str, _: &Repository) {
            *self.0.lock() += 1;
            self.1.notify_one();
        }
    }

    /// The caller leaves while the record waits for a thread.
    #[tokio::test]
    async fn record_of_a_url_is_written_if_its_client_leaves() {
        let written = Arc::new(Written::default());
        let history = ServedHistory::new(Some(Arc::clone(&written) as Arc<dyn ServedStore>));
        let origin = "https://registry.example".parse::<Origin>().unwrap();
        let endpoint = Endpoint::Blob {
            repository: "team/app".parse().unwrap(),
            digest: crate::oci::Digest::of(crate::oci::Algorithm::Sha256, b"x").into(),
        };
        let all = WRITES.acquire_many(2).await.unwrap();
        let recording = history.record("registry", &origin, &endpoint);
        assert!(futures_util::FutureExt::now_or_never(recording).is_none());
        drop(all);
        written.1.notified().await;
        history.record("registry", &origin, &endpoint).await;
        assert_eq!(*written.0.lock(), 1);
    }
}
