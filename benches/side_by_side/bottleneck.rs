//! Shared bandwidth limit: forwards connections to an upstream with one rate for all responses. nginx's `limit_rate`
//! is per connection, so a client with a hundred connections would get a hundred times as much.

use crate::Outcome;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const STEP_BYTES: usize = 64 * 1024;
/// Burst allowed after an idle time.
const CATCH_UP_MAX: Duration = Duration::from_millis(20);

/// A listener that runs until the process ends. Its connections are closed on drop.
pub(crate) struct Bottleneck {
    pub(crate) address: SocketAddr,
    line: Arc<Line>,
}

struct Line {
    upstream: SocketAddr,
    pace: Pace,
    passed: AtomicU64,
    is_closed: AtomicBool,
}

/// A rate, kept by all that wait for their turn.
pub(crate) struct Pace {
    bytes_per_second: f64,
    /// Earliest time of the next byte.
    next: Mutex<Instant>,
}

impl Bottleneck {
    pub(crate) fn before(upstream: SocketAddr, bytes_per_second: f64) -> Outcome<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let line = Arc::new(Line {
            upstream,
            pace: Pace::new(bytes_per_second),
            passed: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
        });
        let shared = Arc::clone(&line);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let line = Arc::clone(&shared);
                std::thread::spawn(move || line.pass_on(&client));
            }
        });
        Ok(Bottleneck { address, line })
    }

    /// Response bytes so far, including heads.
    pub(crate) fn passed(&self) -> u64 {
        self.line.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Bottleneck {
    fn drop(&mut self) {
        self.line.is_closed.store(true, Ordering::Relaxed);
    }
}

impl Line {
    /// Either end may close, which closes the other.
    fn pass_on(&self, client: &TcpStream) -> io::Result<()> {
        let upstream = TcpStream::connect(self.upstream)?;
        client.set_nodelay(true)?;
        upstream.set_nodelay(true)?;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = io::copy(&mut &*client, &mut &upstream);
                let _ = upstream.shutdown(Shutdown::Both);
            });
            let _ = self.pass_back(&upstream, client);
            client.shutdown(Shutdown::Both)
        })
    }

    fn pass_back(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let mut buffer = vec![0; STEP_BYTES];
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 || self.is_closed.load(Ordering::Relaxed) {
                return Ok(());
            }
            self.pace.wait_for_turn(count);
            to.write_all(buffer.get(..count).unwrap_or_default())?;
            self.passed.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}

impl Pace {
    pub(crate) fn new(bytes_per_second: f64) -> Self {
        Pace {
            bytes_per_second,
            next: Mutex::new(Instant::now()),
        }
    }

    pub(crate) fn wait_for_turn(&self, count: usize) {
        let now = Instant::now();
        let turn = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = (*next).max(now.checked_sub(CATCH_UP_MAX).unwrap_or(now));
            *next = turn + Duration::from_secs_f64(count as f64 / self.bytes_per_second);
            turn
        };
        std::thread::sleep(turn.saturating_duration_since(now));
    }
}
