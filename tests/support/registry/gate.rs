//! A gate holds an answer, or a body after so many bytes, until the test lets it go: interleavings without sleeping.

use super::within;
use tokio::sync::watch;

/// Cloned gates are one gate.
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

    /// Waits until somebody stands at the gate.
    pub async fn reached(&self) {
        self.reached_by(1).await;
    }

    /// Waits until `count` stood at the gate.
    pub async fn reached_by(&self, count: usize) {
        let mut state = self.state.subscribe();
        within(
            "somebody to reach the gate",
            state.wait_for(|state| state.arrived >= count),
        )
        .await
        .unwrap();
    }

    /// How many came to the gate so far.
    pub fn arrived(&self) -> usize {
        self.state.borrow().arrived
    }

    /// Lets everybody pass, now and later.
    pub fn release(&self) {
        self.state.send_modify(|state| state.open = true);
    }

    /// Stands at the gate until it is opened.
    pub(super) async fn pass(&self) {
        self.state.send_modify(|state| state.arrived += 1);
        self.state.subscribe().wait_for(|state| state.open).await.unwrap();
    }
}
