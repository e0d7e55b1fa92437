//! Upstream registry: settings, and learned state that outlives a reload.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;

use super::cooling::CheckedTime;
use super::invalidation::{WriteGenerations, WriteSnapshot};
use super::local_tokens::is_local_token;
use crate::oci::digest::hmac_sha256;
use crate::oci::{NameError, Repository, Tag};
use crate::policy::authz::Principal;
use crate::policy::rules::{EffectivePolicy, Rules};
use crate::queue::{Class, Peer};
use crate::trace_context::TraceContext;
use crate::upstream::origin::Origin;
use crate::upstream::{Caller, Credential, LearnedState, Upstream};

/// Docker Hub, the only registry that puts one-component names under `library/`.
const DOCKER_HUB: &str = "docker.io";

/// A configured upstream. A reload replaces the settings; the state belongs to the upstream's name.
pub struct UpstreamRegistry {
    upstream: Arc<Upstream>,
    access: Access,
    realm: Option<Origin>,
    rules: Arc<Rules>,
    state: Arc<RegistryState>,
    identity_in_records: Arc<str>,
}

/// Learned state of an upstream that outlives reloads.
#[derive(Default)]
pub struct RegistryState {
    upstream: LearnedState,
    /// Whether a client was intercepted that addressed the registry by its own name.
    intercepted: AtomicBool,
    write_generations: WriteGenerations,
    checked_time: CheckedTime,
}

impl RegistryState {
    /// State of the upstream client.
    pub fn upstream(&self) -> &LearnedState {
        &self.upstream
    }
}

/// States of all upstreams by name. The names come only from the configuration, which bounds their number. The state
/// of a removed upstream is retained for its return.
#[derive(Default)]
pub struct RegistryStates(Mutex<HashMap<String, Arc<RegistryState>>>);

impl RegistryStates {
    /// State of the upstream with this name.
    pub fn of(&self, name: &str) -> Arc<RegistryState> {
        let mut states = self.0.lock();
        Arc::clone(states.entry(name.to_owned()).or_default())
    }
}

/// Principals: those without a credential, derived once, and the secret that keys all others.
pub(super) struct Principals {
    anonymous: Principal,
    proxy: Principal,
    secret: [u8; 32],
}

impl Principals {
    pub(super) fn new(secret: [u8; 32]) -> Self {
        Self {
            anonymous: Principal::anonymous(&secret),
            proxy: Principal::proxy(&secret),
            secret,
        }
    }

    /// Principal of requests without a credential.
    pub(super) fn anonymous(&self) -> [u8; 32] {
        *self.anonymous.as_bytes()
    }

    /// Principal of this `Authorization` value.
    pub(super) fn credential(&self, shown: &HeaderValue) -> Principal {
        Principal::of_credential(&self.secret, shown.as_bytes())
    }

    /// Principal of this login at a token service.
    pub(super) fn account(&self, login: &[u8]) -> Principal {
        Principal::of_account(&self.secret, login)
    }

    /// Keyed hash that cannot be computed without the secret.
    pub(super) fn keyed(&self, message: &[u8]) -> [u8; 32] {
        hmac_sha256(&self.secret, message)
    }

    /// Caller for an anonymous background request.
    pub(super) fn anonymous_caller(&self, trace: &TraceContext) -> Caller {
        Caller {
            principal: *self.anonymous.as_bytes(),
            credential: Credential::Anonymous,
            peer: Peer::Background,
            class: Class::Background,
            waiters: None,
            trace: trace.clone(),
            wait_deadline: None,
        }
    }
}

/// Whose authorization counts at an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Each client's own: a hit requires a grant of its credential.
    PerClient,
    /// Every client that reaches the listener is authorized.
    Shared {
        /// Whether the proxy has its own credential for the upstream.
        proxy_credential: bool,
    },
}

impl UpstreamRegistry {
    /// An upstream with its access mode, policies and state.
    pub fn new(
        upstream: Arc<Upstream>,
        access: Access,
        rules: Arc<Rules>,
        state: Arc<RegistryState>,
    ) -> Self {
        Self {
            identity_in_records: upstream.identity().into(),
            upstream,
            access,
            realm: None,
            rules,
            state,
        }
    }

    /// The effective policy of an image; without a tag, of a request by digest.
    pub fn rule(&self, repository: &Repository, tag: Option<&Tag>) -> &EffectivePolicy {
        self.rules.find(self.name(), repository, tag)
    }

    /// Returns this registry with local tokens while the token service at `realm` is unavailable.
    #[must_use]
    pub fn with_local_tokens(self, realm: Origin) -> Self {
        Self {
            realm: Some(realm),
            ..self
        }
    }

    /// The token service for which local tokens are issued.
    pub fn realm(&self) -> Option<&Origin> {
        self.realm.as_ref()
    }

    /// Write counters of this repository. Comparing two snapshots shows whether a write happened in between.
    pub fn writes(&self, repository: &Repository) -> WriteSnapshot {
        self.state.write_generations.now(repository)
    }

    /// The registry's own time.
    pub(super) fn checked_time(&self) -> &CheckedTime {
        &self.state.checked_time
    }

    pub(super) fn write_generations(&self) -> &WriteGenerations {
        &self.state.write_generations
    }

    /// Records that a client addressed the registry by its own name and will follow its challenge.
    pub(super) fn mark_intercepted(&self) {
        self.state.intercepted.store(true, Ordering::Relaxed);
    }

    /// Whether such a client was intercepted.
    pub(super) fn is_intercepted(&self) -> bool {
        self.state.intercepted.load(Ordering::Relaxed)
    }

    /// Name of the upstream as in references: `docker.io`.
    pub fn name(&self) -> &str {
        self.upstream.name()
    }

    /// [`Self::name`], for keys that hold it.
    pub fn shared_name(&self) -> Arc<str> {
        self.upstream.shared_name()
    }

    /// Identity of the upstream in records, which every cache derives alike.
    pub(super) fn identity_in_records(&self) -> &Arc<str> {
        &self.identity_in_records
    }

    /// The upstream client.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Whether every client that reaches the listener is authorized.
    pub fn is_shared(&self) -> bool {
        matches!(self.access, Access::Shared { .. })
    }

    /// Whether the proxy sends its own credential, so that the operator must fix a denial.
    pub fn has_proxy_credential(&self) -> bool {
        self.access
            == Access::Shared {
                proxy_credential: true,
            }
    }

    /// Credential sent upstream: `client` (each client's own), `cache` (the proxy's), `anonymous`.
    pub fn identity(&self) -> &'static str {
        match self.access {
            Access::PerClient => "client",
            Access::Shared {
                proxy_credential: true,
            } => "cache",
            Access::Shared {
                proxy_credential: false,
            } => "anonymous",
        }
    }

    /// Whether this is Docker Hub, which has its own naming rules.
    pub fn is_hub(&self) -> bool {
        self.name() == DOCKER_HUB
    }

    /// The repository name at the upstream: Docker Hub's `demo` is `library/demo`.
    pub fn full_name(&self, repository: Repository) -> Result<Repository, NameError> {
        if self.is_hub() && repository.is_one_component() {
            repository.with_prefix("library")
        } else {
            Ok(repository)
        }
    }

    /// The shortest interval of scheduled refreshes; `None` if nothing is refreshed.
    pub(super) fn shortest_refresh(&self) -> Option<Duration> {
        self.rules.shortest_refresh(self.name())
    }

    /// Caller for a request of the cache itself: with its own credential, or with none.
    pub(super) fn background_caller(&self, principals: &Principals) -> Caller {
        let trace = TraceContext::new_root();
        Caller {
            class: Class::Background,
            ..self.caller(principals, None, (Peer::Background, &trace))
        }
    }

    /// Caller for an upstream request on behalf of a client that sent `authorization`.
    pub(super) fn caller(
        &self,
        principals: &Principals,
        authorization: Option<&HeaderValue>,
        (peer, trace): (Peer, &TraceContext),
    ) -> Caller {
        let (principal, credential) = match (self.access, authorization) {
            (Access::Shared { proxy_credential }, _) => {
                let credential = if proxy_credential {
                    Credential::Configured
                } else {
                    Credential::Anonymous
                };
                (principals.proxy, credential)
            }
            (Access::PerClient, Some(value)) if !is_local_token(value) => {
                (principals.credential(value), Credential::Client(value.clone()))
            }
            (Access::PerClient, _) => (principals.anonymous, Credential::Anonymous),
        };
        Caller {
            principal: *principal.as_bytes(),
            credential,
            peer,
            class: Class::Interactive,
            waiters: None,
            trace: trace.clone(),
            wait_deadline: None,
        }
    }
}
