//! Who has how much outstanding, and who reads next: the rules of the budget, without clock, task or lock.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::{Address, BODIES_MAX, BYTES_MAX};
use crate::store::file_read::READ_CHUNK_BYTES;

/// The middle step, for a few hundred bodies of one address.
const STEP_BYTES_SHORT: usize = 64 * 1024;

/// The least step while at most [`ROOMY_BODIES_MAX`] bodies read; also what a body may read that has nothing outstanding,
/// however much others have.
const STEP_BYTES_MIN: usize = 16 * 1024;

/// The least step when more do.
const STEP_BYTES_CROWDED: usize = 4 * 1024;

const ROOMY_BODIES_MAX: usize = 512;

/// A step is at most this part of what is left to its address, so that the last bytes are spread over many bodies.
const STEPS_LEFT: usize = 32;

/// One body may have two large steps outstanding: one being written, one ready.
const BODY_BYTES_MAX: usize = 2 * READ_CHUNK_BYTES;

/// A place in the queue.
pub(super) type Ticket = u64;

/// The accounts of all addresses. `W` is what waits.
pub(super) struct Ledger<W> {
    bytes: usize,
    bodies: usize,
    waiting: usize,
    accounts: HashMap<Address, Account<W>>,
    /// Addresses with waiters, the next one first.
    turns: VecDeque<Address>,
    tickets: Ticket,
}

struct Account<W> {
    bytes: usize,
    bodies: usize,
    /// In the order of their coming.
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

    /// Counts another body of `address` in, if its share allows it and no earlier one waits.
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

    /// Queues what could not enter.
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

    /// Takes a waiter out of the queue, if it is still there.
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

    /// Counts a body out.
    pub(super) fn leave(&mut self, address: Address) {
        if let Some(account) = self.accounts.get_mut(&address) {
            account.bodies = account.bodies.saturating_sub(1);
            self.bodies = self.bodies.saturating_sub(1);
        }
        self.close(address);
    }

    /// Counts the next waiter in whose address's share allows it; the addresses take turns.
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

    /// Counts the next step of a body of `address` that has `own` bytes outstanding; its size. `None`: not before some of
    /// those are written.
    pub(super) fn reserve(&mut self, address: Address, own: usize) -> Option<usize> {
        let free = BYTES_MAX.saturating_sub(self.bytes);
        let account = self.accounts.entry(address).or_default();
        let step = step(free.saturating_sub(account.bytes), self.bodies, own)?;
        account.bytes += step;
        self.bytes += step;
        Some(step)
    }

    /// Counts `after` bytes in place of `before`.
    pub(super) fn adjust(&mut self, address: Address, before: usize, after: usize) {
        let account = self.accounts.entry(address).or_default();
        account.bytes = account.bytes.saturating_sub(before) + after;
        self.bytes = self.bytes.saturating_sub(before) + after;
        self.close(address);
    }

    /// Forgets an address that has nothing any more.
    fn close(&mut self, address: Address) {
        let is_idle =
            |account: &Account<W>| account.bytes == 0 && account.bodies == 0 && account.waiting.is_empty();
        if self.accounts.get(&address).is_some_and(is_idle) {
            self.accounts.remove(&address);
        }
    }
}

/// The next step of a body with `own` bytes outstanding, where `left` bytes are left to its address.
fn step(left: usize, bodies: usize, own: usize) -> Option<usize> {
    let least = if bodies > ROOMY_BODIES_MAX {
        STEP_BYTES_CROWDED
    } else {
        STEP_BYTES_MIN
    };
    let step = match left / STEPS_LEFT {
        READ_CHUNK_BYTES.. => READ_CHUNK_BYTES,
        STEP_BYTES_SHORT.. => STEP_BYTES_SHORT,
        _ => least,
    };
    if own == 0 || (left >= step && own + step <= BODY_BYTES_MAX) {
        Some(step)
    } else if own <= least / 2 {
        // A short chunk, such as the head of a part, does not cost a body its turn.
        Some(least - own)
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
