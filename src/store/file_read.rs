//! File reads in large chunks, without leaving the thread while the page cache has the bytes.
//!
//! Measured as server CPU per byte, a 256 KiB `preadv2` with `RWF_NOWAIT` on the event loop costs a third of 64 KiB
//! reads through a thread pool. Only reads that miss the page cache go to the blocking pool.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::fs::FsFile;
use crate::blocking;
use bytes::Bytes;
use parking_lot::Mutex;

/// Maximum bytes per read.
pub const READ_CHUNK_BYTES: usize = 256 * 1024;

/// Reads of at most this size use a buffer of the exact size: for small blobs, and when memory is short.
const SMALL_READ_BYTES_MAX: usize = 64 * 1024;

/// Maximum number of idle buffers: 4 MiB.
const IDLE_BUFFERS_MAX: usize = 16;

/// Memory retained by a chunk of this length.
pub const fn buffer_bytes(length: usize) -> usize {
    if length <= SMALL_READ_BYTES_MAX {
        length
    } else {
        READ_CHUNK_BYTES
    }
}

/// Pool of buffers of [`READ_CHUNK_BYTES`], which saves allocating and zeroing one per read.
#[derive(Clone, Default)]
pub struct BufferPool {
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl BufferPool {
    fn take(&self, length: usize) -> Buffer {
        if length <= SMALL_READ_BYTES_MAX {
            return Buffer {
                bytes: vec![0; length],
                used: length,
                pool: None,
            };
        }
        let idle = self.idle.lock().pop();
        let bytes = idle.unwrap_or_else(|| vec![0; READ_CHUNK_BYTES]);
        Buffer {
            used: length.min(bytes.len()),
            bytes,
            pool: Some(self.clone()),
        }
    }

    fn put_back(&self, bytes: Vec<u8>) {
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_BUFFERS_MAX {
            idle.push(bytes);
        }
    }
}

/// A buffer on loan. It returns to the pool when the last `Bytes` made of it is dropped.
struct Buffer {
    bytes: Vec<u8>,
    used: usize,
    pool: Option<BufferPool>,
}

impl Buffer {
    fn space(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.used).unwrap_or_default()
    }

    fn filled(mut self, length: usize) -> Bytes {
        self.used = length.min(self.used);
        if self.pool.is_some() && self.used <= SMALL_READ_BYTES_MAX {
            // A short read must not retain a full buffer.
            return Bytes::copy_from_slice(self.as_ref());
        }
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(..self.used).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.put_back(std::mem::take(&mut self.bytes));
        }
    }
}

/// Reads up to `length` bytes at `offset` from the page cache; otherwise [`io::ErrorKind::WouldBlock`].
pub fn read_nowait(file: &dyn FsFile, offset: u64, length: usize, buffers: &BufferPool) -> io::Result<Bytes> {
    let mut buffer = buffers.take(length.min(READ_CHUNK_BYTES));
    let read = file.read_at_nowait(buffer.space(), offset)?;
    not_short(buffer, read)
}

/// Reads up to `length` bytes at `offset`. Blocks.
pub fn read_blocking(
    file: &dyn FsFile,
    offset: u64,
    length: usize,
    buffers: &BufferPool,
) -> io::Result<Bytes> {
    let mut buffer = buffers.take(length.min(READ_CHUNK_BYTES));
    let read = file.read_at(buffer.space(), offset)?;
    not_short(buffer, read)
}

/// Reads up to `length` bytes at `offset`: from the page cache, otherwise on the blocking pool.
pub async fn read_chunk(
    file: &Arc<dyn FsFile>,
    offset: u64,
    length: usize,
    buffers: &BufferPool,
) -> io::Result<Bytes> {
    match read_nowait(file.as_ref(), offset, length, buffers) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let (file, buffers) = (Arc::clone(file), buffers.clone());
            blocking::read_file(move || read_blocking(file.as_ref(), offset, length, &buffers)).await
        }
        done => done,
    }
}

/// A range of an open file.
#[derive(Clone)]
pub struct FileRange {
    /// The open file.
    pub file: Arc<dyn FsFile>,
    /// First byte.
    pub offset: u64,
    /// In bytes.
    pub length: usize,
}

/// Distance between the bytes that [`FileRange::is_cached`] tests. Readahead fills the page cache, and reclaim empties
/// it, in runs of neighbouring pages.
const PROBE_STEP_BYTES: usize = 256 * 1024;

/// Bytes read at a time to fill the page cache.
const LOAD_STEP_BYTES: usize = 64 * 1024;

impl fmt::Debug for FileRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRange")
            .field("offset", &self.offset)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl FileRange {
    /// Whether the page cache has the range, by samples. Fails if the file is shorter.
    pub fn is_cached(&self) -> io::Result<bool> {
        let last = self.length.saturating_sub(1);
        for ahead in (0..last).step_by(PROBE_STEP_BYTES).chain([last]) {
            match self.file.read_at_nowait(&mut [0], self.offset + ahead as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Waits until the page cache has the range.
    pub async fn into_page_cache(self) -> io::Result<Self> {
        if self.is_cached()? {
            return Ok(self);
        }
        blocking::read_file(move || self.load().map(|()| self)).await
    }

    /// Reads the range into the page cache. Blocks.
    pub fn load(&self) -> io::Result<()> {
        let mut bytes = vec![0; LOAD_STEP_BYTES.min(self.length)];
        let mut done = 0;
        while done < self.length {
            let step = bytes.len().min(self.length - done);
            let Some(into) = bytes.get_mut(..step) else { break };
            match self.file.read_at(into, self.offset + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read,
            }
        }
        Ok(())
    }
}

/// A file shorter than its known size was truncated by someone else.
fn not_short(buffer: Buffer, read: usize) -> io::Result<Bytes> {
    if read == 0 {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(buffer.filled(read))
    }
}
