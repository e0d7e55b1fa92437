//! Connection admission: places per address and for the process, and which connection is closed when they run out.
//!
//! From accept on, a connection holds a place of its address ([`Seat`]). Beyond those of its address it waits, without a
//! place of the process. With a seat it takes a place of the process ([`Slot`]). Where none is left, the oldest quiet
//! connection is closed: one without a request in flight. [`victim`] says which, and is pure.

mod places;
mod victim;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::places::{Place, Places};
use self::victim::{Candidate, Choice, Newcomer, is_many, victim};
use crate::store::LogLimit;
use crate::telemetry::{CloseReason, ConnectionState, OpenConnection, Telemetry};

/// A connection that is closed to make room has finished what it was sending within this.
const CLOSED_WITHIN: Duration = Duration::from_millis(500);

/// How often it is looked again for a connection to close while nothing is heard of any.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How many connections there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Of the process.
    pub(crate) places: usize,
    /// Of one address. As many further ones wait.
    pub(crate) per_address: usize,
    /// That wait for a seat of their address, of all addresses.
    pub(crate) waiting: usize,
    /// Whether the oldest quiet connection of an address is closed for a further one of the same address.
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
    places: Places,
    /// Askers for a place of the process, and what tells them that a connection became quiet.
    wanted: AtomicUsize,
    quieted: Notify,
    registered: Mutex<Registered>,
    /// Those that come through a unix socket, whose mode says who may.
    local: Arc<Address>,
}

#[derive(Default)]
struct Registered {
    addresses: HashMap<IpAddr, Arc<Address>>,
    /// Those with a place of the process.
    open: HashMap<u64, Arc<Entry>>,
    next: u64,
    waiting: usize,
}

/// The connections of one address.
struct Address {
    seats: Arc<Semaphore>,
    /// Those that have a seat or wait for one. Changed under the lock alone.
    present: AtomicUsize,
    /// Those with a place of the process and without a request in flight.
    quiet: AtomicUsize,
    /// Those that ended without a request since the last request.
    unused: AtomicUsize,
}

/// One connection, as those see it that look for one to close.
struct Entry {
    connections: Connections,
    address: Arc<Address>,
    ip: Option<IpAddr>,
    /// Requests and tunnels in flight.
    requests: AtomicUsize,
    has_requested: AtomicBool,
    /// Whether bytes wait for the peer to take earlier ones.
    is_sending: AtomicBool,
    /// In microseconds since the start of `connections`.
    quiet_since: AtomicU64,
    closing: CancellationToken,
}

/// Why a connection was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// As many connections of its address wait as may.
    Address,
    /// As many connections of all addresses wait as may.
    Waiting,
}

impl Refused {
    /// The name in the log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Address => "too-many-of-address",
            Self::Waiting => "too-many-waiting",
        }
    }
}

/// What becomes of a connection that was accepted.
pub(crate) enum Entering {
    /// It has a seat of its address.
    Seated(Seat),
    /// It waits for one.
    Waits(Wait),
    /// It is closed.
    Refused(Refused),
}

impl Connections {
    /// No connection yet. `listener` names the kind of listener in the log and the metrics.
    pub(crate) fn new(listener: &'static str, bounds: Bounds, telemetry: Telemetry) -> Self {
        Self(Arc::new(Inner {
            listener,
            bounds,
            telemetry,
            closed: LogLimit::default(),
            began: Instant::now(),
            places: Places::new(bounds.places),
            wanted: AtomicUsize::new(0),
            quieted: Notify::new(),
            registered: Mutex::default(),
            local: Address::new(Semaphore::MAX_PERMITS),
        }))
    }

    fn registered(&self) -> MutexGuard<'_, Registered> {
        self.0.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection that was accepted under its address. Never waits.
    pub(crate) fn enter(&self, ip: Option<IpAddr>) -> Entering {
        let bounds = self.0.bounds;
        let mut registered = self.registered();
        let address = match ip {
            None => Arc::clone(&self.0.local),
            Some(ip) => {
                let address = registered
                    .addresses
                    .entry(ip)
                    .or_insert_with(|| Address::new(bounds.per_address));
                Arc::clone(address)
            }
        };
        if address.present.load(Ordering::Relaxed) >= bounds.per_address.saturating_mul(2) && ip.is_some() {
            return Entering::Refused(Refused::Address);
        }
        let seat = Arc::clone(&address.seats).try_acquire_owned();
        if seat.is_err() && registered.waiting >= bounds.waiting {
            return Entering::Refused(Refused::Waiting);
        }
        address.present.fetch_add(1, Ordering::Relaxed);
        let present = Present {
            connections: self.clone(),
            address,
            ip,
        };
        let telemetry = &self.0.telemetry;
        if let Ok(permit) = seat {
            return Entering::Seated(Seat {
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

    /// A place of the process for a connection that has a seat. While there is none, the oldest quiet connection is
    /// closed; while all are busy, it is waited for.
    pub(crate) async fn place(&self, seat: Seat) -> Slot {
        let place = if let Some(place) = self.0.places.try_acquire() {
            Some(place)
        } else {
            let present = seat.present.address.present.load(Ordering::Relaxed);
            let has_many = is_many(present, self.0.bounds.places);
            let newcomer = if has_many { Newcomer::Many } else { Newcomer::Few };
            let acquired = self.0.places.acquire(has_many);
            self.freed(acquired, None, newcomer, CloseReason::NoPlace).await
        };
        self.slot(seat, place)
    }

    fn slot(&self, seat: Seat, place: Option<Place>) -> Slot {
        let entry = Arc::new(Entry {
            connections: self.clone(),
            address: Arc::clone(&seat.present.address),
            ip: seat.present.ip,
            requests: AtomicUsize::new(0),
            is_sending: AtomicBool::new(false),
            has_requested: AtomicBool::new(false),
            quiet_since: AtomicU64::new(self.micros(Instant::now())),
            closing: CancellationToken::new(),
        });
        entry.address.quiet.fetch_add(1, Ordering::Relaxed);
        let mut registered = self.registered();
        let id = registered.next;
        registered.next += 1;
        registered.open.insert(id, Arc::clone(&entry));
        drop(registered);
        Slot {
            id,
            entry,
            place,
            _seat: seat,
            _counted: self
                .0
                .telemetry
                .count_connection(self.0.listener, ConnectionState::Open),
        }
    }

    /// What is to be `acquired`, for which quiet connections are closed: those of this address, or of all.
    async fn freed<T>(
        &self,
        acquired: impl Future<Output = Option<T>>,
        of: Option<&Arc<Address>>,
        newcomer: Newcomer,
        why: CloseReason,
    ) -> Option<T> {
        let _wanted = Wanted::count(&self.0.wanted);
        let mut acquired = pin!(acquired);
        loop {
            let mut quieted = pin!(self.0.quieted.notified());
            // From here on, a connection that becomes quiet is noticed.
            quieted.as_mut().enable();
            let look_again = match self.close_one(of, newcomer, why) {
                // Its place comes within a moment: no other one is closed until then.
                Choice::Close(()) => match timeout(LOOK_EVERY, acquired.as_mut()).await {
                    Ok(acquired) => return acquired,
                    Err(_) => continue,
                },
                Choice::NotBefore(left) => left.min(LOOK_EVERY),
                Choice::NoneQuiet => LOOK_EVERY,
            };
            tokio::select! {
                biased;
                acquired = acquired.as_mut() => return acquired,
                () = quieted => {}
                () = sleep(look_again) => {}
            }
        }
    }

    /// Closes the connection that goes first, if any may go, where the process or the system has no descriptor left.
    pub(crate) fn accept_failed(&self, error: &io::Error) {
        let errno = error.raw_os_error().map(Errno::from_raw_os_error);
        if matches!(errno, Some(Errno::MFILE | Errno::NFILE)) {
            self.close_one(None, Newcomer::Few, CloseReason::NoDescriptor);
        }
    }

    fn close_one(&self, of: Option<&Arc<Address>>, newcomer: Newcomer, why: CloseReason) -> Choice<()> {
        let now = Instant::now();
        let registered = self.registered();
        let candidates = registered.open.values().filter_map(|entry| {
            let is_of = of.is_none_or(|address| Arc::ptr_eq(address, &entry.address));
            let is_quiet = entry.requests.load(Ordering::SeqCst) == 0 && !entry.closing.is_cancelled();
            (is_of && is_quiet).then(|| Candidate {
                what: entry,
                of_address: entry.address.quiet.load(Ordering::Relaxed),
                quiet_for: entry.quiet_for(now),
                is_unused: is_many(entry.address.unused.load(Ordering::Relaxed), self.0.bounds.places),
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
            Choice::NoneQuiet => Choice::NoneQuiet,
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.0.began).as_micros()).unwrap_or(u64::MAX)
    }
}

impl Address {
    fn new(seats: usize) -> Arc<Self> {
        Arc::new(Self {
            seats: Arc::new(Semaphore::new(seats)),
            present: AtomicUsize::new(0),
            quiet: AtomicUsize::new(0),
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
        let mut registered = self.connections.registered();
        let left = self.address.present.fetch_sub(1, Ordering::Relaxed) - 1;
        if let (0, Some(ip)) = (left, self.ip) {
            registered.addresses.remove(&ip);
        }
    }
}

/// A place of an address. Fields are dropped in this order: the place is free before the connection is not counted.
pub(crate) struct Seat {
    _permit: OwnedSemaphorePermit,
    present: Present,
}

/// A connection that waits for a place of its address.
pub(crate) struct Wait {
    _counted: OpenConnection,
    present: Option<Present>,
    connections: Connections,
}

impl Wait {
    /// A place of the address and one of the process. `None` if that takes longer than `patience`.
    pub(crate) async fn slot(mut self, patience: Duration) -> Option<Slot> {
        let connections = self.connections.clone();
        let present = self.present.take()?;
        let seats = Arc::clone(&present.address.seats);
        let permit = if connections.0.bounds.closes_at_address {
            let acquired = async { seats.acquire_owned().await.ok() };
            let address = Some(&present.address);
            let freed = connections.freed(
                acquired,
                address,
                Newcomer::SameAddress,
                CloseReason::NoPlaceOfAddress,
            );
            timeout(patience, freed).await.ok()??
        } else {
            timeout(patience, seats.acquire_owned()).await.ok()?.ok()?
        };
        let seat = Seat {
            _permit: permit,
            present,
        };
        // It counts as waiting until it has both: each holds a descriptor.
        Some(connections.place(seat).await)
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.connections.registered().waiting -= 1;
    }
}

/// A connection that was let in, until it ends. Its place of the process is free before that of its address.
pub(crate) struct Slot {
    id: u64,
    entry: Arc<Entry>,
    place: Option<Place>,
    _seat: Seat,
    _counted: OpenConnection,
}

impl Slot {
    /// Counts the connection under the address that its PROXY header names, and no longer under the balancer's. Waits as
    /// one that was accepted from there, and then without a place of the process.
    pub(crate) async fn announced(mut self, ip: IpAddr, patience: Duration) -> Result<Self, Refused> {
        let connections = self.entry.connections.clone();
        match connections.enter(Some(ip)) {
            Entering::Seated(seat) => {
                let place = self.place.take();
                drop(self);
                Ok(connections.slot(seat, place))
            }
            Entering::Waits(wait) => {
                drop(self);
                wait.slot(patience).await.ok_or(Refused::Address)
            }
            Entering::Refused(refused) => Err(refused),
        }
    }

    /// What requests of this connection hold while they are in flight.
    pub(crate) fn handle(&self) -> Handle {
        Handle(Some(Arc::clone(&self.entry)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.entry.connections.registered().open.remove(&self.id);
        // A request that is still counted leaves its quiet to be counted by nobody.
        self.entry.closing.cancel();
        if !self.entry.has_requested.load(Ordering::Relaxed) {
            self.entry.address.unused.fetch_add(1, Ordering::Relaxed);
        }
        if self.entry.requests.swap(usize::MAX / 2, Ordering::AcqRel) == 0 {
            self.entry.address.quiet.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Entry {
    fn quiet_for(&self, now: Instant) -> Duration {
        let since = self.quiet_since.load(Ordering::Relaxed);
        Duration::from_micros(self.connections.micros(now).saturating_sub(since))
    }

    fn close(&self, why: CloseReason, now: Instant) {
        self.closing.cancel();
        let inner = &self.connections.0;
        inner.telemetry.record_connection_closed(inner.listener, why);
        if let Some(skipped) = inner.closed.admits() {
            let client = self.ip.map(tracing::field::display);
            let quiet_ms = self.quiet_for(now).as_millis();
            tracing::warn!(
                listener = inner.listener,
                client,
                reason = why.name(),
                quiet_ms,
                skipped,
                connections = inner.bounds.places,
                "a connection without a request was closed to make room for another"
            );
        }
    }
}

/// A connection as its requests see it.
#[derive(Clone, Default)]
pub(crate) struct Handle(Option<Arc<Entry>>);

impl Handle {
    /// The connection is busy until what is given is dropped.
    pub(crate) fn request(&self) -> InFlight {
        if let Some(entry) = &self.0 {
            entry.has_requested.store(true, Ordering::Relaxed);
            entry.address.unused.store(0, Ordering::Relaxed);
            if entry.requests.fetch_add(1, Ordering::AcqRel) == 0 {
                entry.address.quiet.fetch_sub(1, Ordering::Relaxed);
            }
        }
        InFlight(self.0.clone())
    }

    /// Notes whether bytes wait for the peer to take earlier ones.
    pub(crate) fn note_sending(&self, is_sending: bool) {
        if let Some(entry) = &self.0 {
            entry.is_sending.store(is_sending, Ordering::Relaxed);
        }
    }

    /// Completes when the connection is to be closed to make room.
    pub(crate) async fn closing(&self) {
        match &self.0 {
            Some(entry) => entry.closing.cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Lets a connection that is to be closed end: one without a request so far at once; else `serving`, told to take no
    /// further request, finishes what it is sending, as long as the peer takes it. A request that came in between is
    /// answered.
    pub(crate) async fn ended<T>(&self, mut serving: impl Future<Output = T> + Unpin) -> Option<T> {
        let entry = self.0.as_ref()?;
        if !entry.has_requested.load(Ordering::Relaxed) {
            return None;
        }
        loop {
            match timeout(CLOSED_WITHIN, &mut serving).await {
                Ok(ended) => return Some(ended),
                Err(_) if entry.requests.load(Ordering::Relaxed) > 0 => {}
                // A response ends for its request with the last bytes that are handed on, before they are sent.
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
        entry.quiet_since.store(now, Ordering::Relaxed);
        if entry.requests.fetch_sub(1, Ordering::SeqCst) == 1 {
            entry.address.quiet.fetch_add(1, Ordering::Relaxed);
            if inner.wanted.load(Ordering::SeqCst) > 0 {
                inner.quieted.notify_waiters();
            }
        }
    }
}

/// Counted while it lives.
struct Wanted<'a>(&'a AtomicUsize);

impl<'a> Wanted<'a> {
    fn count(wanted: &'a AtomicUsize) -> Self {
        wanted.fetch_add(1, Ordering::SeqCst);
        Self(wanted)
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
