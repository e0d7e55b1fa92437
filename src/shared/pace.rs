//! Minimum rate of the body of an object. A bucket that sends a few bytes at a time would otherwise hold up a pull that the
//! upstream could finish.
//!
//! Only the time of waiting for the bucket counts, and not that in which the consumer does not read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use crate::bucket::{BucketError, ObjectBody};
use crate::oci::UpstreamFailure;

/// Time of waiting over which the rate is measured.
const WINDOW: Duration = Duration::from_secs(5);

/// Fewest bytes of one object in a [`WINDOW`]: 1 MiB/s.
const WINDOW_BYTES_MIN: u64 = 5 * 1024 * 1024;

/// If all objects together receive this much in a [`WINDOW`] (8 MiB/s), a slow one has only its share of a busy link.
const WINDOW_BYTES_OF_ALL: u64 = 40 * 1024 * 1024;

/// Rate of one body.
#[derive(Debug, Default)]
pub(super) struct Pace {
    waited: Duration,
    bytes: u64,
    /// Bytes of all objects when the window began.
    of_all: u64,
}

impl Pace {
    /// A new window. `of_all` counts the bytes of all objects.
    pub(super) fn new(of_all: &AtomicU64) -> Self {
        Self {
            of_all: of_all.load(Ordering::Relaxed),
            ..Self::default()
        }
    }

    /// The next bytes of the body, or an error if it is too slow.
    pub(super) async fn chunk(
        &mut self,
        body: &mut dyn ObjectBody,
        of_all: &AtomicU64,
    ) -> Option<Result<Bytes, BucketError>> {
        loop {
            let began = Instant::now();
            let next = timeout(WINDOW.saturating_sub(self.waited), body.chunk()).await;
            self.waited += began.elapsed();
            match next {
                Ok(next) => {
                    if let Some(Ok(bytes)) = &next {
                        self.bytes += bytes.len() as u64;
                        of_all.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    }
                    return next;
                }
                Err(_) if self.is_slow(of_all) => {
                    return Some(Err(BucketError::Silent(UpstreamFailure::Timeout)));
                }
                Err(_) => *self = Self::new(of_all),
            }
        }
    }

    fn is_slow(&self, of_all: &AtomicU64) -> bool {
        let of_all = of_all.load(Ordering::Relaxed).wrapping_sub(self.of_all);
        self.bytes < WINDOW_BYTES_MIN && (self.bytes == 0 || of_all < WINDOW_BYTES_OF_ALL)
    }
}
