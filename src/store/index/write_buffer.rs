//! What is written while the index is down: kept in memory, found there, and put into the index once it is open again.
//!
//! A removal counts as a write: a grant that was taken back must not return with the old index. What is too much to be
//! remembered makes the old index worthless for that reason.

use std::collections::BTreeMap;

use super::{Index, IndexError};

/// How much is remembered; an outage of the index in which more is written costs its content.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// What a key and its place cost beside their bytes.
const PAIR_BYTES: usize = 128;

#[derive(Default)]
pub(super) struct WriteBuffer {
    /// `None` is a removal.
    pairs: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    bytes: usize,
    is_overflowed: bool,
}

impl WriteBuffer {
    /// `value` with its checksum, or its removal.
    pub(super) fn write(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) {
        let added = PAIR_BYTES + key.len() + value.as_ref().map_or(0, Vec::len);
        if self.is_overflowed || self.bytes + added > BYTES_MAX {
            *self = Self {
                is_overflowed: true,
                ..Self::default()
            };
            return;
        }
        self.bytes += added;
        self.pairs.insert(key, value);
    }

    /// What was written of `key`, if anything was.
    pub(super) fn get(&self, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        self.pairs.get(key)
    }

    /// Whether more was written than is remembered: the index has missed removals.
    pub(super) fn is_overflowed(&self) -> bool {
        self.is_overflowed
    }

    /// Puts all of it into `index`; to be dropped once that is done.
    pub(super) fn replay(&self, index: &mut dyn Index) -> Result<(), IndexError> {
        for (key, value) in &self.pairs {
            match value {
                Some(value) => index.put(key, value)?,
                None => index.remove(key)?,
            }
        }
        if self.pairs.is_empty() {
            return Ok(());
        }
        index.sync()
    }
}
