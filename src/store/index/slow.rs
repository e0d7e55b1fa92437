//! Test index whose flushes wait for the test.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::Mutex;

use super::handle::{IndexHandle, Location};
use super::{Index, IndexError, MemoryIndex, Pair};

/// Controls the flushes of the index.
pub(in crate::store) struct Flushes {
    begun: Receiver<()>,
    through: Sender<()>,
}

impl Flushes {
    /// Waits until a flush has begun.
    pub(in crate::store) fn begun(&self) {
        self.begun.recv().unwrap();
    }

    /// Lets one flush complete.
    pub(in crate::store) fn let_through(&self) {
        self.through.send(()).unwrap();
    }
}

struct SlowIndex {
    inner: MemoryIndex,
    begun: Sender<()>,
    through: Mutex<Receiver<()>>,
}

/// An index whose flushes the test controls. If the test drops the control, flushes complete at once.
pub(in crate::store) fn slow_index() -> (Arc<IndexHandle>, Flushes) {
    let (location, flushes) = slow_location();
    (Arc::new(IndexHandle::start(location).unwrap()), flushes)
}

/// Location of such an index.
pub(in crate::store) fn slow_location() -> (Location, Flushes) {
    let (begun, is_begun) = channel();
    let (let_through, through) = channel();
    let index = SlowIndex {
        inner: MemoryIndex::default(),
        begun,
        through: Mutex::new(through),
    };
    let location = Location::Given(Mutex::new(Some(Box::new(index))));
    let flushes = Flushes {
        begun: is_begun,
        through: let_through,
    };
    (location, flushes)
}

impl Index for SlowIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.inner.get(key)
    }
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexError> {
        self.inner.put(key, value)
    }
    fn remove(&mut self, key: &[u8]) -> Result<(), IndexError> {
        self.inner.remove(key)
    }
    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError> {
        self.inner.scan(prefix, after, limit)
    }
    fn sync(&mut self) -> Result<(), IndexError> {
        let _gone = self.begun.send(());
        let _gone = self.through.lock().recv();
        Ok(())
    }
    fn abandon(self: Box<Self>, _: &IndexError) -> bool {
        true
    }
}
