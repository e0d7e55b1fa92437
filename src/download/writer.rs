//! The writing side of a transfer: into the file, hashed on the way.

use std::mem;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_blocking;

use super::progress::Download;
use super::receive::{Piece, QUEUE_CHUNKS_MAX};
use super::{Failure, Stranded};
use crate::oci::Hasher;
use crate::store::StoreError;
use crate::store::blobs::Verified;
use crate::store::ingest::Ingest;
use crate::store::partial::Resumed;

/// Writes and hashes, in steps on the blocking pool. Between two steps a transfer holds no thread, so their number does not
/// limit that of the transfers. Publishes each chunk before it is hashed: readers need not wait for the hash, only the
/// end of the blob does.
pub(super) struct Writer {
    /// `None` once it is verified or its disk has failed.
    file: Option<File>,
    download: Arc<Download>,
    /// The size that was announced.
    total: Option<u64>,
}

struct File {
    ingest: Ingest,
    /// Has taken the first `written` bytes.
    hasher: Hasher,
    written: u64,
}

/// A verified file and its size in bytes. Its last bytes are not released to the readers yet.
pub(super) type Written = (Ingest, Verified, u64);

impl Writer {
    pub(super) fn new(resumed: Resumed, download: &Arc<Download>, total: Option<u64>) -> Self {
        let Resumed {
            ingest,
            hasher,
            written,
        } = resumed;
        Self {
            file: Some(File {
                ingest,
                hasher,
                written,
            }),
            download: Arc::clone(download),
            total,
        }
    }

    /// Until the transfer ends or stops.
    pub(super) async fn run(
        mut self,
        mut pieces: mpsc::Receiver<Piece>,
        steps: Arc<Semaphore>,
    ) -> Result<Written, Failure> {
        let mut batch = Vec::new();
        while pieces.recv_many(&mut batch, QUEUE_CHUNKS_MAX).await > 0 {
            let batch = mem::take(&mut batch);
            // The semaphore is never closed.
            let step = steps.acquire().await;
            let stepped = spawn_blocking(move || {
                let ended = self.step(batch);
                (self, ended)
            });
            let Ok((writer, ended)) = stepped.await else {
                return Err(Failure::Abandoned);
            };
            drop(step);
            match ended {
                Some(ended) => return ended,
                None => self = writer,
            }
        }
        // The transfer stopped without an end; the receiving side says why. What came so far is for the next one.
        let _left = spawn_blocking(move || drop(self)).await;
        Err(Failure::Abandoned)
    }

    /// What came since the last step. Says how the blob ended, if it did.
    fn step(&mut self, batch: Vec<Piece>) -> Option<Result<Written, Failure>> {
        for piece in batch {
            match piece {
                Piece::Chunk(chunk, _share) => {
                    if let Err(fault) = self.write(&chunk) {
                        return Some(Err(self.stranded(fault)));
                    }
                }
                Piece::IsWhole(reply) => {
                    let hash = self.file.as_ref().map(|file| file.hasher.clone().finish());
                    // The receiving side may have stopped.
                    let _ = reply.send(hash == Some(self.download.digest));
                }
                Piece::End => return Some(self.verify()),
            }
        }
        None
    }

    fn write(&mut self, chunk: &[u8]) -> Result<(), StoreError> {
        let Some(File {
            ingest,
            hasher,
            written,
        }) = &mut self.file
        else {
            return Ok(());
        };
        let until = *written + chunk.len() as u64;
        ingest.ensure_reserved(until)?;
        ingest
            .file()
            .write_at(chunk, *written)
            .map_err(|error| StoreError::io("write a blob", self.download.digest.to_string(), &error))?;
        *written = until;
        self.download.publish(until);
        self.download.counts.fetched(chunk.len() as u64);
        hasher.update(chunk);
        ingest.checkpoint_if_due(until, hasher);
        Ok(())
    }

    fn stranded(&mut self, fault: StoreError) -> Failure {
        let Some(file) = self.file.take() else {
            return Failure::Abandoned;
        };
        let stranded = Stranded::new(fault, &self.download, file.written, file.hasher);
        Failure::Stranded(Box::new(stranded))
    }

    fn verify(&mut self) -> Result<Written, Failure> {
        let Some(file) = self.file.take() else {
            return Err(Failure::Abandoned);
        };
        let verified = Verified::check(file.hasher, &self.download.digest, file.written, self.total)
            .map_err(Failure::Wrong)?;
        Ok((file.ingest, verified, file.written))
    }
}

impl Drop for Writer {
    /// What was written is left to the next who asks, also when the process ends.
    fn drop(&mut self) {
        if let Some(File {
            ingest,
            hasher,
            written,
        }) = self.file.take()
        {
            ingest.suspend(written, &hasher);
        }
    }
}
