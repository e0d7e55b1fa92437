//! Rate limits in the forms of real registries.

use super::faults::Instead;
use super::{Seen, Upstream};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

/// A literal response.
#[derive(Clone, Debug)]
pub struct Scripted {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Scripted {
    pub fn new(status: u16, body: &str) -> Scripted {
        Scripted {
            status,
            headers: vec![("content-type".to_owned(), "application/json".to_owned())],
            body: body.to_owned(),
        }
    }

    pub fn header(mut self, name: &str, value: &str) -> Scripted {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// 429 as GHCR and ECR Public send it: without `Retry-After`.
    pub fn too_many() -> Scripted {
        Scripted::new(
            429,
            r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"rate exceeded"}]}"#,
        )
    }
}

impl Upstream {
    /// The next `times` of these requests get this response.
    pub fn answers_next(
        &self,
        times: usize,
        which: impl Fn(&Seen) -> bool + Send + Sync + 'static,
        response: Scripted,
    ) {
        let left = AtomicUsize::new(times);
        let applies = move |seen: &Seen| {
            let take = |left: usize| left.checked_sub(1);
            which(seen)
                && left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
                    .is_ok()
        };
        self.instead(Arc::new(applies), Instead::Scripted(response));
    }

    /// Allows this many of these requests per second. Others get this response.
    pub fn allows_each_second(
        &self,
        requests: usize,
        which: impl Fn(&Seen) -> bool + Send + Sync + 'static,
        response: Scripted,
    ) {
        let allowed = Mutex::new(VecDeque::new());
        let applies = move |seen: &Seen| {
            if !which(seen) {
                return false;
            }
            let (mut allowed, now) = (allowed.lock().unwrap(), Instant::now());
            allowed.retain(|at: &Instant| now.duration_since(*at) < Duration::from_secs(1));
            let over = allowed.len() >= requests;
            if !over {
                allowed.push_back(now);
            }
            over
        };
        self.instead(Arc::new(applies), Instead::Scripted(response));
    }
}
