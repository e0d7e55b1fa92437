//! Errors of the disk: counted by operation, whatever the caller makes of them, and logged at a bounded rate.
//!
//! A caller that cannot read takes what it wanted for not cached and goes on. Counted below all callers, a failing disk
//! still does not look like an empty cache.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

/// A failing disk fails every read; one line in this time says so.
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
    /// How many lines were skipped since the last one, if another may be written now.
    pub fn admits(&self) -> Option<u64> {
        let now = Instant::now();
        let admitted = self.0.last.try_lock().is_ok_and(|mut last| {
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

/// An operation on the file system, as the metric names it.
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

/// The errors since the start. Clones count into the same.
#[derive(Clone, Default)]
pub(in crate::store) struct DiskErrors(Arc<Counted>);

#[derive(Default)]
struct Counted {
    by_operation: [AtomicU64; IoOperation::ALL.len()],
    logged: LogLimit,
}

impl DiskErrors {
    /// Counts `error`, if it is one of the disk and no ordinary result such as "there is no such file".
    pub(in crate::store) fn note(&self, operation: IoOperation, path: &Path, error: &io::Error) {
        if is_ordinary(error) {
            return;
        }
        if let Some(count) = self.0.by_operation.get(operation as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        // A refused write is logged by whoever tried it, and as the trouble of the disk that it is.
        if operation.is_reading()
            && let Some(skipped) = self.0.logged.admits()
        {
            let op = operation.name();
            tracing::error!(op, path = %path.display(), %error, skipped,
                "the store cannot be read; what is not readable is fetched again (see the kernel's log)");
        }
    }

    /// How many there were, by operation.
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
    fn e16_a_missing_file_is_no_error_of_the_disk() {
        let errors = DiskErrors::default();
        let note = |kind: io::ErrorKind| errors.note(IoOperation::Open, Path::new("x"), &kind.into());
        note(io::ErrorKind::NotFound);
        assert!(errors.totals().iter().all(|(_, count)| *count == 0));
        note(io::ErrorKind::PermissionDenied);
        note(io::ErrorKind::IsADirectory);
        assert!(errors.totals().contains(&("open", 2)));
    }

    #[tokio::test(start_paused = true)]
    async fn e16_log_lines_are_limited_and_skipped_ones_counted() {
        let limit = LogLimit::default();
        assert_eq!(limit.admits(), Some(0));
        assert_eq!((limit.admits(), limit.admits()), (None, None));
        tokio::time::advance(LOG_EVERY).await;
        assert_eq!(limit.admits(), Some(2));
    }
}
