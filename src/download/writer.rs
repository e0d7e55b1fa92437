//! The writing side of a transfer: into the file, hashed on the way.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::progress::Download;
use super::receive::Piece;
use super::{Failure, Stranded};
use crate::oci::Hasher;
use crate::store::Fault;
use crate::store::blobs::Verified;
use crate::store::ingest::Ingest;

/// Writes and hashes, on a thread of the blocking pool. Publishes each chunk before it is hashed: readers need not
/// wait for the hash, only the end of the blob does.
pub(super) struct Writer {
    pub(super) ingest: Ingest,
    /// Has taken the first `written` bytes.
    pub(super) hasher: Hasher,
    pub(super) written: u64,
    pub(super) download: Arc<Download>,
}

/// A verified file and its size in bytes. Its last bytes are not released to the readers yet.
pub(super) type Written = (Ingest, Verified, u64);

impl Writer {
    /// Until the transfer ends or stops. `total` is what was announced.
    pub(super) fn run(
        mut self,
        mut chunks: mpsc::Receiver<Piece>,
        total: Option<u64>,
    ) -> Result<Written, Failure> {
        let file = self.ingest.file();
        while let Some(piece) = chunks.blocking_recv() {
            let chunk: Bytes = match piece {
                Piece::Chunk(chunk) => chunk,
                Piece::IsWhole(reply) => {
                    let is_whole = self.hasher.clone().finish() == self.download.digest;
                    // The receiving side may have stopped.
                    let _ = reply.send(is_whole);
                    continue;
                }
                Piece::End => return self.verify(total),
            };
            let until = self.written + chunk.len() as u64;
            let written = self.ingest.make_room(until).and_then(|()| {
                let written = file.write_at(&chunk, self.written);
                written.map_err(|error| Fault::io("write a blob", self.download.digest.to_string(), &error))
            });
            if let Err(fault) = written {
                return Err(self.stranded(fault));
            }
            self.written = until;
            self.download.publish(self.written);
            self.download.counts.fetched(chunk.len() as u64);
            self.hasher.update(&chunk);
            self.ingest.wrote(self.written, &self.hasher);
        }
        // The transfer stopped without an end; the receiving side says why. What came so far is for the next one.
        self.ingest.leave(self.written, &self.hasher);
        Err(Failure::Abandoned)
    }

    fn stranded(self, fault: Fault) -> Failure {
        let stranded = Stranded::new(fault, &self.download, self.written, self.hasher);
        Failure::Stranded(Box::new(stranded))
    }

    fn verify(self, total: Option<u64>) -> Result<Written, Failure> {
        let verified = Verified::check(self.hasher, &self.download.digest, self.written, total)
            .map_err(Failure::Wrong)?;
        Ok((self.ingest, verified, self.written))
    }
}
