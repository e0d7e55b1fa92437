//! Clients that fetch one blob by several ranges at once, as containerd does from 2.1 on.
//!
//! A worker takes the next chunk when it has one. The chunks are kept and hashed after the measurement.

use crate::Outcome;
use crate::client::{Timed, after_manifest};
use crate::connection::{Connection, Endpoint};
use crate::content::{Layered, blob, named};
use sha2::{Digest, Sha256};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WORKERS: usize = 8;
const CHUNK_BYTES: u64 = 8 * 1024 * 1024;
const STEP_BYTES: usize = 256 * 1024;

#[derive(Clone, Copy)]
pub(crate) enum Ranges {
    /// `bytes=N-`, first of them `bytes=0-`. The connection is closed after the chunk. containerd's.
    Open,
    /// `bytes=N-M` over connections that are kept, after a first GET without a range.
    Closed,
}

/// One blob, its chunks and when its first byte arrived.
struct Fetch<'f> {
    endpoint: &'f Endpoint,
    path: String,
    bytes: u64,
    ranges: Ranges,
    next: AtomicU64,
    began: Instant,
    first_byte: OnceLock<Duration>,
}

/// The blob of an image with one layer, and its manifest before the measurement.
pub(crate) fn in_chunks(endpoint: &Endpoint, image: &Layered, ranges: Ranges) -> Outcome<Timed> {
    let digest = image.layers.first().ok_or("an image without a layer")?;
    let mut first = after_manifest(endpoint, image)?;
    let fetch = Fetch {
        endpoint,
        path: blob(digest),
        bytes: image.layer_bytes,
        ranges,
        next: AtomicU64::new(1),
        began: Instant::now(),
        first_byte: OnceLock::new(),
    };
    let (mut chunks, total) = std::thread::scope(|scope| -> Outcome<_> {
        // As the clients do: the others begin when the first response has shown the size.
        let body = fetch.open(0, &mut first)?;
        let others: Vec<_> = (1..WORKERS)
            .map(|_| scope.spawn(|| fetch.work(Vec::new())))
            .collect();
        let chunk = fetch.chunk(0, &mut first, body)?;
        drop(first);
        let mut chunks = fetch.work(vec![(0, chunk)])?;
        for worker in others {
            chunks.extend(worker.join().map_err(|_| "a client panicked")??);
        }
        Ok((chunks, fetch.began.elapsed()))
    })?;
    chunks.sort_by_key(|(number, _)| *number);
    let mut hash = Sha256::new();
    for (_, chunk) in &chunks {
        hash.update(chunk);
    }
    if named(&hash.finalize()) != *digest {
        return Err(format!("{}: wrong bytes in chunks", fetch.path).into());
    }
    Ok(Timed {
        first_byte: fetch.first_byte.get().copied().unwrap_or(total),
        total,
    })
}

/// The beginning of a chunk, which came with its head.
type Beginning = Vec<u8>;

impl Fetch<'_> {
    fn work(&self, mut chunks: Vec<(u64, Vec<u8>)>) -> Outcome<Vec<(u64, Vec<u8>)>> {
        let mut kept = None;
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number * CHUNK_BYTES >= self.bytes {
                return Ok(chunks);
            }
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => self.endpoint.connect()?,
            };
            let beginning = self.open(number, &mut connection)?;
            chunks.push((number, self.chunk(number, &mut connection, beginning)?));
            if let Ranges::Closed = self.ranges {
                kept = Some(connection);
            }
        }
    }

    fn open(&self, number: u64, connection: &mut Connection) -> Outcome<Beginning> {
        let start = number * CHUNK_BYTES;
        let range = match self.ranges {
            Ranges::Open => Some(format!("bytes={start}-")),
            Ranges::Closed if number == 0 => None,
            Ranges::Closed => Some(format!("bytes={start}-{}", self.end(number) - 1)),
        };
        let (mut buffer, mut beginning) = (vec![0; STEP_BYTES], Vec::new());
        let status = if range.is_some() { 206 } else { 200 };
        connection
            .request(&self.path, range.as_deref(), &mut buffer, |part| {
                beginning.extend_from_slice(part);
            })?
            .expect(status, &self.path)?;
        Ok(beginning)
    }

    fn chunk(&self, number: u64, connection: &mut Connection, beginning: Beginning) -> Outcome<Vec<u8>> {
        let (mut chunk, mut buffer) = (beginning, vec![0; STEP_BYTES]);
        let bytes = self.end(number) - number * CHUNK_BYTES;
        loop {
            if number == 0 && !chunk.is_empty() {
                self.first_byte.get_or_init(|| self.began.elapsed());
            }
            let left = bytes.saturating_sub(chunk.len() as u64);
            if left == 0 {
                return Ok(chunk);
            }
            chunk.extend_from_slice(connection.read_some(left, &mut buffer)?);
        }
    }

    fn end(&self, number: u64) -> u64 {
        ((number + 1) * CHUNK_BYTES).min(self.bytes)
    }
}
