//! Service manager notifications (`sd_notify`): ready, reloading, watchdog, stopping. Without a service manager they
//! do nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// Reports that requests are served.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// A running reload. Dropping it reports ready.
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

/// Reports that shutdown has begun.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Sends watchdog notifications while the runtime makes progress, if the service manager expects them
/// (`WatchdogSec=`).
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
        tracing::warn!(%error, "failed to notify the service manager");
    }
}
