//! Status endpoint: health, counters and downloads.

use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Admin;
use super::extract::Params;
use super::format::{duration, rfc3339};
use super::refreshes::RefreshesStatus;
use super::response::Problem;
use crate::store::AsyncStore;
use crate::telemetry::Totals;

/// Age of a denial that the shared storage lacks, from which on it is a problem.
const REVOCATION_WAIT_MAX: Duration = Duration::from_secs(30);

/// Status of the cache.
#[derive(Serialize, ToSchema)]
pub(super) struct Status {
    pub(super) version: &'static str,
    #[schema(format = DateTime)]
    pub(super) now: String,
    #[schema(format = DateTime)]
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

#[derive(Serialize, ToSchema)]
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
    /// Maximum size of the cache: `store.size`.
    pub(super) size: u64,
    /// Free disk space that the cache leaves: `store.free`.
    pub(super) free: u64,
    /// Free space of the disk.
    pub(super) disk_free_bytes: Option<u64>,
    pub(super) pins: usize,
    /// Since the start of the process.
    pub(super) scrubbed: Scrubbed,
    pub(super) evicted: Evicted,
}

/// Objects re-read to detect disk corruption.
#[derive(Serialize, ToSchema)]
pub(super) struct Scrubbed {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    pub(super) damaged: u64,
}

#[derive(Serialize, ToSchema)]
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

#[derive(Serialize, ToSchema)]
pub(super) struct Counters {
    /// Manifest requests with a response.
    pub(super) pulls: u64,
    /// Pulls served from the store.
    pub(super) hits: u64,
    /// Pulls served stale from the store while the upstream was unavailable.
    pub(super) served_stale: u64,
    pub(super) denied: u64,
    /// Bytes of blobs sent to clients.
    pub(super) sent_bytes: u64,
    /// Bytes of blobs fetched from upstreams.
    pub(super) fetched_bytes: u64,
    pub(super) saved_bytes: u64,
    /// Fraction of the sent bytes that were not fetched from an upstream. Null if no bytes were sent.
    pub(super) byte_hit_ratio: Option<f64>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Quota {
    pub(super) upstream: String,
    /// anonymous, cache (the configured credential), or a client's id, which is valid only in this process.
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
        problems.extend(self.shared_storage_problems());
        if let Some(quota) = self.quota().filter(|quota| quota.remaining == 0) {
            problems.push(format!(
                "the rate limit of {} for {} is exhausted",
                quota.upstream, quota.credential
            ));
        }
        problems
    }

    fn shared_storage_problems(&self) -> Vec<String> {
        let Some(shared) = self.registry.load().proxy.shared().status() else {
            return Vec::new();
        };
        let name = &shared.name;
        let reads = shared.reads_stopped.map(|(since, failure)| {
            let since = duration(since);
            format!("degraded: shared storage {name} cannot be read, for {since}: {failure}")
        });
        let writes = shared.writes_stopped.map(|(since, failure)| {
            let since = duration(since);
            format!("degraded: shared storage {name} accepts no uploads, for {since}: {failure}")
        });
        let denials = shared
            .revocations_waiting
            .filter(|(_, since)| *since >= REVOCATION_WAIT_MAX);
        let denials = denials.map(|(count, since)| {
            let since = duration(since);
            format!(
                "degraded: {count} denials wait for shared storage {name}, for {since}; other caches may not know of them"
            )
        });
        reads.into_iter().chain(writes).chain(denials).collect()
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

/// Health, counters and store usage.
#[utoipa::path(get, path = "/api/v1/status", responses((status = 200, body = Status)))]
pub(super) async fn status(State(admin): State<Admin>) -> Json<Status> {
    Json(admin.status(admin.clock.now()))
}

/// Plot resolution of one hour: number of intervals, and minutes of each.
pub(super) const HOUR: (u64, u64) = (60, 1);
/// Plot resolution of one day.
pub(super) const DAY: (u64, u64) = (96, 15);

/// One interval of a plot.
#[derive(Serialize, ToSchema)]
pub(super) struct Point {
    #[schema(format = DateTime)]
    pub(super) until: String,
    #[serde(flatten)]
    pub(super) counted: Counters,
}

/// Counters per interval.
#[derive(Serialize, ToSchema)]
pub(super) struct Series {
    /// Length of an interval.
    minutes: u64,
    points: Vec<Point>,
}

#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct SeriesQuery {
    /// hour (60 intervals of 1 minute) or day (96 intervals of 15 minutes).
    #[param(inline)]
    span: Span,
}

#[derive(Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(try_from = "String")]
#[schema(rename_all = "lowercase")]
enum Span {
    #[default]
    Hour,
    Day,
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match &*text {
            "hour" => Ok(Self::Hour),
            "day" => Ok(Self::Day),
            other => Err(format!("is hour or day, not `{other}`")),
        }
    }
}

/// Counters per interval, oldest first.
#[utoipa::path(get, path = "/api/v1/series", params(SeriesQuery), responses((status = 200, body = Series)))]
pub(super) async fn series(
    State(admin): State<Admin>,
    Params(query): Params<SeriesQuery>,
) -> Result<Json<Series>, Problem> {
    let span = match query.span {
        Span::Hour => HOUR,
        Span::Day => DAY,
    };
    Ok(Json(Series {
        minutes: span.1,
        points: admin.series(span, admin.clock.now()),
    }))
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
