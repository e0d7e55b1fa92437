//! Lookups of host names by the resolver of the system, one of a name at a time for all connections that need it.
//!
//! A lookup occupies a thread until the name server answers or the resolver gives up, which takes longer than any
//! connection waits. So a name server that says nothing occupies one thread for each name, and at most those of
//! [`Operation::NameLookup`].

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::Name;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tower_service::Service;

use crate::blocking::{self, Operation};

/// Names that are looked up or wait for that. An upstream may redirect to any name.
const NAMES_MAX: usize = 1024;

/// Lookups of the process.
static LOOKUPS: LazyLock<Arc<Lookups>> = LazyLock::new(|| Arc::new(Lookups::new(system)));

/// Addresses of a name. The error is shared.
type Found = Result<Vec<SocketAddr>, Arc<io::Error>>;

/// The resolver of the system.
#[derive(Clone)]
pub(super) struct SystemResolver;

impl Service<Name> for SystemResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(async move { LOOKUPS.addresses(name.as_str()).await.map(Vec::into_iter) })
    }
}

fn system(name: &str) -> io::Result<Vec<SocketAddr>> {
    (name, 0).to_socket_addrs().map(Iterator::collect)
}

struct Lookups {
    running: Mutex<HashMap<String, watch::Receiver<Option<Found>>>>,
    permits: Arc<Semaphore>,
    resolve: fn(&str) -> io::Result<Vec<SocketAddr>>,
}

/// A running lookup. Dropping it, also at the end of a runtime, lets the next one of the name begin.
struct Running {
    lookups: Arc<Lookups>,
    name: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.lookups.running.lock().remove(&self.name);
    }
}

impl Lookups {
    fn new(resolve: fn(&str) -> io::Result<Vec<SocketAddr>>) -> Self {
        Self {
            running: Mutex::default(),
            permits: Operation::NameLookup.permits(),
            resolve,
        }
    }

    async fn addresses(self: &Arc<Self>, name: &str) -> io::Result<Vec<SocketAddr>> {
        let mut lookup = self.join(name)?;
        let found = lookup.wait_for(Option::is_some).await.ok();
        match found.and_then(|found| found.clone()) {
            Some(Ok(found)) => Ok(found),
            Some(Err(error)) => Err(shared(&error)),
            None => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    /// Joins the lookup of this name, or begins one. It continues when its callers have left: the next one may join.
    fn join(self: &Arc<Self>, name: &str) -> io::Result<watch::Receiver<Option<Found>>> {
        let mut running = self.running.lock();
        if let Some(lookup) = running.get(name) {
            return Ok(lookup.clone());
        }
        if running.len() >= NAMES_MAX {
            return Err(io::Error::other("too many host names are being looked up"));
        }
        let (sender, lookup) = watch::channel(None);
        running.insert(name.to_owned(), lookup.clone());
        drop(running);
        let guard = Running {
            lookups: Arc::clone(self),
            name: name.to_owned(),
        };
        tokio::spawn(async move {
            let (name, resolve) = (guard.name.clone(), guard.lookups.resolve);
            let found = blocking::run(&guard.lookups.permits, move || resolve(&name)).await;
            let found = found.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()));
            // Before the result is known, so that no later caller gets it.
            drop(guard);
            sender.send_replace(Some(found.map_err(Arc::new)));
        });
        Ok(lookup)
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
        let lookups = Arc::new(Lookups::new(counted));
        let all = join_all((0..100).map(|_| lookups.addresses("registry"))).await;
        assert!(all.iter().all(|found| found.as_ref().unwrap().len() == 1));
        assert_eq!(COUNT.load(Ordering::Relaxed), 1);
        assert!(lookups.running.lock().is_empty());
        let failed = lookups.addresses("absent").await.unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(24));
    }

    #[tokio::test]
    async fn names_that_wait_have_a_limit() {
        let lookups = Arc::new(Lookups::new(FIXED));
        for number in 0..NAMES_MAX {
            lookups.join(&format!("name{number}")).unwrap();
        }
        assert!(lookups.join("further").is_err());
        assert!(lookups.join("name1").is_ok());
    }

    /// The runtime of the lookup has ended, as at the end of a test.
    #[test]
    fn lookup_that_was_dropped_blocks_no_other() {
        let lookups = Arc::new(Lookups::new(FIXED));
        let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let first = runtime();
        let lookup = first.block_on(async { lookups.join("registry").unwrap() });
        drop(first);
        assert!(lookup.has_changed().is_err());
        assert!(runtime().block_on(lookups.addresses("registry")).is_ok());
    }
}
