//! Local tokens: issued by the cache while the upstream's token service is unavailable (`local_tokens`), and the
//! accounts behind upstream tokens.
//!
//! Docker, podman and crane fetch a token before each pull and do not reuse the previous one. If the token service is
//! unavailable, they have no token that the registry accepted. So the cache inspects token responses in transit and
//! records which *account* (hash of the presented credential) received which token for which repositories. A grant of
//! a token then also counts for its account, and in an outage a local token stands for that account.
//!
//! A local token identifies its account and carries no authority; every client that requests one gets one.
//! Authorization is checked when the token is used: it covers public repositories, and those that the account could
//! read while the token service accepted it. A local token is never sent upstream. A request with one is sent
//! anonymously, and a denial then means that the outage is over: the client is challenged to fetch a token from the
//! service.

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
use crate::shared::RecordPrincipal;
use crate::upstream::TokenResponse;
use crate::upstream::forward::ForwardRequest;
use crate::upstream::origin::Origin;

/// Prefix of local tokens. A token with this prefix is never forwarded upstream, whichever cache issued it.
const PREFIX: &str = "ifnewer-local-";

/// Token lifetime, as Docker Hub's.
const TOKEN_TTL: Duration = Duration::from_secs(300);

/// Tokens with a known account, upstream and local. A forgotten upstream token is still a valid credential.
const TOKENS_MAX: usize = 16_384;

/// Whether the credential is a local token of any cache.
pub fn is_local_token(shown: &HeaderValue) -> bool {
    let shown = shown.to_str().ok().and_then(|shown| shown.split_once(' '));
    shown.is_some_and(|(scheme, token)| {
        scheme.eq_ignore_ascii_case("bearer") && token.trim_start().starts_with(PREFIX)
    })
}

/// Result of a token request.
pub enum TokenOutcome {
    /// Response of the token service.
    Upstream(TokenResponse),
    /// The token service was unavailable for this cause; the JSON body carries a local token.
    Local(UpstreamFailure, Bytes),
}

/// Accounts of known tokens.
pub(super) struct LocalTokens {
    known: Cache<Token, Arc<IssuedToken>>,
    issued: AtomicU64,
}

/// Upstream name, and the token as a principal.
type Token = (Arc<str>, [u8; 32]);

/// An account at a token service: as principal of this cache, and in grant records.
type Account = ([u8; 32], Option<RecordPrincipal>);

struct IssuedToken {
    /// Realm that issued it, or that the cache stood in for. Accounts of another realm are different.
    realm: Origin,
    /// `None` for an anonymous token.
    account: Option<[u8; 32]>,
    /// The account in grant records.
    recorded: Option<RecordPrincipal>,
    /// Requested repositories. The registry decides whether the token is valid for them.
    repositories: Vec<Repository>,
    until: Instant,
}

impl Default for LocalTokens {
    fn default() -> Self {
        Self {
            known: Cache::new(TOKENS_MAX),
            issued: AtomicU64::new(0),
        }
    }
}

impl LocalTokens {
    fn find(&self, registry: &UpstreamRegistry, token: &Principal) -> Option<Arc<IssuedToken>> {
        let issued_token = self.known.get(&(registry.shared_name(), *token.as_bytes()))?;
        (registry.realm() == Some(&issued_token.realm) && issued_token.until > Instant::now())
            .then_some(issued_token)
    }

    fn insert(&self, registry: &UpstreamRegistry, token: &Principal, issued_token: IssuedToken) {
        self.known.insert(
            (registry.shared_name(), *token.as_bytes()),
            Arc::new(issued_token),
        );
    }
}

impl ProxyService {
    /// Forwards a client's token request to the upstream's token service and records the response, even if the client
    /// has left. `Err` only at shutdown.
    pub async fn request_token(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        realm: &Origin,
        request: TokenRequest,
        passing: ForwardRequest,
    ) -> Result<TokenOutcome, UpstreamFailure> {
        let (proxy, registry, realm) = (Arc::clone(self), Arc::clone(registry), realm.clone());
        let answered = tokio::spawn(async move {
            let account = request.credential.as_deref().map(|secret| -> Account {
                let own = *proxy.principals.account(secret).as_bytes();
                (own, proxy.recorded_account(&realm, secret))
            });
            let sent_at = (proxy.clock.now(), Instant::now());
            match registry.upstream().forward_token_request(&realm, passing).await {
                Ok(reply) => {
                    if let Some(account) = account {
                        proxy
                            .record_token_response(
                                &registry,
                                &realm,
                                (account, request.repositories),
                                &reply,
                                sent_at,
                            )
                            .await;
                    }
                    TokenOutcome::Upstream(reply)
                }
                Err(cause) => TokenOutcome::Local(
                    cause,
                    proxy.issue_local_token(&registry, realm, account, request.repositories),
                ),
            }
        });
        answered.await.map_err(|_| UpstreamFailure::Abandoned)
    }

    /// Account of this token, if the token was issued for the repository.
    pub(super) fn account(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        shown: Option<&HeaderValue>,
    ) -> Option<[u8; 32]> {
        self.issued_token(registry, repository, shown?)?.account
    }

    /// The same account in grant records.
    pub(super) fn account_in_records(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        shown: &HeaderValue,
    ) -> Option<RecordPrincipal> {
        self.issued_token(registry, repository, shown)?.recorded.clone()
    }

    fn issued_token(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        shown: &HeaderValue,
    ) -> Option<Arc<IssuedToken>> {
        registry.realm()?;
        let issued_token = self
            .local_tokens
            .find(registry, &self.principals.credential(shown))?;
        issued_token
            .repositories
            .contains(repository)
            .then_some(issued_token)
    }

    /// Whether the credential is a local token that is unknown or expired. It then counts as no credential.
    pub(super) fn is_expired_local_token(&self, registry: &UpstreamRegistry, shown: &HeaderValue) -> bool {
        is_local_token(shown)
            && self
                .local_tokens
                .find(registry, &self.principals.credential(shown))
                .is_none()
    }

    async fn record_token_response(
        &self,
        registry: &Arc<UpstreamRegistry>,
        realm: &Origin,
        ((account, recorded), repositories): (Account, Vec<Repository>),
        reply: &TokenResponse,
        sent_at: (SystemTime, Instant),
    ) {
        if matches!(reply.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return self
                .record_login_denied(registry, (&account, recorded.as_ref()))
                .await;
        }
        let Some(issued) = &reply.issued else { return };
        let Ok(shown) = HeaderValue::from_str(&issued.authorization) else {
            return;
        };
        self.record_login(registry, account, sent_at).await;
        self.note_login(registry, recorded.as_ref(), sent_at.1);
        let issued_token = IssuedToken {
            realm: realm.clone(),
            account: Some(account),
            recorded,
            repositories,
            until: Instant::now() + issued.life,
        };
        self.local_tokens
            .insert(registry, &self.principals.credential(&shown), issued_token);
    }

    fn issue_local_token(
        &self,
        registry: &UpstreamRegistry,
        realm: Origin,
        account: Option<Account>,
        repositories: Vec<Repository>,
    ) -> Bytes {
        let (account, recorded) = account.unzip();
        let now = self.clock.now();
        let nth = self.local_tokens.issued.fetch_add(1, Ordering::Relaxed);
        let unguessable = self
            .principals
            .keyed(format!("local token {nth} at {now:?}").as_bytes());
        let token = Zeroizing::new(format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(unguessable)));
        let issued_token = IssuedToken {
            realm,
            account,
            recorded: recorded.flatten(),
            repositories,
            until: Instant::now() + TOKEN_TTL,
        };
        if let Ok(shown) = HeaderValue::from_str(&Zeroizing::new(format!("Bearer {}", *token))) {
            self.local_tokens
                .insert(registry, &self.principals.credential(&shown), issued_token);
        }
        let response = serde_json::json!({
            "token": *token,
            "access_token": *token,
            "expires_in": TOKEN_TTL.as_secs(),
            "issued_at": humantime::format_rfc3339_seconds(now).to_string(),
        });
        response.to_string().into()
    }
}
