//! Memory budget of response bodies: bytes that were read and not yet written to a socket.
//!
//! A client controls how long a chunk stays in memory: by its windows, by its number of streams, and by not reading. Each
//! chunk is therefore counted, for the process and for the client's address, until the connection drops it. An address
//! may have as many bytes outstanding as are free (dynamic thresholds, Choudhury and Hahne 1998). One address alone gets
//! half of [`BYTES_MAX`], two get a third each, and some is always free for the next.
//!
//! The budget limits the size of a read and never stops a body: a body with nothing outstanding may always read one chunk
//! of the minimum size. The limit is therefore [`BYTES_MAX`] plus one minimum chunk for each of [`BODIES_MAX`] bodies:
//! 40 MiB + 512 × 16 KiB + 3,584 × 4 KiB = 62 MiB for the process, and 20 MiB + 512 × 16 KiB + 1,536 × 4 KiB = 34 MiB
//! for one address. A body beyond its address's share of [`BODIES_MAX`] waits until another one ends, and reads nothing
//! meanwhile.
//!
//! TLS records that a client has not read are counted in place of the chunk that they encrypt ([`Unsent`]). The body may
//! then read its next one, so over TLS each may have two minimum chunks.
//!
//! Not counted, because a constant limits it: content that several bodies share in memory (manifests and small blobs).

mod ledger;

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use ledger::{Ledger, Ticket};

use super::listener::host_network;

/// The bytes of all response bodies in memory, beyond one minimum chunk for each body. With less, 64 readers of one
/// address could not read the largest chunk each. Blobs that `sendfile` sends are not counted, because none of their bytes
/// is in memory.
const BYTES_MAX: usize = 40 * 1024 * 1024;

/// Response bodies that may read at the same time. Further ones wait. That is 2,048 of one address alone: five times 10
/// jobs that pull 40 layers each. With 16,384, unread streams of one address took 24 MiB more.
const BODIES_MAX: usize = 4_096;

/// The network of a client ([`host_network`]). `None` for a unix socket.
type Address = Option<IpAddr>;

/// Memory budget of the response bodies of the process.
#[derive(Clone, Default)]
pub struct Egress(Arc<Mutex<Ledger<oneshot::Sender<Permit>>>>);

/// Current use of the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    /// Bytes that were read and not yet written.
    pub bytes: u64,
    /// Bodies that wait until another one ends.
    pub waiting: u64,
}

impl Egress {
    /// Current use of the budget.
    pub fn outstanding(&self) -> Outstanding {
        let ledger = self.0.lock();
        Outstanding {
            bytes: ledger.bytes() as u64,
            waiting: ledger.waiting() as u64,
        }
    }

    /// The account of one body for a client at `address`.
    pub(super) fn body(&self, address: Option<IpAddr>) -> Account {
        Account {
            egress: self.clone(),
            address: address.map(host_network),
            of_body: Arc::default(),
            admission: Admission::New,
        }
    }

    /// The unsent TLS records of one connection of a client at `address`.
    pub(super) fn unsent(&self, address: Option<IpAddr>) -> Unsent {
        Unsent {
            egress: self.clone(),
            address: address.map(host_network),
            bytes: 0,
        }
    }
}

/// Encrypted bytes of one connection that the socket has not taken yet.
pub(super) struct Unsent {
    egress: Egress,
    address: Address,
    bytes: usize,
}

impl Unsent {
    /// Counts `bytes` from now on.
    pub(super) fn set(&mut self, bytes: usize) {
        if bytes != self.bytes {
            self.egress.0.lock().adjust(self.address, self.bytes, bytes);
            self.bytes = bytes;
        }
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The account of one body.
pub(super) struct Account {
    egress: Egress,
    address: Address,
    of_body: Arc<BodyBytes>,
    admission: Admission,
}

enum Admission {
    New,
    Queued {
        admitted: oneshot::Receiver<Permit>,
        _queued: Queued,
    },
    Admitted {
        _permit: Permit,
    },
}

/// The outstanding bytes of one body, and the task that waits until they are fewer.
#[derive(Default)]
struct BodyBytes(Mutex<(usize, Option<Waker>)>);

impl Account {
    /// Reserves the bytes of the next chunk. Pending until the body may read.
    pub(super) fn poll_reserve(&mut self, context: &mut Context<'_>) -> Poll<Charge> {
        ready!(self.poll_admission(context));
        let mut of_body = self.of_body.0.lock();
        let (outstanding, waker) = &mut *of_body;
        let Some(bytes) = self.egress.0.lock().reserve(self.address, *outstanding) else {
            // A chunk of this body is outstanding. Its drop wakes the task.
            *waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        *outstanding += bytes;
        drop(of_body);
        Poll::Ready(Charge {
            egress: self.egress.clone(),
            address: self.address,
            of_body: Arc::clone(&self.of_body),
            bytes,
        })
    }

    /// Whether the body waits for its permit, until another body ends.
    pub(super) fn is_queued(&self) -> bool {
        matches!(self.admission, Admission::Queued { .. })
    }

    fn poll_admission(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.admission {
                Admission::Admitted { .. } => return Poll::Ready(()),
                Admission::New => self.admission = self.enter(),
                Admission::Queued { admitted, .. } => match ready!(Pin::new(admitted).poll(context)) {
                    Ok(permit) => self.admission = Admission::Admitted { _permit: permit },
                    // Not expected: the queue drops no waiter. The body would queue again.
                    Err(_) => self.admission = Admission::New,
                },
            }
        }
    }

    fn enter(&self) -> Admission {
        let mut ledger = self.egress.0.lock();
        if ledger.enter(self.address) {
            drop(ledger);
            return Admission::Admitted {
                _permit: Permit::new(&self.egress, self.address),
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

/// A wait for a [`Permit`]. Its drop leaves the queue.
struct Queued {
    egress: Egress,
    address: Address,
    ticket: Ticket,
}

impl Drop for Queued {
    fn drop(&mut self) {
        let left = self.egress.0.lock().cancel(self.address, self.ticket);
        drop(left);
    }
}

/// The permit of a body to read. Its drop gives it to the next waiter.
struct Permit(Option<(Egress, Address)>);

impl Permit {
    fn new(egress: &Egress, address: Address) -> Self {
        Self(Some((egress.clone(), address)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some((egress, address)) = self.0.take() else {
            return;
        };
        egress.0.lock().leave(address);
        loop {
            let next = egress.0.lock().admit();
            let Some((address, waiter)) = next else { return };
            // If the waiter has left, the permit comes back and is dropped here, which admits the next one.
            let _ = waiter.send(Permit::new(&egress, address));
        }
    }
}

/// Bytes of one body that are in memory or reserved for the next read.
pub(super) struct Charge {
    egress: Egress,
    address: Address,
    of_body: Arc<BodyBytes>,
    bytes: usize,
}

impl Charge {
    /// The size of the reserved chunk.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counts `chunk`, which occupies `in_memory` bytes, until the last reference to it is dropped.
    pub(super) fn onto(mut self, chunk: Bytes, in_memory: usize) -> Bytes {
        if in_memory != self.bytes {
            self.egress.0.lock().adjust(self.address, self.bytes, in_memory);
            let mut of_body = self.of_body.0.lock();
            of_body.0 = of_body.0.saturating_sub(self.bytes) + in_memory;
            self.bytes = in_memory;
        }
        Bytes::from_owner(Counted { chunk, _charge: self })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.egress.0.lock().adjust(self.address, self.bytes, 0);
        let mut of_body = self.of_body.0.lock();
        of_body.0 = of_body.0.saturating_sub(self.bytes);
        let waker = of_body.1.take();
        drop(of_body);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A counted chunk. The field order matters: the chunk is dropped before its charge.
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
