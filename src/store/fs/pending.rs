//! Pending file-system operations. A disk that hangs returns no error, so only a pending operation reveals it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// An operation that takes longer is reported as a health issue.
const SLOW_AFTER: Duration = Duration::from_secs(3);

/// The pending operations. Cheap to clone.
#[derive(Clone, Default)]
pub(in crate::store) struct PendingIo(Arc<Mutex<PendingOperations>>);

#[derive(Default)]
struct PendingOperations {
    next: u64,
    /// Ordered by start.
    operations: BTreeMap<u64, (&'static str, Instant)>,
}

impl PendingIo {
    pub(super) fn run<T>(&self, operation: &'static str, work: impl FnOnce() -> T) -> T {
        let mut begun = self.0.lock();
        let id = begun.next;
        begun.next += 1;
        begun.operations.insert(id, (operation, Instant::now()));
        drop(begun);
        let _ended = PendingGuard { pending: self, id };
        work()
    }

    /// The oldest pending operation and its duration, if it is slow.
    pub(in crate::store) fn slow(&self, now: Instant) -> Option<(&'static str, Duration)> {
        let begun = self.0.lock();
        let (_, (operation, since)) = begun.operations.first_key_value()?;
        let took = now.saturating_duration_since(*since);
        (took >= SLOW_AFTER).then_some((operation, took))
    }
}

struct PendingGuard<'a> {
    pending: &'a PendingIo,
    id: u64,
}

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        self.pending.0.lock().operations.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e15_pending_io_reports_the_slowest_operation() {
        let (pending, start) = (PendingIo::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let seen = pending.run("open", || {
            pending.run("read", || pending.slow(after(3_600)));
            (pending.slow(start), pending.slow(after(3_600)))
        });
        let (at_once, later) = seen;
        assert_eq!(at_once, None);
        assert!(matches!(later, Some(("open", took)) if took > Duration::from_secs(3_000)));
        assert_eq!(pending.slow(after(3_600)), None, "it has ended");
    }
}
