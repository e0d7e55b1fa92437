//! How an upstream asks for a credential, from memory, for when it is silent.
//!
//! Most clients show a credential only to who asks for one. In an outage nobody but us can ask, so without this the very
//! clients that had the right before would be told of the outage instead. The answer is the same for every repository
//! that is not known to be public, held or not: a stranger learns nothing from it.

use std::sync::Arc;

use http::HeaderValue;

use super::{Denied, ProxyResponse, ProxyService, Request, UpstreamRegistry};
use crate::oci::{Repository, UpstreamFailure};
use crate::policy::DenyReason;
use crate::store::challenges::StoredChallenge;
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Stands for the repository in a kept challenge. No repository's name has such a character.
const BLANK: &str = "{}";

impl ProxyService {
    /// Keeps how this upstream asks for a credential in a repository, for all its repositories.
    pub(super) async fn keep_challenge(
        &self,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        answer: &UpstreamResponse,
    ) {
        let lines: Vec<String> = answer
            .challenge
            .iter()
            .filter_map(|line| line.to_str().ok())
            .map(|line| renamed(site, line, (repository.as_str(), BLANK)))
            .collect();
        let known = self.kept_challenge(key(site)).await;
        if lines.is_empty() || known.is_some_and(|known| known.lines == lines) {
            return;
        }
        let kept = StoredChallenge {
            lines,
            given_at: self.clock.now(),
        };
        let key = key(site);
        let done = self
            .store
            .write(move |store| store.put_challenge(&key, kept))
            .await;
        super::revalidate::report(done, "keep how an upstream asks for a credential");
    }

    /// What is kept under `key` of how an upstream asks for a credential.
    pub(super) async fn kept_challenge(&self, key: String) -> Option<Arc<StoredChallenge>> {
        self.store.read(move |view| view.challenge(&key)).await
    }

    /// `outcome`, or the upstream's challenge in its place where the upstream was silent and there is no credential.
    pub(super) async fn or_challenge(
        self: &Arc<Self>,
        request: &Request,
        outcome: ProxyResponse,
    ) -> ProxyResponse {
        let ProxyResponse::Denied(Denied { refusal, answer, .. }) = &outcome else {
            return outcome;
        };
        let answered = answer.as_ref().is_some_and(|answer| answer.failure().is_none());
        let unasked = match refusal {
            DenyReason::UpstreamUnavailable(_)
            | DenyReason::StaleLimitExceeded(_)
            | DenyReason::Incomplete(_) => !answered,
            DenyReason::NotCached | DenyReason::NotAuthorized => true,
            DenyReason::Forbidden | DenyReason::AuthRequired | DenyReason::NotFound => false,
        };
        let Some(repository) = request.endpoint.repository().filter(|_| unasked) else {
            return outcome;
        };
        if request.authorization.is_some()
            || request.site.is_shared()
            || self.public_since(&request.site, repository).await.is_some()
        {
            return outcome;
        }
        let Some(kept) = self.kept_challenge(key(&request.site)).await else {
            return outcome;
        };
        let lines = kept
            .lines
            .iter()
            .map(|line| renamed(&request.site, line, (BLANK, repository.as_str())));
        let answer = UpstreamResponse {
            kind: ResponseKind::Denied,
            challenge: lines
                .filter_map(|line| HeaderValue::try_from(line).ok())
                .collect(),
            ..UpstreamResponse::unavailable(UpstreamFailure::Offline)
        };
        ProxyResponse::Denied(Denied {
            refusal: DenyReason::AuthRequired,
            answer: Some(Arc::new(answer)),
            own_credential: false,
        })
    }
}

/// Beside the challenge of the upstream as a whole, which is kept under its name: this one names a scope. No upstream's
/// name has a slash.
fn key(site: &UpstreamRegistry) -> String {
    format!("{}/", site.name())
}

/// A challenge with one repository's name in the place of another's, as in `scope="repository:library/alpine:pull"`.
fn renamed(site: &UpstreamRegistry, line: &str, (from, to): (&str, &str)) -> String {
    let scope = |prefix: Option<&Repository>, name: &str| match prefix {
        Some(prefix) => format!("repository:{prefix}/{name}:"),
        None => format!("repository:{name}:"),
    };
    let prefixes = site.upstream().repository_prefixes();
    prefixes.fold(line.to_owned(), |line, prefix| {
        line.replace(&scope(prefix, from), &scope(prefix, to))
    })
}
