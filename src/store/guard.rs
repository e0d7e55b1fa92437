//! The guard that keeps the disk off the async workers.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Panics, in debug builds, on a worker of the server's runtime: a call that may block would stop every task there. All
/// tests of the whole program run with it. A runtime of a single thread, as unit tests have, is let pass.
#[inline]
pub(super) fn assert_may_block() {
    if cfg!(debug_assertions) {
        let flavor = Handle::try_current().map(|runtime| runtime.runtime_flavor());
        if !matches!(flavor, Ok(RuntimeFlavor::CurrentThread)) {
            let lock = tokio::sync::Mutex::new(());
            // Tokio refuses this on its workers, and nowhere else.
            drop(lock.blocking_lock());
        }
    }
}
