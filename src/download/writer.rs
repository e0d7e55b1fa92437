//! Disk side of a transfer: writes the file and hashes it.

use std::io;
use std::mem;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};

use super::fetch::{QUEUE_CHUNKS_MAX, WriterMsg};
use super::state::Download;
use super::{DiskFailed, DownloadError};
use crate::blocking::run;
use crate::oci::Hasher;
use crate::store::StoreError;
use crate::store::blobs::Verified;
use crate::store::file_read::READ_CHUNK_BYTES;
use crate::store::ingest::Ingest;
use crate::store::partial::Resumed;

/// Writes and hashes in steps on the blocking pool. Between two steps a transfer holds no thread, so the number
/// of threads does not limit the number of transfers. Each chunk is published before it is hashed: readers do
/// not wait for the hash, only the end of the blob does.
pub(super) struct Writer {
    /// `None` once it is verified or its disk has failed.
    file: Option<File>,
    download: Arc<Download>,
    /// Announced size.
    total: Option<u64>,
}

struct File {
    ingest: Ingest,
    /// Has hashed the first `written` bytes.
    hasher: Hasher,
    written: u64,
}

/// A verified file and its size in bytes. Its last bytes are still withheld.
pub(super) type VerifiedIngest = (Ingest, Verified, u64);

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

    /// Runs until the blob ends or fetching stops.
    pub(super) async fn run(
        mut self,
        mut messages: mpsc::Receiver<WriterMsg>,
        steps: Arc<Semaphore>,
    ) -> Result<VerifiedIngest, DownloadError> {
        let mut batch = Vec::new();
        while messages.recv_many(&mut batch, QUEUE_CHUNKS_MAX).await > 0 {
            let batch = mem::take(&mut batch);
            let stepped = run(&steps, move || {
                let ended = self.step(batch);
                (self, ended)
            });
            let Ok((writer, ended)) = stepped.await else {
                return Err(DownloadError::Abandoned);
            };
            match ended {
                Some(ended) => return ended,
                None => self = writer,
            }
        }
        // Fetching stopped early and has the reason. The partial download remains for the next request.
        let _left = run(&steps, move || drop(self)).await;
        Err(DownloadError::Abandoned)
    }

    /// Handles the messages since the last step. Returns the result if the blob has ended.
    fn step(&mut self, batch: Vec<WriterMsg>) -> Option<Result<VerifiedIngest, DownloadError>> {
        for message in batch {
            match message {
                WriterMsg::Chunk(chunk, _share) => {
                    if let Err(fault) = self.write(&chunk) {
                        return Some(Err(self.disk_failed(fault)));
                    }
                }
                WriterMsg::Adopt(length) => {
                    if let Err(fault) = self.adopt(length) {
                        return Some(Err(self.disk_failed(fault)));
                    }
                }
                WriterMsg::CheckDigest(reply) => {
                    let hash = self.file.as_ref().map(|file| file.hasher.clone().finish());
                    // The fetching side may have stopped.
                    let _ = reply.send(hash == Some(self.download.digest));
                }
                WriterMsg::End => return Some(self.verify()),
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

    /// Hashes bytes that another connection wrote, as the file has them, and publishes them. No reader is ahead of the
    /// hash: if the disk fails here, the readers continue from where it ended.
    fn adopt(&mut self, length: u64) -> Result<(), StoreError> {
        let Some(File {
            ingest,
            hasher,
            written,
        }) = &mut self.file
        else {
            return Ok(());
        };
        let until = *written + length;
        self.download.counts.fetched(length);
        let (file, mut buffer) = (ingest.file(), vec![0; READ_CHUNK_BYTES]);
        while *written < until {
            let left = usize::try_from(until - *written).unwrap_or(READ_CHUNK_BYTES);
            let step = buffer.get_mut(..left.min(READ_CHUNK_BYTES)).unwrap_or_default();
            let read = match file.read_at(step, *written) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read,
            };
            let read = read
                .map_err(|error| StoreError::io("read a blob", self.download.digest.to_string(), &error))?;
            hasher.update(step.get(..read).unwrap_or_default());
            *written += read as u64;
            self.download.publish(*written);
            ingest.checkpoint_if_due(*written, hasher);
        }
        Ok(())
    }

    fn disk_failed(&mut self, fault: StoreError) -> DownloadError {
        let Some(file) = self.file.take() else {
            return DownloadError::Abandoned;
        };
        let disk_failed = DiskFailed::new(fault, &self.download, file.written, file.hasher);
        DownloadError::DiskFailed(Box::new(disk_failed))
    }

    fn verify(&mut self) -> Result<VerifiedIngest, DownloadError> {
        let Some(file) = self.file.take() else {
            return Err(DownloadError::Abandoned);
        };
        let verified = Verified::check(file.hasher, &self.download.digest, file.written, self.total)
            .map_err(DownloadError::DigestMismatch)?;
        Ok((file.ingest, verified, file.written))
    }
}

impl Drop for Writer {
    /// Leaves a partial download to the next request, also at process exit.
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
