//! Asks a running cache over its admin listener: for the command line.

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use zeroize::Zeroizing;

use crate::config;

/// The longest answer read.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A refresh waits for the upstream, so an answer may take as long as that may.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The configuration has no admin listener.
    #[error("the admin listener is off (`listen.admin = \"off\"`), so nobody can be asked")]
    Off,
    /// Nobody answers there.
    #[error("no ifnewer answers at {place}: {reason}; is `ifnewer serve` running, and is `--admin` right?")]
    Unreachable {
        /// Where.
        place: String,
        /// Why.
        reason: String,
    },
    /// It said no.
    #[error("{detail}{}", or_rather(.nearest))]
    Refused {
        /// The status.
        status: u16,
        /// Why, in its words.
        detail: String,
        /// What may have been meant.
        nearest: Vec<String>,
    },
    /// It answered what cannot be read.
    #[error("the answer from {place} cannot be read: {reason}")]
    Unreadable {
        /// From where.
        place: String,
        /// Why not.
        reason: String,
    },
}

fn or_rather(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("; did you mean {}?", names.join(" or ")),
    }
}

/// Where to ask, and with what right.
#[derive(Clone)]
pub struct Client {
    admin: config::Admin,
    token: Option<Zeroizing<String>>,
}

impl Client {
    /// Asks at `admin`, with the token if there is one.
    pub fn new(admin: config::Admin, token: Option<Zeroizing<String>>) -> Self {
        Self { admin, token }
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> Result<Value, AskError> {
        self.ask(Method::GET, path, None).await
    }

    /// `POST` with JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, AskError> {
        self.ask(Method::POST, path, Some(body)).await
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str) -> Result<Value, AskError> {
        self.ask(Method::DELETE, path, None).await
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, AskError> {
        let (place, host) = match &self.admin {
            config::Admin::Off => return Err(AskError::Off),
            config::Admin::Tcp(address) => (address.to_string(), address.to_string()),
            config::Admin::Unix(path) => (format!("unix:{}", path.display()), "localhost".to_owned()),
        };
        let unreachable = |reason: String| AskError::Unreachable {
            place: place.clone(),
            reason,
        };
        let mut request = Request::builder().method(method).uri(path).header(HOST, host);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.as_str()));
        }
        let body = body.map(|body| Bytes::from(body.to_string()));
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(body.unwrap_or_default()))
            .map_err(|error| unreachable(error.to_string()))?;
        let exchanged = async {
            match &self.admin {
                config::Admin::Unix(path) => {
                    let stream = UnixStream::connect(path)
                        .await
                        .map_err(|error| unreachable(error.to_string()))?;
                    exchange(stream, request).await.map_err(unreachable)
                }
                config::Admin::Tcp(address) => {
                    let stream = TcpStream::connect(address)
                        .await
                        .map_err(|error| unreachable(error.to_string()))?;
                    exchange(stream, request).await.map_err(unreachable)
                }
                config::Admin::Off => Err(AskError::Off),
            }
        };
        let timed = tokio::time::timeout(PATIENCE, exchanged).await;
        let (status, bytes) =
            timed.unwrap_or_else(|_| Err(unreachable(format!("no answer in {PATIENCE:?}"))))?;
        read(status, &bytes, &place)
    }
}

fn read(status: StatusCode, bytes: &[u8], place: &str) -> Result<Value, AskError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| AskError::Unreadable {
        place: place.to_owned(),
        reason: format!("{status}, {error}"),
    })?;
    if status.is_success() {
        return Ok(value);
    }
    let names = value.get("nearest").and_then(Value::as_array);
    Err(AskError::Refused {
        status: status.as_u16(),
        detail: value
            .get("detail")
            .and_then(Value::as_str)
            .unwrap_or("refused")
            .to_owned(),
        nearest: names
            .map(|names| {
                names
                    .iter()
                    .filter_map(|name| name.as_str().map(str::to_owned))
                    .collect()
            })
            .unwrap_or_default(),
    })
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), String> {
    let words = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(words)?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(words)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await;
    body.map(|body| (status, body.to_bytes()))
        .map_err(|error| error.to_string())
}
