//! Object of the shared storage that is being read.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::active::Active;
use super::breaker::Outcome;
use super::pace::Pace;
use crate::bucket::{BucketError, Object, ObjectInfo, ObjectKey};
use crate::oci::UpstreamFailure;

/// How long an object is not read after its bytes stopped, so that the upstream continues it at once.
pub(super) const STALLED_PERIOD: Duration = Duration::from_secs(30);

/// An object that is being read.
pub struct SharedObject {
    /// Its properties.
    pub info: ObjectInfo,
    pub(super) key: ObjectKey,
    pub(super) object: Object,
    pub(super) active: Arc<Active>,
    pub(super) pace: Pace,
    /// Offset of the next byte.
    pub(super) offset: u64,
    /// It arrived completely, or failed.
    pub(super) has_ended: bool,
}

impl SharedObject {
    /// The next bytes, or `None` at the end.
    pub async fn chunk(&mut self) -> Option<Result<Bytes, BucketError>> {
        let body = self.object.body.as_mut();
        let chunk = if self.has_ended {
            None
        } else {
            self.pace.chunk(body, &self.active.received).await
        };
        match &chunk {
            None => self.arrive(),
            Some(Ok(bytes)) => {
                let count = bytes.len() as u64;
                self.offset += count;
                self.active.telemetry.shared().add_bytes("received", count);
                if self.offset >= self.info.size {
                    // A reader that knows the size reads no further.
                    self.arrive();
                }
            }
            Some(Err(error)) => self.fail(error),
        }
        chunk
    }

    fn arrive(&mut self) {
        if !self.has_ended {
            self.has_ended = true;
            self.active.note_read(Outcome::Arrived, None);
        }
    }

    pub(super) fn fail(&mut self, error: &BucketError) {
        if self.has_ended {
            return;
        }
        self.has_ended = true;
        tracing::debug!(object = %self.key, %error, "an object of the shared storage broke off");
        let active = &self.active;
        active.record_request("body", &Err::<(), _>(error.clone()), None);
        if matches!(error, BucketError::Silent(UpstreamFailure::Timeout)) {
            active.refuse(&self.key, STALLED_PERIOD, false);
        }
        *active.stalled.lock() = Some((self.key.clone(), self.offset));
        active.note_read(Outcome::Stalled, Some(error));
    }
}
