//! TCP dialer: system resolver, both address families (RFC 8305), no TLS and no proxy.

use std::error::Error;
use std::io;
use std::iter;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::str::FromStr as _;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use rustix::io::Errno;
use tokio::time::sleep;
use tower_service::Service;

use super::dialer::{DialError, DialFuture, DialedStream, Dialer};
use super::ip_scope::IpScope;
use super::name_lookup::SystemResolver;
use super::origin::address;
use super::redirect_rules::AddressLimit;
use super::tls::io_cause;
use crate::oci::failure::UpstreamFailure;

/// TCP keepalive: a lost peer is detected after about a minute.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Linux `TCP_USER_TIMEOUT`: the peer is considered lost if sent bytes stay unacknowledged this long.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);

/// Pause before another attempt if the process has no free file descriptor.
const DESCRIPTOR_PAUSE: Duration = Duration::from_millis(20);
/// Attempts to connect while the process has no free file descriptor.
const DESCRIPTOR_ATTEMPTS_MAX: u32 = 25;

/// [`Dialer`] over TCP.
pub(super) struct TcpDialer;

impl Dialer for TcpDialer {
    fn dial(&self, to: &Uri, limit: &AddressLimit, timeout: Duration) -> DialFuture {
        let (to, limit) = (to.clone(), limit.clone());
        Box::pin(async move {
            // hyper's connector resolves no IP literals, so they are checked here.
            if let Some(refused) = to.host().and_then(address).filter(|ip| !limit.allows(*ip)) {
                return Err(DialError::scope_denied(refused));
            }
            let mut tcp = HttpConnector::new_with_resolver(Resolver::of(limit));
            tcp.enforce_http(false);
            tcp.set_nodelay(true);
            tcp.set_keepalive(Some(KEEPALIVE));
            tcp.set_keepalive_interval(Some(KEEPALIVE / 3));
            tcp.set_keepalive_retries(Some(3));
            #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
            tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX));
            tcp.set_connect_timeout(Some(timeout));
            let connected = once_descriptor_is_free(|| tcp.call(to.clone())).await;
            let stream = connected.map_err(dial_error)?.into_inner();
            let peer = stream.peer_addr().ok().map(|peer| peer.ip());
            Ok(DialedStream {
                stream: Box::new(stream),
                peer,
            })
        })
    }
}

/// The result of `attempt`, which is repeated for a while if it lacks a descriptor: a connection that is being closed frees
/// one.
async fn once_descriptor_is_free<T, E, F>(mut attempt: impl FnMut() -> F) -> Result<T, E>
where
    E: Error + 'static,
    F: Future<Output = Result<T, E>>,
{
    for _ in 1..DESCRIPTOR_ATTEMPTS_MAX {
        match attempt().await {
            Err(error) if lacks_descriptor(&error) => sleep(DESCRIPTOR_PAUSE).await,
            result => return result,
        }
    }
    attempt().await
}

/// Whether the process, or the system, has no free file descriptor.
fn lacks_descriptor(error: &(dyn Error + 'static)) -> bool {
    iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source())
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .filter_map(Errno::from_io_error)
        .any(|errno| matches!(errno, Errno::MFILE | Errno::NFILE))
}

fn dial_error(error: impl Error + Send + Sync + 'static) -> DialError {
    let mut next: Option<&(dyn Error + 'static)> = Some(&error);
    let mut cause = UpstreamFailure::Unreachable;
    while let Some(one) = next {
        if let Some(resolving) = one.downcast_ref::<ResolveError>() {
            match resolving {
                ResolveError::Failed(_) => cause = UpstreamFailure::Dns,
                ResolveError::ScopeDenied(address) => return DialError::scope_denied(*address),
            }
            break;
        }
        if let Some(io) = one.downcast_ref::<io::Error>() {
            cause = if io.kind() == io::ErrorKind::TimedOut {
                UpstreamFailure::ConnectTimeout
            } else {
                io_cause(io)
            };
            break;
        }
        next = one.source();
    }
    DialError::new(cause, error)
}

/// The first address of a name that `limit` allows, for a proxy that does not resolve it.
pub(super) async fn resolved(name: &str, limit: &AddressLimit) -> Result<IpAddr, DialError> {
    let name = Name::from_str(name).map_err(|error| DialError::new(UpstreamFailure::Dns, error))?;
    let mut found = Resolver::of(limit.clone()).call(name).await.map_err(dial_error)?;
    found
        .next()
        .map(|found| found.ip())
        .ok_or_else(|| UpstreamFailure::Dns.into())
}

/// System resolver that drops disallowed addresses. It checks every lookup, so a name that changes between two
/// lookups (DNS rebinding) bypasses nothing.
#[derive(Clone)]
struct Resolver<S> {
    system: S,
    limit: AddressLimit,
}

impl Resolver<SystemResolver> {
    fn of(limit: AddressLimit) -> Self {
        let system = if limit == IpScope::LinkLocal.into() {
            SystemResolver::Configured
        } else {
            SystemResolver::Target
        };
        Self { system, limit }
    }
}

#[derive(Debug, thiserror::Error)]
enum ResolveError {
    #[error("the name does not resolve")]
    Failed(#[source] io::Error),
    #[error("the name resolves to {0}, which is in a narrower IP scope")]
    ScopeDenied(IpAddr),
}

impl<S> Service<Name> for Resolver<S>
where
    S: Service<Name, Error = io::Error>,
    S::Response: Iterator<Item = SocketAddr>,
    S::Future: Send + 'static,
{
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = ResolveError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ResolveError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ResolveError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolving = self.system.call(name);
        let limit = self.limit.clone();
        Box::pin(async move {
            let found: Vec<_> = resolving.await.map_err(ResolveError::Failed)?.collect();
            let first = found.first().map(SocketAddr::ip);
            let allowed: Vec<_> = found.into_iter().filter(|one| limit.allows(one.ip())).collect();
            match first {
                Some(refused) if allowed.is_empty() => Err(ResolveError::ScopeDenied(refused)),
                _ => Ok(allowed.into_iter()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    /// Name server with a different answer for each lookup.
    #[derive(Clone)]
    struct RebindingResolver(Vec<Vec<SocketAddr>>);

    impl Service<Name> for RebindingResolver {
        type Response = std::vec::IntoIter<SocketAddr>;
        type Error = io::Error;
        type Future = std::future::Ready<Result<Self::Response, io::Error>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Name) -> Self::Future {
            std::future::ready(Ok(self.0.remove(0).into_iter()))
        }
    }

    #[test]
    fn only_a_lack_of_descriptors_is_tried_again() {
        let nested = |errno: Errno| DialError::new(UpstreamFailure::Unreachable, io::Error::from(errno));
        for (errno, is_lacking) in [
            (Errno::MFILE, true),
            (Errno::NFILE, true),
            (Errno::CONNREFUSED, false),
            (Errno::TIMEDOUT, false),
        ] {
            assert_eq!(lacks_descriptor(&nested(errno)), is_lacking, "{errno:?}");
            assert_eq!(lacks_descriptor(&io::Error::from(errno)), is_lacking, "{errno:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn connection_waits_for_a_descriptor_half_a_second() {
        for (lacking, attempts, is_connected) in [(0, 1, true), (3, 4, true), (24, 25, true), (99, 25, false)]
        {
            let (began, mut count) = (tokio::time::Instant::now(), 0);
            let connected = once_descriptor_is_free(|| {
                count += 1;
                let result = if count > lacking {
                    Ok(())
                } else {
                    Err(io::Error::from(Errno::MFILE))
                };
                std::future::ready(result)
            });
            assert_eq!(connected.await.is_ok(), is_connected, "{lacking}");
            assert_eq!(
                (count, began.elapsed()),
                (attempts, DESCRIPTOR_PAUSE * (attempts - 1))
            );
        }
    }

    #[tokio::test]
    async fn dns_rebinding_is_checked_at_every_lookup() {
        let addresses =
            |list: &[&str]| -> Vec<SocketAddr> { list.iter().map(|one| one.parse().unwrap()).collect() };
        let mut resolver = Resolver {
            system: RebindingResolver(vec![
                addresses(&["8.8.8.8:443"]),
                addresses(&["127.0.0.1:443"]),
                addresses(&["169.254.169.254:443", "8.8.8.8:443", "[::ffff:10.0.0.1]:443"]),
            ]),
            limit: IpScope::Public.into(),
        };
        let mut look_up = async || {
            let found = resolver.call("rebinding.example".parse().unwrap()).await;
            found.map(Iterator::collect::<Vec<_>>)
        };
        assert_eq!(look_up().await.unwrap(), addresses(&["8.8.8.8:443"]));
        assert!(matches!(look_up().await, Err(ResolveError::ScopeDenied(_))));
        assert_eq!(look_up().await.unwrap(), addresses(&["8.8.8.8:443"]));
    }
}
