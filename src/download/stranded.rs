//! Readers whose transfer lost its disk in the middle, or failed before its first byte on what does not concern them: a
//! pull never fails because it cannot be stored.
//!
//! Each reads what is in the file and asks the upstream for the rest itself, with its own asker's right. A whole blob is
//! verified all the same: the writer's hash of what it wrote is carried on over the rest, whose end is withheld until
//! it is right. That costs the upstream one transfer per reader, a few at a time; it is for the rare case that
//! the room could not be reserved before the first byte.

use std::fmt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::OwnedSemaphorePermit;

use super::progress::{Download, Opened, Progress};
use super::reader::{Part, Reader};
use super::{Failure, Verifying};
use crate::oci::{Digest, Hasher};
use crate::store::StoreError;

/// What the writer had when its disk failed.
pub struct Stranded {
    fault: StoreError,
    digest: Digest,
    opened: Option<Opened>,
    written: u64,
    hasher: Hasher,
}

impl fmt::Debug for Stranded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stranded")
            .field("fault", &self.fault)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Stranded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.fault)
    }
}

impl Stranded {
    /// `written` bytes are in the file, and `hasher` has taken them.
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

/// The rest of a blob, on its way to one reader.
pub(super) struct Rest {
    pub(super) verifying: Verifying,
    _place: Option<OwnedSemaphorePermit>,
}

/// What a reader without a transfer does next.
pub(super) enum Alone {
    /// It had this much in the file.
    Read(Bytes),
    /// What it lacks is on its way.
    Asked,
    /// It has everything.
    End,
}

impl Reader {
    /// Goes on without the transfer that failed, if that is possible.
    pub(super) async fn go_on_alone(&mut self, failure: &Arc<Failure>) -> Result<Alone, Arc<Failure>> {
        let step = match failure.as_ref() {
            Failure::Stranded(stranded) => self.step_alone(stranded).await?,
            // The leader's right is not this reader's.
            Failure::Refused(_) if self.leads => None,
            Failure::Refused(_) | Failure::Unstorable(_) | Failure::Abandoned | Failure::Crowded(_) => {
                self.begin_alone().await
            }
            Failure::Broken(_) | Failure::Wrong(_) | Failure::Store(_) => None,
        };
        step.ok_or_else(|| Arc::clone(failure))
    }

    /// Asks for the whole: its answer may have begun already, while the transfer was queued, so that it cannot join again.
    async fn begin_alone(&mut self) -> Option<Alone> {
        if self.position > 0 || self.end.is_some() {
            return None;
        }
        let mut ahead = self.ahead.take()?;
        let body = ahead.open(0, None).await?;
        let hasher = Hasher::new(self.digest.algorithm());
        self.rest = Some(Box::new(Rest {
            verifying: Verifying::rest(*self.digest, hasher, BytesMut::new(), body),
            _place: None,
        }));
        Some(Alone::Asked)
    }

    async fn step_alone(&mut self, stranded: &Stranded) -> Result<Option<Alone>, Arc<Failure>> {
        let Some(opened) = &stranded.opened else {
            return Ok(None);
        };
        if self.given.is_some_and(|attempt| attempt != opened.attempt) {
            return Ok(None);
        }
        let end = self.end.or(opened.size);
        if end.is_some_and(|end| self.position >= end) {
            return Ok(Some(Alone::End));
        }
        let safe = opened.safe(stranded.written).min(end.unwrap_or(u64::MAX));
        if self.position < safe {
            self.given = Some(opened.attempt);
            return Ok(Some(Alone::Read(self.read(&opened.file, safe).await?)));
        }
        let Some(mut ahead) = self.ahead.take() else {
            return Ok(None);
        };
        let Ok(place) = Arc::clone(&self.ahead_places).acquire_owned().await else {
            return Ok(None);
        };
        if let Some(end) = self.end {
            // A part cannot be verified by itself.
            let body = ahead.open(self.position, Some(end)).await;
            self.part = body.map(|body| Part::new(body, end, place));
            return Ok(self.part.is_some().then_some(Alone::Asked));
        }
        let mut withheld = BytesMut::new();
        while self.position < stranded.written {
            withheld.extend_from_slice(&self.read(&opened.file, stranded.written).await?);
        }
        let body = ahead.open(stranded.written, opened.size).await;
        let digest = stranded.digest;
        self.rest = body.map(|body| {
            Box::new(Rest {
                verifying: Verifying::rest(digest, stranded.hasher.clone(), withheld, body),
                _place: Some(place),
            })
        });
        Ok(self.rest.is_some().then_some(Alone::Asked))
    }
}
