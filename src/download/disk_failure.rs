//! Continuation of readers after a disk failure, or after a failure before the first byte that does not concern
//! them. A pull never fails because its blob cannot be stored.
//!
//! Each reader reads the file so far and fetches the remainder from the upstream with its own credential. A
//! complete blob is still verified: the writer's hash state continues over the remainder, whose end is withheld
//! until the digest matches. This costs the upstream one transfer per reader, a few at a time. It is meant for
//! the rare case that the space could not be reserved before the first byte.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::timeout;

use super::reader::{AheadRange, FallbackStep, Reader, RemainderStream};
use super::state::{Download, DownloadInfo, Progress};
use super::{DownloadError, VerifyingStream};
use crate::oci::{Digest, Hasher};
use crate::store::StoreError;

/// How long a reader waits for one of the permits for responses of its own.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(30);

/// State of the writer when its disk failed.
pub struct DiskFailed {
    fault: StoreError,
    digest: Digest,
    opened: Option<DownloadInfo>,
    written: u64,
    hasher: Hasher,
}

impl fmt::Debug for DiskFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stranded")
            .field("fault", &self.fault)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for DiskFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.fault)
    }
}

impl DiskFailed {
    /// `written` bytes are in the file, and `hasher` has hashed them.
    pub(super) fn new(fault: StoreError, download: &Download, written: u64, hasher: Hasher) -> Self {
        let opened = match &*download.progress.borrow() {
            Progress::Filling(opened, _) => Some(opened.clone()),
            _ => None,
        };
        Self {
            fault,
            digest: download.digest,
            opened,
            written,
            hasher,
        }
    }
}

impl Reader {
    /// Continues without the failed download, if possible.
    pub(super) async fn continue_from_upstream(
        &mut self,
        failure: &Arc<DownloadError>,
    ) -> Result<FallbackStep, Arc<DownloadError>> {
        let step = match failure.as_ref() {
            DownloadError::DiskFailed(disk_failed) => self.continue_after_disk_failure(disk_failed).await?,
            // A denial of the leader's credential does not apply to this reader's.
            DownloadError::NotStarted(_) if self.leads => None,
            DownloadError::NotStarted(_)
            | DownloadError::Unstorable(_)
            | DownloadError::Abandoned
            | DownloadError::QueueFull(_) => self.fetch_from_start().await,
            DownloadError::Interrupted(_) | DownloadError::DigestMismatch(_) | DownloadError::Store(_) => {
                None
            }
        };
        step.ok_or_else(|| Arc::clone(failure))
    }

    /// Requests the complete blob. The reader's response may have begun while the download was queued, so it
    /// cannot join again.
    async fn fetch_from_start(&mut self) -> Option<FallbackStep> {
        if self.position > 0 || self.end.is_some() {
            return None;
        }
        let mut ahead = self.ahead.take()?;
        let body = ahead.open(0, None).await?;
        let hasher = Hasher::new(self.digest.algorithm());
        self.remainder = Some(Box::new(RemainderStream {
            verifying: VerifyingStream::rest(*self.digest, hasher, BytesMut::new(), body),
            _permit: None,
        }));
        Some(FallbackStep::Asked)
    }

    async fn continue_after_disk_failure(
        &mut self,
        disk_failed: &DiskFailed,
    ) -> Result<Option<FallbackStep>, Arc<DownloadError>> {
        let Some(opened) = &disk_failed.opened else {
            return Ok(None);
        };
        if self
            .served_attempt
            .is_some_and(|attempt| attempt != opened.attempt)
        {
            return Ok(None);
        }
        let end = self.end.or(opened.size);
        if end.is_some_and(|end| self.position >= end) {
            return Ok(Some(FallbackStep::End));
        }
        let readable = opened
            .readable_len(disk_failed.written)
            .min(end.unwrap_or(u64::MAX));
        if self.position < readable {
            self.served_attempt = Some(opened.attempt);
            return Ok(Some(FallbackStep::Read(self.read(&opened.file, readable).await?)));
        }
        let Some(mut ahead) = self.ahead.take() else {
            return Ok(None);
        };
        let permit = Arc::clone(&self.ahead_permits).acquire_owned();
        // Slow clients may have all permits. A response that ends is requested again.
        let Ok(Ok(permit)) = timeout(PERMIT_TIMEOUT, permit).await else {
            return Ok(None);
        };
        if let Some(end) = self.end {
            // A range cannot be verified by itself.
            let body = ahead.open(self.position, Some(end)).await;
            self.ahead_range = body.map(|body| AheadRange::new(body, end, permit));
            return Ok(self.ahead_range.is_some().then_some(FallbackStep::Asked));
        }
        let mut withheld = BytesMut::new();
        while self.position < disk_failed.written {
            withheld.extend_from_slice(&self.read(&opened.file, disk_failed.written).await?);
        }
        let body = ahead.open(disk_failed.written, opened.size).await;
        let digest = disk_failed.digest;
        self.remainder = body.map(|body| {
            Box::new(RemainderStream {
                verifying: VerifyingStream::rest(digest, disk_failed.hasher.clone(), withheld, body),
                _permit: Some(permit),
            })
        });
        Ok(self.remainder.is_some().then_some(FallbackStep::Asked))
    }
}
