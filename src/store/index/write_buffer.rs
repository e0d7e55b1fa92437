//! Write buffer for the time when the index is down. Reads find the buffered records, and they are written when the
//! index is open again.
//!
//! Removals are buffered too, because a revoked grant must not return with the old index. If the buffer overflows,
//! the old index is discarded for that reason.

use std::collections::BTreeMap;

use super::{Index, IndexError};

/// Size limit. If an outage exceeds it, the content of the index is lost.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// Memory used by an entry in addition to its bytes.
const PAIR_BYTES: usize = 128;

#[derive(Default)]
pub(super) struct WriteBuffer {
    /// `None` is a removal.
    pairs: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    bytes: usize,
    is_overflowed: bool,
}

impl WriteBuffer {
    /// Buffers `value`, which includes its checksum, or a removal.
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

    /// The buffered write of `key`, if there is one.
    pub(super) fn get(&self, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        self.pairs.get(key)
    }

    /// Returns whether the buffer has overflowed, so that removals are lost.
    pub(super) fn is_overflowed(&self) -> bool {
        self.is_overflowed
    }

    /// Writes the buffer to `index`. Drop the buffer afterwards.
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
