//! Connections to a server: plain or TLS, one `GET` at a time.

use crate::Outcome;
use crate::content::MANIFEST_TYPE;
use rustix::net::{RecvFlags, recv};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, IpAddr, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most clients wait this long for the next bytes.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Copy)]
pub(crate) enum Scheme {
    Plain,
    Tls,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scheme::Plain => "plain",
            Scheme::Tls => "TLS 1.3",
        })
    }
}

/// Address and CA of a server.
#[derive(Clone)]
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    trust: Option<Arc<ClientConfig>>,
}

impl Endpoint {
    pub(crate) fn plain(address: SocketAddr) -> Self {
        Endpoint { address, trust: None }
    }

    pub(crate) fn tls(address: SocketAddr, trust: Arc<ClientConfig>) -> Self {
        Endpoint {
            address,
            trust: Some(trust),
        }
    }

    pub(crate) fn connect(&self) -> Outcome<Connection> {
        self.connect_for(SILENCE_MAX)
    }

    /// For a client that waits this long for the next bytes.
    pub(crate) fn connect_for(&self, silence_max: Duration) -> Outcome<Connection> {
        let tcp = TcpStream::connect(self.address)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(silence_max))?;
        let Some(trust) = &self.trust else {
            return Ok(Connection {
                bare: Some(tcp.try_clone()?),
                stream: Box::new(tcp),
                host: self.address,
                lines: String::new(),
            });
        };
        let name = ServerName::IpAddress(IpAddr::from(self.address.ip()));
        let mut stream = StreamOwned::new(ClientConnection::new(Arc::clone(trust), name)?, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Connection {
            bare: None,
            stream: Box::new(stream),
            host: self.address,
            lines: String::new(),
        })
    }
}

/// Trusts one CA and uses TLS 1.3 only, without resumption, so that both servers do the same work.
pub(crate) fn trusting(authority: &Path) -> Outcome<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// A connection that is kept between requests.
pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    /// The raw connection, without a layer in between.
    bare: Option<TcpStream>,
    /// Named in each request.
    host: SocketAddr,
    /// Additional header lines of each request.
    lines: String,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A response whose head was read, and of whose body this much was not.
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) left: u64,
}

impl Connection {
    /// Adds a header line to each request.
    pub(crate) fn with_line(mut self, line: &str) -> Self {
        self.lines.push_str(line);
        self.lines.push_str("\r\n");
        self
    }

    /// A complete 200 whose body is discarded in the kernel. Returns the body's length.
    pub(crate) fn fetch(&mut self, path: &str, buffer: &mut [u8]) -> Outcome<u64> {
        let mut received = 0;
        let mut left = self.ask(path, buffer, |part| received = part.len() as u64)?.left;
        while left > 0 {
            let more = self.discard_some(left, buffer)?.len() as u64;
            left -= more;
            received += more;
        }
        Ok(received)
    }

    /// Sends a GET and reads the head of a 200. Body bytes read with it are passed to `taken`.
    pub(crate) fn ask(
        &mut self,
        path: &str,
        buffer: &mut [u8],
        taken: impl FnMut(&[u8]),
    ) -> Outcome<Response> {
        self.request(path, None, buffer, taken)?.expect(200, path)
    }

    /// A complete 200 whose bytes do not matter.
    pub(crate) fn read_all(&mut self, path: &str) -> Outcome<()> {
        let mut buffer = vec![0; HEAD_BYTES_MAX];
        let mut left = self.ask(path, &mut buffer, |_| ())?.left;
        while left > 0 {
            left -= self.read_some(left, &mut buffer)?.len() as u64;
        }
        Ok(())
    }

    /// Sends a GET with this `Range`, if any, and reads the head. Body bytes read with it are passed to `taken`.
    pub(crate) fn request(
        &mut self,
        path: &str,
        range: Option<&str>,
        buffer: &mut [u8],
        mut taken: impl FnMut(&[u8]),
    ) -> Outcome<Response> {
        let range = range.map_or_else(String::new, |range| format!("Range: {range}\r\n"));
        let (host, lines) = (self.host, &self.lines);
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: {MANIFEST_TYPE}\r\n{range}{lines}\r\n");
        self.stream.write_all(request.as_bytes())?;
        self.stream.flush()?;
        let mut filled = 0;
        loop {
            let room = buffer
                .get_mut(filled..HEAD_BYTES_MAX)
                .ok_or("a head that does not end")?;
            let more = self.stream.read(room)?;
            if more == 0 {
                return Err(format!("{path}: closed before the head ended").into());
            }
            filled += more;
            let got = buffer.get(..filled).unwrap_or_default();
            if let Some(end) = got.windows(4).position(|four| four == b"\r\n\r\n") {
                let (head, body) = got.split_at(end + 4);
                let head = std::str::from_utf8(head)?;
                let status = status(head).ok_or_else(|| format!("{path}: not HTTP/1.1"))?;
                let length = match content_length(head) {
                    Some(length) => length,
                    // The bodies of errors are not read.
                    None if status >= 400 => body.len() as u64,
                    None => return Err(format!("{path}: no Content-Length").into()),
                };
                taken(body);
                return Ok(Response {
                    status,
                    left: length - body.len() as u64,
                });
            }
        }
    }

    pub(crate) fn read_some<'b>(&mut self, left: u64, buffer: &'b mut [u8]) -> Outcome<&'b [u8]> {
        let limit = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let room = buffer.get_mut(..limit).unwrap_or_default();
        let more = self.stream.read(room)?;
        if more == 0 {
            return Err(format!("a body ended {left} bytes short").into());
        }
        Ok(buffer.get(..more).unwrap_or_default())
    }

    /// Like `read_some`, but the bytes are discarded in the kernel. Only the returned length is meaningful.
    pub(crate) fn discard_some<'b>(&mut self, left: u64, buffer: &'b mut [u8]) -> Outcome<&'b [u8]> {
        let Some(bare) = &self.bare else {
            return self.read_some(left, buffer);
        };
        let limit = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let room = buffer.get_mut(..limit).unwrap_or_default();
        let (_, more) = recv(bare, room, RecvFlags::TRUNC)?;
        if more == 0 {
            return Err(format!("a body ended {left} bytes short").into());
        }
        Ok(buffer.get(..more).unwrap_or_default())
    }
}

impl Response {
    pub(crate) fn expect(self, status: u16, path: &str) -> Outcome<Self> {
        if self.status == status {
            Ok(self)
        } else {
            Err(format!("{path}: {}", self.status).into())
        }
    }
}

fn status(head: &str) -> Option<u16> {
    head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

fn content_length(head: &str) -> Option<u64> {
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    let mut named = fields.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    named.next()?.1.trim().parse().ok()
}
