//! Distant upstream: a TCP relay with a round trip and a limit of the throughput, for each connection or for all.
//!
//! Each direction has a queue of steps, each with the time at which it arrives. The queue holds at most what a window of
//! TCP would, so a receiver that stops reading soon stops the sender. Slow start and loss are not modelled.

use crate::Outcome;
use crate::bottleneck::Pace;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

const ROUND_TRIP: Duration = Duration::from_millis(40);
/// Large, because eight connections share two cores with the measured programs.
const STEP_BYTES: usize = 128 * 1024;
/// Steps under way in one direction: at most 2 MiB, where 40 MB/s need 0.8 MB.
const STEPS_MAX: usize = 16;

#[derive(Clone, Copy)]
pub(crate) enum Limit {
    /// Bytes per second of each connection.
    Each(f64),
    /// Bytes per second of all connections together.
    Total(f64),
}

/// A relay that runs until the process ends.
pub(crate) struct Distance {
    pub(crate) address: SocketAddr,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    connections: AtomicU64,
}

/// Counts of a relay so far, or between two times.
#[derive(Clone, Copy)]
pub(crate) struct Passed {
    /// Response bytes that the upstream sent, including heads and bytes that were never read.
    pub(crate) bytes: u64,
    pub(crate) connections: u64,
}

/// Bytes and the time at which they arrive.
type Step = (Instant, Vec<u8>, usize);

impl Distance {
    pub(crate) fn before(upstream: SocketAddr, limit: Limit) -> Outcome<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, counters) = (listener.local_addr()?, Arc::new(Counters::default()));
        let counted = Arc::clone(&counters);
        let shared = match limit {
            Limit::Each(_) => None,
            Limit::Total(rate) => Some(Arc::new(Pace::new(rate))),
        };
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                counted.connections.fetch_add(1, Ordering::Relaxed);
                let counted = Arc::clone(&counted);
                let (Limit::Each(rate) | Limit::Total(rate)) = limit;
                let pace = shared.clone().unwrap_or_else(|| Arc::new(Pace::new(rate)));
                std::thread::spawn(move || connect(&client, upstream, &pace, &counted));
            }
        });
        Ok(Distance { address, counters })
    }

    pub(crate) fn passed(&self) -> Passed {
        Passed {
            bytes: self.counters.sent.load(Ordering::Relaxed),
            connections: self.counters.connections.load(Ordering::Relaxed),
        }
    }
}

impl Passed {
    pub(crate) fn since(self, before: Passed) -> Passed {
        Passed {
            bytes: self.bytes - before.bytes,
            connections: self.connections - before.connections,
        }
    }
}

fn connect(client: &TcpStream, upstream: SocketAddr, pace: &Pace, counters: &Counters) -> io::Result<()> {
    // The kernel has accepted the client at once. Its first bytes could leave a round trip later.
    let established = Instant::now() + ROUND_TRIP;
    let upstream = TcpStream::connect(upstream)?;
    client.set_nodelay(true)?;
    upstream.set_nodelay(true)?;
    std::thread::scope(|scope| {
        scope.spawn(|| relay(client, &upstream, |_| established));
        relay(&upstream, client, |count| {
            pace.wait_for_turn(count);
            counters.sent.fetch_add(count as u64, Ordering::Relaxed);
            Instant::now()
        });
    });
    Ok(())
}

/// Passes on one direction until either end closes. `leave` returns the earliest time at which that many bytes leave.
fn relay(mut from: &TcpStream, to: &TcpStream, leave: impl Fn(usize) -> Instant) {
    let ((queue, queued), (spent, spare)) = (sync_channel::<Step>(STEPS_MAX), channel());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let delivered = deliver(queued, to, |buffer| spent.send(buffer).is_ok());
            if delivered.is_err() {
                // The sender learns of it as late as over a real line.
                std::thread::sleep(ROUND_TRIP / 2);
                let _ = from.shutdown(Shutdown::Both);
            }
            let _ = to.shutdown(Shutdown::Write);
        });
        let queue: SyncSender<Step> = queue;
        loop {
            let mut buffer = spare.try_recv().unwrap_or_else(|_| vec![0; STEP_BYTES]);
            let Ok(count @ 1..) = from.read(&mut buffer) else {
                return;
            };
            let arrival = leave(count).max(Instant::now()) + ROUND_TRIP / 2;
            if queue.send((arrival, buffer, count)).is_err() {
                return;
            }
        }
    });
}

fn deliver(queued: Receiver<Step>, mut to: &TcpStream, reuse: impl Fn(Vec<u8>) -> bool) -> io::Result<()> {
    for (arrival, buffer, count) in queued {
        std::thread::sleep(arrival.saturating_duration_since(Instant::now()));
        to.write_all(buffer.get(..count).unwrap_or_default())?;
        reuse(buffer);
    }
    Ok(())
}
