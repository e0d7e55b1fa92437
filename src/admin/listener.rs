//! Admin listener: its own thread, runtime and connections.
//!
//! Health and metrics are served on this thread (`health`). Other requests run on the main runtime, so that they do
//! not delay health checks. The checks of `auth` come before the router, so that no route is without them.
//!
//! Connections are limited in total and per address (`server::connections`); an address at its limit gets its oldest
//! idle connection closed. Requests and event streams have lower limits than connections, so that a health check
//! always finds a free connection.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use http::header::ALLOW;
use http::{Request, StatusCode};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::{Builder, Handle as Runtime};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;
use tower_service::Service as _;

use super::Admin;
use super::auth::{Caller, ListenerKind};
use super::concurrency_limit::{ConcurrencyLimit, Permit};
use super::health::{READS_MAX, is_health};
use super::response::{Pace, Problem, with_fixed_headers};
use super::router::{self, READ_METHODS};
use crate::server::connections::{Bounds, Connections, Entering, InFlight, Slot};
use crate::server::{IdlePause, IdlePauseGuard, IdleTimeoutStream};

const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle timeout while a response is sent. Event streams send every 15 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a new connection waits for a permit of its address.
const SLOT_TIMEOUT: Duration = Duration::from_secs(5);

const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A TCP or unix stream.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A bound admin listener.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix socket.
    Unix(UnixListener),
}

impl Admin {
    /// Serves the listener on its own thread. The returned future completes when accepting stops at shutdown. Open
    /// connections are served until the process exits.
    pub fn serve(self, listener: Listener) -> io::Result<impl Future<Output = ()>> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(READS_MAX)
            .build()?;
        let listener = DetachedListener::new(listener)?;
        let server = AdminServer::new(self, Runtime::current());
        let (closed, is_closed) = oneshot::channel::<Infallible>();
        let thread = std::thread::Builder::new().name("admin".to_owned());
        thread.spawn(move || {
            runtime.block_on(async move {
                match listener.attach() {
                    Ok(listener) => server.accept(listener).await,
                    Err(error) => tracing::error!(%error, "failed to start the admin listener"),
                }
                drop(closed);
                std::future::pending::<()>().await;
            });
        })?;
        Ok(async move { _ = is_closed.await })
    }
}

/// A listener detached from its runtime, because each runtime has its own poller.
enum DetachedListener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl DetachedListener {
    fn new(listener: Listener) -> io::Result<Self> {
        Ok(match listener {
            Listener::Tcp(listener) => Self::Tcp(listener.into_std()?),
            Listener::Unix(listener) => Self::Unix(listener.into_std()?),
        })
    }

    fn attach(self) -> io::Result<Listener> {
        Ok(match self {
            Self::Tcp(listener) => Listener::Tcp(TcpListener::from_std(listener)?),
            Self::Unix(listener) => Listener::Unix(UnixListener::from_std(listener)?),
        })
    }
}

impl Listener {
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, Option<IpAddr>)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                (Box::new(stream), Some(address.ip().to_canonical()))
            }
            Self::Unix(listener) => (Box::new(listener.accept().await?.0), None),
        })
    }

    fn kind(&self) -> ListenerKind {
        match self {
            Self::Unix(_) => ListenerKind::Socket,
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) if address.ip().is_loopback() => ListenerKind::Loopback,
                _ => ListenerKind::Network,
            },
        }
    }
}

/// State shared by all connections. Cheap to clone.
#[derive(Clone)]
struct AdminServer {
    admin: Admin,
    /// Runtime for requests other than health and metrics.
    workers: Runtime,
    connections: Connections,
    requests: ConcurrencyLimit,
    health: Router,
    api: Router,
}

impl AdminServer {
    fn new(admin: Admin, workers: Runtime) -> Self {
        let connections = admin.connections_max;
        let bounds = Bounds {
            places: connections,
            per_address: connections / 2,
            waiting: connections / 2,
            closes_at_address: true,
        };
        Self {
            connections: Connections::new("admin", bounds, admin.telemetry.clone()),
            requests: ConcurrencyLimit::new(connections / 2, connections / 4),
            health: router::health_service(&admin),
            api: router::api_service(&admin),
            admin,
            workers,
        }
    }

    /// Accepts connections until shutdown.
    async fn accept(&self, listener: Listener) {
        let kind = listener.kind();
        let ending = self.admin.ending.clone();
        loop {
            let accepted = tokio::select! {
                () = ending.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, client) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept an admin connection");
                    self.connections.accept_failed(&error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let caller = Caller {
                listener: kind,
                client,
            };
            match self.connections.enter(client) {
                Entering::Admitted(seat) => {
                    let slot = tokio::select! {
                        () = ending.cancelled() => return,
                        slot = self.connections.place(seat) => slot,
                    };
                    tokio::spawn(self.clone().serve_connection(stream, slot, caller));
                }
                Entering::Waits(wait) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        match wait.slot(SLOT_TIMEOUT).await {
                            Some(slot) => server.serve_connection(stream, slot, caller).await,
                            None => server.refuse(caller),
                        }
                    });
                }
                Entering::Refused(_) => self.refuse(caller),
            }
            // Connections that are asked to close get a turn before more are accepted.
            tokio::task::yield_now().await;
        }
    }

    fn refuse(&self, caller: Caller) {
        self.admin.telemetry.record_connection_refused();
        if let Some(skipped) = self.admin.refusal_log.admits() {
            let client = caller.client.map(tracing::field::display);
            tracing::warn!(
                client,
                skipped,
                "admin connection refused: too many active connections from its address"
            );
        }
    }

    async fn serve_connection(self, stream: Box<dyn Stream>, slot: Slot, caller: Caller) {
        let (handle, idle_pause) = (slot.handle(), IdlePause::default());
        let service = service_fn(|request: Request<Incoming>| {
            let (busy, unhurried) = (handle.request(), idle_pause.pause());
            let server = self.clone();
            async move {
                let (reply, permit) = server.respond(request, caller).await;
                Ok::<_, Infallible>(for_connection(reply, permit, busy, unhurried))
            }
        });
        let stream = TokioIo::new(IdleTimeoutStream::new(stream, IDLE_TIMEOUT, idle_pause.clone()));
        let mut connection = pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(stream, service)
        );
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = handle.closing() => {
                connection.as_mut().graceful_shutdown();
                handle.ended(connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "admin connection failed");
        }
    }

    /// Serves one request. Returns the response, and the permit that the request holds until its end.
    async fn respond(&self, request: Request<Incoming>, caller: Caller) -> (Response, Option<Permit>) {
        let (reply, permit) = match self.check_and_route(request, caller).await {
            Ok(answered) => answered,
            // The router, which knows the methods of each path, was not asked.
            Err(problem) if problem.status == StatusCode::METHOD_NOT_ALLOWED => {
                (([(ALLOW, READ_METHODS)], problem).into_response(), None)
            }
            Err(problem) => (problem.into_response(), None),
        };
        (with_fixed_headers(reply), permit)
    }

    async fn check_and_route(
        &self,
        request: Request<Incoming>,
        caller: Caller,
    ) -> Result<(Response, Option<Permit>), Problem> {
        let (mut head, body) = request.into_parts();
        let (auth, telemetry) = (&self.admin.auth, &self.admin.telemetry);
        if is_health(&head) {
            auth.authorize(&head, caller, telemetry)?;
            return Ok((
                answer(self.health.clone(), Request::from_parts(head, body)).await,
                None,
            ));
        }
        let permit = self.requests.try_acquire(caller.client).ok_or_else(|| {
            Problem::busy("too many concurrent admin requests, in total or from this address")
        })?;
        if let Some(delay) = auth.delay(&head, caller) {
            tokio::time::sleep(delay).await;
        }
        auth.authorize(&head, caller, telemetry)?;
        head.extensions.insert(caller);
        let answered = self
            .workers
            .spawn(answer(self.api.clone(), Request::from_parts(head, body)));
        // Aborted when the client disconnects.
        let reply = AbortOnDropHandle::new(answered).await;
        let reply = reply.unwrap_or_else(|_| Problem::task_failed().into_response());
        Ok((reply, Some(permit)))
    }
}

async fn answer(mut router: Router, request: Request<Incoming>) -> Response {
    let Ok(reply) = router.call(request).await;
    reply
}

/// Attaches the guards that are dropped at the end of the body. An event stream releases the request permit, because it has a
/// permit of its own. Archives pause the idle timer, because a disk or pipe sets their pace.
fn for_connection(
    reply: Response,
    permit: Option<Permit>,
    busy: InFlight,
    unhurried: IdlePauseGuard,
) -> http::Response<ConnectionBody> {
    let pace = reply.extensions().get::<Pace>().copied();
    reply.map(|body| ConnectionBody {
        body,
        _permit: permit.filter(|_| pace != Some(Pace::Events)),
        _busy: busy,
        _unhurried: (pace == Some(Pace::Archive)).then_some(unhurried),
    })
}

/// A response body with the guards that are released at its end.
struct ConnectionBody {
    body: Body,
    _permit: Option<Permit>,
    _busy: InFlight,
    _unhurried: Option<IdlePauseGuard>,
}

impl http_body::Body for ConnectionBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
