//! What a service manager is told (`sd_notify`): ready, alive, ending. Without one nothing happens.

use std::time::Duration;

use sd_notify::NotifyState;

/// Requests are answered from now on.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// A reload of the configuration, which the service manager waits for. Dropped when it is over, whichever way.
pub(super) struct Reloading;

impl Reloading {
    pub(super) fn begin() -> Self {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
        }
        Self
    }
}

impl Drop for Reloading {
    fn drop(&mut self) {
        ready();
    }
}

/// What is under way is finished, and then the process ends.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Shows that tasks still get their turn, if the service manager wants to see that (`WatchdogSec=`).
pub(super) async fn watchdog() {
    let Some(within) = sd_notify::watchdog_enabled() else {
        return;
    };
    let pause = (within / 3).max(Duration::from_millis(10));
    loop {
        notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(pause).await;
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager could not be told how it goes");
    }
}
