//! Status endpoint: health, counters and downloads.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::Admin;
use super::format::{duration, rfc3339};
use super::refreshes::RefreshesStatus;
use crate::server::ServingState;
use crate::store::AsyncStore;
use crate::telemetry::Totals;

/// Status of the cache.
#[derive(Serialize)]
pub(super) struct Status {
    pub(super) version: &'static str,
    pub(super) now: String,
    pub(super) started_at: String,
    pub(super) uptime_seconds: u64,
    /// Whether there are no problems.
    pub(super) healthy: bool,
    /// Summary in one sentence.
    pub(super) summary: String,
    /// Problems, one sentence each.
    pub(super) problems: Vec<String>,
    pub(super) offline: bool,
    pub(super) store: StoreStatus,
    pub(super) since_start: Counters,
    pub(super) last_day: Counters,
    /// The upstream rate limit closest to exhaustion.
    pub(super) quota: Option<Quota>,
    pub(super) transfers: usize,
    /// Scheduled refreshes.
    pub(super) refreshes: RefreshesStatus,
}

#[derive(Serialize)]
pub(super) struct StoreStatus {
    /// Problems of the store.
    pub(super) problems: Vec<String>,
    pub(super) bytes: u64,
    pub(super) blobs: u64,
    pub(super) blob_bytes: u64,
    pub(super) manifests: u64,
    pub(super) manifest_bytes: u64,
    pub(super) tags: u64,
    /// Whether the initial count of the store is complete.
    pub(super) is_counted: bool,
    /// `store.size`.
    pub(super) size: u64,
    /// `store.free`.
    pub(super) free: u64,
    pub(super) disk_free_bytes: Option<u64>,
    pub(super) pins: usize,
    /// Since the start of the process.
    pub(super) scrubbed: Scrubbed,
    pub(super) evicted: Evicted,
}

/// Objects re-read to detect disk corruption.
#[derive(Serialize)]
pub(super) struct Scrubbed {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    pub(super) damaged: u64,
}

#[derive(Serialize)]
pub(super) struct Evicted {
    pub(super) for_size: u64,
    pub(super) for_free: u64,
    pub(super) tags: u64,
    pub(super) bytes: u64,
    /// Blobs that were forwarded without storing, because the quota had no space for them.
    pub(super) over_quota: u64,
}

impl StoreStatus {
    fn of(store: &AsyncStore) -> Self {
        let (usage, limits, evicted) = (store.usage(), store.limits(), store.evictions());
        let scrubbed = store.scrubbed();
        Self {
            problems: store.health_issues().iter().map(ToString::to_string).collect(),
            bytes: usage.blob_bytes + usage.manifest_bytes,
            blobs: usage.blobs,
            blob_bytes: usage.blob_bytes,
            manifests: usage.manifests,
            manifest_bytes: usage.manifest_bytes,
            tags: usage.tags,
            is_counted: usage.is_complete,
            size: limits.bytes_max,
            free: limits.free_bytes_min,
            disk_free_bytes: store.free_bytes(),
            pins: store.pins_count(),
            scrubbed: Scrubbed {
                objects: scrubbed.objects,
                bytes: scrubbed.bytes,
                damaged: scrubbed.damaged,
            },
            evicted: Evicted {
                for_size: evicted.for_size,
                for_free: evicted.for_free,
                tags: evicted.tags,
                bytes: evicted.bytes,
                over_quota: evicted.refused,
            },
        }
    }
}

#[derive(Serialize)]
pub(super) struct Counters {
    pub(super) pulls: u64,
    pub(super) hits: u64,
    pub(super) served_stale: u64,
    pub(super) denied: u64,
    pub(super) sent_bytes: u64,
    pub(super) fetched_bytes: u64,
    pub(super) saved_bytes: u64,
    pub(super) byte_hit_ratio: Option<f64>,
}

#[derive(Serialize)]
pub(super) struct Quota {
    pub(super) upstream: String,
    pub(super) credential: String,
    pub(super) remaining: u64,
    pub(super) limit: Option<u64>,
    pub(super) window_seconds: Option<u64>,
    pub(super) seconds_ago: u64,
}

impl Counters {
    pub(super) fn of(totals: &Totals) -> Self {
        Self {
            pulls: totals.pulls,
            hits: totals.hits,
            served_stale: totals.stale,
            denied: totals.refused,
            sent_bytes: totals.sent_bytes,
            fetched_bytes: totals.fetched_bytes,
            saved_bytes: totals.saved_bytes(),
            byte_hit_ratio: totals.byte_hit_ratio(),
        }
    }
}

impl Admin {
    pub(super) fn status(&self, now: SystemTime) -> Status {
        let registry = self.registry.load();
        let store = registry.proxy.store();
        let fetched = registry.proxy.downloads().fetched_bytes();
        let day = self.telemetry.history(now, 1, 24 * 60, fetched);
        let problems = self.problems();
        let offline = self.offline.is_on();
        let uptime = now.duration_since(self.started_at).unwrap_or_default();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            now: rfc3339(now),
            started_at: rfc3339(self.started_at),
            uptime_seconds: uptime.as_secs(),
            healthy: problems.is_empty(),
            summary: summary(offline, &problems),
            problems,
            offline,
            store: StoreStatus::of(store),
            since_start: Counters::of(&self.telemetry.totals(fetched)),
            last_day: Counters::of(&day.first().copied().unwrap_or_default()),
            quota: self.quota(),
            transfers: registry.proxy.downloads().count(),
            refreshes: RefreshesStatus::of(&registry.proxy, now),
        }
    }

    /// Current problems, most severe first.
    pub(super) fn problems(&self) -> Vec<String> {
        let registry = self.registry.load();
        let mut problems = Vec::new();
        if self.offline.is_on() {
            problems.push("Offline mode is on: no upstream requests are sent".to_owned());
        }
        for upstream_registry in registry.router.all() {
            if let Some(open) = upstream_registry.upstream().status().open {
                let (cause, scope) = (open.cause, open.scope);
                let words = duration(open.open.unwrap_or_default());
                problems.push(format!(
                    "{} {cause} (circuit breaker: {scope}), for {words}; serving cached images",
                    upstream_registry.name()
                ));
            }
        }
        for issue in registry.proxy.store().health_issues() {
            problems.push(format!("degraded: {issue}"));
        }
        if let Some(quota) = self.quota().filter(|quota| quota.remaining == 0) {
            problems.push(format!(
                "the rate limit of {} for {} is exhausted",
                quota.upstream, quota.credential
            ));
        }
        problems
    }

    fn quota(&self) -> Option<Quota> {
        let registry = self.registry.load();
        let upstream_registries = registry.router.all().iter();
        let quotas = upstream_registries.flat_map(|upstream_registry| {
            let upstream = upstream_registry.name().to_owned();
            let quotas = upstream_registry.upstream().status().quotas;
            quotas.into_iter().filter_map(move |quota| {
                Some(Quota {
                    upstream: upstream.clone(),
                    credential: quota.owner.to_string(),
                    remaining: quota.limit.remaining?,
                    limit: quota.limit.limit,
                    window_seconds: quota.limit.window_s,
                    seconds_ago: quota.ago.as_secs(),
                })
            })
        });
        // A limit is outdated once its window has passed.
        let counts = |quota: &Quota| {
            quota
                .window_seconds
                .is_none_or(|window| quota.seconds_ago < window)
        };
        quotas.filter(counts).min_by_key(|quota| quota.remaining)
    }
}

fn summary(offline: bool, problems: &[String]) -> String {
    match (offline, problems.first()) {
        (_, None) => "Healthy: all requested upstreams respond".to_owned(),
        (true, Some(_)) => "Offline: serving cached images, no upstream requests".to_owned(),
        (false, Some(only)) if problems.len() == 1 => only.clone(),
        (false, Some(_)) => format!("{} problems; serving cached images", problems.len()),
    }
}

/// Plot resolution of one hour: number of intervals, and minutes of each.
pub(super) const HOUR: (u64, u64) = (60, 1);
/// Plot resolution of one day.
pub(super) const DAY: (u64, u64) = (96, 15);

/// One interval of a plot.
#[derive(Serialize)]
pub(super) struct Point {
    pub(super) until: String,
    #[serde(flatten)]
    pub(super) counted: Counters,
}

impl Admin {
    /// Counters per interval, oldest first.
    pub(super) fn series(&self, (count, minutes): (u64, u64), now: SystemTime) -> Vec<Point> {
        let registry = self.registry.load();
        let fetched = registry.proxy.downloads().fetched_bytes();
        let spans = self.telemetry.history(now, count, minutes, fetched);
        let length = Duration::from_secs(60 * minutes);
        let last = u32::try_from(spans.len()).unwrap_or(u32::MAX).saturating_sub(1);
        let ends = (0..=last)
            .rev()
            .map(|back| now.checked_sub(length * back).unwrap_or(now));
        let points = ends.zip(&spans);
        points
            .map(|(until, totals)| Point {
                until: rfc3339(until),
                counted: Counters::of(totals),
            })
            .collect()
    }
}

/// A running download.
#[derive(Serialize)]
pub(super) struct TransferView {
    pub(super) digest: String,
    pub(super) size: Option<u64>,
    pub(super) received: u64,
    /// Average since the start.
    pub(super) bytes_per_second: u64,
    pub(super) seconds: f64,
    /// Current readers.
    pub(super) readers: usize,
    /// Whether it waits in the download queue.
    pub(super) queued: bool,
}

/// Running downloads, longest running first.
pub(super) fn transfers(registry: &ServingState) -> Vec<TransferView> {
    let transfers = registry.proxy.downloads().statuses();
    transfers
        .into_iter()
        .map(|transfer| {
            let ms = u64::try_from(transfer.elapsed.as_millis())
                .unwrap_or(u64::MAX)
                .max(1);
            TransferView {
                digest: transfer.digest.to_string(),
                size: transfer.size,
                received: transfer.received,
                bytes_per_second: transfer.received.saturating_mul(1_000) / ms,
                seconds: transfer.elapsed.as_secs_f64(),
                readers: transfer.readers,
                queued: transfer.is_queued,
            }
        })
        .collect()
}
