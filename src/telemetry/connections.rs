//! Counts of the listeners: connections, those closed to make room, and refused admin tokens.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type IntGauge = Gauge<u64, AtomicU64>;

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// It has a place.
    Open,
    /// It waits for a place of its address.
    Waiting,
}

impl ConnectionState {
    fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Waiting => "waiting",
        }
    }
}

/// Why an admin token was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRejection {
    /// It is another one.
    Wrong,
    /// Its address has sent too many wrong ones: it was not compared.
    TooMany,
}

impl TokenRejection {
    fn name(self) -> &'static str {
        match self {
            Self::Wrong => "wrong",
            Self::TooMany => "too-many",
        }
    }
}

/// Why a quiet connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The process had no place for another connection.
    NoPlace,
    /// Its address had no place for another connection.
    NoPlaceOfAddress,
    /// The process had no file descriptor left.
    NoDescriptor,
}

impl CloseReason {
    /// The name in the log and the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoPlace => "no-place",
            Self::NoPlaceOfAddress => "no-place-of-address",
            Self::NoDescriptor => "no-descriptor",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    listener: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClosedLabels {
    listener: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// A connection that is counted until this is dropped.
pub struct OpenConnection(IntGauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What is counted of connections.
#[derive(Default)]
pub(super) struct Connections {
    open: Family<StateLabels, IntGauge>,
    closed: Family<ClosedLabels, Counter>,
    admin_tokens: Family<ReasonLabels, Counter>,
}

impl Connections {
    pub(super) fn open(&self, listener: &'static str, state: ConnectionState) -> OpenConnection {
        let state = state.name();
        let level = self.open.get_or_create_owned(&StateLabels { listener, state });
        level.inc();
        OpenConnection(level)
    }

    pub(super) fn closed(&self, listener: &'static str, reason: CloseReason) {
        let reason = reason.name();
        self.closed
            .get_or_create(&ClosedLabels { listener, reason })
            .inc();
    }

    pub(super) fn token_refused(&self, reason: TokenRejection) {
        let reason = reason.name();
        self.admin_tokens.get_or_create(&ReasonLabels { reason }).inc();
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "connections",
            "Connections now, by listener: open, or waiting for a place of their address",
            self.open.clone(),
        );
        registry.register(
            "connections_closed",
            "Connections without a request that were closed to make room for others, by listener and reason",
            self.closed.clone(),
        );
        registry.register(
            "admin_tokens_refused",
            "Wrong admin tokens, and tokens that were not compared because their address had sent too many",
            self.admin_tokens.clone(),
        );
    }
}
