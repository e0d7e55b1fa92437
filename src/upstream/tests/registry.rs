//! Scripted registry: a closure maps requests to responses. It records all requests.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::super::{AddressLimit, DialFuture, DialedStream, Dialer};
use super::{MANIFEST, OCI_MANIFEST, digest};
use crate::oci::failure::UpstreamFailure;

/// A recorded request.
#[derive(Clone, Debug)]
pub(in crate::upstream) struct Seen {
    pub(in crate::upstream) method: Method,
    pub(in crate::upstream) uri: Uri,
    pub(in crate::upstream) headers: HeaderMap,
    pub(in crate::upstream) body: Bytes,
    pub(in crate::upstream) version: Version,
    /// The number of requests before it.
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

    /// A challenge with this registry as the realm.
    pub(in crate::upstream) fn challenge(&self) -> Reply {
        let challenge = format!(
            r#"Bearer realm="http://{}/token",service="reg",scope="repository:library/a:pull""#,
            self.host()
        );
        response(401).header("www-authenticate", &challenge)
    }
}

/// How the registry responds to a request.
pub(in crate::upstream) struct Reply {
    response: http::response::Builder,
    body: Bytes,
    end: End,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Proper,
    /// Closes the connection after the body, whatever `Content-Length` says.
    Cut,
    /// Sends nothing after the body and keeps the connection open.
    Stall,
    /// Sends a byte a second after the body, without end.
    Trickle,
    /// Closes the connection before any response.
    Hangup,
}

pub(in crate::upstream) fn response(status: u16) -> Reply {
    let response = Response::builder().status(StatusCode::from_u16(status).unwrap());
    Reply {
        response,
        body: Bytes::new(),
        end: End::Proper,
    }
}

/// 200 with [`MANIFEST`] and all headers, for HEAD and GET.
pub(in crate::upstream) fn manifest() -> Reply {
    response(200)
        .header("content-type", OCI_MANIFEST)
        .header("docker-content-digest", &digest(MANIFEST).to_string())
        .body(MANIFEST)
}

/// A token response.
pub(in crate::upstream) fn token(token: &str) -> Reply {
    response(200).body(&format!(r#"{{"token":"{token}"}}"#))
}

pub(in crate::upstream) fn hangup() -> Reply {
    Reply {
        end: End::Hangup,
        ..response(200)
    }
}

impl Reply {
    pub(in crate::upstream) fn header(mut self, name: &str, value: &str) -> Reply {
        self.response = self.response.header(name, value);
        self
    }

    pub(in crate::upstream) fn body(mut self, body: &str) -> Reply {
        self.body = Bytes::copy_from_slice(body.as_bytes());
        self
    }

    pub(in crate::upstream) fn cut(self) -> Reply {
        Reply {
            end: End::Cut,
            ..self
        }
    }

    pub(in crate::upstream) fn trickle(self) -> Reply {
        Reply {
            end: End::Trickle,
            ..self
        }
    }

    pub(in crate::upstream) fn stall(self) -> Reply {
        Reply {
            end: End::Stall,
            ..self
        }
    }
}

/// A running registry. Stops listening when dropped.
pub(in crate::upstream) struct Registry {
    address: SocketAddr,
    stage: Arc<Stage>,
    listening: JoinHandle<()>,
}

struct Stage {
    play: Box<dyn Fn(&Seen) -> Reply + Send + Sync>,
    seen: Mutex<Vec<Seen>>,
    refuses: AtomicBool,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Registry {
    pub(in crate::upstream) async fn start(
        play: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Registry {
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
        self.stage.seen.lock().clone()
    }

    /// Method and path of all requests so far.
    pub(in crate::upstream) fn requests(&self) -> Vec<String> {
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

    /// A dialer with in-memory pipes to this registry, for any address.
    pub(in crate::upstream) fn dial(&self) -> Arc<dyn Dialer> {
        Arc::new(Pipes(Arc::clone(&self.stage)))
    }

    /// Serves one connection accepted by the caller, who may have added TLS.
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
        let mut all = stage.seen.lock();
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
            next: None,
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
    /// The next byte of a trickle.
    next: Option<Pin<Box<tokio::time::Sleep>>>,
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
            (None, End::Trickle) => {
                let second = || Box::pin(tokio::time::sleep(Duration::from_secs(1)));
                ready!(self.next.get_or_insert_with(second).as_mut().poll(cx));
                self.next = None;
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b".")))))
            }
            // Flushes the bytes sent so far before the connection closes.
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
