//! A registry that plays a script: a closure from what was asked to what is answered. It keeps what it saw.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::super::{AddressLimit, DialFuture, DialedStream, Dialer};
use super::{MANIFEST, OCI_MANIFEST, digest};
use crate::oci::failure::UpstreamFailure;

/// A request as the registry saw it.
#[derive(Clone, Debug)]
pub(in crate::upstream) struct Seen {
    pub(in crate::upstream) method: Method,
    pub(in crate::upstream) uri: Uri,
    pub(in crate::upstream) headers: HeaderMap,
    pub(in crate::upstream) body: Bytes,
    pub(in crate::upstream) version: Version,
    /// How many came before it.
    pub(in crate::upstream) nth: usize,
}

impl Seen {
    pub(in crate::upstream) fn path(&self) -> &str {
        self.uri.path()
    }

    pub(in crate::upstream) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub(in crate::upstream) fn authorization(&self) -> Option<&str> {
        self.header("authorization")
    }

    fn host(&self) -> &str {
        self.header("host")
            .or(self.uri.authority().map(http::uri::Authority::as_str))
            .unwrap()
    }

    /// A challenge whose realm is this registry.
    pub(in crate::upstream) fn challenge(&self) -> Play {
        let challenge = format!(
            r#"Bearer realm="http://{}/token",service="reg",scope="repository:library/a:pull""#,
            self.host()
        );
        answer(401).header("www-authenticate", &challenge)
    }
}

/// What the registry does with a request.
pub(in crate::upstream) struct Play {
    response: http::response::Builder,
    body: Bytes,
    end: End,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Proper,
    /// The connection is closed after the body, whatever length was promised.
    Cut,
    /// Nothing comes after the body, and the connection stays.
    Stall,
    /// The connection is closed before any answer.
    Hangup,
}

pub(in crate::upstream) fn answer(status: u16) -> Play {
    let response = Response::builder().status(StatusCode::from_u16(status).unwrap());
    Play {
        response,
        body: Bytes::new(),
        end: End::Proper,
    }
}

/// 200 with [`MANIFEST`] as a good registry sends it, to HEAD and GET.
pub(in crate::upstream) fn manifest() -> Play {
    answer(200)
        .header("content-type", OCI_MANIFEST)
        .header("docker-content-digest", &digest(MANIFEST).to_string())
        .body(MANIFEST)
}

/// A token service's answer.
pub(in crate::upstream) fn token(token: &str) -> Play {
    answer(200).body(&format!(r#"{{"token":"{token}"}}"#))
}

pub(in crate::upstream) fn hangup() -> Play {
    Play {
        end: End::Hangup,
        ..answer(200)
    }
}

impl Play {
    pub(in crate::upstream) fn header(mut self, name: &str, value: &str) -> Play {
        self.response = self.response.header(name, value);
        self
    }

    pub(in crate::upstream) fn body(mut self, body: &str) -> Play {
        self.body = Bytes::copy_from_slice(body.as_bytes());
        self
    }

    pub(in crate::upstream) fn cut(self) -> Play {
        Play {
            end: End::Cut,
            ..self
        }
    }

    pub(in crate::upstream) fn stall(self) -> Play {
        Play {
            end: End::Stall,
            ..self
        }
    }
}

/// A running registry. Dropped, it stops listening.
pub(in crate::upstream) struct Registry {
    address: SocketAddr,
    stage: Arc<Stage>,
    listening: JoinHandle<()>,
}

struct Stage {
    play: Box<dyn Fn(&Seen) -> Play + Send + Sync>,
    seen: Mutex<Vec<Seen>>,
    refuses: AtomicBool,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Registry {
    pub(in crate::upstream) async fn start(play: impl Fn(&Seen) -> Play + Send + Sync + 'static) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stage = Arc::new(Stage {
            play: Box::new(play),
            seen: Mutex::default(),
            refuses: AtomicBool::new(false),
        });
        let on_stage = Arc::clone(&stage);
        let listening = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(Arc::clone(&on_stage), stream));
            }
        });
        Registry {
            address,
            stage,
            listening,
        }
    }

    pub(in crate::upstream) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    pub(in crate::upstream) fn seen(&self) -> Vec<Seen> {
        self.stage.seen.lock().unwrap().clone()
    }

    /// Method and path of all requests so far.
    pub(in crate::upstream) fn asked(&self) -> Vec<String> {
        self.seen()
            .iter()
            .map(|seen| format!("{} {}", seen.method, seen.path()))
            .collect()
    }

    pub(in crate::upstream) fn count(&self, path: &str) -> usize {
        self.seen().iter().filter(|seen| seen.path() == path).count()
    }

    /// Whether connections over pipes are refused.
    pub(in crate::upstream) fn refuses(&self, refuses: bool) {
        self.stage.refuses.store(refuses, Ordering::SeqCst);
    }

    /// In-memory pipes to this registry, whatever the address.
    pub(in crate::upstream) fn dial(&self) -> Arc<dyn Dialer> {
        Arc::new(Pipes(Arc::clone(&self.stage)))
    }

    /// Serves one connection that somebody else accepted (and perhaps put TLS on).
    pub(in crate::upstream) fn serve(
        &self,
        stream: impl super::super::dialer::Stream + 'static,
    ) -> impl Future<Output = ()> + Send {
        serve(
            Arc::clone(&self.stage),
            Box::new(stream) as Box<dyn super::super::dialer::Stream>,
        )
    }
}

struct Pipes(Arc<Stage>);

impl Dialer for Pipes {
    fn dial(&self, _: &Uri, _: &AddressLimit, _: Duration) -> DialFuture {
        let stage = Arc::clone(&self.0);
        Box::pin(async move {
            if stage.refuses.load(Ordering::SeqCst) {
                return Err(UpstreamFailure::ConnectionRefused.into());
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(serve(stage, theirs));
            Ok(DialedStream {
                stream: Box::new(ours),
                peer: None,
            })
        })
    }
}

async fn serve(stage: Arc<Stage>, stream: impl super::super::dialer::Stream + 'static) {
    let service = service_fn(move |request: Request<Incoming>| act(Arc::clone(&stage), request));
    let _ = auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn act(stage: Arc<Stage>, request: Request<Incoming>) -> Result<Response<Script>, Gone> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let mut seen = Seen {
        method: parts.method,
        uri: parts.uri,
        version: parts.version,
        headers: parts.headers,
        body,
        nth: 0,
    };
    {
        let mut all = stage.seen.lock().unwrap();
        seen.nth = all.len();
        all.push(seen.clone());
    }
    let play = (stage.play)(&seen);
    if play.end == End::Hangup {
        return Err(Gone);
    }
    Ok(play
        .response
        .body(Script {
            data: Some(play.body).filter(|data| !data.is_empty()),
            end: play.end,
            flushed: false,
        })
        .unwrap())
}

#[derive(Debug, thiserror::Error)]
#[error("as the script says")]
struct Gone;

impl From<Infallible> for Gone {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

struct Script {
    data: Option<Bytes>,
    end: End,
    flushed: bool,
}

impl Body for Script {
    type Data = Bytes;
    type Error = Gone;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Gone>>> {
        match (self.data.take(), self.end) {
            (Some(data), _) => Poll::Ready(Some(Ok(Frame::data(data)))),
            (None, End::Stall) => Poll::Pending,
            // What was sent so far is flushed before the connection goes.
            (None, End::Cut) if !self.flushed => {
                self.flushed = true;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            (None, End::Cut) => Poll::Ready(Some(Err(Gone))),
            (None, End::Proper | End::Hangup) => Poll::Ready(None),
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match (self.end, &self.data) {
            (End::Proper, data) => {
                hyper::body::SizeHint::with_exact(data.as_ref().map_or(0, |data| data.len() as u64))
            }
            _ => hyper::body::SizeHint::default(),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.end == End::Proper && self.data.is_none()
    }
}
