//! Health and metrics endpoints, served independently of the main runtime.
//!
//! They run on the admin listener's own thread. State of other subsystems is read on a blocking thread with a timeout,
//! one read of each kind at a time. A lock that is never released therefore delays the details, not the response. No
//! disk is accessed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::State;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::Admin;
use super::metrics::{OPENMETRICS, PLAIN_METRICS, wants_openmetrics};
use super::response::Problem;
use crate::blocking;

/// Interval of the worker heartbeat.
const BEAT_EVERY: Duration = Duration::from_secs(1);

/// Heartbeat timeout after which the workers count as stalled. Longer than a busy machine delays a task.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Timeouts for reading problems and metrics; Prometheus waits for 10 s.
const PROBLEMS_TIMEOUT: Duration = Duration::from_secs(1);
const METRICS_TIMEOUT: Duration = Duration::from_secs(5);

/// Paths that are served on the admin thread, and without the admin token.
pub(super) const PATHS: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// Whether the admin thread serves this request.
pub(super) fn is_health(head: &Parts) -> bool {
    matches!(head.method, Method::GET | Method::HEAD) && PATHS.contains(&head.uri.path())
}

/// Heartbeat of the worker threads that serve requests.
pub(super) struct Heartbeat {
    began: Instant,
    last_ms: AtomicU64,
}

impl Heartbeat {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            last_ms: AtomicU64::new(0),
        }
    }

    fn beat(&self, now: Instant) {
        self.last_ms.store(self.ms(now), Ordering::Relaxed);
    }

    /// Time since the last heartbeat, if it exceeds the timeout.
    fn stalled_for(&self, now: Instant) -> Option<Duration> {
        let last = self.last_ms.load(Ordering::Relaxed);
        let stalled = Duration::from_millis(self.ms(now).saturating_sub(last));
        (stalled >= STALL_TIMEOUT).then_some(stalled)
    }

    fn ms(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX)
    }
}

/// Limits reads of other subsystems: one of each kind at a time.
pub(super) struct BlockingReads {
    problems: Arc<Semaphore>,
    metrics: Arc<Semaphore>,
}

/// Threads needed for blocking reads.
pub(super) const READS_MAX: usize = 2;

impl Default for BlockingReads {
    fn default() -> Self {
        Self {
            problems: Arc::new(Semaphore::new(1)),
            metrics: Arc::new(Semaphore::new(1)),
        }
    }
}

impl Admin {
    /// Updates the heartbeat for as long as the worker threads run.
    pub async fn beat(self) {
        loop {
            self.worker_heartbeat.beat(Instant::now());
            tokio::time::sleep(BEAT_EVERY).await;
        }
    }

    fn alive(&self) -> Result<(), Problem> {
        let Some(stalled) = self.worker_heartbeat.stalled_for(Instant::now()) else {
            return Ok(());
        };
        Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "the worker threads have not run for {} s; restart ifnewer",
                stalled.as_secs()
            ),
        ))
    }
}

/// Liveness of the process.
#[utoipa::path(
    get,
    path = "/healthz",
    responses((status = 200, description = "ok", body = String, content_type = "text/plain; charset=utf-8"))
)]
pub(super) async fn healthz(State(admin): State<Admin>) -> Result<&'static str, Problem> {
    admin.alive().map(|()| "ok\n")
}

/// Readiness, with the current problems.
///
/// An unavailable upstream, a slow disk or a broken index degrades the cache and does not make it unready.
#[utoipa::path(
    get,
    path = "/readyz",
    responses((status = 200, description = "ready", body = String, content_type = "text/plain; charset=utf-8"))
)]
pub(super) async fn readyz(State(admin): State<Admin>) -> Result<String, Problem> {
    admin.alive()?;
    let reader = admin.clone();
    let problems = read(&admin.blocking_reads.problems, PROBLEMS_TIMEOUT, move || {
        reader.problems()
    })
    .await;
    let problems =
        problems.unwrap_or_else(|| vec!["degraded: problems could not be read within a second".to_owned()]);
    let mut lines = vec!["ready".to_owned()];
    lines.extend(problems);
    lines.push(String::new());
    Ok(lines.join("\n"))
}

/// Metrics, as `OpenMetrics` text if the request accepts it, otherwise in the Prometheus text format.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, content((String = OPENMETRICS), (String = PLAIN_METRICS))))
)]
pub(super) async fn metrics(
    State(admin): State<Admin>,
    headers: HeaderMap,
) -> Result<([(HeaderName, &'static str); 1], String), Problem> {
    let as_openmetrics = wants_openmetrics(&headers);
    let kind = if as_openmetrics {
        OPENMETRICS
    } else {
        PLAIN_METRICS
    };
    let reader = admin.clone();
    let measure = move || reader.metrics(as_openmetrics, reader.clock.now());
    let measured = read(&admin.blocking_reads.metrics, METRICS_TIMEOUT, measure).await;
    let text = measured.ok_or_else(|| {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "the metrics could not be read within {} s; /readyz says what is wrong",
                METRICS_TIMEOUT.as_secs()
            ),
        )
    })?;
    Ok(([(CONTENT_TYPE, kind)], text))
}

/// Runs `work` on a blocking thread; `None` on timeout. The permit is released when `work` returns.
async fn read<T: Send + 'static>(
    kind: &Arc<Semaphore>,
    within: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    timeout(within, blocking::run(kind, work)).await.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e15_health_follows_the_worker_heartbeat() {
        let start = Instant::now();
        let worker_heartbeat = Heartbeat::new(start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(worker_heartbeat.stalled_for(after(29)), None);
        assert_eq!(
            worker_heartbeat.stalled_for(after(31)),
            Some(Duration::from_secs(31))
        );
        worker_heartbeat.beat(after(40));
        assert_eq!(worker_heartbeat.stalled_for(after(69)), None);
        assert_eq!(
            worker_heartbeat.stalled_for(after(75)),
            Some(Duration::from_secs(35))
        );
    }

    #[tokio::test]
    async fn e15_blocked_read_does_not_delay_the_response() {
        let kind = Arc::new(Semaphore::new(1));
        let (release, held) = std::sync::mpsc::channel::<()>();
        let stuck = read(&kind, Duration::from_millis(20), move || held.recv());
        assert!(stuck.await.is_none());
        // The stuck read still holds the permit, so a second read takes no further thread.
        let next = read(&kind, Duration::from_millis(20), || "read");
        assert_eq!(next.await, None);
        drop(release);
        let next = read(&kind, Duration::from_secs(60), || "read");
        assert_eq!(next.await, Some("read"));
    }
}
