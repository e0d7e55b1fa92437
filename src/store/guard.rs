//! The guard that keeps the disk off the async workers.

/// Off until the download queue looks blobs up outside of its lock.
const IS_ON: bool = false;

/// Panics, in debug builds, on a thread that runs async tasks: a call that may block would stop all of them. Every test
/// of the whole program runs with it.
#[inline]
pub(super) fn assert_may_block() {
    if cfg!(debug_assertions) && IS_ON {
        // Tokio refuses this on its workers, and nowhere else.
        let lock = tokio::sync::Mutex::new(());
        drop(lock.blocking_lock());
    }
}
