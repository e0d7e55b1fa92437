//! Work that a request waits for, and that goes on where its client leaves.

use std::future::pending;
use std::panic::resume_unwind;

/// Does `work` in a task of its own. The server drops a request whose client is gone; what an upstream response shows of a
/// right is learned all the same, and not by half.
pub(super) async fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The end of the process cut it off, and its caller ends with the process too.
            Err(_) => pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::pin::pin;
    use std::task::{Context, Waker};

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn t08_learning_goes_on_when_its_client_leaves() {
        let (let_go, is_let_go) = oneshot::channel();
        let (learned, is_learned) = oneshot::channel();
        {
            let work = pin!(detached(async move {
                is_let_go.await.unwrap();
                learned.send(()).unwrap();
            }));
            let is_pending = work.poll(&mut Context::from_waker(Waker::noop())).is_pending();
            assert!(is_pending);
        }
        let_go.send(()).unwrap();
        is_learned.await.unwrap();
    }
}
