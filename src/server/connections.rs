//! Connection admission: limits per address and for the process, and the idle connection that is closed at a limit.
//!
//! An accepted connection first needs a permit of its address ([`AddressPermit`]). While its address has none left, it
//! waits without a permit of the process. It then needs a permit of the process ([`Slot`]). If none is left, the longest
//! idle connection is closed. A connection is idle while it has no request in flight. [`victim`] chooses; it is pure.

mod permits;
mod victim;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::permits::{Permit, Permits};
use self::victim::{Candidate, Choice, Newcomer, is_many, victim};
use super::listener::host_network;
use crate::store::LogLimit;
use crate::telemetry::{CloseReason, ConnectionState, OpenConnection, Telemetry};

/// The time in which a connection that is being closed sends the rest of its response.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// Interval of the search for a connection to close, if no connection reports that it became idle.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Limits on the number of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Connections of the process.
    pub(crate) places: usize,
    /// Connections of one address, or of one IPv6 /64. The same number of further ones may wait.
    pub(crate) per_address: usize,
    /// Waiting connections of all addresses together.
    pub(crate) waiting: usize,
    /// Whether, at the limit of an address, its longest idle connection is closed for a new one.
    pub(crate) closes_at_address: bool,
}

/// The connections of one kind of listener. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Connections(Arc<Inner>);

struct Inner {
    listener: &'static str,
    bounds: Bounds,
    telemetry: Telemetry,
    closed: LogLimit,
    began: Instant,
    permits: Permits,
    /// Connections that wait until another one is closed.
    waiters: AtomicUsize,
    /// Wakes `waiters` when a connection became idle.
    became_idle: Notify,
    registered: Mutex<Registered>,
    /// Connections through a unix socket. They have no limit of an address: the socket's mode restricts its users.
    local: Arc<Address>,
}

#[derive(Default)]
struct Registered {
    /// By [`host_network`].
    addresses: HashMap<IpAddr, Arc<Address>>,
    /// The connections with a permit of the process.
    open: HashMap<u64, Arc<Entry>>,
    next: u64,
    waiting: usize,
}

/// The connections of one address, or of one IPv6 /64.
struct Address {
    permits: Arc<Semaphore>,
    /// Connections that have a permit or wait for one. Changed only under the lock.
    present: AtomicUsize,
    /// Open connections without a request in flight.
    idle: AtomicUsize,
    /// Connections that ended without a request, since the last request of this address.
    unused: AtomicUsize,
}

/// State of an open connection, shared with its requests and with the search for a connection to close.
struct Entry {
    connections: Connections,
    address: Arc<Address>,
    ip: Option<IpAddr>,
    /// Requests and tunnels in flight.
    requests: AtomicUsize,
    has_requested: AtomicBool,
    /// Whether bytes wait until the peer has read earlier ones.
    is_sending: AtomicBool,
    /// In microseconds since `Inner::began`.
    idle_since: AtomicU64,
    closing: CancellationToken,
}

/// Why a connection was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The limit of waiting connections of its address is reached.
    Address,
    /// The limit of waiting connections of all addresses is reached.
    Waiting,
}

impl Refused {
    /// The name in the log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Address => "address-limit",
            Self::Waiting => "waiting-limit",
        }
    }
}

/// Result of the admission of an accepted connection.
pub(crate) enum Entering {
    /// It has a permit of its address.
    Admitted(AddressPermit),
    /// It waits for a permit of its address.
    Waits(Wait),
    /// It is rejected, and closed by the caller.
    Refused(Refused),
}

impl Connections {
    /// Without connections. `listener` names the kind of listener in log and metrics.
    pub(crate) fn new(listener: &'static str, bounds: Bounds, telemetry: Telemetry) -> Self {
        Self(Arc::new(Inner {
            listener,
            bounds,
            telemetry,
            closed: LogLimit::default(),
            began: Instant::now(),
            permits: Permits::new(bounds.places),
            waiters: AtomicUsize::new(0),
            became_idle: Notify::new(),
            registered: Mutex::default(),
            local: Address::new(Semaphore::MAX_PERMITS),
        }))
    }

    /// Counts an accepted connection under its address. Never waits.
    pub(crate) fn enter(&self, ip: Option<IpAddr>) -> Entering {
        let bounds = self.0.bounds;
        let mut registered = self.0.registered.lock();
        let address = match ip {
            None => Arc::clone(&self.0.local),
            Some(ip) => {
                let address = registered
                    .addresses
                    .entry(host_network(ip))
                    .or_insert_with(|| Address::new(bounds.per_address));
                Arc::clone(address)
            }
        };
        if address.present.load(Ordering::Relaxed) >= bounds.per_address.saturating_mul(2) && ip.is_some() {
            return Entering::Refused(Refused::Address);
        }
        let permit = Arc::clone(&address.permits).try_acquire_owned();
        if permit.is_err() && registered.waiting >= bounds.waiting {
            return Entering::Refused(Refused::Waiting);
        }
        address.present.fetch_add(1, Ordering::Relaxed);
        let present = Present {
            connections: self.clone(),
            address,
            ip,
        };
        let telemetry = &self.0.telemetry;
        if let Ok(permit) = permit {
            return Entering::Admitted(AddressPermit {
                _permit: permit,
                present,
            });
        }
        registered.waiting += 1;
        drop(registered);
        Entering::Waits(Wait {
            _counted: telemetry.count_connection(self.0.listener, ConnectionState::Waiting),
            present: Some(present),
            connections: self.clone(),
        })
    }

    /// Takes a permit of the process for a connection that has one of its address. If none is left, closes the longest
    /// idle connection; while all have a request in flight, waits for one.
    pub(crate) async fn place(&self, of_address: AddressPermit) -> Slot {
        let permit = if let Some(permit) = self.0.permits.try_acquire() {
            Some(permit)
        } else {
            let present = of_address.present.address.present.load(Ordering::Relaxed);
            let has_many = is_many(present, self.0.bounds.places);
            let newcomer = if has_many { Newcomer::Many } else { Newcomer::Few };
            let acquired = self.0.permits.acquire(has_many);
            self.close_until(acquired, None, newcomer, CloseReason::ConnectionLimit)
                .await
        };
        self.slot(of_address, permit)
    }

    fn slot(&self, of_address: AddressPermit, permit: Option<Permit>) -> Slot {
        let entry = Arc::new(Entry {
            connections: self.clone(),
            address: Arc::clone(&of_address.present.address),
            ip: of_address.present.ip,
            requests: AtomicUsize::new(0),
            is_sending: AtomicBool::new(false),
            has_requested: AtomicBool::new(false),
            idle_since: AtomicU64::new(self.micros(Instant::now())),
            closing: CancellationToken::new(),
        });
        entry.address.idle.fetch_add(1, Ordering::Relaxed);
        let mut registered = self.0.registered.lock();
        let id = registered.next;
        registered.next += 1;
        registered.open.insert(id, Arc::clone(&entry));
        drop(registered);
        Slot {
            id,
            entry,
            permit,
            _of_address: of_address,
            _counted: self
                .0
                .telemetry
                .count_connection(self.0.listener, ConnectionState::Open),
        }
    }

    /// Awaits `acquired`, and closes idle connections until it completes: those of one address, or of all.
    async fn close_until<T>(
        &self,
        acquired: impl Future<Output = Option<T>>,
        of: Option<&Arc<Address>>,
        newcomer: Newcomer,
        why: CloseReason,
    ) -> Option<T> {
        let _waiter = Waiter::count(&self.0.waiters);
        let mut acquired = pin!(acquired);
        loop {
            let mut became_idle = pin!(self.0.became_idle.notified());
            // Registered before the search, so that no connection becomes idle unnoticed.
            became_idle.as_mut().enable();
            let retry_after = match self.close_one(of, newcomer, why) {
                // Its permit is free soon. No other connection is closed until then.
                Choice::Close(()) => match timeout(RETRY_INTERVAL, acquired.as_mut()).await {
                    Ok(acquired) => return acquired,
                    Err(_) => continue,
                },
                Choice::NotBefore(left) => left.min(RETRY_INTERVAL),
                Choice::NoneIdle => RETRY_INTERVAL,
            };
            tokio::select! {
                biased;
                acquired = acquired.as_mut() => return acquired,
                () = became_idle => {}
                () = sleep(retry_after) => {}
            }
        }
    }

    /// Closes an idle connection if accepting failed because the process or the system has no file descriptor left.
    pub(crate) fn accept_failed(&self, error: &io::Error) {
        let errno = error.raw_os_error().map(Errno::from_raw_os_error);
        if matches!(errno, Some(Errno::MFILE | Errno::NFILE)) {
            self.close_one(None, Newcomer::Few, CloseReason::DescriptorLimit);
        }
    }

    fn close_one(&self, of: Option<&Arc<Address>>, newcomer: Newcomer, why: CloseReason) -> Choice<()> {
        let now = Instant::now();
        let registered = self.0.registered.lock();
        let candidates = registered.open.values().filter_map(|entry| {
            let is_of = of.is_none_or(|address| Arc::ptr_eq(address, &entry.address));
            let is_idle = entry.requests.load(Ordering::SeqCst) == 0 && !entry.closing.is_cancelled();
            (is_of && is_idle).then(|| Candidate {
                connection: entry,
                of_address: entry.address.idle.load(Ordering::Relaxed),
                idle_for: entry.idle_for(now),
                has_no_grace: is_many(entry.address.unused.load(Ordering::Relaxed), self.0.bounds.places),
            })
        });
        match victim(candidates, self.0.bounds.places, newcomer) {
            Choice::Close(entry) => {
                let entry = Arc::clone(entry);
                drop(registered);
                entry.close(why, now);
                Choice::Close(())
            }
            Choice::NotBefore(left) => Choice::NotBefore(left),
            Choice::NoneIdle => Choice::NoneIdle,
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.0.began).as_micros()).unwrap_or(u64::MAX)
    }
}

impl Address {
    fn new(permits: usize) -> Arc<Self> {
        Arc::new(Self {
            permits: Arc::new(Semaphore::new(permits)),
            present: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
            unused: AtomicUsize::new(0),
        })
    }
}

/// A connection counted under its address.
struct Present {
    connections: Connections,
    address: Arc<Address>,
    ip: Option<IpAddr>,
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut registered = self.connections.0.registered.lock();
        let left = self.address.present.fetch_sub(1, Ordering::Relaxed) - 1;
        if let (0, Some(ip)) = (left, self.ip) {
            registered.addresses.remove(&host_network(ip));
        }
    }
}

/// A permit of an address. The field order matters: the permit is released before the connection is no longer counted.
pub(crate) struct AddressPermit {
    _permit: OwnedSemaphorePermit,
    present: Present,
}

/// A connection that waits for a permit of its address.
pub(crate) struct Wait {
    _counted: OpenConnection,
    present: Option<Present>,
    connections: Connections,
}

impl Wait {
    /// Takes a permit of the address and one of the process. `None` if the former takes longer than `wait_timeout`.
    pub(crate) async fn slot(mut self, wait_timeout: Duration) -> Option<Slot> {
        let connections = self.connections.clone();
        let present = self.present.take()?;
        let permits = Arc::clone(&present.address.permits);
        let permit = if connections.0.bounds.closes_at_address {
            let acquired = async { permits.acquire_owned().await.ok() };
            let address = Some(&present.address);
            let acquired = connections.close_until(
                acquired,
                address,
                Newcomer::SameAddress,
                CloseReason::AddressLimit,
            );
            timeout(wait_timeout, acquired).await.ok()??
        } else {
            timeout(wait_timeout, permits.acquire_owned()).await.ok()?.ok()?
        };
        let of_address = AddressPermit {
            _permit: permit,
            present,
        };
        // It counts as waiting until it has both permits, because it uses a file descriptor.
        Some(connections.place(of_address).await)
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.connections.0.registered.lock().waiting -= 1;
    }
}

/// An open connection with both permits. The permit of the process is released before that of the address.
pub(crate) struct Slot {
    id: u64,
    entry: Arc<Entry>,
    permit: Option<Permit>,
    _of_address: AddressPermit,
    _counted: OpenConnection,
}

impl Slot {
    /// Counts the connection under the address in its PROXY header instead of the load balancer's. At the limit of that
    /// address it waits, without a permit of the process.
    pub(crate) async fn announced(mut self, ip: IpAddr, wait_timeout: Duration) -> Result<Self, Refused> {
        let connections = self.entry.connections.clone();
        match connections.enter(Some(ip)) {
            Entering::Admitted(of_address) => {
                let permit = self.permit.take();
                drop(self);
                Ok(connections.slot(of_address, permit))
            }
            Entering::Waits(wait) => {
                drop(self);
                wait.slot(wait_timeout).await.ok_or(Refused::Address)
            }
            Entering::Refused(refused) => Err(refused),
        }
    }

    /// The handle with which requests of this connection are counted.
    pub(crate) fn handle(&self) -> Handle {
        Handle(Some(Arc::clone(&self.entry)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.entry.connections.0.registered.lock().open.remove(&self.id);
        self.entry.closing.cancel();
        if !self.entry.has_requested.load(Ordering::Relaxed) {
            self.entry.address.unused.fetch_add(1, Ordering::Relaxed);
        }
        // A request that ends later must not count this connection as idle: its count never falls to zero.
        if self.entry.requests.swap(usize::MAX / 2, Ordering::AcqRel) == 0 {
            self.entry.address.idle.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Entry {
    fn idle_for(&self, now: Instant) -> Duration {
        let since = self.idle_since.load(Ordering::Relaxed);
        Duration::from_micros(self.connections.micros(now).saturating_sub(since))
    }

    fn close(&self, why: CloseReason, now: Instant) {
        self.closing.cancel();
        let inner = &self.connections.0;
        inner.telemetry.record_connection_closed(inner.listener, why);
        if let Some(skipped) = inner.closed.admits() {
            let client = self.ip.map(tracing::field::display);
            let idle_ms = self.idle_for(now).as_millis();
            tracing::warn!(
                listener = inner.listener,
                client,
                reason = why.name(),
                idle_ms,
                skipped,
                connections = inner.bounds.places,
                "closed an idle connection for a new one"
            );
        }
    }
}

/// Handle of a connection for its requests.
#[derive(Clone, Default)]
pub(crate) struct Handle(Option<Arc<Entry>>);

impl Handle {
    /// Counts a request in flight until the result is dropped.
    pub(crate) fn request(&self) -> InFlight {
        if let Some(entry) = &self.0 {
            entry.has_requested.store(true, Ordering::Relaxed);
            entry.address.unused.store(0, Ordering::Relaxed);
            if entry.requests.fetch_add(1, Ordering::AcqRel) == 0 {
                entry.address.idle.fetch_sub(1, Ordering::Relaxed);
            }
        }
        InFlight(self.0.clone())
    }

    /// Records whether bytes wait until the peer has read earlier ones.
    pub(crate) fn note_sending(&self, is_sending: bool) {
        if let Some(entry) = &self.0 {
            entry.is_sending.store(is_sending, Ordering::Relaxed);
        }
    }

    /// Completes when the connection is chosen to be closed.
    pub(crate) async fn closing(&self) {
        match &self.0 {
            Some(entry) => entry.closing.cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Ends a connection that was chosen to be closed. If it has had no request, it ends at once. Otherwise `serving`,
    /// which accepts no further request, sends what is left, while the peer reads it. A request that arrived in between
    /// gets its response.
    pub(crate) async fn ended<T>(&self, mut serving: impl Future<Output = T> + Unpin) -> Option<T> {
        let entry = self.0.as_ref()?;
        if !entry.has_requested.load(Ordering::Relaxed) {
            return None;
        }
        loop {
            match timeout(CLOSE_TIMEOUT, &mut serving).await {
                Ok(ended) => return Some(ended),
                Err(_) if entry.requests.load(Ordering::Relaxed) > 0 => {}
                // A request ends when the last bytes of its response are queued, which is before they are sent.
                Err(_) if entry.is_sending.load(Ordering::Relaxed) => {}
                Err(_) => return None,
            }
        }
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}

/// A request, or a tunnel, in flight.
pub(crate) struct InFlight(Option<Arc<Entry>>);

impl Drop for InFlight {
    fn drop(&mut self) {
        let Some(entry) = &self.0 else { return };
        let inner = &entry.connections.0;
        let now = entry.connections.micros(Instant::now());
        entry.idle_since.store(now, Ordering::Relaxed);
        if entry.requests.fetch_sub(1, Ordering::SeqCst) == 1 {
            entry.address.idle.fetch_add(1, Ordering::Relaxed);
            if inner.waiters.load(Ordering::SeqCst) > 0 {
                inner.became_idle.notify_waiters();
            }
        }
    }
}

/// Counts a waiter until dropped.
struct Waiter<'a>(&'a AtomicUsize);

impl<'a> Waiter<'a> {
    fn count(waiters: &'a AtomicUsize) -> Self {
        waiters.fetch_add(1, Ordering::SeqCst);
        Self(waiters)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
