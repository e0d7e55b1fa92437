//! The budget of response bytes in memory: read, and not yet written to a socket.
//!
//! A client decides how long a chunk stays in memory: by its windows, by the number of its streams, by not reading. Each
//! chunk is therefore counted, for the process and for the client's address, until the connection drops it. An address
//! may have as much outstanding as is free (dynamic thresholds, Choudhury and Hahne 1998): one alone gets half of
//! [`BYTES_MAX`], two get a third each, and some is always free for the next.
//!
//! The budget bounds the size of a step, it never stops a body: a body with nothing outstanding may always read one step
//! of the least size. The bound is therefore [`BYTES_MAX`], and one least step for each of [`BODIES_MAX`] bodies:
//! 40 MiB + 512 × 16 KiB + 15,872 × 4 KiB = 110 MiB for the process, and 20 MiB + 512 × 16 KiB + 7,680 × 4 KiB = 58 MiB
//! for one address. A body beyond its address's share of [`BODIES_MAX`] waits for another one to end, and reads nothing
//! meanwhile.
//!
//! Not counted, for constants bound it: what several bodies share in memory (manifests and small blobs: a reference), and
//! per connection 64 KiB of TLS records.

mod ledger;

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use tokio::sync::oneshot;

use ledger::{Ledger, Ticket};

/// The bytes of all response bodies in memory, beyond one least step for each body. With less, 64 readers of one address
/// would not have the largest step each.
const BYTES_MAX: usize = 40 * 1024 * 1024;

/// Response bodies that may read at a time. Further ones wait.
const BODIES_MAX: usize = 16_384;

/// A client's address; none for a socket file.
type Address = Option<IpAddr>;

/// The budget of response bytes of the process.
#[derive(Clone, Default)]
pub struct Egress(Arc<Mutex<Ledger<oneshot::Sender<Place>>>>);

/// What is outstanding now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    /// Bytes in memory, read and not yet written.
    pub bytes: u64,
    /// Bodies that wait for another one to end.
    pub waiting: u64,
}

impl Egress {
    /// What is outstanding now.
    pub fn outstanding(&self) -> Outstanding {
        let ledger = self.ledger();
        Outstanding {
            bytes: ledger.bytes() as u64,
            waiting: ledger.waiting() as u64,
        }
    }

    /// The account of one body for a client at `address`.
    pub(super) fn body(&self, address: Address) -> Account {
        Account {
            egress: self.clone(),
            address,
            own: Arc::default(),
            admission: Admission::New,
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger<oneshot::Sender<Place>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The account of one body.
pub(super) struct Account {
    egress: Egress,
    address: Address,
    own: Arc<Own>,
    admission: Admission,
}

enum Admission {
    New,
    Queued {
        admitted: oneshot::Receiver<Place>,
        _queued: Queued,
    },
    Admitted {
        _place: Place,
    },
}

/// What one body has outstanding, and the task that waits for it to become less.
#[derive(Default)]
struct Own(Mutex<(usize, Option<Waker>)>);

impl Own {
    fn lock(&self) -> MutexGuard<'_, (usize, Option<Waker>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Account {
    /// Reserves the bytes of the next step, once the body may read.
    pub(super) fn poll_reserve(&mut self, context: &mut Context<'_>) -> Poll<Charge> {
        ready!(self.poll_admission(context));
        let mut own = self.own.lock();
        let (outstanding, waker) = &mut *own;
        let Some(bytes) = self.egress.ledger().reserve(self.address, *outstanding) else {
            // Some of its own is outstanding: dropping that wakes it.
            *waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        *outstanding += bytes;
        drop(own);
        Poll::Ready(Charge {
            egress: self.egress.clone(),
            address: self.address,
            own: Arc::clone(&self.own),
            bytes,
        })
    }

    fn poll_admission(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.admission {
                Admission::Admitted { .. } => return Poll::Ready(()),
                Admission::New => self.admission = self.enter(),
                Admission::Queued { admitted, .. } => match ready!(Pin::new(admitted).poll(context)) {
                    Ok(place) => self.admission = Admission::Admitted { _place: place },
                    // The queue never drops a waiter; were it to, the body would queue again.
                    Err(_) => self.admission = Admission::New,
                },
            }
        }
    }

    fn enter(&self) -> Admission {
        let mut ledger = self.egress.ledger();
        if ledger.enter(self.address) {
            drop(ledger);
            return Admission::Admitted {
                _place: Place::new(&self.egress, self.address),
            };
        }
        let (sender, admitted) = oneshot::channel();
        let ticket = ledger.queue(self.address, sender);
        drop(ledger);
        let queued = Queued {
            egress: self.egress.clone(),
            address: self.address,
            ticket,
        };
        Admission::Queued {
            admitted,
            _queued: queued,
        }
    }
}

/// A wait for a [`Place`]; leaves the queue when it is dropped.
struct Queued {
    egress: Egress,
    address: Address,
    ticket: Ticket,
}

impl Drop for Queued {
    fn drop(&mut self) {
        let left = self.egress.ledger().cancel(self.address, self.ticket);
        drop(left);
    }
}

/// The right of a body to read, until it ends.
struct Place(Option<(Egress, Address)>);

impl Place {
    fn new(egress: &Egress, address: Address) -> Self {
        Self(Some((egress.clone(), address)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((egress, address)) = self.0.take() else {
            return;
        };
        egress.ledger().leave(address);
        loop {
            let next = egress.ledger().admit();
            let Some((address, waiter)) = next else { return };
            // A waiter that left meanwhile hands its place back, by this very function.
            let _ = waiter.send(Place::new(&egress, address));
        }
    }
}

/// Bytes of one body that are in memory, or about to be.
pub(super) struct Charge {
    egress: Egress,
    address: Address,
    own: Arc<Own>,
    bytes: usize,
}

impl Charge {
    /// The size of the step.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counts `chunk`, which keeps `held` bytes of memory, until the last reference to it is dropped.
    pub(super) fn onto(mut self, chunk: Bytes, held: usize) -> Bytes {
        if held != self.bytes {
            self.egress.ledger().adjust(self.address, self.bytes, held);
            let mut own = self.own.lock();
            own.0 = own.0.saturating_sub(self.bytes) + held;
            self.bytes = held;
        }
        Bytes::from_owner(Counted { chunk, _charge: self })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.egress.ledger().adjust(self.address, self.bytes, 0);
        let mut own = self.own.lock();
        own.0 = own.0.saturating_sub(self.bytes);
        let waker = own.1.take();
        drop(own);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A chunk on its way out. The chunk goes before its charge.
struct Counted {
    chunk: Bytes,
    _charge: Charge,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.chunk
    }
}

#[cfg(test)]
mod tests;
