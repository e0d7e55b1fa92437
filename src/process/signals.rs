//! Signals for shutdown and reload.

use tokio::signal::unix::{self, SignalKind, signal};

/// A received signal.
pub(super) enum Signal {
    Reload,
    Shutdown,
}

/// The signal streams of the process.
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

    /// Waits for a shutdown signal. Reload signals are ignored.
    pub(super) async fn wait_for_shutdown(&mut self) {
        while matches!(self.next().await, Signal::Reload) {
            tracing::info!("reload ignored during shutdown");
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
