//! One HTTP request, over TCP, TLS or a unix socket, and its whole answer. No redirects, no proxy, no reuse: what is asked
//! is answered by the very address that it was put to.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::config::Admin;

/// Patience for what should answer at once.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Where a request goes.
#[derive(Clone, Debug)]
pub(super) enum Target<'a> {
    /// Host and port.
    Plain(&'a str, u16),
    /// Host and port, and whom to trust there.
    Tls(&'a str, u16, &'a [CertificateDer<'static>]),
    /// A socket.
    Unix(&'a Path),
}

impl<'a> Target<'a> {
    /// The admin listener.
    pub(super) fn admin(admin: &'a Admin, host: &'a mut String) -> Option<Self> {
        match admin {
            Admin::Off => None,
            Admin::Tcp(address) => {
                *host = address.ip().to_string();
                Some(Self::Plain(host, address.port()))
            }
            Admin::Unix(path) => Some(Self::Unix(path)),
        }
    }
}

/// What came back.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Response {
    pub(super) fn json(&self) -> Option<serde_json::Value> {
        serde_json::from_slice(&self.body).ok()
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// `GET`.
pub(super) async fn get(target: Target<'_>, path: &str) -> io::Result<Response> {
    request(target, Method::GET, path, PROBE_TIMEOUT).await
}

/// Any request without a body.
pub(super) async fn request(
    target: Target<'_>,
    method: Method,
    path: &str,
    patience: Duration,
) -> io::Result<Response> {
    let asked = async {
        match target {
            Target::Plain(host, port) => {
                let stream = TcpStream::connect((without_brackets(host), port)).await?;
                exchange(stream, &format!("{host}:{port}"), method, path).await
            }
            Target::Tls(host, port, roots) => {
                let stream = TcpStream::connect((without_brackets(host), port)).await?;
                let name =
                    ServerName::try_from(without_brackets(host).to_owned()).map_err(io::Error::other)?;
                let stream = connector(roots)?.connect(name, stream).await?;
                exchange(stream, &format!("{host}:{port}"), method, path).await
            }
            Target::Unix(path_of_socket) => {
                exchange(
                    UnixStream::connect(path_of_socket).await?,
                    "localhost",
                    method,
                    path,
                )
                .await
            }
        }
    };
    let late = |_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer in {} s", patience.as_secs()),
        ))
    };
    tokio::time::timeout(patience, asked).await.unwrap_or_else(late)
}

fn without_brackets(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

fn connector(roots: &[CertificateDer<'static>]) -> io::Result<TlsConnector> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots.iter().cloned());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(store)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

async fn exchange<S>(stream: S, host: &str, method: Method, path: &str) -> io::Result<Response>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", host)
        .header(
            "user-agent",
            concat!("ifnewer-doctor/", env!("CARGO_PKG_VERSION")),
        )
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let (head, body) = sender
        .send_request(request)
        .await
        .map_err(io::Error::other)?
        .into_parts();
    let body = Limited::new(body, BODY_BYTES_MAX)
        .collect()
        .await
        .map_err(io::Error::other)?;
    Ok(Response {
        status: head.status,
        headers: head.headers,
        body: body.to_bytes(),
    })
}
