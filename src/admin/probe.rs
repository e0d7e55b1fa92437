//! `ifnewer healthcheck`: asks the running cache whether it is ready. For images without a shell.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::config::Admin;

const PATIENCE: Duration = Duration::from_secs(5);

/// Asks `admin` for its readiness.
pub async fn ready(admin: &Admin) -> io::Result<()> {
    let asked = async {
        match admin {
            Admin::Off => Err(io::Error::other(
                "the admin listener is off, so nobody can be asked",
            )),
            Admin::Tcp(address) => ask(TcpStream::connect(address).await?).await,
            Admin::Unix(path) => ask(UnixStream::connect(path).await?).await,
        }
    };
    tokio::time::timeout(PATIENCE, asked)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S) -> io::Result<()> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(connection);
    let request = Request::get("/readyz")
        .header("host", "localhost")
        .body(Empty::<Bytes>::new());
    let response = sender
        .send_request(request.map_err(io::Error::other)?)
        .await
        .map_err(io::Error::other)?;
    match response.status() {
        StatusCode::OK => Ok(()),
        status => Err(io::Error::other(format!("it answered {status}"))),
    }
}
