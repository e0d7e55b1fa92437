//! The registry's own `/v2/` challenge, byte for byte, also during an outage.
//!
//! Intercepted clients, which address the registry by its own name, need it. Docker, podman and crane learn only
//! there how to authenticate. They fetch their tokens from the realm it names and send those tokens to this cache.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Uri, header};

use super::pipeline::denied;
use super::{ProxyResponse, ProxyService, Request, UpstreamRegistry};
use crate::age;
use crate::oci::challenge::Challenge;
use crate::oci::{Accept, Endpoint};
use crate::policy::DenyReason;
use crate::store::challenges::StoredChallenge;
use crate::trace_context::TraceContext;
use crate::upstream::UpstreamResponse;

/// Age at which a challenge is fetched again. Registries change theirs once in years.
const RENEW_AFTER: Duration = Duration::from_secs(600);

/// Timeout of the `/v2/` request if an older challenge is cached.
const CHALLENGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Default port of a realm.
const HTTPS_PORT: u16 = 443;

/// Upstream name and settings version.
pub(super) type ChallengeKey = (Arc<str>, (u64, u64));

impl ProxyService {
    /// Response of the registry to a `/v2/` request without a credential.
    pub async fn api_challenge(self: &Arc<Self>, request: &Request) -> ProxyResponse {
        if request.registry.is_shared() {
            // Every client that reaches the listener is authorized, so no credential is requested.
            return ProxyResponse::Ping;
        }
        match self.challenge(&request.registry).await {
            Ok(stored) if stored.lines.is_empty() => ProxyResponse::Ping,
            Ok(stored) => {
                let lines = stored
                    .lines
                    .iter()
                    .filter_map(|line| HeaderValue::from_str(line).ok());
                ProxyResponse::Challenged(lines.collect())
            }
            Err(response) => denied(
                DenyReason::UpstreamUnavailable(response.cause()),
                Some(response),
                false,
            ),
        }
    }

    /// Whether the registry's challenge names this host and port as token realm. The registry is contacted only if a
    /// client was intercepted for it, because otherwise any client could trigger that request.
    pub async fn is_token_realm(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        host: &str,
        port: u16,
    ) -> bool {
        let realms = match self.cached_challenge(registry.name().to_owned()).await {
            Some(stored) => realms(&stored),
            None if registry.is_intercepted() => {
                let challenge = self.challenge(registry).await;
                challenge.map_or_else(|_| Vec::new(), |stored| realms(&stored))
            }
            None => Vec::new(),
        };
        realms.iter().any(|realm| realm.0 == host && realm.1 == port)
    }

    /// Fetches the challenge in the background, for a client that does not request `/v2/` but will follow a
    /// challenge.
    pub fn prefetch_challenge(self: &Arc<Self>, registry: &Arc<UpstreamRegistry>) {
        registry.mark_intercepted();
        if self
            .store
            .in_memory(|view| view.challenge(registry.name()))
            .flatten()
            .is_none()
        {
            let (proxy, registry) = (Arc::clone(self), Arc::clone(registry));
            tokio::spawn(async move { proxy.challenge(&registry).await.is_ok() });
        }
    }

    async fn challenge(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
    ) -> Result<Arc<StoredChallenge>, Arc<UpstreamResponse>> {
        let stored = self.cached_challenge(registry.name().to_owned()).await;
        let now = self.clock.now();
        let is_fresh = |stored: &Arc<StoredChallenge>| age::is_within(stored.given_at, RENEW_AFTER, now);
        if let Some(stored) = stored.as_ref().filter(|stored| is_fresh(stored)) {
            return Ok(Arc::clone(stored));
        }
        let caller = self.principals.anonymous_caller(&TraceContext::new_root());
        let wait = match &stored {
            Some(_) => registry
                .upstream()
                .wait_limit(&caller, (&Endpoint::Ping, false), CHALLENGE_TIMEOUT),
            None => Ok(CHALLENGE_TIMEOUT),
        };
        let wait = match (wait, &stored) {
            (Err(_), Some(stored)) => return Ok(Arc::clone(stored)),
            (wait, _) => wait.unwrap_or(CHALLENGE_TIMEOUT),
        };
        let call = self.challenges.share(
            (registry.shared_name(), registry.upstream().settings_id()),
            || {
                let (proxy, registry) = (Arc::clone(self), Arc::clone(registry));
                async move { proxy.request_challenge(&registry).await }
            },
        );
        let response = match &stored {
            Some(_) => {
                let response = tokio::time::timeout(wait, call.wait()).await;
                if response.is_err() {
                    registry.upstream().record_timeout(&caller, &Endpoint::Ping, wait);
                }
                response.ok().flatten()
            }
            None => call.wait().await,
        };
        match (response, stored) {
            (Some(Ok(new)), _) => Ok(new),
            (_, Some(stored)) => Ok(stored),
            (Some(Err(response)), None) => Err(response),
            (None, None) => Err(Arc::new(UpstreamResponse::unavailable(
                crate::oci::UpstreamFailure::Abandoned,
            ))),
        }
    }

    async fn request_challenge(
        &self,
        registry: &Arc<UpstreamRegistry>,
    ) -> Result<Arc<StoredChallenge>, Arc<UpstreamResponse>> {
        let caller = self.principals.anonymous_caller(&TraceContext::new_root());
        let fetched = registry
            .upstream()
            .get(&caller, &Endpoint::Ping, &Accept::any(), None)
            .await;
        let lines = match fetched {
            Ok(_) => Vec::new(),
            Err(response) if !response.challenge.is_empty() => response
                .challenge
                .iter()
                .filter_map(|line| line.to_str().ok().map(str::to_owned))
                .collect(),
            Err(response) => return Err(Arc::new(response)),
        };
        let stored = StoredChallenge {
            lines,
            given_at: self.clock.now(),
        };
        let (registry, challenge) = (Arc::clone(registry), stored.clone());
        let done = self
            .store
            .write(move |store| store.put_challenge(registry.name(), challenge))
            .await;
        super::log_store_error(done, "store API challenge");
        Ok(Arc::new(stored))
    }
}

/// Token realms of a challenge: host in lower case without brackets, and port. Only https.
fn realms(stored: &StoredChallenge) -> Vec<(String, u16)> {
    let mut headers = HeaderMap::new();
    for line in &stored.lines {
        if let Ok(value) = HeaderValue::from_str(line) {
            headers.append(header::WWW_AUTHENTICATE, value);
        }
    }
    let realm = |challenge: &Challenge| {
        let Challenge::Bearer { realm, .. } = challenge else {
            return None;
        };
        let uri: Uri = realm.parse().ok()?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("https"))?;
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_ascii_lowercase();
        let host = host.strip_suffix('.').map(str::to_owned).unwrap_or(host);
        Some((host, uri.port_u16().unwrap_or(HTTPS_PORT)))
    };
    Challenge::read(&headers).iter().filter_map(realm).collect()
}
