//! HTTP client for tests: one request per connection, every response checked.

use super::check;
use super::identity::Identity;
use super::reply::Reply;
use crate::registry::within;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, Uri};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use std::future::{Future, IntoFuture};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

type Fault = Box<dyn std::error::Error + Send + Sync>;

/// Builder of a request. Awaiting it sends the request.
#[derive(Clone)]
#[must_use = "a request does nothing until it is awaited"]
pub struct Ask {
    address: SocketAddr,
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Bytes,
    /// The body is chunked.
    chunked: bool,
    tls: Option<(String, Vec<String>)>,
    server_name: String,
    identity: Option<Identity>,
    connect: Option<String>,
    /// Sent with the CONNECT.
    proxy_authorization: Option<String>,
    /// The CONNECT itself goes over TLS.
    with_tls_to_proxy: bool,
    checked: bool,
}

impl Ask {
    /// Any method and path, unchanged.
    pub fn new(address: SocketAddr, method: &str, path: &str) -> Ask {
        Ask {
            address,
            method: method.to_owned(),
            path: path.to_owned(),
            headers: Vec::new(),
            body: Bytes::new(),
            chunked: false,
            tls: None,
            server_name: "localhost".to_owned(),
            identity: None,
            connect: None,
            proxy_authorization: None,
            with_tls_to_proxy: false,
            checked: true,
        }
    }

    pub(super) fn with_usual_accept(self) -> Ask {
        use crate::registry::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
        if !self.path.contains("/manifests/") {
            return self;
        }
        [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST]
            .iter()
            .fold(self, |ask, kind| ask.header("accept", kind))
    }

    /// One more header line.
    pub fn header(mut self, name: &str, value: &str) -> Ask {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// These `Accept` lines instead of the usual ones.
    pub fn accept(mut self, lines: &[&str]) -> Ask {
        self.headers.retain(|(name, _)| name != "accept");
        lines.iter().fold(self, |ask, line| ask.header("accept", line))
    }

    /// With `Basic` credentials.
    pub fn basic(self, user: &str, password: &str) -> Ask {
        let pair = BASE64_STANDARD.encode(format!("{user}:{password}"));
        self.header("authorization", &format!("Basic {pair}"))
    }

    /// With a token.
    pub fn bearer(self, token: &str) -> Ask {
        self.header("authorization", &format!("Bearer {token}"))
    }

    /// With a body.
    pub fn body(mut self, body: &[u8]) -> Ask {
        self.body = Bytes::copy_from_slice(body);
        self
    }

    /// With a body of unknown length.
    pub fn chunked_body(mut self, body: &[u8]) -> Ask {
        self.chunked = true;
        self.body(body)
    }

    /// Over TLS, trusting this CA, offering these protocols.
    pub fn tls(mut self, ca_pem: &str, protocols: &[&str]) -> Ask {
        self.tls = Some((
            ca_pem.to_owned(),
            protocols.iter().map(|name| (*name).to_owned()).collect(),
        ));
        self
    }

    /// This server name (SNI), also in `Host` unless set otherwise.
    pub fn server_name(mut self, name: &str) -> Ask {
        name.clone_into(&mut self.server_name);
        self.named_host(name)
    }

    /// Within a `CONNECT` to this host and port, over TLS.
    pub fn through_connect(mut self, target: &str) -> Ask {
        self.connect = Some(target.to_owned());
        let host = target.rsplit_once(':').unwrap().0;
        host.clone_into(&mut self.server_name);
        self.named_host(target.strip_suffix(":443").unwrap_or(target))
    }

    /// With this client certificate in each handshake with the cache. For a `CONNECT` over TLS, only in the outer
    /// one.
    pub fn identity(mut self, identity: &Identity) -> Ask {
        self.identity = Some(identity.clone());
        self
    }

    /// The `CONNECT` carries `Basic` credentials for the proxy.
    pub fn proxy_basic(mut self, user: &str, password: &str) -> Ask {
        let pair = BASE64_STANDARD.encode(format!("{user}:{password}"));
        self.proxy_authorization = Some(format!("Basic {pair}"));
        self
    }

    /// The `CONNECT` itself is sent over TLS, as to a proxy with an https URL.
    pub fn with_tls_to_proxy(mut self) -> Ask {
        self.with_tls_to_proxy = true;
        self
    }

    fn named_host(self, host: &str) -> Ask {
        if self.headers.iter().any(|(name, _)| name == "host") {
            return self;
        }
        self.header("host", host)
    }

    /// For another port than the registry's: the response is not checked.
    pub fn unchecked(mut self) -> Ask {
        self.checked = false;
        self
    }

    /// Sends the request and reads the complete response.
    pub async fn into_reply(self) -> Reply {
        let what = format!("{} {}", self.method, self.path);
        self.attempt()
            .await
            .unwrap_or_else(|fault| panic!("{what}: {fault}"))
    }

    /// The checked response, if there is one, for a process that may end at any moment.
    #[allow(dead_code, reason = "tests/crash uses it")]
    pub async fn tried(self) -> Option<Reply> {
        self.attempt().await.ok()
    }

    /// Expects a visible failure: no response, an interrupted body, or an error. Never a complete 2xx.
    pub async fn visibly_fails(self) {
        let Ok(reply) = self.attempt().await else { return };
        let broke = matches!(reply.status, 200 | 206) && !reply.whole;
        let Reply {
            status, whole, body, ..
        } = &reply;
        assert!(
            broke || matches!(status, 502..=504),
            "status {status}, whole: {whole}, {} bytes",
            body.len()
        );
    }

    /// The response, also with an interrupted body. `None` if the connection ended before one.
    pub async fn broken_or_reply(self) -> Option<Reply> {
        self.attempt().await.ok()
    }

    async fn attempt(self) -> Result<Reply, Fault> {
        let (method, path, checked) = (self.method.clone(), self.path.clone(), self.checked);
        let what = format!("the reply to {method} {path}");
        let mut flow = within(&what, Box::pin(self.send())).await?;
        let (whole, body) = match within(&what, flow.rest()).await {
            Ok(body) => (true, body),
            Err(body) => (false, body),
        };
        let reply = Reply {
            method,
            path,
            status: flow.status,
            headers: flow.headers.clone(),
            body,
            whole,
        };
        if checked {
            check::reply(&reply);
        }
        Ok(reply)
    }

    /// Sends it over TLS with this client's session cache. Also returns whether the session was resumed.
    pub async fn by(self, client: &tokio_rustls::TlsConnector) -> (Reply, bool) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from(self.server_name.clone()).unwrap();
        let stream = client.connect(name, stream).await.unwrap();
        let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        let mut flow = within("the reply", self.over_http1(stream, None)).await.unwrap();
        let body = flow.rest().await.unwrap();
        let reply = Reply {
            method: self.method,
            path: self.path,
            status: flow.status,
            headers: flow.headers.clone(),
            body,
            whole: true,
        };
        check::reply(&reply);
        (reply, resumed)
    }

    /// Sends it and reads only the response head. Dropping the flow closes the connection.
    pub async fn stream(self) -> Flow {
        let what = format!("{} {}", self.method, self.path);
        let sent = within(&what, Box::pin(self.send())).await;
        sent.unwrap_or_else(|fault| panic!("{what}: {fault}"))
    }

    /// Expects no response.
    pub async fn fails(self) {
        let what = format!("{} {}", self.method, self.path);
        if let Ok(flow) = within(&what, Box::pin(self.send())).await {
            panic!("{what}: answered {} though it should have failed", flow.status);
        }
    }

    async fn send(self) -> Result<Flow, Fault> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let Some((ca_pem, protocols)) = &self.tls else {
            return self.over_http1(stream, None).await;
        };
        let mut identity = self.identity.as_ref();
        let name = ServerName::try_from(self.server_name.clone())?;
        let mut stream: Box<dyn Stream> = Box::new(stream);
        if let Some(target) = &self.connect {
            if self.with_tls_to_proxy {
                let proxy = connector(ca_pem, &[], identity.take());
                stream = Box::new(proxy.connect(ServerName::try_from("localhost")?, stream).await?);
            }
            connect(&mut stream, target, self.proxy_authorization.as_deref()).await?;
        }
        let stream = connector(ca_pem, protocols, identity)
            .connect(name, stream)
            .await?;
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            self.over_http2(stream).await
        } else {
            self.over_http1(stream, None).await
        }
    }

    async fn over_http1(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        uri: Option<Uri>,
    ) -> Result<Flow, Fault> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let task = tokio::spawn(connection);
        let mut request = self.request(uri.map_or_else(|| self.path.parse::<Uri>(), Ok)?)?;
        if !request.headers().contains_key("host") {
            request
                .headers_mut()
                .insert("host", self.address.to_string().parse()?);
        }
        Ok(Flow::of(sender.send_request(request).await?, task.abort_handle()))
    }

    async fn over_http2(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Flow, Fault> {
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let task = tokio::spawn(connection);
        let authority = self
            .headers
            .iter()
            .find(|(name, _)| name == "host")
            .map(|(_, value)| value.clone());
        let authority = authority.unwrap_or_else(|| self.address.to_string());
        let mut request = self.request(format!("https://{authority}{}", self.path).parse()?)?;
        request.headers_mut().remove("host");
        Ok(Flow::of(sender.send_request(request).await?, task.abort_handle()))
    }

    fn request(&self, uri: Uri) -> Result<Request<Sent>, Fault> {
        let mut request = Request::builder().method(self.method.as_str()).uri(uri);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let body = if self.chunked {
            Sent::Pieces(self.body.clone())
        } else {
            Sent::Whole(Full::new(self.body.clone()))
        };
        Ok(request.body(body)?)
    }
}

/// The body of a request.
enum Sent {
    Whole(Full<Bytes>),
    Pieces(Bytes),
}

impl http_body::Body for Sent {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Sent::Whole(whole) => Pin::new(whole).poll_frame(context),
            Sent::Pieces(rest) if rest.is_empty() => Poll::Ready(None),
            Sent::Pieces(rest) => {
                let piece = rest.split_to(rest.len().min(64 * 1024));
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Sent::Whole(whole) => whole.is_end_stream(),
            Sent::Pieces(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Sent::Whole(whole) => whole.size_hint(),
            Sent::Pieces(_) => SizeHint::default(),
        }
    }
}

impl IntoFuture for Ask {
    type Output = Reply;
    type IntoFuture = Pin<Box<dyn Future<Output = Reply> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.into_reply())
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Requests a tunnel. The error is the response, if the tunnel is rejected.
async fn connect(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    target: &str,
    authorization: Option<&str>,
) -> Result<(), Fault> {
    let line = authorization.map_or_else(String::new, |basic| format!("Proxy-Authorization: {basic}\r\n"));
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{line}\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut reply = Vec::new();
    while !reply.ends_with(b"\r\n\r\n") {
        reply.push(stream.read_u8().await?);
    }
    let reply = String::from_utf8(reply)?;
    if reply.starts_with("HTTP/1.1 200 ") {
        Ok(())
    } else {
        Err(reply.into())
    }
}

/// A TLS connector that trusts this CA.
pub(super) fn connector(
    ca_pem: &str,
    protocols: &[String],
    identity: Option<&Identity>,
) -> tokio_rustls::TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        Some(identity) => config
            .with_client_auth_cert(identity.chain(), identity.key())
            .unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config).into()
}

/// A response whose body is still being received.
pub struct Flow {
    pub status: u16,
    pub headers: HeaderMap,
    body: Incoming,
    ahead: BytesMut,
    connection: tokio::task::AbortHandle,
}

impl Flow {
    fn of(response: Response<Incoming>, connection: tokio::task::AbortHandle) -> Flow {
        let (head, body) = response.into_parts();
        Flow {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
            ahead: BytesMut::new(),
            connection,
        }
    }

    /// Waits for exactly `count` further bytes.
    pub async fn read(&mut self, count: usize) -> Bytes {
        while self.ahead.len() < count {
            let frame = within("further bytes of the body", self.body.frame()).await;
            let frame = frame.expect("the body ended early").expect("the body broke");
            self.ahead
                .extend_from_slice(&frame.into_data().unwrap_or_default());
        }
        self.ahead.split_to(count).freeze()
    }

    /// The rest of the body. `Err` with the received part if the body was interrupted.
    pub async fn rest(&mut self) -> Result<Bytes, Bytes> {
        while let Some(frame) = within("the rest of the body", self.body.frame()).await {
            match frame {
                Ok(frame) => self
                    .ahead
                    .extend_from_slice(&frame.into_data().unwrap_or_default()),
                Err(_) => return Err(self.ahead.split().freeze()),
            }
        }
        Ok(self.ahead.split().freeze())
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// One connection, several requests: HTTP/1.1 keep-alive.
pub struct Session {
    sender: http1::SendRequest<Sent>,
    address: SocketAddr,
}

impl Session {
    /// Opens the connection.
    pub async fn open(address: SocketAddr) -> Session {
        let stream = TcpStream::connect(address).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Session { sender, address }
    }

    /// Opens the connection over TLS, trusting this CA.
    pub async fn open_tls(address: SocketAddr, ca_pem: &str) -> Session {
        Session::over(address, connector(ca_pem, &[], None)).await
    }

    /// Opens the connection over TLS with this client certificate.
    pub async fn open_as(address: SocketAddr, ca_pem: &str, identity: &Identity) -> Session {
        Session::over(address, connector(ca_pem, &[], Some(identity))).await
    }

    async fn over(address: SocketAddr, connector: tokio_rustls::TlsConnector) -> Session {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = connector.connect(name, stream).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Session { sender, address }
    }

    /// The next request on it.
    pub async fn ask(&mut self, method: &str, path: &str) -> Reply {
        let reply = self.ask_unchecked(method, path).await;
        check::reply(&reply);
        reply
    }

    /// `ask` without response checks.
    pub async fn ask_unchecked(&mut self, method: &str, path: &str) -> Reply {
        within("the connection to stay open", self.sender.ready())
            .await
            .expect("the connection was closed");
        let mut request = Ask::new(self.address, method, path)
            .with_usual_accept()
            .request(path.parse().unwrap())
            .unwrap();
        request
            .headers_mut()
            .insert("host", self.address.to_string().parse().unwrap());
        let response = within("the reply", self.sender.send_request(request))
            .await
            .unwrap();
        let (head, body) = response.into_parts();
        let body = within("the body", body.collect()).await.unwrap().to_bytes();
        let (method, path) = (method.to_owned(), path.to_owned());
        Reply {
            method,
            path,
            status: head.status.as_u16(),
            headers: head.headers,
            body,
            whole: true,
        }
    }
}
