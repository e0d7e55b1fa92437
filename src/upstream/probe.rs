//! Recovery probes: background requests that detect when an upstream responds again.
//!
//! A probe for a kind of request sends the same request without a client's credential. It needs no permit, because
//! requests without a response may occupy all permits. Several probes may be in flight, because an earlier one may
//! wait on a dead connection.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::auth_client;
use super::health::{FailureScope, RequestKind};
use super::http_client::{Follow, HttpRequest};
use super::response_stream::RangeSpec;
use super::settings::{Caller, Credential};
use super::state::Learned;
use super::{Inner, Upstream};
use crate::oci::accept::Accept;
use crate::oci::endpoint::Endpoint;
use crate::queue::{Class, Peer};
use crate::trace_context::TraceContext;

/// Timeout of a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends probes until no scope fails, or the upstream is no longer configured.
pub(super) async fn run_probes(learned: Weak<Learned>, changed: Arc<tokio::sync::Notify>) {
    let mut under_way = JoinSet::new();
    loop {
        while under_way.try_join_next().is_some() {}
        let due = {
            let Some(learned) = learned.upgrade() else { return };
            let Some(inner) = learned.active_upstream() else {
                learned.probing_stopped();
                return;
            };
            match learned.next_probe(&inner) {
                None => return,
                Some((due, _)) if due > Instant::now() => due,
                Some((due, scope)) => {
                    let endpoint = learned.take_probe(&inner, &scope);
                    // In offline mode not even a probe is sent.
                    if let Some(endpoint) = endpoint.filter(|_| !inner.offline.is_on()) {
                        let (upstream, began) = (Upstream(inner), Instant::now());
                        under_way.spawn(async move {
                            let probe = Box::pin(upstream.probe(&scope, endpoint));
                            if timeout(PROBE_TIMEOUT, probe).await == Ok(ProbeOutcome::Attributed) {
                                upstream.0.probe_ended(&scope, began);
                            }
                        });
                    }
                    due
                }
            }
        };
        // A state change may make the next probe due earlier.
        let _ = timeout_at(due, changed.notified()).await;
    }
}

/// Outcome of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProbeOutcome {
    /// A response, a failure already attributed to a scope, or nothing to send.
    Attributed,
    /// No response or a server error, not attributed to a scope.
    NoResponse,
}

impl Upstream {
    /// Sends one probe. Its response is attributed like a client's.
    async fn probe(&self, scope: &FailureScope, endpoint: Endpoint) -> ProbeOutcome {
        let kind = match scope {
            FailureScope::Connection => return self.0.probe_connection().await,
            FailureScope::Kind(RequestKind::Token) | FailureScope::Repository(RequestKind::Token, _) => {
                return self.0.probe_realm(scope).await;
            }
            FailureScope::Kind(kind) | FailureScope::Repository(kind, _) => *kind,
        };
        let caller = self.0.background_caller();
        let accept = Accept::manifests();
        match kind {
            RequestKind::Head | RequestKind::Blob => {
                let request = (&endpoint, &accept);
                drop(Box::pin(self.head_round(&caller, request, true)).await);
            }
            RequestKind::Get | RequestKind::List | RequestKind::Ping | RequestKind::Token => {
                let request = (&endpoint, &accept);
                drop(Box::pin(self.get_round(&caller, request, RangeSpec::default())).await);
            }
        }
        ProbeOutcome::Attributed
    }
}

impl Inner {
    /// The caller of background requests: with the configured credential, if any.
    fn background_caller(&self) -> Caller {
        let credential = match self.auth_client.credentials {
            Some(_) => Credential::Configured,
            None => Credential::Anonymous,
        };
        Caller {
            principal: self.learned.principal_for(&credential),
            credential,
            trace: TraceContext::new_root(),
            wait_deadline: None,
            peer: Peer::Background,
            class: Class::Background,
            waiters: None,
        }
    }

    /// Any response from a URL that was unavailable suffices.
    async fn probe_connection(&self) -> ProbeOutcome {
        let unavailable = self.health().map(|health| health.unavailable_urls.clone());
        let unavailable = unavailable.unwrap_or_default();
        let mut ended = if unavailable.is_empty() {
            ProbeOutcome::Attributed
        } else {
            ProbeOutcome::NoResponse
        };
        for uri in unavailable.iter().filter_map(|origin| origin.join("/v2/")) {
            match self.fetch(uri).await {
                Some(reply) if auth_client::is_registry(&reply) => {
                    self.recovered(&FailureScope::Connection);
                    return ProbeOutcome::Attributed;
                }
                Some(_) => ended = ProbeOutcome::Attributed,
                None => {}
            }
        }
        ended
    }

    /// If the realm last answered any caller, it is not probed: the next client's request decides.
    async fn probe_realm(&self, scope: &FailureScope) -> ProbeOutcome {
        let Some(realm) = self.auth_client.tokens.realm_to_probe() else {
            return ProbeOutcome::Attributed;
        };
        match self.fetch(realm).await {
            Some(reply) if auth_client::is_alive(&reply) => {
                self.recovered(scope);
                ProbeOutcome::Attributed
            }
            Some(reply) if reply.status.is_server_error() => ProbeOutcome::NoResponse,
            Some(_) => ProbeOutcome::Attributed,
            None => ProbeOutcome::NoResponse,
        }
    }

    async fn fetch(&self, uri: http::Uri) -> Option<super::http_client::HttpResponse> {
        let mut headers = HeaderMap::new();
        TraceContext::new_root().inject(&mut headers);
        let request = HttpRequest {
            method: Method::GET,
            uri,
            headers,
            body: Bytes::new(),
            follow: Follow::SameOrigin,
            other_origin: None,
            timeout: self.timeouts.token,
            is_client_paced: false,
        };
        self.auth_client.http.send(request).await.ok()
    }
}
