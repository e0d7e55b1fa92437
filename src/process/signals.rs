//! What ends the process, and what has it read its configuration again.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
pub(super) enum Wanted {
    Reload,
    End,
}

/// The signals that the process listens to.
pub(super) struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
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
    pub(super) async fn end(&mut self) {
        while matches!(self.next().await, Wanted::Reload) {
            tracing::info!("ending already: the configuration is not read again");
        }
    }

    pub(super) async fn next(&mut self) -> Wanted {
        tokio::select! {
            _ = self.hangup.recv() => Wanted::Reload,
            _ = self.terminate.recv() => Wanted::End,
            _ = self.interrupt.recv() => Wanted::End,
        }
    }
}
