//! HTTP probe: one request over TCP, TLS or a unix socket. No redirects, proxies or connection reuse, so that the
//! response is from the requested address.

use std::io;
use std::net::IpAddr;
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

/// Timeout of a probe.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Target of a probe.
#[derive(Clone, Debug)]
pub(super) enum Target<'a> {
    /// Host and port.
    Plain(&'a str, u16),
    /// Host and port, with trusted roots.
    Tls(&'a str, u16, &'a [CertificateDer<'static>]),
    /// A unix socket.
    Unix(&'a Path),
}

impl<'a> Target<'a> {
    /// The admin listener.
    pub(super) fn admin(admin: &'a Admin, host: &'a mut String) -> Option<Self> {
        match admin {
            Admin::Off => None,
            Admin::Tcp(address) => {
                *host = match address.ip() {
                    IpAddr::V4(ip) => ip.to_string(),
                    IpAddr::V6(ip) => format!("[{ip}]"),
                };
                Some(Self::Plain(host, address.port()))
            }
            Admin::Unix(path) => Some(Self::Unix(path)),
        }
    }
}

/// The response.
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

/// A request without a body.
pub(super) async fn request(
    target: Target<'_>,
    method: Method,
    path: &str,
    request_timeout: Duration,
) -> io::Result<Response> {
    let response = async {
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
            format!("no response within {} s", request_timeout.as_secs()),
        ))
    };
    tokio::time::timeout(request_timeout, response)
        .await
        .unwrap_or_else(late)
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
