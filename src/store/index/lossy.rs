//! Test index that loses unflushed writes in a crash.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::sync::Arc;

use parking_lot::Mutex;

use super::handle::Location;
use super::{Index, IndexError, MemoryIndex, Pair};

/// The flushed state, which survives a crash.
#[derive(Clone, Default)]
pub(in crate::store) struct Flushed(Arc<Mutex<MemoryIndex>>);

impl Flushed {
    /// An index that starts with the flushed state.
    pub(in crate::store) fn location(&self) -> Location {
        let index = LosingIndex {
            written: self.0.lock().clone(),
            flushed: self.clone(),
        };
        Location::Given(Mutex::new(Some(Box::new(index))))
    }

    /// The state that survives a crash now.
    pub(in crate::store) fn now(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().clone())))
    }
}

struct LosingIndex {
    written: MemoryIndex,
    flushed: Flushed,
}

impl Index for LosingIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.written.get(key)
    }
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexError> {
        self.written.put(key, value)
    }
    fn remove(&mut self, key: &[u8]) -> Result<(), IndexError> {
        self.written.remove(key)
    }
    fn scan(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError> {
        self.written.scan(prefix, after, limit)
    }
    fn sync(&mut self) -> Result<(), IndexError> {
        *self.flushed.0.lock() = self.written.clone();
        Ok(())
    }
    fn abandon(self: Box<Self>, _: &IndexError) -> bool {
        true
    }
}
