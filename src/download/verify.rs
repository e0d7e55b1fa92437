//! Verified streaming without storage: the end is withheld until the digest matches.

use std::future::Future;
use std::pin::Pin;

use bytes::{Bytes, BytesMut};

use super::{ByteStream, WITHHELD_BYTES};
use crate::oci::{Digest, Hasher, UpstreamFailure};

/// A verified stream of a blob or of its remainder.
pub struct VerifyingStream {
    digest: Digest,
    /// `None` after the end.
    hasher: Option<Hasher>,
    body: Box<dyn ByteStream>,
    withheld: BytesMut,
    /// Runs between the verification and the release of the last bytes.
    on_verified: Option<OnVerified>,
}

type OnVerified = Pin<Box<dyn Future<Output = ()> + Send>>;

impl VerifyingStream {
    /// A complete blob with the expected `digest`.
    pub fn new(digest: Digest, body: impl ByteStream + 'static) -> Self {
        let hasher = Hasher::new(digest.algorithm());
        Self::rest(digest, hasher, BytesMut::new(), Box::new(body))
    }

    /// The remainder of a blob. `hasher` has hashed everything before `body`; `withheld` is its unreleased end.
    pub(super) fn rest(
        digest: Digest,
        hasher: Hasher,
        withheld: BytesMut,
        body: Box<dyn ByteStream>,
    ) -> Self {
        Self {
            digest,
            hasher: Some(hasher),
            body,
            withheld,
            on_verified: None,
        }
    }

    /// Runs this after verification, before the last bytes are released.
    #[must_use]
    pub fn when_verified(self, on_verified: impl Future<Output = ()> + Send + 'static) -> Self {
        let on_verified: Option<OnVerified> = Some(Box::pin(on_verified));
        Self { on_verified, ..self }
    }

    /// Whether the stream has ended, with or without an error.
    pub fn is_over(&self) -> bool {
        self.hasher.is_none()
    }

    /// The next bytes, or `None` at the verified end. Nothing follows an error.
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
        if let Some(on_verified) = self.on_verified.take() {
            on_verified.await;
        }
        (!last.is_empty()).then_some(Ok(last))
    }
}
