//! Challenge template: the upstream's 401 challenge from the store, for an outage.
//!
//! Most clients send a credential only after a challenge. In an outage only the cache can send one; without it,
//! clients that had a grant would get the outage error instead. The response is the same for every repository that is
//! not known to be public, cached or not, so it reveals nothing to a client without a grant.

use std::sync::Arc;

use http::HeaderValue;

use super::pipeline::ReadContext;
use super::{Denied, ProxyService, UpstreamRegistry};
use crate::oci::{Repository, UpstreamFailure};
use crate::policy::DenyReason;
use crate::store::challenges::StoredChallenge;
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Placeholder for the repository in a stored challenge. No repository name contains these characters.
const REPOSITORY_SLOT: &str = "{}";

impl ProxyService {
    /// Stores the challenge of one repository as template for all repositories of the upstream.
    pub(super) async fn store_challenge_template(
        &self,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        response: &UpstreamResponse,
    ) {
        let lines: Vec<String> = response
            .challenge
            .iter()
            .filter_map(|line| line.to_str().ok())
            .map(|line| substitute_repository(registry, line, (repository.as_str(), REPOSITORY_SLOT)))
            .collect();
        let known = self.cached_challenge(template_key(registry)).await;
        if lines.is_empty() || known.is_some_and(|known| known.lines == lines) {
            return;
        }
        let stored = StoredChallenge {
            lines,
            given_at: self.clock.now(),
        };
        let key = template_key(registry);
        let done = self
            .store
            .write(move |store| store.put_challenge(&key, stored))
            .await;
        super::log_store_error(done, "store challenge template");
    }

    /// The stored challenge of `key`.
    pub(super) async fn cached_challenge(&self, key: String) -> Option<Arc<StoredChallenge>> {
        self.store.read(move |view| view.challenge(&key)).await
    }
}

impl ReadContext<'_> {
    /// The upstream's challenge in place of an outage error, if the client sent no credential.
    pub(super) async fn challenge_instead_of_error(&self, refused: &Denied) -> Option<Denied> {
        let (proxy, request, repository) = (self.proxy, self.request, self.repository);
        let answered = refused
            .response
            .as_ref()
            .is_some_and(|response| response.failure().is_none());
        let is_unavailable = match refused.reason {
            DenyReason::UpstreamUnavailable(_)
            | DenyReason::StaleLimitExceeded(_)
            | DenyReason::Incomplete(_) => !answered,
            DenyReason::NotCached | DenyReason::NotAuthorized => true,
            DenyReason::Forbidden
            | DenyReason::AuthRequired
            | DenyReason::NotFound
            | DenyReason::TooYoung(_)
            | DenyReason::Blocked(_) => false,
        };
        if !is_unavailable
            || request.authorization.is_some()
            || request.registry.is_shared()
            || proxy.public_since(&request.registry, repository).await.is_some()
        {
            return None;
        }
        let stored = proxy.cached_challenge(template_key(&request.registry)).await?;
        let lines = stored.lines.iter().map(|line| {
            substitute_repository(&request.registry, line, (REPOSITORY_SLOT, repository.as_str()))
        });
        let response = UpstreamResponse {
            kind: ResponseKind::Denied,
            challenge: lines
                .filter_map(|line| HeaderValue::try_from(line).ok())
                .collect(),
            ..UpstreamResponse::unavailable(UpstreamFailure::Offline)
        };
        Some(Denied {
            reason: DenyReason::AuthRequired,
            response: Some(Arc::new(response)),
            proxy_credential: false,
            block: None,
        })
    }
}

/// Key of the template. The API challenge, which has no scope, is stored under the upstream's name. No upstream name
/// contains a slash.
fn template_key(registry: &UpstreamRegistry) -> String {
    format!("{}/", registry.name())
}

/// The challenge with one repository name replaced by another, as in `scope="repository:library/alpine:pull"`.
fn substitute_repository(registry: &UpstreamRegistry, line: &str, (from, to): (&str, &str)) -> String {
    let scope = |prefix: Option<&Repository>, name: &str| match prefix {
        Some(prefix) => format!("repository:{prefix}/{name}:"),
        None => format!("repository:{name}:"),
    };
    let prefixes = registry.upstream().repository_prefixes();
    prefixes.fold(line.to_owned(), |line, prefix| {
        line.replace(&scope(prefix, from), &scope(prefix, to))
    })
}
