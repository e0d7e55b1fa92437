//! Gate: blocks a response or a body until the test opens it, to order events without sleeping.

use super::within;
use tokio::sync::watch;

/// Clones share one state.
#[derive(Clone, Debug)]
pub struct Gate {
    state: watch::Sender<GateState>,
}

#[derive(Clone, Copy, Debug, Default)]
struct GateState {
    arrived: usize,
    open: bool,
}

impl Gate {
    pub(super) fn new() -> Gate {
        Gate {
            state: watch::Sender::new(GateState::default()),
        }
    }

    /// Waits until a request is blocked at the gate.
    pub async fn reached(&self) {
        self.reached_by(1).await;
    }

    /// Waits until `count` requests have reached the gate.
    pub async fn reached_by(&self, count: usize) {
        let mut state = self.state.subscribe();
        within(
            "somebody to reach the gate",
            state.wait_for(|state| state.arrived >= count),
        )
        .await
        .unwrap();
    }

    /// Requests that reached the gate.
    pub fn arrived(&self) -> usize {
        self.state.borrow().arrived
    }

    /// Opens the gate for good.
    pub fn release(&self) {
        self.state.send_modify(|state| state.open = true);
    }

    /// Blocks until the gate is opened.
    pub(super) async fn pass(&self) {
        self.state.send_modify(|state| state.arrived += 1);
        self.state.subscribe().wait_for(|state| state.open).await.unwrap();
    }
}
