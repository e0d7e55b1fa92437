//! Listeners: TCP and unix sockets, bound here or handed over by the service manager; and what a connection says of
//! itself before its first byte of HTTP or TLS.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

use super::forwarded;
use crate::config::{Listen, Network};

/// The first byte of a TLS record that opens a handshake; no HTTP method begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// A socket file may be used by everyone who reaches its folder: who may speak there is said by the folder's mode.
const SOCKET_MODE: u32 = 0o666;

/// A listener of the registry.
pub struct Listener {
    socket: Socket,
    /// Whose word about the client's address is taken: PROXY protocol.
    trusted: Arc<[Network]>,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// Binds everything that is configured, or takes what the service manager has `passed` in its place.
pub fn listeners(listen: &Listen, passed: Passed) -> io::Result<Vec<Listener>> {
    let trusted: Arc<[Network]> = listen.proxy_protocol_from.clone().into();
    let sockets = if passed.is_empty() {
        bound(listen)?
    } else {
        tracing::info!("listening on the sockets of the service manager, in place of `listen.registry`");
        taken(passed)?
    };
    let listener = |socket| Listener {
        socket,
        trusted: Arc::clone(&trusted),
    };
    Ok(sockets.into_iter().map(listener).collect())
}

/// Sockets that the service manager opened for us (`LISTEN_FDS`).
#[derive(Debug, Default)]
pub struct Passed {
    /// TCP listeners.
    pub tcp: Vec<std::net::TcpListener>,
    /// Unix listeners.
    pub unix: Vec<std::os::unix::net::UnixListener>,
}

impl Passed {
    fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.unix.is_empty()
    }
}

fn bound(listen: &Listen) -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for address in &listen.registry {
        // Linux lets `[::]` take IPv4 as well; where that is asked for by its own name, each gets its own.
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

fn taken(passed: Passed) -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for listener in passed.tcp {
        listener.set_nonblocking(true)?;
        sockets.push(Socket::Tcp(TcpListener::from_std(listener)?));
    }
    for listener in passed.unix {
        listener.set_nonblocking(true)?;
        // The file is the service manager's, and stays.
        sockets.push(Socket::Unix(UnixListener::from_std(listener)?, SocketFile(None)));
    }
    Ok(sockets)
}

/// Binds an address, saying which one could not be had.
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

/// Binds a unix socket. A file that is left over from a process that is gone is replaced; one that is no socket is not.
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
                    "a file is there that is no socket",
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

/// Removed when the process ends, so that the next one can make it again.
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
    /// Where it listens, as the configuration would have it.
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

    /// The address, if it has one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.address().map(|address| address.ip())
    }

    /// Its address and port, if it has one.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(..) => None,
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Wire> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                let announced = self.trusted.iter().any(|network| network.contains(address.ip()));
                Ok(Wire {
                    stream: Stream::Tcp(stream),
                    from: From::Address(address),
                    announced,
                })
            }
            Socket::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok(Wire {
                    stream: Stream::Unix(stream),
                    from: From::Socket,
                    announced: false,
                })
            }
        }
    }
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Address(SocketAddr),
    Socket,
}

impl From {
    /// Its address, for counting.
    pub(super) fn ip(self) -> Option<IpAddr> {
        match self {
            Self::Address(address) => Some(address.ip().to_canonical()),
            Self::Socket => None,
        }
    }

    /// Whether it is on this machine.
    pub(super) fn is_local(self) -> bool {
        self.ip().is_none_or(|ip| ip.is_loopback())
    }
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Socket => f.write_str("a unix socket"),
        }
    }
}

/// An accepted connection.
pub(super) struct Wire {
    stream: Stream,
    from: From,
    /// Whether it begins with who is behind it.
    announced: bool,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Wire {
    /// Who is at the other end; after [`Wire::announced`], who is behind a trusted proxy.
    pub(super) fn peer(&self) -> From {
        self.from
    }

    /// Reads the PROXY header of a trusted proxy, where one is expected.
    pub(super) async fn announced(&mut self) -> io::Result<()> {
        if self.announced
            && let Some(address) = forwarded::read(self).await?
        {
            self.from = From::Address(address);
        }
        Ok(())
    }

    /// Looks at the first byte: is it TLS? `None` if nothing came.
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
}

macro_rules! either {
    ($wire:expr, $stream:ident => $deed:expr) => {
        match &mut $wire.get_mut().stream {
            Stream::Tcp($stream) => $deed,
            Stream::Unix($stream) => $deed,
        }
    };
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Wire {
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
