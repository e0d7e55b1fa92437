//! Metrics of the shared storage.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    op: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    op: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RecordLabels {
    class: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BucketLabels {
    bucket: Arc<str>,
}

fn latency() -> Histogram {
    Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0])
}

/// Reads and writes of the bucket since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedCounts {
    /// Objects that the bucket had.
    pub objects_read: u64,
    /// Bytes of objects that were received.
    pub received_bytes: u64,
    /// Objects that were uploaded.
    pub objects_uploaded: u64,
    /// Bytes of objects that were sent.
    pub sent_bytes: u64,
    /// Uploads that failed, or were dropped because the queue was full.
    pub uploads_lost: u64,
    /// Uploads that are queued or running now.
    pub uploads_waiting: u64,
    /// Objects that did not match their digest.
    pub wrong_objects: u64,
}

/// Metrics of the shared storage.
pub struct SharedMetrics {
    requests: Family<RequestLabels, Counter>,
    seconds: Family<OperationLabels, Histogram, fn() -> Histogram>,
    bytes: Family<DirectionLabels, Counter>,
    uploads: Family<ResultLabels, Counter>,
    uploads_waiting: Gauge<u64, AtomicU64>,
    records: Family<RecordLabels, Counter>,
    revocations_waiting: Gauge<u64, AtomicU64>,
    revocations_unlisted: Family<ReasonLabels, Counter>,
    wrong: Counter,
    redirects: Counter,
    up: Family<BucketLabels, Gauge<u64, AtomicU64>>,
    conditional: Family<BucketLabels, Gauge<u64, AtomicU64>>,
    claims: Family<ResultLabels, Counter>,
    follow_wait: Histogram,
}

/// Reasons why the list of denials on the disk lacks one.
const UNLISTED_REASONS: [&str; 3] = ["full", "full-unknown", "disk"];

/// Counters that begin at 0, so that an alert sees the first increase.
fn from_zero(reasons: &[&'static str]) -> Family<ReasonLabels, Counter> {
    let counters = Family::<ReasonLabels, Counter>::default();
    for reason in reasons {
        drop(counters.get_or_create(&ReasonLabels { reason }));
    }
    counters
}

impl Default for SharedMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(latency),
            bytes: Family::default(),
            uploads: Family::default(),
            uploads_waiting: Gauge::default(),
            records: Family::default(),
            revocations_waiting: Gauge::default(),
            revocations_unlisted: from_zero(&UNLISTED_REASONS),
            wrong: Counter::default(),
            redirects: Counter::default(),
            up: Family::default(),
            conditional: Family::default(),
            claims: Family::default(),
            follow_wait: latency(),
        }
    }
}

impl SharedMetrics {
    /// Counts a request to the bucket. `took`: the time up to its first byte, if it was sent.
    pub fn record_request(&self, op: &'static str, result: &'static str, took: Option<Duration>) {
        self.requests.get_or_create(&RequestLabels { op, result }).inc();
        if let Some(took) = took {
            let seconds = self.seconds.get_or_create(&OperationLabels { op });
            seconds.observe(took.as_secs_f64());
        }
    }

    /// Counts bytes of objects: `received` or `sent`.
    pub fn add_bytes(&self, direction: &'static str, bytes: u64) {
        let counter = self.bytes.get_or_create(&DirectionLabels { direction });
        counter.inc_by(bytes);
    }

    /// Counts an upload by its result.
    pub fn record_upload(&self, result: &'static str) {
        self.uploads.get_or_create(&ResultLabels { result }).inc();
    }

    /// Counts a claim by its result.
    pub fn record_claim(&self, result: &'static str) {
        self.claims.get_or_create(&ResultLabels { result }).inc();
    }

    /// Records how long a follower of a claim waited for its first byte.
    pub fn record_follow_wait(&self, waited: Duration) {
        self.follow_wait.observe(waited.as_secs_f64());
    }

    /// Sets the number of uploads that are queued or running.
    pub fn set_uploads_waiting(&self, uploads: u64) {
        self.uploads_waiting.set(uploads);
    }

    /// Counts a read or an update of a record by its result.
    pub fn record_record(&self, class: &'static str, result: &'static str) {
        self.records.get_or_create(&RecordLabels { class, result }).inc();
    }

    /// Sets the number of denials that the bucket does not have yet.
    pub fn set_revocations_waiting(&self, denials: u64) {
        self.revocations_waiting.set(denials);
    }

    /// Counts a denial that waits in memory only, by the reason why the list on the disk lacks it.
    pub fn record_unlisted_revocation(&self, reason: &'static str) {
        self.revocations_unlisted
            .get_or_create(&ReasonLabels { reason })
            .inc();
    }

    /// Counts an object with wrong bytes.
    pub fn record_wrong(&self) {
        self.wrong.inc();
    }

    /// Counts a redirect of a client to an object.
    pub fn record_redirect(&self) {
        self.redirects.inc();
    }

    /// Sets whether the bucket can be read.
    pub fn set_up(&self, bucket: &Arc<str>, is_up: bool) {
        let labels = BucketLabels {
            bucket: Arc::clone(bucket),
        };
        self.up.get_or_create(&labels).set(u64::from(is_up));
    }

    /// Sets whether the storage keeps conditions of simultaneous writes.
    pub fn set_conditions(&self, bucket: &Arc<str>, are_kept: bool) {
        let labels = BucketLabels {
            bucket: Arc::clone(bucket),
        };
        self.conditional.get_or_create(&labels).set(u64::from(are_kept));
    }

    /// There is no bucket any more, or another.
    pub fn clear_up(&self) {
        self.up.clear();
        self.conditional.clear();
    }

    /// Counts since the start, for the operator.
    pub fn counts(&self) -> SharedCounts {
        let upload = |result| self.uploads.get_or_create(&ResultLabels { result }).get();
        let bytes = |direction| self.bytes.get_or_create(&DirectionLabels { direction }).get();
        let found = RequestLabels {
            op: "get",
            result: "ok",
        };
        SharedCounts {
            objects_read: self.requests.get_or_create(&found).get(),
            received_bytes: bytes("received"),
            objects_uploaded: upload("done"),
            sent_bytes: bytes("sent"),
            uploads_lost: upload("failed") + upload("dropped"),
            uploads_waiting: self.uploads_waiting.get(),
            wrong_objects: self.wrong.get(),
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "shared_requests",
            "Requests to the bucket of the shared storage, by operation and result",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "shared_request_duration",
            "Time of a request to the bucket, up to its first byte",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register_with_unit(
            "shared_object",
            "Bytes of objects received from and sent to the bucket",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register(
            "shared_uploads",
            "Uploads to the bucket, by result. Dropped: the queue was full",
            self.uploads.clone(),
        );
        registry.register(
            "shared_uploads_waiting",
            "Uploads to the bucket that are queued or running",
            self.uploads_waiting.clone(),
        );
        registry.register(
            "shared_claims",
            "Claims of blobs and manifests in the bucket, by result",
            self.claims.clone(),
        );
        registry.register_with_unit(
            "shared_follow_wait",
            "Time that a follower of another cache's claim waited for its first byte",
            Unit::Seconds,
            self.follow_wait.clone(),
        );
        registry.register(
            "shared_records",
            "Reads and updates of records in the bucket, by class and result",
            self.records.clone(),
        );
        registry.register(
            "shared_revocations_waiting",
            "Denials by an upstream that the bucket does not have yet. Other caches may honour what they end, in an outage",
            self.revocations_waiting.clone(),
        );
        registry.register(
            "shared_revocations_unlisted",
            "Denials that wait for the bucket in memory only and are lost at a restart, by reason",
            self.revocations_unlisted.clone(),
        );
        registry.register(
            "shared_wrong_objects",
            "Objects of the bucket that did not match their digest",
            self.wrong.clone(),
        );
        registry.register(
            "shared_redirects",
            "Clients that were redirected to an object of the bucket",
            self.redirects.clone(),
        );
        registry.register(
            "shared_up",
            "1 if the bucket can be read, 0 while its circuit breaker is open; absent without a bucket",
            self.up.clone(),
        );
        registry.register(
            "shared_conditional",
            "1 if the storage lets one of simultaneous conditional writes win, 0 if not; absent before the first upload",
            self.conditional.clone(),
        );
    }
}
