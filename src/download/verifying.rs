//! Bytes that pass by without being stored, but not unverified: their end is withheld until the digest is right.

use std::future::Future;
use std::pin::Pin;

use bytes::{Bytes, BytesMut};

use super::{Chunks, WITHHELD_BYTES};
use crate::oci::{Digest, Hasher, UpstreamFailure};

/// A blob, or the rest of one, that passes by.
pub struct Verifying {
    digest: Digest,
    /// `None` after the end.
    hasher: Option<Hasher>,
    body: Box<dyn Chunks>,
    withheld: BytesMut,
    /// Done between the verification and the release of the last bytes.
    deed: Option<Deed>,
}

type Deed = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Verifying {
    /// A whole blob, which should be `digest`.
    pub fn new(digest: Digest, body: impl Chunks + 'static) -> Self {
        let hasher = Hasher::new(digest.algorithm());
        Self::rest(digest, hasher, BytesMut::new(), Box::new(body))
    }

    /// The rest of one: `hasher` has taken everything before `body`, of which `withheld` was not given to anyone yet.
    pub(super) fn rest(digest: Digest, hasher: Hasher, withheld: BytesMut, body: Box<dyn Chunks>) -> Self {
        Self {
            digest,
            hasher: Some(hasher),
            body,
            withheld,
            deed: None,
        }
    }

    /// Does this once the bytes are verified, before the last of them are given.
    #[must_use]
    pub fn when_verified(self, deed: impl Future<Output = ()> + Send + 'static) -> Self {
        let deed: Option<Deed> = Some(Box::pin(deed));
        Self { deed, ..self }
    }

    /// Whether everything was given, or it failed.
    pub fn is_over(&self) -> bool {
        self.hasher.is_none()
    }

    /// The next bytes; `None` at the verified end. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        while let Some(hasher) = &mut self.hasher {
            match self.body.chunk().await {
                Some(Ok(chunk)) => {
                    hasher.update(&chunk);
                    self.withheld.extend_from_slice(&chunk);
                    let withheld_max = usize::try_from(WITHHELD_BYTES).unwrap_or(usize::MAX);
                    if self.withheld.len() > withheld_max {
                        let free = self.withheld.len() - withheld_max;
                        return Some(Ok(self.withheld.split_to(free).freeze()));
                    }
                }
                Some(Err(cause)) => {
                    self.hasher = None;
                    self.withheld.clear();
                    return Some(Err(cause));
                }
                None => return self.verified().await,
            }
        }
        None
    }

    async fn verified(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        let hasher = self.hasher.take()?;
        let last = std::mem::take(&mut self.withheld).freeze();
        if hasher.finish() != self.digest {
            return Some(Err(UpstreamFailure::DigestMismatch));
        }
        if let Some(deed) = self.deed.take() {
            deed.await;
        }
        (!last.is_empty()).then_some(Ok(last))
    }
}
