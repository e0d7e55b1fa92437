//! Renewal of the server certificate at run time, and expiry warnings.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::server::tls::ServerTls;

/// Interval of certificate checks, in wall-clock time.
const CHECK_INTERVAL: Duration = Duration::from_secs(3_600);
/// Interval at which the wall clock is read, because a machine may sleep and its clock may be set.
const WAKE_INTERVAL: Duration = Duration::from_secs(5);
/// Interval at which a warning is repeated.
const WARN_INTERVAL: Duration = Duration::from_secs(86_400);

/// Renews certificates and logs expiry warnings until shutdown.
pub(super) async fn renewal_loop(tls: Arc<ArcSwap<ServerTls>>, clock: Clock, shutdown: CancellationToken) {
    let (mut checked, mut warned) = (None, None);
    while !shutdown.is_cancelled() {
        let now = clock.now();
        if is_due(checked, now, CHECK_INTERVAL) {
            checked = Some(now);
            let warn = is_due(warned, now, WARN_INTERVAL);
            if warn {
                warned = Some(now);
            }
            let tls = Arc::clone(&tls);
            let check = move || {
                renew_if_due(&tls);
                if warn {
                    tls.load().warn_of_expiry(now);
                }
            };
            if tokio::task::spawn_blocking(check).await.is_err() {
                tracing::error!("certificate check panicked, retrying");
            }
        }
        let _ = shutdown
            .run_until_cancelled(tokio::time::sleep(WAKE_INTERVAL))
            .await;
    }
}

/// Also true if the clock was set back.
fn is_due(last: Option<SystemTime>, now: SystemTime, every: Duration) -> bool {
    last.is_none_or(|last| now.duration_since(last).map_or(true, |since| since >= every))
}

/// Replaces the server certificate if it expires soon. Blocks.
fn renew_if_due(tls: &ArcSwap<ServerTls>) {
    let old = tls.load_full();
    match old.renew_if_due() {
        None => {}
        Some(Ok(new)) => {
            let until = new.expiries().into_iter().find(|(name, _)| *name == "server");
            let until = until.map(|(_, at)| humantime::format_rfc3339_seconds(at).to_string());
            // A concurrent reload has created its own certificate.
            let found = tls.compare_and_swap(&old, Arc::new(new));
            if Arc::ptr_eq(&found, &old) {
                tracing::info!(until, "server certificate renewed before its expiry");
            }
        }
        Some(Err(error)) => {
            tracing::error!(%error, "failed to renew the expiring server certificate, retrying");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::config::Tls;

    const DAY: Duration = Duration::from_secs(86_400);
    /// Days since 2026-01-01.
    static TODAY: AtomicU64 = AtomicU64::new(0);

    fn now() -> SystemTime {
        let days = u32::try_from(TODAY.load(Ordering::SeqCst)).unwrap();
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600) + DAY * days
    }

    fn prepared(folder: &std::path::Path) -> ServerTls {
        let tls = Tls {
            folder: folder.to_owned(),
            names: Vec::new(),
            constrained: true,
            certificate: None,
        };
        ServerTls::prepare(&tls, &[], HashSet::new(), &[], Clock::from_fn(now)).unwrap()
    }

    fn end(tls: &ArcSwap<ServerTls>, of: &str) -> SystemTime {
        let ends = tls.load().expiries();
        ends.into_iter().find(|(name, _)| *name == of).unwrap().1
    }

    #[test]
    fn o04_server_certificate_is_renewed_at_run_time() {
        let folder = tempfile::tempdir().unwrap();
        let tls = ArcSwap::from_pointee(prepared(folder.path()));
        let (first, ca) = (end(&tls, "server"), end(&tls, "ca"));
        renew_if_due(&tls);
        assert_eq!(end(&tls, "server"), first, "it is not due");

        // A month before its expiry, and long after it.
        for day in [800, 900, 1_700] {
            TODAY.store(day, Ordering::SeqCst);
            renew_if_due(&tls);
            assert!(end(&tls, "server") > now() + DAY * 30, "day {day}");
        }
        assert_eq!(end(&tls, "ca"), ca, "clients trust the same CA");
        assert!(!tls.load().warn_of_expiry(now()));

        // It is stored on disk, so a restart loads it.
        let started = ArcSwap::from_pointee(prepared(folder.path()));
        assert_eq!(end(&started, "server"), end(&tls, "server"));

        // Warnings about the CA start half a year before its expiry.
        TODAY.store(3_500, Ordering::SeqCst);
        renew_if_due(&tls);
        assert!(tls.load().warn_of_expiry(now()));
        TODAY.store(0, Ordering::SeqCst);
    }

    #[test]
    fn o04_certificates_are_checked_after_clock_change() {
        let at = SystemTime::UNIX_EPOCH + DAY;
        assert!(is_due(None, at, CHECK_INTERVAL));
        assert!(!is_due(Some(at), at + CHECK_INTERVAL / 2, CHECK_INTERVAL));
        assert!(is_due(Some(at), at + CHECK_INTERVAL, CHECK_INTERVAL));
        assert!(is_due(Some(at), at - DAY / 2, CHECK_INTERVAL), "set back");
    }
}
