//! Accounts of the memory budget by client address: sizes of reads, and turns of waiting bodies. Without clock, task or lock.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::{Address, BODIES_MAX, BYTES_MAX};
use crate::store::file_read::READ_CHUNK_BYTES;

/// The medium chunk, for a few hundred bodies of one address.
const CHUNK_BYTES_MEDIUM: usize = 64 * 1024;

/// The minimum chunk while at most [`UNCROWDED_BODIES_MAX`] bodies read. A body with nothing outstanding may always read
/// it.
const CHUNK_BYTES_MIN: usize = 16 * 1024;

/// The minimum chunk while more bodies read.
const CHUNK_BYTES_MIN_CROWDED: usize = 4 * 1024;

const UNCROWDED_BODIES_MAX: usize = 512;

/// A chunk is at most one in `CHUNKS_LEFT_MIN` of the bytes left to its address, so that many bodies share the last ones.
const CHUNKS_LEFT_MIN: usize = 32;

/// One body may have two large chunks outstanding: one being written, one ready.
const BODY_BYTES_MAX: usize = 2 * READ_CHUNK_BYTES;

/// Identifies a waiter in the queue.
pub(super) type Ticket = u64;

/// The accounts of all addresses. `W` is the type of a waiter.
pub(super) struct Ledger<W> {
    bytes: usize,
    bodies: usize,
    waiting: usize,
    accounts: HashMap<Address, Account<W>>,
    /// Addresses with waiters, in the order of their turns.
    turns: VecDeque<Address>,
    tickets: Ticket,
}

struct Account<W> {
    bytes: usize,
    bodies: usize,
    /// In order of arrival.
    waiting: BTreeMap<Ticket, W>,
}

impl<W> Default for Account<W> {
    fn default() -> Self {
        Self {
            bytes: 0,
            bodies: 0,
            waiting: BTreeMap::new(),
        }
    }
}

impl<W> Default for Ledger<W> {
    fn default() -> Self {
        Self {
            bytes: 0,
            bodies: 0,
            waiting: 0,
            accounts: HashMap::new(),
            turns: VecDeque::new(),
            tickets: 0,
        }
    }
}

impl<W> Ledger<W> {
    /// Bytes outstanding.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bodies that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Admits another body of `address`, if the share of the address allows it and no earlier body waits.
    pub(super) fn enter(&mut self, address: Address) -> bool {
        let free = BODIES_MAX.saturating_sub(self.bodies);
        let account = self.accounts.entry(address).or_default();
        if !account.waiting.is_empty() || account.bodies >= free {
            return false;
        }
        account.bodies += 1;
        self.bodies += 1;
        true
    }

    /// Queues a body that [`Self::enter`] did not admit.
    pub(super) fn queue(&mut self, address: Address, waiter: W) -> Ticket {
        let account = self.accounts.entry(address).or_default();
        if account.waiting.is_empty() {
            self.turns.push_back(address);
        }
        let ticket = self.tickets;
        self.tickets += 1;
        account.waiting.insert(ticket, waiter);
        self.waiting += 1;
        ticket
    }

    /// Removes a waiter from the queue, if it is still there.
    pub(super) fn cancel(&mut self, address: Address, ticket: Ticket) -> Option<W> {
        let account = self.accounts.get_mut(&address)?;
        let waiter = account.waiting.remove(&ticket)?;
        self.waiting -= 1;
        if account.waiting.is_empty() {
            self.turns.retain(|turn| *turn != address);
        }
        self.close(address);
        Some(waiter)
    }

    /// Ends a body of `address`.
    pub(super) fn leave(&mut self, address: Address) {
        if let Some(account) = self.accounts.get_mut(&address) {
            account.bodies = account.bodies.saturating_sub(1);
            self.bodies = self.bodies.saturating_sub(1);
        }
        self.close(address);
    }

    /// Admits the next waiter whose address's share allows it. The addresses take turns.
    pub(super) fn admit(&mut self) -> Option<(Address, W)> {
        let free = BODIES_MAX.saturating_sub(self.bodies);
        for _ in 0..self.turns.len() {
            let address = self.turns.pop_front()?;
            let Some(account) = self.accounts.get_mut(&address) else {
                continue;
            };
            if account.bodies < free
                && let Some((_, waiter)) = account.waiting.pop_first()
            {
                account.bodies += 1;
                self.bodies += 1;
                self.waiting -= 1;
                if !account.waiting.is_empty() {
                    self.turns.push_back(address);
                }
                return Some((address, waiter));
            }
            self.turns.push_back(address);
        }
        None
    }

    /// Counts the next chunk of a body that has `outstanding` bytes, and returns its size. `None` until some of those are
    /// written.
    pub(super) fn reserve(&mut self, address: Address, outstanding: usize) -> Option<usize> {
        let free = BYTES_MAX.saturating_sub(self.bytes);
        let account = self.accounts.entry(address).or_default();
        let bytes = chunk_bytes(free.saturating_sub(account.bytes), self.bodies, outstanding)?;
        account.bytes += bytes;
        self.bytes += bytes;
        Some(bytes)
    }

    /// Counts `after` bytes instead of `before`.
    pub(super) fn adjust(&mut self, address: Address, before: usize, after: usize) {
        let account = self.accounts.entry(address).or_default();
        account.bytes = account.bytes.saturating_sub(before) + after;
        self.bytes = self.bytes.saturating_sub(before) + after;
        self.close(address);
    }

    /// Removes the account of an address without bytes, bodies and waiters.
    fn close(&mut self, address: Address) {
        let is_idle =
            |account: &Account<W>| account.bytes == 0 && account.bodies == 0 && account.waiting.is_empty();
        if self.accounts.get(&address).is_some_and(is_idle) {
            self.accounts.remove(&address);
        }
    }
}

/// The size of the next chunk of a body with `outstanding` bytes, if `left` bytes are left to its address.
fn chunk_bytes(left: usize, bodies: usize, outstanding: usize) -> Option<usize> {
    let min = if bodies > UNCROWDED_BODIES_MAX {
        CHUNK_BYTES_MIN_CROWDED
    } else {
        CHUNK_BYTES_MIN
    };
    let bytes = match left / CHUNKS_LEFT_MIN {
        READ_CHUNK_BYTES.. => READ_CHUNK_BYTES,
        CHUNK_BYTES_MEDIUM.. => CHUNK_BYTES_MEDIUM,
        _ => min,
    };
    if outstanding == 0 || (left >= bytes && outstanding + bytes <= BODY_BYTES_MAX) {
        Some(bytes)
    } else if outstanding <= min / 2 {
        // A short chunk, such as the head of a part, must not stop a body from reading.
        Some(min - outstanding)
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
