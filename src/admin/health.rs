//! Health and metrics endpoints, served independently of the main runtime.
//!
//! They run on the admin listener's own thread. State of other subsystems is read on a blocking thread with a timeout,
//! one read of each kind at a time. A lock that is never released therefore delays the details, not the response. No
//! disk is accessed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::request::Parts;
use http::{Method, StatusCode};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use super::response::{ApiResponse, Problem, full};
use super::{Admin, metrics};

/// Interval of the worker heartbeat.
const BEAT_EVERY: Duration = Duration::from_secs(1);

/// Heartbeat timeout after which the workers count as stalled. Longer than a busy machine delays a task.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Timeouts for reading problems and metrics; Prometheus waits for 10 s.
const PROBLEMS_TIMEOUT: Duration = Duration::from_secs(1);
const METRICS_TIMEOUT: Duration = Duration::from_secs(5);

const PLAIN: &str = "text/plain; charset=utf-8";

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

/// An endpoint served on the admin thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HealthEndpoint {
    /// `/healthz`
    Alive,
    /// `/readyz`
    Ready,
    /// `/metrics`
    Metrics { as_openmetrics: bool },
}

impl HealthEndpoint {
    pub(super) fn of(head: &Parts) -> Option<Self> {
        if !matches!(head.method, Method::GET | Method::HEAD) {
            return None;
        }
        match head.uri.path() {
            "/healthz" => Some(Self::Alive),
            "/readyz" => Some(Self::Ready),
            "/metrics" => Some(Self::Metrics {
                as_openmetrics: metrics::wants_openmetrics(head),
            }),
            _ => None,
        }
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

    /// Serves a health endpoint.
    pub(super) async fn health(&self, endpoint: HealthEndpoint) -> Result<ApiResponse, Problem> {
        match endpoint {
            HealthEndpoint::Alive => self.alive().map(|()| full(StatusCode::OK, PLAIN, "ok\n")),
            HealthEndpoint::Ready => self.ready().await,
            HealthEndpoint::Metrics { as_openmetrics } => self.metrics_response(as_openmetrics).await,
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

    /// Ready while requests are served. An unavailable upstream, a slow disk or a broken index degrades the cache but
    /// does not make it unready.
    async fn ready(&self) -> Result<ApiResponse, Problem> {
        self.alive()?;
        let admin = self.clone();
        let problems = read(&self.blocking_reads.problems, PROBLEMS_TIMEOUT, move || {
            admin.problems()
        })
        .await;
        let problems = problems
            .unwrap_or_else(|| vec!["degraded: problems could not be read within a second".to_owned()]);
        let mut lines = vec!["ready".to_owned()];
        lines.extend(problems);
        lines.push(String::new());
        Ok(full(StatusCode::OK, PLAIN, lines.join("\n")))
    }

    async fn metrics_response(&self, as_openmetrics: bool) -> Result<ApiResponse, Problem> {
        let admin = self.clone();
        let metrics = move || admin.metrics(as_openmetrics, admin.clock.now());
        let measured = read(&self.blocking_reads.metrics, METRICS_TIMEOUT, metrics).await;
        measured.ok_or_else(|| {
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!(
                    "the metrics could not be read within {} s; /readyz says what is wrong",
                    METRICS_TIMEOUT.as_secs()
                ),
            )
        })
    }
}

/// Runs `work` on a blocking thread; `None` on timeout. The permit is released when `work` returns.
async fn read<T: Send + 'static>(
    kind: &Arc<Semaphore>,
    within: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let reading = async {
        let permit = Arc::clone(kind).acquire_owned().await.ok()?;
        let done = spawn_blocking(move || {
            let done = work();
            drop(permit);
            done
        });
        done.await.ok()
    };
    timeout(within, reading).await.ok().flatten()
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
