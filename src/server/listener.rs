//! Listeners: TCP and unix sockets, bound here or inherited from the service manager. Reads the PROXY header and
//! detects TLS by the first byte.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

use super::proxy_protocol;
use crate::config::{Listen, Network};

/// First byte of a TLS handshake record. No HTTP method begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// Accept queue of the kernel.
const BACKLOG: u32 = 1024;

/// The socket file is open to all users. The mode of its folder limits access.
const SOCKET_MODE: u32 = 0o666;

/// A listener of the registry.
pub struct Listener {
    socket: Socket,
    /// Networks of load balancers, which must send the PROXY protocol.
    trusted: Arc<[Network]>,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// Binds the configured addresses, or uses the `inherited` sockets in their place.
pub fn listeners(listen: &Listen, inherited: InheritedSockets) -> io::Result<Vec<Listener>> {
    let trusted: Arc<[Network]> = listen.proxy_protocol_from.clone().into();
    let sockets = if inherited.is_empty() {
        bind_configured(listen)?
    } else {
        tracing::info!("using inherited sockets of the service manager instead of `listen.registry`");
        from_inherited(inherited)?
    };
    let listener = |socket| Listener {
        socket,
        trusted: Arc::clone(&trusted),
    };
    Ok(sockets.into_iter().map(listener).collect())
}

/// Sockets inherited from the service manager (`LISTEN_FDS`).
#[derive(Debug, Default)]
pub struct InheritedSockets {
    /// TCP listeners.
    pub tcp: Vec<std::net::TcpListener>,
    /// Unix listeners.
    pub unix: Vec<std::os::unix::net::UnixListener>,
}

impl InheritedSockets {
    fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.unix.is_empty()
    }
}

fn bind_configured(listen: &Listen) -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for address in &listen.registry {
        // On Linux `[::]` accepts IPv4 too. If `0.0.0.0` is configured with the same port, each gets its own socket.
        let has_twin = |other: &SocketAddr| {
            other.is_ipv4() && other.ip().is_unspecified() && other.port() == address.port()
        };
        let only_v6 =
            address.is_ipv6() && address.ip().is_unspecified() && listen.registry.iter().any(has_twin);
        sockets.push(Socket::Tcp(bind(*address, only_v6)?));
    }
    for path in &listen.sockets {
        let (listener, file) = bind_unix(path, SOCKET_MODE)?;
        sockets.push(Socket::Unix(listener, file));
    }
    Ok(sockets)
}

fn from_inherited(inherited: InheritedSockets) -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for listener in inherited.tcp {
        listener.set_nonblocking(true)?;
        sockets.push(Socket::Tcp(TcpListener::from_std(listener)?));
    }
    for listener in inherited.unix {
        listener.set_nonblocking(true)?;
        // The file belongs to the service manager and is not removed.
        sockets.push(Socket::Unix(UnixListener::from_std(listener)?, SocketFile(None)));
    }
    Ok(sockets)
}

/// Binds an address. The error names it.
pub fn bind(address: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let bound = || {
        let socket = if address.is_ipv6() {
            TcpSocket::new_v6()?
        } else {
            TcpSocket::new_v4()?
        };
        if only_v6 {
            rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
        }
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bound().map_err(|error: io::Error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen on {address}: {error}; is another process there?"),
        )
    })
}

/// Binds a unix socket. Replaces the socket file of a process that has ended, but no other file.
pub fn bind_unix(path: &Path, mode: u32) -> io::Result<(UnixListener, SocketFile)> {
    let bound = || {
        match std::fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(io::Error::new(
                        io::ErrorKind::AddrInUse,
                        "another process listens there",
                    ));
                }
                std::fs::remove_file(path)?;
            }
            Ok(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "the file exists and is not a socket",
                ));
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        Ok((listener, SocketFile(Some(path.to_owned()))))
    };
    bound().map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen on {}: {error}", path.display()),
        )
    })
}

/// Socket file, removed on drop so that the next process can bind it.
#[derive(Debug)]
pub struct SocketFile(Option<PathBuf>);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Listener {
    /// Its address in the form of the configuration.
    pub fn name(&self) -> String {
        match &self.socket {
            Socket::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|_| "a socket".to_owned(), |address| address.to_string()),
            Socket::Unix(_, SocketFile(Some(path))) => format!("unix:{}", path.display()),
            Socket::Unix(listener, _) => match listener.local_addr() {
                Ok(address) if address.as_pathname().is_some() => {
                    format!(
                        "unix:{}",
                        address.as_pathname().unwrap_or(Path::new("")).display()
                    )
                }
                _ => "a socket".to_owned(),
            },
        }
    }

    /// Its IP address. `None` for a unix socket.
    pub fn ip(&self) -> Option<IpAddr> {
        self.address().map(|address| address.ip())
    }

    /// Its address and port. `None` for a unix socket.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(..) => None,
        }
    }

    pub(super) async fn accept(&self) -> io::Result<AcceptedStream> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                let expects_proxy_header = self.trusted.iter().any(|network| network.contains(address.ip()));
                Ok(AcceptedStream {
                    stream: Stream::Tcp(stream),
                    from: PeerAddr::Ip(address),
                    expects_proxy_header,
                })
            }
            Socket::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok(AcceptedStream {
                    stream: Stream::Unix(stream),
                    from: PeerAddr::Unix,
                    expects_proxy_header: false,
                })
            }
        }
    }
}

/// Address of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PeerAddr {
    Ip(SocketAddr),
    Unix,
}

impl PeerAddr {
    /// The IP address by which connections are counted.
    pub(super) fn ip(self) -> Option<IpAddr> {
        match self {
            Self::Ip(address) => Some(address.ip().to_canonical()),
            Self::Unix => None,
        }
    }

    /// Whether the client is on this machine.
    pub(super) fn is_local(self) -> bool {
        self.ip().is_none_or(|ip| ip.is_loopback())
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix => f.write_str("a unix socket"),
        }
    }
}

/// An accepted connection.
pub(super) struct AcceptedStream {
    stream: Stream,
    from: PeerAddr,
    /// Whether the peer is a trusted load balancer, which sends a PROXY header first.
    expects_proxy_header: bool,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AcceptedStream {
    /// The address of the peer. After [`AcceptedStream::read_proxy_header`], that of the client behind a trusted load
    /// balancer.
    pub(super) fn peer(&self) -> PeerAddr {
        self.from
    }

    /// Reads the PROXY header, if the peer is a trusted load balancer.
    pub(super) async fn read_proxy_header(&mut self) -> io::Result<()> {
        if self.expects_proxy_header
            && let Some(address) = proxy_protocol::read(self).await?
        {
            self.from = PeerAddr::Ip(address);
        }
        Ok(())
    }

    /// Whether the first byte, which is not consumed, begins a TLS handshake. `None` if the connection ended.
    pub(super) async fn first_byte_is_tls(&self) -> io::Result<Option<bool>> {
        let mut first = [0];
        let read = match &self.stream {
            Stream::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.peek(&mut first).await?
            }
            Stream::Unix(stream) => {
                let peek = || Ok(rustix::net::recv(stream, &mut first, RecvFlags::PEEK)?);
                stream.async_io(Interest::READABLE, peek).await?.0
            }
        };
        Ok((read > 0).then_some(first == [TLS_HANDSHAKE]))
    }

    /// Runs a system call that writes to the socket, as soon as the socket takes bytes.
    pub(super) fn poll_send(
        &self,
        context: &mut Context<'_>,
        mut system_call: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let done = match &self.stream {
                Stream::Tcp(stream) => {
                    ready!(stream.poll_write_ready(context))?;
                    stream.try_io(Interest::WRITABLE, || system_call(stream.as_fd()))
                }
                Stream::Unix(stream) => {
                    ready!(stream.poll_write_ready(context))?;
                    stream.try_io(Interest::WRITABLE, || system_call(stream.as_fd()))
                }
            };
            match done {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

#[cfg(test)]
impl From<UnixStream> for AcceptedStream {
    fn from(stream: UnixStream) -> Self {
        Self {
            stream: Stream::Unix(stream),
            from: PeerAddr::Unix,
            expects_proxy_header: false,
        }
    }
}

macro_rules! either {
    ($wire:expr, $stream:ident => $call:expr) => {
        match &mut $wire.get_mut().stream {
            Stream::Tcp($stream) => $call,
            Stream::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for AcceptedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for AcceptedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// The network of one host: an IPv4 address, or an IPv6 /64, in which a host can choose its addresses freely.
pub(crate) fn host_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn t17_the_addresses_of_one_host_are_one_peer() {
        let of = |text: &str| host_network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.1"));
    }
}
