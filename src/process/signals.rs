//! What ends the process, and what has it read its configuration again.

use tokio::signal::unix::{self, SignalKind, signal};

/// What a signal asks for.
pub(super) enum Signal {
    Reload,
    Shutdown,
}

/// The signals that the process listens to.
pub(super) struct Signals {
    hangup: unix::Signal,
    terminate: unix::Signal,
    interrupt: unix::Signal,
}

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for one that ends the process. There is nothing left to be read again for.
    pub(super) async fn wait_for_shutdown(&mut self) {
        while matches!(self.next().await, Signal::Reload) {
            tracing::info!("ending already: the configuration is not read again");
        }
    }

    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.hangup.recv() => Signal::Reload,
            _ = self.terminate.recv() => Signal::Shutdown,
            _ = self.interrupt.recv() => Signal::Shutdown,
        }
    }
}
