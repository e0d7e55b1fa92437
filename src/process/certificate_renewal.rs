//! Renewal of the server certificate in the running process, and warnings of certificates that end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::server::tls::ServerTls;

/// How often the certificates are checked at, by the time of day.
const CHECK_INTERVAL: Duration = Duration::from_secs(3_600);
/// How often the time of day is checked at: a machine may sleep, and its clock may be set.
const WAKE_INTERVAL: Duration = Duration::from_secs(5);
/// How often the same warning is logged.
const WARN_INTERVAL: Duration = Duration::from_secs(86_400);

/// Looks after the certificates until the end.
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
                tracing::error!("looking after the certificates ended in a panic; it is tried again");
            }
        }
        let _ = shutdown
            .run_until_cancelled(tokio::time::sleep(WAKE_INTERVAL))
            .await;
    }
}

/// Also after the clock was set back.
fn is_due(last: Option<SystemTime>, now: SystemTime, every: Duration) -> bool {
    last.is_none_or(|last| now.duration_since(last).map_or(true, |since| since >= every))
}

/// Puts a new server certificate into effect if the one in effect ends soon. Blocks.
fn renew_if_due(tls: &ArcSwap<ServerTls>) {
    let old = tls.load_full();
    match old.renew_if_due() {
        None => {}
        Some(Ok(new)) => {
            let until = new.expiries().into_iter().find(|(name, _)| *name == "server");
            let until = until.map(|(_, at)| humantime::format_rfc3339_seconds(at).to_string());
            // A reload in the meantime has made its own.
            let found = tls.compare_and_swap(&old, Arc::new(new));
            if Arc::ptr_eq(&found, &old) {
                tracing::info!(until, "the server certificate ended soon and was renewed");
            }
        }
        Some(Err(error)) => {
            tracing::error!(%error, "the server certificate ends soon and cannot be renewed; it is tried again");
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
    fn o04_the_server_certificate_is_renewed_while_it_runs() {
        let folder = tempfile::tempdir().unwrap();
        let tls = ArcSwap::from_pointee(prepared(folder.path()));
        let (first, ca) = (end(&tls, "server"), end(&tls, "ca"));
        renew_if_due(&tls);
        assert_eq!(end(&tls, "server"), first, "it is not due");

        // A month before its end, and long after it.
        for day in [800, 900, 1_700] {
            TODAY.store(day, Ordering::SeqCst);
            renew_if_due(&tls);
            assert!(end(&tls, "server") > now() + DAY * 30, "day {day}");
        }
        assert_eq!(end(&tls, "ca"), ca, "clients trust the same CA");
        assert!(!tls.load().warn_of_expiry(now()));

        // It is on the disk as well: a start finds it.
        let started = ArcSwap::from_pointee(prepared(folder.path()));
        assert_eq!(end(&started, "server"), end(&tls, "server"));

        // Of the CA's end there are warnings half a year before.
        TODAY.store(3_500, Ordering::SeqCst);
        renew_if_due(&tls);
        assert!(tls.load().warn_of_expiry(now()));
        TODAY.store(0, Ordering::SeqCst);
    }

    #[test]
    fn o04_certificates_are_looked_at_again_when_the_clock_is_set() {
        let at = SystemTime::UNIX_EPOCH + DAY;
        assert!(is_due(None, at, CHECK_INTERVAL));
        assert!(!is_due(Some(at), at + CHECK_INTERVAL / 2, CHECK_INTERVAL));
        assert!(is_due(Some(at), at + CHECK_INTERVAL, CHECK_INTERVAL));
        assert!(is_due(Some(at), at - DAY / 2, CHECK_INTERVAL), "set back");
    }
}
