//! Tokens: to whom a token service gave which, and ours in place of those that a silent one cannot give
//! (`local_tokens`).
//!
//! Docker, podman and crane fetch a token before each pull. While the token service is silent they cannot, and the token
//! of their last pull, to which the registry said yes, they no longer have. So the service's answers are looked at on
//! their way to clients: which *account* (what was shown to it, hashed) got which token for which repositories. What the
//! registry lets a token read is then known of the account as well, and in an outage a token of ours stands for the account.
//!
//! A token of ours says only who asked; it proves nothing, and whoever asks gets one. What it opens is weighed when it is
//! used: what is public, and what its account could read while the service took it. It is never sent upstream. A request
//! with one asks as a stranger would, and an answer to that means that the outage is over: the client is sent for a token
//! of the service's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use quick_cache::sync::Cache;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{ProxyService, UpstreamRegistry};
use crate::oci::{Repository, TokenRequest, UpstreamFailure};
use crate::policy::authz::Principal;
use crate::upstream::TokenResponse;
use crate::upstream::forward::ForwardRequest;
use crate::upstream::origin::Origin;

/// How a token of ours begins. None of these ever leaves for an upstream, whichever cache made it.
const PREFIX: &str = "ifnewer-local-";

/// How long one is good: as long as Docker Hub's.
const LIFE: Duration = Duration::from_secs(300);

/// Tokens, theirs and ours, whose account is known. A forgotten one is a token as any other.
const KNOWN_MAX: usize = 16_384;

/// Whether what a client shows is a token that a cache made.
pub fn is_local_token(shown: &HeaderValue) -> bool {
    let shown = shown.to_str().ok().and_then(|shown| shown.split_once(' '));
    shown.is_some_and(|(scheme, token)| {
        scheme.eq_ignore_ascii_case("bearer") && token.trim_start().starts_with(PREFIX)
    })
}

/// What became of a question to a token service.
pub enum TokenOutcome {
    /// The service answered.
    Upstream(TokenResponse),
    /// It was silent for this reason; a token of ours as its answer would be, in JSON.
    Local(UpstreamFailure, Bytes),
}

/// Whose tokens are.
pub(super) struct LocalTokens {
    known: Cache<Token, Arc<IssuedToken>>,
    made: AtomicU64,
}

/// An upstream, and a token as the principal that shows it.
type Token = (Arc<str>, [u8; 32]);

struct IssuedToken {
    /// The token service that gave it, or in whose place we did. Another one has other accounts.
    realm: Origin,
    /// `None` for nobody's.
    account: Option<[u8; 32]>,
    /// What it was asked for. Whether it is good for that is the registry's word.
    repositories: Vec<Repository>,
    until: Instant,
}

impl Default for LocalTokens {
    fn default() -> Self {
        Self {
            known: Cache::new(KNOWN_MAX),
            made: AtomicU64::new(0),
        }
    }
}

impl LocalTokens {
    fn given(&self, site: &UpstreamRegistry, token: &Principal) -> Option<Arc<IssuedToken>> {
        let given = self.known.get(&(site.name().into(), *token.as_bytes()))?;
        (site.realm() == Some(&given.realm) && given.until > Instant::now()).then_some(given)
    }

    fn note(&self, site: &UpstreamRegistry, token: &Principal, given: IssuedToken) {
        self.known
            .insert((site.name().into(), *token.as_bytes()), Arc::new(given));
    }
}

impl ProxyService {
    /// Hands a client's question on to the upstream's token service, and learns from the answer, also where the client is
    /// gone by then. `Err` only where the process ends.
    pub async fn log_in(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        realm: &Origin,
        asked: TokenRequest,
        passing: ForwardRequest,
    ) -> Result<TokenOutcome, UpstreamFailure> {
        let (pull, site, realm) = (Arc::clone(self), Arc::clone(site), realm.clone());
        let answered = tokio::spawn(async move {
            let account = asked
                .credential
                .as_deref()
                .map(|secret| *pull.principals.account(secret).as_bytes());
            let asked_at = (pull.clock.now(), Instant::now());
            match site.upstream().forward_token_request(&realm, passing).await {
                Ok(reply) => {
                    if let Some(account) = account {
                        pull.learn_login(&site, &realm, (account, asked.repositories), &reply, asked_at)
                            .await;
                    }
                    TokenOutcome::Upstream(reply)
                }
                Err(cause) => {
                    TokenOutcome::Local(cause, pull.local_token(&site, realm, account, asked.repositories))
                }
            }
        });
        answered.await.map_err(|_| UpstreamFailure::Busy)
    }

    /// The account that is asking in this repository with this token, if the token was given for it.
    pub(super) fn account(
        &self,
        site: &UpstreamRegistry,
        repository: &Repository,
        shown: Option<&HeaderValue>,
    ) -> Option<[u8; 32]> {
        site.realm()?;
        let given = self.logins.given(site, &self.principals.credential(shown?))?;
        given.account.filter(|_| given.repositories.contains(repository))
    }

    /// Whether a client shows a token of ours that is no good, here or any more: as good as none.
    pub(super) fn is_spent(&self, site: &UpstreamRegistry, shown: &HeaderValue) -> bool {
        is_local_token(shown)
            && self
                .logins
                .given(site, &self.principals.credential(shown))
                .is_none()
    }

    async fn learn_login(
        &self,
        site: &Arc<UpstreamRegistry>,
        realm: &Origin,
        (account, repositories): ([u8; 32], Vec<Repository>),
        reply: &TokenResponse,
        asked_at: (SystemTime, Instant),
    ) {
        if matches!(reply.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return self.learn_no_login(site, account).await;
        }
        let Some(issued) = &reply.issued else { return };
        let Ok(shown) = HeaderValue::from_str(&issued.authorization) else {
            return;
        };
        self.learn_yes_login(site, account, asked_at).await;
        let given = IssuedToken {
            realm: realm.clone(),
            account: Some(account),
            repositories,
            until: Instant::now() + issued.life,
        };
        self.logins.note(site, &self.principals.credential(&shown), given);
    }

    fn local_token(
        &self,
        site: &UpstreamRegistry,
        realm: Origin,
        account: Option<[u8; 32]>,
        repositories: Vec<Repository>,
    ) -> Bytes {
        let now = self.clock.now();
        let nth = self.logins.made.fetch_add(1, Ordering::Relaxed);
        let unguessable = self
            .principals
            .keyed(format!("local token {nth} at {now:?}").as_bytes());
        let token = Zeroizing::new(format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(unguessable)));
        let given = IssuedToken {
            realm,
            account,
            repositories,
            until: Instant::now() + LIFE,
        };
        if let Ok(shown) = HeaderValue::from_str(&Zeroizing::new(format!("Bearer {}", *token))) {
            self.logins.note(site, &self.principals.credential(&shown), given);
        }
        let answer = serde_json::json!({
            "token": *token,
            "access_token": *token,
            "expires_in": LIFE.as_secs(),
            "issued_at": humantime::format_rfc3339_seconds(now).to_string(),
        });
        answer.to_string().into()
    }
}
