//! How the registry itself answers `/v2/`: with its own challenge, byte for byte, also while it is silent.
//!
//! For clients that believe to speak with the registry. Docker, podman and crane learn only there how to authenticate, and
//! what they learn is the registry's: they get their tokens where it says, and bring us those.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Uri, header};

use super::manifest::refused;
use super::{ProxyResponse, ProxyService, Request, UpstreamRegistry};
use crate::age;
use crate::oci::challenge::Challenge;
use crate::oci::{Accept, Endpoint};
use crate::policy::DenyReason;
use crate::store::challenges::StoredChallenge;
use crate::trace_context::TraceContext;
use crate::upstream::UpstreamResponse;

/// A challenge this old is asked for again. Registries change theirs once in years.
const RENEW_AFTER: Duration = Duration::from_secs(600);

/// How long the registry is waited for where an older challenge will do.
const BUDGET: Duration = Duration::from_secs(2);

/// The port of a realm that names none.
const HTTPS: u16 = 443;

/// An upstream, and its settings.
pub(super) type ChallengeKey = (Arc<str>, (u64, u64));

impl ProxyService {
    /// What the registry answers to who has no credential.
    pub async fn knock(self: &Arc<Self>, request: &Request) -> ProxyResponse {
        if request.site.is_shared() {
            // Whoever reaches us is entitled, and must not be sent for a credential.
            return ProxyResponse::Ping;
        }
        match self.challenge(&request.site).await {
            Ok(kept) if kept.lines.is_empty() => ProxyResponse::Ping,
            Ok(kept) => {
                let lines = kept
                    .lines
                    .iter()
                    .filter_map(|line| HeaderValue::from_str(line).ok());
                ProxyResponse::Challenged(lines.collect())
            }
            Err(answer) => refused(
                DenyReason::UpstreamUnavailable(answer.cause()),
                Some(answer),
                false,
            ),
        }
    }

    /// Whether the registry sends clients to this host and port for a token. It is asked only if a client of its own is
    /// here, or anyone could have us ask it.
    pub async fn is_realm(self: &Arc<Self>, site: &Arc<UpstreamRegistry>, host: &str, port: u16) -> bool {
        let realms = match self.kept_challenge(site.name().to_owned()).await {
            Some(kept) => realms(&kept),
            None if site.is_visited() => {
                let challenge = self.challenge(site).await;
                challenge.map_or_else(|_| Vec::new(), |kept| realms(&kept))
            }
            None => Vec::new(),
        };
        realms.iter().any(|realm| realm.0 == host && realm.1 == port)
    }

    /// Sees to it that the challenge is known soon, for a client that does not ask for it but will follow one.
    pub fn expect_challenge(self: &Arc<Self>, site: &Arc<UpstreamRegistry>) {
        site.visit();
        if self
            .store
            .in_memory(|view| view.challenge(site.name()))
            .flatten()
            .is_none()
        {
            let (pull, site) = (Arc::clone(self), Arc::clone(site));
            tokio::spawn(async move { pull.challenge(&site).await.is_ok() });
        }
    }

    async fn challenge(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
    ) -> Result<Arc<StoredChallenge>, Arc<UpstreamResponse>> {
        let kept = self.kept_challenge(site.name().to_owned()).await;
        let now = self.clock.now();
        let is_fresh = |kept: &Arc<StoredChallenge>| age::is_within(kept.given_at, RENEW_AFTER, now);
        if let Some(kept) = kept.as_ref().filter(|kept| is_fresh(kept)) {
            return Ok(Arc::clone(kept));
        }
        let caller = self.principals.stranger(&TraceContext::new_root());
        let wait = match &kept {
            Some(_) => site
                .upstream()
                .wait_limit(&caller, (&Endpoint::Ping, false), BUDGET),
            None => Ok(BUDGET),
        };
        let wait = match (wait, &kept) {
            (Err(_), Some(kept)) => return Ok(Arc::clone(kept)),
            (wait, _) => wait.unwrap_or(BUDGET),
        };
        let call = self
            .challenges
            .share((site.name().into(), site.upstream().settings_id()), || {
                let (pull, site) = (Arc::clone(self), Arc::clone(site));
                async move { pull.ask_for_challenge(&site).await }
            });
        let answer = match &kept {
            Some(_) => {
                let answer = tokio::time::timeout(wait, call.wait()).await;
                if answer.is_err() {
                    site.upstream().record_timeout(&caller, &Endpoint::Ping, wait);
                }
                answer.ok().flatten()
            }
            None => call.wait().await,
        };
        match (answer, kept) {
            (Some(Ok(new)), _) => Ok(new),
            (_, Some(kept)) => Ok(kept),
            (Some(Err(answer)), None) => Err(answer),
            (None, None) => Err(Arc::new(UpstreamResponse::unavailable(
                crate::oci::UpstreamFailure::Busy,
            ))),
        }
    }

    async fn ask_for_challenge(
        &self,
        site: &Arc<UpstreamRegistry>,
    ) -> Result<Arc<StoredChallenge>, Arc<UpstreamResponse>> {
        let caller = self.principals.stranger(&TraceContext::new_root());
        let asked = site
            .upstream()
            .get(&caller, &Endpoint::Ping, &Accept::any(), None)
            .await;
        let lines = match asked {
            Ok(_) => Vec::new(),
            Err(answer) if !answer.challenge.is_empty() => answer
                .challenge
                .iter()
                .filter_map(|line| line.to_str().ok().map(str::to_owned))
                .collect(),
            Err(answer) => return Err(Arc::new(answer)),
        };
        let kept = StoredChallenge {
            lines,
            given_at: self.clock.now(),
        };
        let (site, challenge) = (Arc::clone(site), kept.clone());
        let done = self
            .store
            .write(move |store| store.put_challenge(site.name(), challenge))
            .await;
        super::revalidate::report(done, "keep a registry's challenge");
        Ok(Arc::new(kept))
    }
}

/// Where a challenge sends clients: hosts in lower case, without brackets, and ports. Only by https.
fn realms(kept: &StoredChallenge) -> Vec<(String, u16)> {
    let mut headers = HeaderMap::new();
    for line in &kept.lines {
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
        Some((host, uri.port_u16().unwrap_or(HTTPS)))
    };
    Challenge::read(&headers).iter().filter_map(realm).collect()
}
