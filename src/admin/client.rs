//! HTTP client of the admin API, for the command line.

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use http::{Method, Request, Response, StatusCode, request};
use http_body::Body;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::error::Elapsed;
use zeroize::Zeroizing;

use super::archive::TAR;
use super::response::StreamBody;
use crate::archive::pipe::Chunk;
use crate::config;

/// Maximum size of a response body.
const RESPONSE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Response timeout. A refresh waits for the upstream, so it covers the upstream timeout.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(120);

/// Error of an admin request.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The admin listener is disabled.
    #[error("the admin listener is disabled (`listen.admin = \"off\"`)")]
    Off,
    /// The connection failed.
    #[error(
        "cannot reach ifnewer at {address}: {reason}; check that `ifnewer serve` is running and that `--admin` is correct"
    )]
    Unreachable {
        /// The address.
        address: String,
        /// The reason.
        reason: String,
    },
    /// The API returned an error.
    #[error("{detail}{}", did_you_mean(.nearest))]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The problem detail.
        detail: String,
        /// Similar names.
        nearest: Vec<String>,
    },
    /// The connection closed before the end of the response.
    #[error("the response from {address} is incomplete; see the log of the cache")]
    Truncated {
        /// The address.
        address: String,
    },
    /// The response is not valid.
    #[error("invalid response from {address}: {reason}")]
    InvalidResponse {
        /// The address.
        address: String,
        /// The reason.
        reason: String,
    },
}

fn did_you_mean(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("; did you mean {}?", names.join(" or ")),
    }
}

/// An admin API client: address and token.
#[derive(Clone)]
pub struct Client {
    admin: config::Admin,
    token: Option<Zeroizing<String>>,
}

impl Client {
    /// Creates a client for `admin`, with the token if there is one.
    pub fn new(admin: config::Admin, token: Option<Zeroizing<String>>) -> Self {
        Self { admin, token }
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.request_json(Method::GET, path, None).await
    }

    /// `POST` with JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.request_json(Method::POST, path, Some(body)).await
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str) -> Result<Value, ClientError> {
        self.request_json(Method::DELETE, path, None).await
    }

    /// `GET` of an archive.
    pub async fn download(&self, path: &str) -> Result<Download, ClientError> {
        let request = self.request(Method::GET, path, None)?;
        let answered = tokio::time::timeout(
            RESPONSE_TIMEOUT,
            self.send(request.body(Full::<Bytes>::default())),
        );
        let response = self.or_timeout(answered.await)?;
        if response.status() != StatusCode::OK {
            let refused = self.read_json(response).await?;
            return Err(ClientError::InvalidResponse {
                address: self.address(),
                reason: format!("expected an archive, got {refused}"),
            });
        }
        let length = response.headers().get(CONTENT_LENGTH);
        Ok(Download {
            bytes: length.and_then(|length| length.to_str().ok()?.parse().ok()),
            address: self.address(),
            body: response.into_body(),
        })
    }

    /// `POST` of an archive, streamed from `chunks`. Has no timeout.
    pub async fn upload(&self, path: &str, chunks: mpsc::Receiver<Chunk>) -> Result<Value, ClientError> {
        let request = self.request(Method::POST, path, Some(TAR))?;
        let response = self.send(request.body(StreamBody::new(chunks, None))).await?;
        self.read_json(response).await
    }

    async fn request_json(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, ClientError> {
        let kind = body.map(|_| "application/json");
        let body = body.map(|body| Bytes::from(body.to_string()));
        let request = self.request(method, path, kind)?;
        let asked = async {
            let response = self
                .send(request.body(Full::new(body.unwrap_or_default())))
                .await?;
            self.read_json(response).await
        };
        self.or_timeout(tokio::time::timeout(RESPONSE_TIMEOUT, asked).await)
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        kind: Option<&str>,
    ) -> Result<request::Builder, ClientError> {
        let host = match &self.admin {
            config::Admin::Off => return Err(ClientError::Off),
            config::Admin::Tcp(address) => address.to_string(),
            config::Admin::Unix(_) => "localhost".to_owned(),
        };
        let mut request = Request::builder().method(method).uri(path).header(HOST, host);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.as_str()));
        }
        Ok(match kind {
            Some(kind) => request.header(CONTENT_TYPE, kind),
            None => request,
        })
    }

    async fn send<B>(&self, request: http::Result<Request<B>>) -> Result<Response<Incoming>, ClientError>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync,
    {
        let unreachable = |reason: String| self.unreachable(reason);
        let failed = |error: hyper::Error| {
            if error.is_incomplete_message() {
                // A response that fails may fail before its head is written.
                ClientError::Truncated {
                    address: self.address(),
                }
            } else {
                self.unreachable(error.to_string())
            }
        };
        let request = request.map_err(|error| unreachable(error.to_string()))?;
        match &self.admin {
            config::Admin::Off => Err(ClientError::Off),
            config::Admin::Unix(path) => {
                let stream = UnixStream::connect(path).await;
                let stream = stream.map_err(|error| unreachable(error.to_string()))?;
                exchange(stream, request).await.map_err(failed)
            }
            config::Admin::Tcp(address) => {
                let stream = TcpStream::connect(address).await;
                let stream = stream.map_err(|error| unreachable(error.to_string()))?;
                exchange(stream, request).await.map_err(failed)
            }
        }
    }

    async fn read_json(&self, response: Response<Incoming>) -> Result<Value, ClientError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), RESPONSE_BYTES_MAX);
        let body = body.collect().await;
        let body = body.map_err(|error| self.unreachable(error.to_string()))?;
        parse_response(status, &body.to_bytes(), &self.address())
    }

    fn or_timeout<T>(&self, answered: Result<Result<T, ClientError>, Elapsed>) -> Result<T, ClientError> {
        answered.unwrap_or_else(|_| {
            Err(self.unreachable(format!("no response within {} s", RESPONSE_TIMEOUT.as_secs())))
        })
    }

    fn address(&self) -> String {
        match &self.admin {
            config::Admin::Off => String::new(),
            config::Admin::Tcp(address) => address.to_string(),
            config::Admin::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    fn unreachable(&self, reason: String) -> ClientError {
        ClientError::Unreachable {
            address: self.address(),
            reason,
        }
    }
}

/// An archive being downloaded.
pub struct Download {
    /// The content length, if the response states it.
    pub bytes: Option<u64>,
    address: String,
    body: Incoming,
}

impl Download {
    /// The next chunk; `None` at the end of a complete archive.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|_| ClientError::Truncated {
                address: self.address.clone(),
            })?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }
}

fn parse_response(status: StatusCode, bytes: &[u8], address: &str) -> Result<Value, ClientError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| ClientError::InvalidResponse {
        address: address.to_owned(),
        reason: format!("{status}, {error}"),
    })?;
    if status.is_success() {
        return Ok(value);
    }
    let names = value.get("nearest").and_then(Value::as_array);
    Err(ClientError::Refused {
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

async fn exchange<S, B>(stream: S, request: Request<B>) -> hyper::Result<Response<Incoming>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: std::error::Error + Send + Sync,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    sender.send_request(request).await
}
