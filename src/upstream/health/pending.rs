//! Sent requests without a final response, and which of them are overdue.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::{RequestKind, SHORT_WAIT};
use crate::oci::endpoint::Endpoint;

/// A sent request, for attributing its outcome.
#[derive(Clone, Debug)]
pub(super) struct SentRequest {
    pub(super) kind: RequestKind,
    pub(super) endpoint: Endpoint,
    pub(super) principal: [u8; 32],
    /// When it began to wait for the response.
    pub(super) since: Instant,
}

/// The requests of one upstream.
#[derive(Debug, Default)]
pub(super) struct PendingRequests {
    requests: HashMap<u64, PendingRequest>,
    next: u64,
}

#[derive(Debug)]
struct PendingRequest {
    request: SentRequest,
    /// `None` while nothing is in flight (a credential helper runs).
    waiting_on: Option<WaitingOn>,
    /// When it was sent. A pause resets it.
    sent_at: Instant,
    /// How long a caller waited for it in vain, and when that wait ended.
    timed_out: Option<(Duration, Instant)>,
    /// When such a wait was last counted as a failure.
    counted_at: Option<Instant>,
}

/// The peer whose response is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitingOn {
    Registry,
    TokenService,
}

impl PendingRequests {
    /// Adds a request and returns its number.
    pub(super) fn add(&mut self, request: SentRequest) -> u64 {
        let id = self.next;
        self.next += 1;
        let pending = PendingRequest {
            waiting_on: Some(WaitingOn::Registry),
            sent_at: request.since,
            timed_out: None,
            counted_at: None,
            request,
        };
        self.requests.insert(id, pending);
        id
    }

    /// Pauses or resumes a request while the cache itself is busy, e.g. with a credential helper.
    pub(super) fn set_paused(&mut self, id: u64, is_paused: bool, now: Instant) {
        if let Some(pending) = self.requests.get_mut(&id) {
            pending.waiting_on = (!is_paused).then_some(WaitingOn::Registry);
            pending.request.since = now;
            pending.sent_at = now;
        }
    }

    /// The request now waits for the token service.
    pub(super) fn waiting_for_token(&mut self, id: u64, now: Instant) {
        if let Some(pending) = self.requests.get_mut(&id) {
            pending.waiting_on = Some(WaitingOn::TokenService);
            pending.request.since = now;
        }
    }

    /// The token request has ended. Returns it, and the request waits for the registry again.
    pub(super) fn token_finished(&mut self, id: u64, now: Instant) -> Option<SentRequest> {
        let pending = self.requests.get_mut(&id)?;
        let token_request = SentRequest {
            kind: RequestKind::Token,
            ..pending.request.clone()
        };
        pending.waiting_on = Some(WaitingOn::Registry);
        pending.request.since = now;
        Some(token_request)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<SentRequest> {
        Some(self.requests.remove(&id)?.request)
    }

    /// The requests whose missing response is a failure, after a caller waited `waited` for the one of this principal
    /// and endpoint. A request that was sent late is not among them. It is at a later timeout, if its response is then
    /// still missing. `needs_token`: whether the registry sends a 401 first. `is_suspected`: whether this kind of request failed
    /// before.
    pub(super) fn overdue(
        &mut self,
        (principal, endpoint, needs_token): ([u8; 32], &Endpoint, bool),
        waited: Duration,
        is_suspected: impl Fn(RequestKind) -> bool,
        now: Instant,
    ) -> Vec<SentRequest> {
        // The wait may be too short for the 401 alone, and then the token is missing too.
        let blames_token = needs_token && is_suspected(RequestKind::Token);
        let mut overdue = Vec::new();
        for pending in self.requests.values_mut() {
            let is_same = pending.request.principal == principal && pending.request.endpoint == *endpoint;
            if is_same {
                pending.timed_out = Some((waited, now));
            }
            if let Some(kind) = pending.waiting_kind()
                && pending.is_overdue(is_suspected(kind), now)
                && !pending.is_counted(is_same, now)
            {
                pending.counted_at = Some(now);
                let kind = if is_same && blames_token {
                    RequestKind::Token
                } else {
                    kind
                };
                overdue.push(SentRequest {
                    kind,
                    ..pending.request.clone()
                });
            }
        }
        overdue
    }
}

impl PendingRequest {
    /// The kind of request that is missing a response: token requests have their own.
    fn waiting_kind(&self) -> Option<RequestKind> {
        self.waiting_on.map(|peer| match peer {
            WaitingOn::Registry => self.request.kind,
            WaitingOn::TokenService => RequestKind::Token,
        })
    }

    /// Whether a wait for this peer timed out, and at least half of it was due to the peer. Once a token service is
    /// suspected, the time until the registry's 401 counts as its own: a short wait may have room for no more than the 401.
    fn is_overdue(&self, is_suspected: bool, now: Instant) -> bool {
        let began = self.request.since;
        let counts_from = match self.waiting_on {
            Some(WaitingOn::TokenService) if is_suspected => self.sent_at,
            _ => began,
        };
        self.timed_out.is_some_and(|(waited, at)| {
            at >= began && now.saturating_duration_since(counts_from) >= waited / 2
        })
    }

    /// Whether it already counts as a failure. Several callers may wait for one request at a time.
    fn is_counted(&self, timed_out_again: bool, now: Instant) -> bool {
        self.counted_at.is_some_and(|at| {
            let is_recent = now.saturating_duration_since(at) < SHORT_WAIT / 2;
            at >= self.request.since && (is_recent || !timed_out_again)
        })
    }
}
