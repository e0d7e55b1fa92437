//! Bytes that pass through without being stored: content that cannot be verified, and content that the disk cannot take.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::manifest::refused;
use super::{Outcome, Request};
use crate::download::WITHHELD_BYTES;
use crate::oci::{Cause, Digest, Hasher, MediaType, Operation};
use crate::policy::Refusal;
use crate::upstream::{Answer, Caller, Fetched, Said};

/// An answer passed on as it comes, its digest being of an algorithm that cannot be verified here.
pub struct Passed {
    /// The digest asked for, as written.
    pub digest: Option<String>,
    /// The media type, as sent.
    pub media_type: Option<MediaType>,
    /// The size of the body in bytes, if it was said.
    pub size: Option<u64>,
    /// The body; `None` where only the head was asked for.
    pub body: Option<Box<Fetched>>,
}

/// Asks for content that cannot be verified. Nothing is kept, so the upstream's word is asked for each time.
pub(super) async fn unverifiable(request: &Request, caller: &Caller, size_max: u64) -> Outcome {
    let Request {
        site,
        operation,
        accept,
        ..
    } = request;
    let digest = match operation {
        Operation::Manifest { reference, .. } => Some(reference.to_string()),
        Operation::Blob { digest, .. } => Some(digest.to_string()),
        _ => None,
    };
    if request.head {
        let answer = site.upstream().head(caller, operation, accept).await;
        return if answer.said.is_yes() {
            let (media_type, size) = (answer.media_type, answer.length);
            Outcome::Passed(Passed {
                digest,
                media_type,
                size,
                body: None,
            })
        } else {
            not_passed(answer)
        };
    }
    match site.upstream().get(caller, operation, accept, None).await {
        Ok(fetched) if fetched.length.is_some_and(|length| length > size_max) => {
            refused(Refusal::Silent(Cause::TooLarge), None, false)
        }
        Ok(fetched) => Outcome::Passed(Passed {
            digest,
            media_type: fetched.media_type.clone(),
            size: fetched.length,
            body: Some(Box::new(fetched)),
        }),
        Err(answer) => not_passed(answer),
    }
}

fn not_passed(answer: Answer) -> Outcome {
    let refusal = match answer.said {
        Said::Absent => Refusal::Absent,
        Said::Forbidden => Refusal::Forbidden,
        _ => Refusal::Silent(answer.cause()),
    };
    refused(refusal, Some(Arc::new(answer)), false)
}

/// A blob passed through unstored, but not unverified: its end is withheld until its digest is right.
pub struct Passing {
    digest: Digest,
    hasher: Option<Hasher>,
    fetched: Fetched,
    withheld: BytesMut,
}

impl Passing {
    /// Passes on what `fetched` brings, which should be the blob `digest`.
    pub fn new(digest: Digest, fetched: Fetched) -> Self {
        let hasher = Some(Hasher::new(digest.algorithm()));
        Self {
            digest,
            hasher,
            fetched,
            withheld: BytesMut::new(),
        }
    }

    /// The next bytes; `None` at the verified end. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Bytes, Cause>> {
        while let Some(hasher) = &mut self.hasher {
            match self.fetched.chunk().await {
                Some(Ok(chunk)) => {
                    hasher.update(&chunk);
                    self.withheld.extend_from_slice(&chunk);
                    let withheld_max = usize::try_from(WITHHELD_BYTES).unwrap_or(usize::MAX);
                    if self.withheld.len() > withheld_max {
                        return Some(Ok(self
                            .withheld
                            .split_to(self.withheld.len() - withheld_max)
                            .freeze()));
                    }
                }
                Some(Err(cause)) => {
                    self.hasher = None;
                    self.withheld.clear();
                    return Some(Err(cause));
                }
                None => return self.verified(),
            }
        }
        None
    }

    fn verified(&mut self) -> Option<Result<Bytes, Cause>> {
        let right = self
            .hasher
            .take()
            .is_some_and(|hasher| hasher.finish() == self.digest);
        let last = std::mem::take(&mut self.withheld).freeze();
        match (right, last.is_empty()) {
            (false, _) => Some(Err(Cause::WrongDigest)),
            (true, true) => None,
            (true, false) => Some(Ok(last)),
        }
    }
}
