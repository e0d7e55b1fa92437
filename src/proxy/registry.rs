//! An upstream as the road knows it: its settings, and the state that outlives them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::HeaderValue;

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

/// Docker Hub, the one registry whose one-component names live under `library/`.
const HUB: &str = "docker.io";

/// A configured upstream: its settings, which a reload exchanges, over the state that belongs to its name.
pub struct UpstreamRegistry {
    upstream: Arc<Upstream>,
    access: Access,
    realm: Option<Origin>,
    rules: Arc<Rules>,
    state: Arc<RegistryState>,
}

/// State of an upstream, learned, that outlives reloads.
#[derive(Default)]
pub struct RegistryState {
    upstream: LearnedState,
    /// Whether a client came that believes to speak with it.
    visited: AtomicBool,
    writings: WriteGenerations,
}

impl RegistryState {
    /// The part of it that the client side has.
    pub fn upstream(&self) -> &LearnedState {
        &self.upstream
    }
}

/// The states of all upstreams of this process, by name. Names come from the operator's configuration alone, which
/// bounds their number; the state of an upstream that was removed waits for its return.
#[derive(Default)]
pub struct RegistryStates(Mutex<HashMap<String, Arc<RegistryState>>>);

impl RegistryStates {
    /// The state of the upstream of this name.
    pub fn of(&self, name: &str) -> Arc<RegistryState> {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(states.entry(name.to_owned()).or_default())
    }
}

/// Who there can be: those without a credential of their own, worked out once, and the secret that keys all others.
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

    /// Whoever shows no credential.
    pub(super) fn anonymous(&self) -> [u8; 32] {
        *self.anonymous.as_bytes()
    }

    /// Who shows this `Authorization`.
    pub(super) fn credential(&self, shown: &HeaderValue) -> Principal {
        Principal::of_credential(&self.secret, shown.as_bytes())
    }

    /// Who shows this at a token service.
    pub(super) fn account(&self, login: &[u8]) -> Principal {
        Principal::of_account(&self.secret, login)
    }

    /// What nobody without the secret can work out.
    pub(super) fn keyed(&self, message: &[u8]) -> [u8; 32] {
        hmac_sha256(&self.secret, message)
    }

    /// Who asks upstream without a credential, and on nobody's behalf.
    pub(super) fn stranger(&self, trace: &TraceContext) -> Caller {
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

/// Whose right counts at an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Each client's own: a hit is proven with its credential.
    PerClient,
    /// Whoever reaches the listener is entitled. `own_credential`: the proxy has one of its own to show upstream.
    Shared {
        /// Whether the proxy has a credential of its own.
        own_credential: bool,
    },
}

impl UpstreamRegistry {
    /// An upstream over its state, whose right counts there, and the rules for its images.
    pub fn new(
        upstream: Arc<Upstream>,
        access: Access,
        rules: Arc<Rules>,
        state: Arc<RegistryState>,
    ) -> Self {
        Self {
            upstream,
            access,
            realm: None,
            rules,
            state,
        }
    }

    /// The rule that holds for an image; without a tag, for what is asked by digest.
    pub fn rule(&self, repository: &Repository, tag: Option<&Tag>) -> &EffectivePolicy {
        self.rules.find(self.name(), repository, tag)
    }

    /// The same, with tokens of ours while the token service at `realm` is silent.
    #[must_use]
    pub fn with_local_tokens(self, realm: Origin) -> Self {
        Self {
            realm: Some(realm),
            ..self
        }
    }

    /// The token service in whose place tokens are given.
    pub fn realm(&self) -> Option<&Origin> {
        self.realm.as_ref()
    }

    /// Which writes there were in this repository: compared with a later value, whether there was one in between.
    pub fn writes(&self, repository: &Repository) -> WriteSnapshot {
        self.state.writings.now(repository)
    }

    pub(super) fn writings(&self) -> &WriteGenerations {
        &self.state.writings
    }

    /// A client believes to speak with it, and will follow its challenge.
    pub(super) fn visit(&self) {
        self.state.visited.store(true, Ordering::Relaxed);
    }

    /// Whether such a client came.
    pub(super) fn is_visited(&self) -> bool {
        self.state.visited.load(Ordering::Relaxed)
    }

    /// The upstream's name, as in references: `docker.io`.
    pub fn name(&self) -> &str {
        self.upstream.name()
    }

    /// The client that reaches it.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Whether whoever reaches the listener is entitled.
    pub fn is_shared(&self) -> bool {
        matches!(self.access, Access::Shared { .. })
    }

    /// Whether the proxy shows a credential of its own, so that a refusal is the operator's to mend.
    pub fn has_own_credential(&self) -> bool {
        self.access == Access::Shared { own_credential: true }
    }

    /// Who is shown to it: `client` (each its own credential), `cache` (the proxy's), `anonymous`.
    pub fn identity(&self) -> &'static str {
        match self.access {
            Access::PerClient => "client",
            Access::Shared { own_credential: true } => "cache",
            Access::Shared {
                own_credential: false,
            } => "anonymous",
        }
    }

    /// Whether this is Docker Hub, whose names follow rules of their own.
    pub fn is_hub(&self) -> bool {
        self.name() == HUB
    }

    /// The repository as the upstream knows it: Docker Hub's `demo` is `library/demo`.
    pub fn full_name(&self, repository: Repository) -> Result<Repository, NameError> {
        if self.is_hub() && repository.is_one_component() {
            repository.with_prefix("library")
        } else {
            Ok(repository)
        }
    }

    /// Who asks upstream on behalf of a client that sent `authorization`.
    pub(super) fn caller(
        &self,
        principals: &Principals,
        authorization: Option<&HeaderValue>,
        (peer, trace): (Peer, &TraceContext),
    ) -> Caller {
        let (principal, credential) = match (self.access, authorization) {
            (Access::Shared { own_credential }, _) => {
                let credential = if own_credential {
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
