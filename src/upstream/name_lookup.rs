//! Lookups of host names by the resolver of the system, one of a name at a time for all connections that need it.
//!
//! A lookup occupies a thread until the name server answers or the resolver gives up, which takes longer than any
//! connection waits. So a name server that does not answer occupies one thread for each name, and at most those of
//! [`Operation::NameLookup`]. Names of redirect targets and token services have threads of their own, because an upstream
//! chooses them. A lookup that waits for a thread ends with its last caller.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::client::legacy::connect::dns::Name;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout};
use tower_service::Service;

use crate::blocking::{self, Operation};

/// Names that are looked up or wait for that. An upstream may redirect to any name.
const NAMES_MAX: usize = 1024;

/// Time after which a second lookup of the name begins. Less than the time for a connection to a bucket.
const REPEAT_AFTER: Duration = Duration::from_millis(300);

/// Lookups of the process.
static LOOKUPS: LazyLock<Arc<Lookups>> =
    LazyLock::new(|| Arc::new(Lookups::new(Operation::NameLookup, system)));

/// Lookups of names that an upstream chose.
static TARGET_LOOKUPS: LazyLock<Arc<Lookups>> =
    LazyLock::new(|| Arc::new(Lookups::new(Operation::TargetLookup, system)));

/// Addresses of a name. The error is shared.
type Found = Result<Vec<SocketAddr>, Arc<io::Error>>;

/// The resolver of the system.
#[derive(Clone)]
pub(super) enum SystemResolver {
    /// For configured names.
    Configured,
    /// For names that an upstream chose: of redirect targets and token services.
    Target,
}

impl Service<Name> for SystemResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let lookups = match self {
            Self::Configured => &LOOKUPS,
            Self::Target => &TARGET_LOOKUPS,
        };
        Box::pin(async move { lookups.addresses(name.as_str()).await.map(Vec::into_iter) })
    }
}

fn system(name: &str) -> io::Result<Vec<SocketAddr>> {
    (name, 0).to_socket_addrs().map(Iterator::collect)
}

struct Lookups {
    running: Mutex<HashMap<String, Lookup>>,
    permits: Arc<Semaphore>,
    resolve: fn(&str) -> io::Result<Vec<SocketAddr>>,
}

/// The lookup of one name, for all that wait for it.
struct Lookup {
    found: Sender,
    began: Instant,
    is_repeated: bool,
}

type Sender = Arc<watch::Sender<Option<Found>>>;

/// A running lookup. Dropping it, also at the end of a runtime, lets the next one of the name begin.
struct Running {
    lookups: Arc<Lookups>,
    name: String,
    found: Sender,
}

impl Running {
    /// Ends the lookup for further callers, unless it ended before and another one has begun.
    fn end(&self, running: &mut HashMap<String, Lookup>) {
        let current = running.get(&self.name);
        if current.is_some_and(|lookup| Arc::ptr_eq(&lookup.found, &self.found)) {
            running.remove(&self.name);
        }
    }

    /// Ends the lookup if no caller waits.
    fn end_if_abandoned(&self) -> bool {
        let mut running = self.lookups.running.lock();
        let is_abandoned = self.found.receiver_count() == 0;
        if is_abandoned {
            self.end(&mut running);
        }
        is_abandoned
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end(&mut self.lookups.running.lock());
    }
}

impl Lookups {
    fn new(operation: Operation, resolve: fn(&str) -> io::Result<Vec<SocketAddr>>) -> Self {
        Self {
            running: Mutex::default(),
            permits: operation.permits(),
            resolve,
        }
    }

    async fn addresses(self: &Arc<Self>, name: &str) -> io::Result<Vec<SocketAddr>> {
        let mut found = self.join(name)?;
        if timeout(REPEAT_AFTER, found.wait_for(Option::is_some))
            .await
            .is_err()
        {
            self.repeat(name);
        }
        let found = found.wait_for(Option::is_some).await.ok();
        match found.and_then(|found| found.clone()) {
            Some(Ok(found)) => Ok(found),
            Some(Err(error)) => Err(shared(&error)),
            None => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    /// Joins a running lookup of this name, or begins one.
    fn join(self: &Arc<Self>, name: &str) -> io::Result<watch::Receiver<Option<Found>>> {
        let mut running = self.running.lock();
        if let Some(lookup) = running.get(name) {
            let found = lookup.found.subscribe();
            drop(running);
            self.repeat(name);
            return Ok(found);
        }
        if running.len() >= NAMES_MAX {
            return Err(io::Error::other("too many host names are being looked up"));
        }
        let (sender, found) = watch::channel(None);
        let sender = Arc::new(sender);
        let lookup = Lookup {
            found: Arc::clone(&sender),
            began: Instant::now(),
            is_repeated: false,
        };
        running.insert(name.to_owned(), lookup);
        drop(running);
        self.start(name, sender, None);
        Ok(found)
    }

    /// Looks the name up once more if that takes long: a reply may be lost, and the resolver repeats its request after 5 s.
    fn repeat(self: &Arc<Self>, name: &str) {
        let mut running = self.running.lock();
        let Some(lookup) = running
            .get_mut(name)
            .filter(|lookup| !lookup.is_repeated && lookup.began.elapsed() >= REPEAT_AFTER)
        else {
            return;
        };
        // Other names have precedence.
        if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            lookup.is_repeated = true;
            let found = Arc::clone(&lookup.found);
            drop(running);
            self.start(name, found, Some(permit));
        }
    }

    fn start(self: &Arc<Self>, name: &str, found: Sender, permit: Option<OwnedSemaphorePermit>) {
        let running = Running {
            lookups: Arc::clone(self),
            name: name.to_owned(),
            found: Arc::clone(&found),
        };
        tokio::spawn(async move {
            let lookups = Arc::clone(&running.lookups);
            let permit = match permit {
                Some(permit) => Some(permit),
                // The semaphore is never closed.
                None => Arc::clone(&lookups.permits).acquire_owned().await.ok(),
            };
            if running.end_if_abandoned() {
                return;
            }
            let (name, resolve) = (running.name.clone(), lookups.resolve);
            let result = blocking::run_with(permit, move || resolve(&name)).await;
            let result = result.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()));
            // Before the result is known, so that no later caller gets it.
            drop(running);
            found.send_replace(Some(result.map_err(Arc::new)));
        });
    }
}

/// The same error for another caller. Callers tell a lack of descriptors by its number.
fn shared(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    const FIXED: fn(&str) -> io::Result<Vec<SocketAddr>> = |_| Ok(vec![([192, 0, 2, 1], 0).into()]);
    static COUNT: AtomicUsize = AtomicUsize::new(0);

    fn counted(name: &str) -> io::Result<Vec<SocketAddr>> {
        COUNT.fetch_add(1, Ordering::Relaxed);
        match name {
            "absent" => Err(io::Error::from_raw_os_error(24)),
            _ => FIXED(name),
        }
    }

    #[tokio::test]
    async fn simultaneous_lookups_of_a_name_are_one() {
        let lookups = Arc::new(Lookups::new(Operation::NameLookup, counted));
        let all = join_all((0..100).map(|_| lookups.addresses("registry"))).await;
        assert!(all.iter().all(|found| found.as_ref().unwrap().len() == 1));
        assert_eq!(COUNT.load(Ordering::Relaxed), 1);
        assert!(lookups.running.lock().is_empty());
        let failed = lookups.addresses("absent").await.unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(24));
    }

    #[tokio::test]
    async fn names_that_wait_have_a_limit() {
        let lookups = Arc::new(Lookups::new(Operation::NameLookup, FIXED));
        let waiting: Vec<_> = (0..NAMES_MAX)
            .map(|number| lookups.join(&format!("name{number}")).unwrap())
            .collect();
        assert!(lookups.join("further").is_err());
        assert!(lookups.join("name1").is_ok());
        drop(waiting);
    }

    /// The reply to the first request is lost.
    #[tokio::test(start_paused = true)]
    async fn slow_lookup_is_repeated_once() {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        fn first_hangs(name: &str) -> io::Result<Vec<SocketAddr>> {
            match CALLS.fetch_add(1, Ordering::Relaxed) {
                0 => {
                    while CALLS.load(Ordering::Relaxed) < 2 {
                        std::thread::yield_now();
                    }
                    Err(io::ErrorKind::TimedOut.into())
                }
                _ => FIXED(name),
            }
        }
        let lookups = Arc::new(Lookups::new(Operation::NameLookup, first_hangs));
        let later = async {
            while CALLS.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
            // The clock does not advance by itself while a blocking operation runs.
            tokio::time::advance(REPEAT_AFTER).await;
        };
        let (one, other) = (lookups.addresses("registry"), lookups.addresses("registry"));
        let (one, other, ()) = tokio::join!(one, other, later);
        assert_eq!(one.is_ok(), other.is_ok());
        assert_eq!(CALLS.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn lookup_without_a_caller_takes_no_thread() {
        let lookups = Arc::new(Lookups::new(Operation::NameLookup, |_| {
            unreachable!("it was abandoned")
        }));
        let all = Arc::clone(&lookups.permits);
        let permits = all
            .acquire_many(u32::try_from(Operation::NameLookup.threads_max()).unwrap())
            .await
            .unwrap();
        drop(lookups.join("registry").unwrap());
        drop(permits);
        while !lookups.running.lock().is_empty() {
            tokio::task::yield_now().await;
        }
    }

    /// The runtime of its task has ended, as at the end of a test.
    #[test]
    fn lookup_that_was_dropped_blocks_no_other() {
        let lookups = Arc::new(Lookups::new(Operation::NameLookup, FIXED));
        let runtime = || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_time().build().unwrap()
        };
        let first = runtime();
        let lookup = first.block_on(async { lookups.join("registry").unwrap() });
        drop(first);
        assert!(lookup.has_changed().is_err());
        assert!(runtime().block_on(lookups.addresses("registry")).is_ok());
    }
}
