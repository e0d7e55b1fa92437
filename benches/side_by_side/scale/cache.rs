//! A measured cache: ifnewer with a configuration, and the cost of one step.

use crate::Outcome;
use crate::client::reply;
use crate::connection::Endpoint;
use crate::program::Running;
use crate::servers::{announced, start_configured};
use std::path::Path;
use std::time::{Duration, Instant};

/// From this CPU time on, the kernel's ticks are exact enough. They include threads that ended.
const TICKS_SUFFICE_SECONDS: f64 = 0.5;
/// The program is idle if it uses less than `IDLE_CPU` within this time.
const IDLE_WINDOW: Duration = Duration::from_millis(100);
const IDLE_CPU: Duration = Duration::from_millis(1);
/// Setup and end of many connections.
pub(super) const RAMP: Duration = Duration::from_secs(1);
/// Scheduled work may keep it from being idle.
const SETTLE_MAX: Duration = Duration::from_secs(5);

pub(super) struct Cache {
    pub(super) endpoint: Endpoint,
    pub(super) admin: Endpoint,
    running: Running,
}

/// Cost of one step.
pub(super) struct Step {
    /// Position on the axis.
    pub(super) at: f64,
    pub(super) label: String,
    pub(super) count: f64,
    /// Per request, or whatever the axis counts.
    pub(super) cpu_micros: f64,
    pub(super) p99_ms: f64,
    pub(super) resident_mib: f64,
    pub(super) peak_mib: f64,
    pub(super) note: String,
}

/// What a step did.
pub(super) struct Work {
    pub(super) count: f64,
    pub(super) p99_ms: f64,
    pub(super) note: String,
}

impl Work {
    /// One latency in milliseconds for each request.
    pub(super) fn of(mut latencies: Vec<f64>) -> Self {
        Work {
            count: latencies.len() as f64,
            p99_ms: p99(&mut latencies),
            note: String::new(),
        }
    }
}

impl Step {
    fn announce(&self) {
        println!(
            "measured: {}: {:.1} CPU µs, p99 {:.2} ms",
            self.label, self.cpu_micros, self.p99_ms
        );
    }
}

impl Cache {
    /// Starts it with these sections of its configuration. Its data is in `folder`.
    pub(super) fn start(folder: &Path, sections: &str) -> Outcome<Self> {
        let (mut running, address) = start_configured(folder, sections)?;
        let admin = running.wait_until(folder, || announced(folder, "admin listening on "))?;
        Ok(Cache {
            endpoint: Endpoint::plain(address),
            admin: Endpoint::plain(admin),
            running,
        })
    }

    /// The cost of `work` at the position `at`.
    pub(super) fn measure(
        &self,
        at: f64,
        label: String,
        work: impl FnOnce() -> Outcome<Work>,
    ) -> Outcome<Step> {
        self.settle()?;
        self.running.reset_peak_memory()?;
        let (threads, ticks) = (self.running.thread_times()?, self.running.cpu_seconds()?);
        let work = work()?;
        self.settle()?;
        let ticks = self.running.cpu_seconds()? - ticks;
        let seconds = if ticks >= TICKS_SUFFICE_SECONDS {
            ticks
        } else {
            let after = self.running.thread_times()?;
            let ran = |(id, time): (&String, &u64)| time - threads.get(id).unwrap_or(&0);
            after.iter().map(ran).sum::<u64>() as f64 / 1e9
        };
        let step = Step {
            at,
            label,
            count: work.count,
            cpu_micros: seconds * 1e6 / work.count,
            p99_ms: work.p99_ms,
            resident_mib: self.running.resident_memory_mib()?,
            peak_mib: self.running.peak_memory_mib()?,
            note: work.note,
        };
        step.announce();
        Ok(step)
    }

    /// The same for `work` that needs time to begin and to end, `RAMP` each: the cost within `window` between them. The
    /// requests are those that the program has counted.
    pub(super) fn measure_within(
        &self,
        at: f64,
        label: String,
        window: Duration,
        work: impl FnOnce() -> Outcome<Work> + Send,
    ) -> Outcome<Step> {
        self.settle()?;
        self.running.reset_peak_memory()?;
        std::thread::scope(|scope| {
            let working = scope.spawn(work);
            std::thread::sleep(RAMP);
            let (requests, cpu) = (self.requests()?, self.cpu_seconds()?);
            std::thread::sleep(window);
            let (requests, cpu) = (self.requests()? - requests, self.cpu_seconds()? - cpu);
            let resident_mib = self.running.resident_memory_mib()?;
            let work = working.join().map_err(|_| "a client panicked")??;
            let step = Step {
                at,
                label,
                count: requests,
                cpu_micros: cpu * 1e6 / requests,
                p99_ms: work.p99_ms,
                resident_mib,
                peak_mib: self.running.peak_memory_mib()?,
                note: work.note,
            };
            step.announce();
            Ok(step)
        })
    }

    /// Number of requests so far, as its metrics count them.
    fn requests(&self) -> Outcome<f64> {
        let metrics = reply(&self.admin, "/metrics")?;
        if metrics.status != 200 {
            return Err(format!("/metrics: {}", metrics.status).into());
        }
        let metrics = String::from_utf8(metrics.body)?;
        let counters = metrics
            .lines()
            .filter(|line| line.starts_with("ifnewer_requests_total"))
            .filter_map(|line| line.rsplit_once(' '));
        let counts: Vec<f64> = counters
            .map(|(_, count)| count.parse())
            .collect::<Result<_, _>>()?;
        Ok(counts.iter().sum())
    }

    /// CPU time since its start.
    pub(super) fn cpu_seconds(&self) -> Outcome<f64> {
        Ok(self.running.thread_times()?.values().sum::<u64>() as f64 / 1e9)
    }

    pub(super) fn resident_mib(&self) -> Outcome<f64> {
        self.running.resident_memory_mib()
    }

    pub(super) fn peak_mib(&self) -> Outcome<f64> {
        self.running.peak_memory_mib()
    }

    /// Waits until it is idle.
    pub(super) fn settle(&self) -> Outcome<()> {
        let began = Instant::now();
        let mut before = self.cpu_seconds()?;
        while began.elapsed() < SETTLE_MAX {
            std::thread::sleep(IDLE_WINDOW);
            let now = self.cpu_seconds()?;
            if now - before < IDLE_CPU.as_secs_f64() {
                break;
            }
            before = now;
        }
        Ok(())
    }
}

/// The 99th percentile; of fewer than a hundred, the largest.
pub(super) fn p99(latencies: &mut [f64]) -> f64 {
    latencies.sort_by(f64::total_cmp);
    let above = latencies.len() / 100;
    latencies.iter().rev().nth(above).copied().unwrap_or(f64::NAN)
}

/// A duration in milliseconds.
pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
