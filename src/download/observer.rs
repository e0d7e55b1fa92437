//! Observer of a running download: reads the bytes that have arrived, and does not keep it running.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use super::state::{Download, Progress};
use super::{Leader, Shared};
use crate::store::file_read::{BufferPool, read_chunk};
use crate::store::fs::FsFile;

/// Reads the bytes of a download that readers may read. It counts neither as a request that waits nor as a reader.
pub struct Observer {
    progress: watch::Receiver<Progress>,
    observers: Arc<AtomicUsize>,
    buffers: BufferPool,
}

impl Clone for Observer {
    fn clone(&self) -> Self {
        self.observers.fetch_add(1, Ordering::Relaxed);
        Self {
            progress: self.progress.clone(),
            observers: Arc::clone(&self.observers),
            buffers: self.buffers.clone(),
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.observers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Leader {
    /// An observer of the transfer.
    pub fn observer(&self) -> Observer {
        Observer::new(&self.guard.download, &self.guard.shared)
    }
}

impl Observer {
    fn new(download: &Download, shared: &Shared) -> Self {
        download.observers.fetch_add(1, Ordering::Relaxed);
        Self {
            progress: download.progress.subscribe(),
            observers: Arc::clone(&download.observers),
            buffers: shared.buffers.clone(),
        }
    }

    /// Number of readable bytes.
    pub fn received(&self) -> u64 {
        match &*self.progress.borrow() {
            Progress::Opening | Progress::Failed(_) => 0,
            Progress::Filling(_, readable) | Progress::Complete(_, readable) => *readable,
        }
    }

    /// Waits until the bytes before `until` are readable, or the blob has ended. Returns the end of the readable bytes
    /// then, or `None` if the download failed.
    pub async fn reached(&self, until: u64) -> Option<u64> {
        let enough = |progress: &Progress| match progress {
            Progress::Opening => false,
            Progress::Filling(_, readable) => *readable >= until,
            Progress::Complete(..) | Progress::Failed(_) => true,
        };
        match self.clone().progress.wait_for(enough).await.as_deref() {
            Ok(Progress::Filling(_, readable) | Progress::Complete(_, readable)) => Some(*readable),
            _ => None,
        }
    }

    /// Reads readable bytes. `None` if they are not readable, or the disk failed.
    pub async fn read(&self, start: u64, length: usize) -> Option<Bytes> {
        let file: Arc<dyn FsFile> = match &*self.progress.borrow() {
            Progress::Filling(opened, readable) | Progress::Complete(opened, readable)
                if start + length as u64 <= *readable =>
            {
                Arc::clone(&opened.file)
            }
            _ => return None,
        };
        let mut bytes = BytesMut::with_capacity(length);
        while bytes.len() < length {
            let offset = start + bytes.len() as u64;
            let chunk = read_chunk(&file, offset, length - bytes.len(), &self.buffers)
                .await
                .ok()?;
            if chunk.is_empty() {
                return None;
            }
            bytes.extend_from_slice(&chunk);
        }
        Some(bytes.freeze())
    }
}
