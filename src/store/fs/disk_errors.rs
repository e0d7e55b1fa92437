//! Disk error counters by operation, and a rate limit for their log lines.
//!
//! A caller that cannot read treats the content as not cached and goes on. Errors are counted below all callers, so
//! that a failing disk does not look like an empty cache.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Minimum time between two log lines: a failing disk fails every read.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Limits a kind of log line to one in ten seconds. Clones share the limit.
#[derive(Clone, Default)]
pub struct LogLimit(Arc<Limited>);

#[derive(Default)]
struct Limited {
    last: Mutex<Option<Instant>>,
    skipped: AtomicU64,
}

impl LogLimit {
    /// If a line may be logged now, the number of lines skipped since the last one.
    pub fn admits(&self) -> Option<u64> {
        let now = Instant::now();
        let admitted = self.0.last.try_lock().is_some_and(|mut last| {
            let is_due = last.is_none_or(|at| now.duration_since(at) >= LOG_EVERY);
            if is_due {
                *last = Some(now);
            }
            is_due
        });
        if admitted {
            Some(self.0.skipped.swap(0, Ordering::Relaxed))
        } else {
            self.0.skipped.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

/// A file-system operation, with its name in the metric.
#[derive(Clone, Copy)]
pub(in crate::store) enum IoOperation {
    Open,
    Read,
    List,
    Write,
    Sync,
    Rename,
    Remove,
}

impl IoOperation {
    const ALL: [Self; 7] = [
        Self::Open,
        Self::Read,
        Self::List,
        Self::Write,
        Self::Sync,
        Self::Rename,
        Self::Remove,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::List => "list",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Rename => "rename",
            Self::Remove => "remove",
        }
    }

    fn is_reading(self) -> bool {
        matches!(self, Self::Open | Self::Read | Self::List)
    }
}

/// Errors since the start. Clones share the counters.
#[derive(Clone, Default)]
pub(in crate::store) struct DiskErrors(Arc<Counted>);

#[derive(Default)]
struct Counted {
    by_operation: [AtomicU64; IoOperation::ALL.len()],
    logged: LogLimit,
}

impl DiskErrors {
    /// Counts `error`, unless it is an ordinary result such as "not found".
    pub(in crate::store) fn note(&self, operation: IoOperation, path: &Path, error: &io::Error) {
        if is_ordinary(error) {
            return;
        }
        if let Some(count) = self.0.by_operation.get(operation as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        // A failed write is logged by its caller and reported as a health issue.
        if operation.is_reading()
            && let Some(skipped) = self.0.logged.admits()
        {
            let op = operation.name();
            tracing::error!(op, path = %path.display(), %error, skipped,
                "store read failed, content will be fetched again (see the kernel's log)");
        }
    }

    /// Number of errors, by operation.
    pub(in crate::store) fn totals(&self) -> Vec<(&'static str, u64)> {
        let counts = IoOperation::ALL.iter().zip(&self.0.by_operation);
        counts
            .map(|(operation, count)| (operation.name(), count.load(Ordering::Relaxed)))
            .collect()
    }
}

fn is_ordinary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::Interrupted
            | io::ErrorKind::Unsupported
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn e16_missing_file_is_not_a_disk_error() {
        let errors = DiskErrors::default();
        let note = |kind: io::ErrorKind| errors.note(IoOperation::Open, Path::new("x"), &kind.into());
        note(io::ErrorKind::NotFound);
        assert!(errors.totals().iter().all(|(_, count)| *count == 0));
        note(io::ErrorKind::PermissionDenied);
        note(io::ErrorKind::IsADirectory);
        assert!(errors.totals().contains(&("open", 2)));
    }

    #[tokio::test(start_paused = true)]
    async fn e16_log_lines_are_rate_limited_and_skips_counted() {
        let limit = LogLimit::default();
        assert_eq!(limit.admits(), Some(0));
        assert_eq!((limit.admits(), limit.admits()), (None, None));
        tokio::time::advance(LOG_EVERY).await;
        assert_eq!(limit.admits(), Some(2));
    }
}
