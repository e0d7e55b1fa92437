//! Listener metrics: open connections, idle connections closed at a limit, and rejected admin tokens.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type IntGauge = Gauge<u64, AtomicU64>;

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// It has a permit of its address and one of the process.
    Open,
    /// It waits for a permit of its address.
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

/// Why an admin token was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRejection {
    /// It is wrong.
    Wrong,
    /// Not compared, because its address has sent too many wrong ones.
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

/// Why an idle connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The limit of connections of the listener was reached.
    ConnectionLimit,
    /// The limit of connections of its address was reached.
    AddressLimit,
    /// The process had no file descriptor left.
    DescriptorLimit,
}

impl CloseReason {
    /// The name in the log and the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConnectionLimit => "connection-limit",
            Self::AddressLimit => "address-limit",
            Self::DescriptorLimit => "descriptor-limit",
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

/// Counts a connection as open until dropped.
pub struct OpenConnection(IntGauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Metrics of the listeners' connections.
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
            "Current connections, by listener: open, or waiting because their address has reached its limit",
            self.open.clone(),
        );
        registry.register(
            "connections_closed",
            "Idle connections closed for new ones at a limit, by listener and reason",
            self.closed.clone(),
        );
        registry.register(
            "admin_tokens_refused",
            "Rejected admin tokens: wrong, or not compared because their address had sent too many",
            self.admin_tokens.clone(),
        );
    }
}
