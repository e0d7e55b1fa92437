//! Probes: requests of the cache's own that find out whether an upstream responds again.
//!
//! A probe of one kind of request sends the same request, without a client's credential, and beside the places of the
//! clients' requests, which may all be taken by what has no response. Several may be under way, for an earlier one may
//! wait on a connection that is dead.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::client::{Follow, Request};
use super::exchange;
use super::fetched::Part;
use super::health::{Kind, Scope};
use super::settings::{Caller, Credential};
use super::state::Learned;
use super::{Inner, Upstream};
use crate::oci::accept::Accept;
use crate::oci::operation::Operation;
use crate::queue::{Class, Peer};
use crate::trace_context::Trace;

/// How long a response to a probe is waited for.
const PROBE_WITHIN: Duration = Duration::from_secs(10);

/// Probes what has no response until all of it has, or the upstream is no longer configured.
pub(super) async fn probes(learned: Weak<Learned>, changed: Arc<tokio::sync::Notify>) {
    let mut under_way = JoinSet::new();
    loop {
        while under_way.try_join_next().is_some() {}
        let due = {
            let Some(learned) = learned.upgrade() else { return };
            let Some(inner) = learned.in_effect() else {
                learned.stopped_probing();
                return;
            };
            match learned.next_probe(&inner) {
                None => return,
                Some((due, _)) if due > Instant::now() => due,
                Some((due, scope)) => {
                    let operation = learned.probed(&inner, &scope);
                    // Switched off by the operator: not even a probe goes out.
                    if let Some(operation) = operation.filter(|_| !inner.offline.is_on()) {
                        let (upstream, began) = (Upstream(inner), Instant::now());
                        under_way.spawn(async move {
                            let probe = Box::pin(upstream.probe(&scope, operation));
                            if timeout(PROBE_WITHIN, probe).await == Ok(Ended::ByItself) {
                                upstream.0.probe_ended(&scope, began);
                            }
                        });
                    }
                    due
                }
            }
        };
        // A change may bring the next one forward.
        let _ = timeout_at(due, changed.notified()).await;
    }
}

/// How a probe ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// With a response, a failure that was attributed, or without having had anything to ask.
    ByItself,
    /// Without a response or with a server error, and nothing was attributed.
    InSilence,
}

impl Upstream {
    /// One probe. Its response is attributed as a client's would be.
    async fn probe(&self, scope: &Scope, operation: Operation) -> Ended {
        let kind = match scope {
            Scope::Connection => return self.0.probe_connection().await,
            Scope::Kind(Kind::Token) | Scope::Repository(Kind::Token, _) => {
                return self.0.probe_realm(scope).await;
            }
            Scope::Kind(kind) | Scope::Repository(kind, _) => *kind,
        };
        let caller = self.0.own_caller();
        let accept = Accept::manifests();
        match kind {
            Kind::Head | Kind::Blob => {
                let asked = (&operation, &accept);
                drop(Box::pin(self.head_round(&caller, asked, true)).await);
            }
            Kind::Get | Kind::List | Kind::Ping | Kind::Token => {
                let asked = (&operation, &accept);
                drop(Box::pin(self.get_round(&caller, asked, Part::default())).await);
            }
        }
        Ended::ByItself
    }
}

impl Inner {
    /// The cache itself: with its own credential, if it has one.
    fn own_caller(&self) -> Caller {
        let credential = match self.exchange.own {
            Some(_) => Credential::Own,
            None => Credential::Anonymous,
        };
        Caller {
            principal: self.learned.principal_of(&credential),
            credential,
            trace: Trace::begun(),
            waits_until: None,
            peer: Peer::Background,
            class: Class::Background,
            waiters: None,
        }
    }

    /// Any response from a URL that was unavailable will do.
    async fn probe_connection(&self) -> Ended {
        let unavailable = self.health().map(|health| health.unavailable.clone());
        let unavailable = unavailable.unwrap_or_default();
        let mut ended = if unavailable.is_empty() {
            Ended::ByItself
        } else {
            Ended::InSilence
        };
        for uri in unavailable.iter().filter_map(|origin| origin.join("/v2/")) {
            match self.reply_from(uri).await {
                Some(reply) if exchange::is_registry(&reply) => {
                    self.is_back(&Scope::Connection);
                    return Ended::ByItself;
                }
                Some(_) => ended = Ended::ByItself,
                None => {}
            }
        }
        ended
    }

    /// A realm whose last word was an answer, to anybody, is not asked again: the next client's own request decides.
    async fn probe_realm(&self, scope: &Scope) -> Ended {
        let Some(realm) = self.exchange.tokens.unanswered_realm() else {
            return Ended::ByItself;
        };
        match self.reply_from(realm).await {
            Some(reply) if exchange::is_alive(&reply) => {
                self.is_back(scope);
                Ended::ByItself
            }
            Some(reply) if reply.status.is_server_error() => Ended::InSilence,
            Some(_) => Ended::ByItself,
            None => Ended::InSilence,
        }
    }

    async fn reply_from(&self, uri: http::Uri) -> Option<super::client::Reply> {
        let mut headers = HeaderMap::new();
        Trace::begun().write(&mut headers);
        let request = Request {
            method: Method::GET,
            uri,
            headers,
            body: Bytes::new(),
            follow: Follow::SameOrigin,
            elsewhere: None,
            within: self.timeouts.token,
        };
        self.exchange.http.send(request).await.ok()
    }
}
