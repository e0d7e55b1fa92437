//! Pause of shared work: a bounded wait for something that may make the work unnecessary, which no waiting request pays for.

use std::pin::pin;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Pauses of one piece of work.
#[derive(Default)]
pub struct Pause {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// The earliest end that a request has set.
    ends: Option<Instant>,
    began: Option<Instant>,
    /// Time of the pauses that have ended.
    total: Duration,
}

impl State {
    fn total(&self, now: Instant) -> Duration {
        let current = self.began.map(|began| now.saturating_duration_since(began));
        self.total + current.unwrap_or_default()
    }
}

/// A running pause. Dropping it ends it.
struct Running<'a>(&'a Pause);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.total = state.total(Instant::now());
        state.began = None;
    }
}

impl Pause {
    /// No pause lasts beyond this time, because a request that waits for the work has a deadline. The earliest such time
    /// counts.
    pub fn end_by(&self, time: Instant) {
        let mut state = self.state.lock();
        state.ends = Some(state.ends.map_or(time, |ends| ends.min(time)));
        drop(state);
        self.changed.notify_waiters();
    }

    /// Pauses the work for `waiting`, which is dropped when no request may wait any more. Then the result is `None`, and
    /// `waiting` does not even begin if that time has passed.
    pub async fn run<T>(&self, waiting: impl Future<Output = T>) -> Option<T> {
        if self.ends().is_some_and(|ends| ends <= Instant::now()) {
            return None;
        }
        self.state.lock().began = Some(Instant::now());
        let _running = Running(self);
        tokio::select! {
            biased;
            waited = waiting => Some(waited),
            () = self.over() => None,
        }
    }

    /// Time that the work has been paused until `now`. A request that began to wait for the work meanwhile counts what was
    /// added since.
    pub fn total(&self, now: Instant) -> Duration {
        self.state.lock().total(now)
    }

    fn ends(&self) -> Option<Instant> {
        self.state.lock().ends
    }

    async fn over(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            match self.ends() {
                None => changed.await,
                Some(ends) if timeout_at(ends, changed).await.is_err() => return,
                Some(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::future::pending;
    use std::sync::Arc;

    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn earliest_end_of_any_request_ends_the_pause() {
        let (pause, start) = (Arc::new(Pause::default()), Instant::now());
        let work = Arc::clone(&pause);
        let paused = tokio::spawn(async move { work.run(pending::<()>()).await });
        sleep(SECOND).await;
        pause.end_by(start + 9 * SECOND);
        // A request joins that has less time.
        pause.end_by(start + 2 * SECOND);
        pause.end_by(start + 5 * SECOND);
        assert_eq!(paused.await.unwrap(), None);
        assert_eq!(
            (start.elapsed(), pause.total(Instant::now())),
            (2 * SECOND, 2 * SECOND)
        );
        assert_eq!(pause.run(async { panic!("no time is left") }).await, None::<()>);
    }

    #[tokio::test(start_paused = true)]
    async fn total_counts_running_and_dropped_pauses() {
        let pause = Pause::default();
        assert_eq!(pause.run(sleep(SECOND)).await, Some(()));
        let running = pause.run(pending::<()>());
        let asked = async {
            sleep(SECOND).await;
            pause.total(Instant::now())
        };
        tokio::select! {
            _ = running => {}
            total = asked => assert_eq!(total, 2 * SECOND),
        }
        sleep(SECOND).await;
        assert_eq!(pause.total(Instant::now()), 2 * SECOND);
    }
}
