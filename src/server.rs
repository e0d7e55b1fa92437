//! HTTP server of the registry: listeners, TLS, request parsing, authentication, responses and the access log.
//!
//! * Connections: `listener` and `proxy_protocol` accept them, `connections` limits them, `acceptor` serves HTTP on
//!   them, `http_version` detects HTTP/2, `idle_timeout` closes those that make no progress.
//! * TLS: `tls` holds the CA, the server certificate and the leaf certificates for upstream hosts.
//! * Requests: `request` parses and validates, `routing` chooses the upstream, `auth` authenticates the client,
//!   `connect` handles `CONNECT`, `error` lists every rejection.
//! * Dispatch: a read becomes a [`crate::proxy::Request`]. `forward` sends writes to the registry, `token_endpoint`
//!   serves token requests (`local_tokens`).
//! * Responses: `response` is the only module that builds one, except for responses that `forward` copies. `egress`
//!   limits the response bytes in memory. `access_log` writes one record per request.

pub mod acceptor;
mod access_log;
mod auth;
mod connect;
pub(crate) mod connections;
mod egress;
mod error;
mod forward;
mod http_version;
mod idle_timeout;
pub mod listener;
mod proxy_protocol;
mod request;
mod response;
mod routing;
mod sendfile;
pub mod tls;
mod token_endpoint;

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use http::header::CONNECTION;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, Version};
use hyper::body::Incoming;

use auth::CredentialHeader;
pub use auth::{Authenticator, PasswordCache};
pub use connect::TunnelRules;
pub use egress::{Egress, Outstanding};
use error::Rejection;
pub use idle_timeout::IdlePause;
pub(crate) use idle_timeout::{IdlePauseGuard, IdleTimeoutStream};
pub(crate) use listener::host_network;
use request::{ForwardTarget, ParsedRequest, RequestBody};
pub use response::{Body, VerifiedBlobs};
pub use routing::{ConnectionInfo, RouteKind, Router};

use crate::clock::Clock;
use crate::proxy::ProxyService;
use crate::store::file_read::BufferPool;
use crate::telemetry::{ResourceKind, Telemetry};
use crate::trace_context::TraceContext;
use access_log::AccessLogFields;

/// The state that serves requests. A reload replaces it as a unit.
pub struct ServingState {
    /// Upstreams, and the names by which clients reach them.
    pub router: Router,
    /// The pull-through proxy.
    pub proxy: Arc<ProxyService>,
    /// Hosts that `CONNECT` may tunnel to, besides the upstreams.
    pub tunnels: TunnelRules,
    /// Client authentication. `None`: every client is accepted.
    pub auth: Option<Authenticator>,
}

impl ServingState {
    /// Applies the settings of its upstreams to the state that outlives reloads.
    pub fn activate(&self) {
        for upstream_registry in self.router.all() {
            upstream_registry.upstream().activate();
            let transfers_max = upstream_registry.upstream().downloads_max();
            self.proxy
                .downloads()
                .resize_upstream(upstream_registry.name(), transfers_max);
        }
        self.proxy.set_refreshed_upstreams(self.router.all());
    }
}

/// State shared by all connections.
#[derive(Clone)]
pub struct RegistryService {
    /// The state now in effect.
    pub registry: Arc<ArcSwap<ServingState>>,
    /// Metrics, access log and decision log.
    pub telemetry: Telemetry,
    /// `BufferPool` for reading blobs.
    pub buffers: BufferPool,
    /// The limit of response bytes in memory.
    pub egress: Egress,
    /// Cached blobs whose digest was verified since the start.
    pub verified: VerifiedBlobs,
    /// The time of day.
    pub clock: Clock,
}

impl RegistryService {
    /// Handles one request. Every request gets a response.
    pub async fn answer(&self, request: Request<Incoming>, peer: &ConnectionInfo) -> Response<Body> {
        let began = tokio::time::Instant::now();
        let registry = self.registry.load_full();
        let (head, body) = request.into_parts();
        let (body, ended) = RequestBody::new(body);
        let at = self.clock.now();
        let trace = self.telemetry.trace(&head.headers);
        let info = RequestInfo {
            head: &head,
            peer,
            at,
            trace: &trace,
        };
        let mut record = access_log::AccessLogEntry::new(&self.telemetry, &head, peer, (at, began, &trace));
        let (response, fields) = self.respond(&registry, &info, body, &mut record).await;
        let mut response = record.attach_to(fields, &head.method, response);
        if response.body().is_charged() {
            response.body_mut().charge_to(self.egress.body(peer.address));
        }
        response.body_mut().pause_idle_timeout_by(&peer.idle_pause);
        if request::closes_connection(&head) || (head.version < Version::HTTP_2 && !ended.is_true()) {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn respond(
        &self,
        registry: &ServingState,
        info: &RequestInfo<'_>,
        body: RequestBody,
        record: &mut access_log::AccessLogEntry,
    ) -> (Response<Body>, AccessLogFields) {
        let head = info.head;
        let proxy = &registry.proxy;
        let read = request::parse(head, info.peer, &registry.router, (info.at, info.trace));
        let read = match (&registry.auth, read) {
            (Some(auth), Ok(parsed)) => Box::pin(authenticate(auth, info, parsed)).await,
            (_, read) => read,
        };
        let parsed = match read {
            Ok(parsed) => parsed,
            Err(error) => {
                let fields = AccessLogFields::rejected(error.name());
                return (response::request_error(&error, &head.method), fields);
            }
        };
        let (upstream_registry, _, route) = parsed.subject();
        record.set_route(Some(upstream_registry), route);
        match parsed {
            ParsedRequest::Read(mut read) => {
                let (kind, image) = access_log::subject(&read.request.endpoint);
                record.set_subject(kind, image);
                let idle_paused = info.peer.idle_pause.pause();
                let outcome = proxy.handle(&mut read.request).await;
                drop(idle_paused);
                let fields = AccessLogFields::of(&outcome);
                (
                    response::build(outcome, &read.context, self, proxy.store()),
                    fields,
                )
            }
            ParsedRequest::ApiCheck(read) => {
                record.set_subject(ResourceKind::Ping, None);
                let outcome = Box::pin(proxy.api_challenge(&read.request)).await;
                let fields = AccessLogFields::of(&outcome);
                (
                    response::build(outcome, &read.context, self, proxy.store()),
                    fields,
                )
            }
            ParsedRequest::Forward(target) => {
                record.set_subject(forward_kind(&target, head), None);
                let upstream_registry = Arc::clone(&target.upstream_registry);
                match Box::pin(self.forward(proxy, *target, info, body)).await {
                    Ok(response) => (response, AccessLogFields::forwarded()),
                    Err(cause) => {
                        let is_head = head.method == Method::HEAD;
                        let response = response::forward_failed(upstream_registry.name(), cause, is_head);
                        (response, AccessLogFields::forward_failed(cause))
                    }
                }
            }
            ParsedRequest::Token(target, realm) => {
                Box::pin(self.answer_token_request(proxy, *target, &realm, info, body)).await
            }
        }
    }
}

/// Authenticates the client and checks its allow list. A password of the cache is removed before the request goes
/// upstream.
async fn authenticate(
    auth: &Authenticator,
    info: &RequestInfo<'_>,
    mut parsed: ParsedRequest,
) -> Result<ParsedRequest, Rejection> {
    let (upstream_registry, repository, route) = parsed.subject();
    let header = match route {
        RouteKind::Mirror | RouteKind::Namespace | RouteKind::Prefix => CredentialHeader::Authorization,
        RouteKind::Host | RouteKind::Connect => CredentialHeader::None,
    };
    let who = auth.authenticate(info.head, info.peer, header, info.at).await?;
    if let Some(repository) = repository
        && !auth.allows(who.name(), upstream_registry.name(), repository)
    {
        return Err(Rejection::NotAllowed(format!(
            "{}/{repository}",
            upstream_registry.name()
        )));
    }
    if let ParsedRequest::Forward(target) = &parsed {
        check_forward(auth, who.name(), target, info.head)?;
    }
    if let (ParsedRequest::Read(read), CredentialHeader::Authorization) = (&mut parsed, header)
        && auth.has_passwords()
    {
        read.request.authorization = None;
    }
    Ok(parsed)
}

/// Applies the allow list to a forwarded request. Fails if the list denies a repository, or if the path cannot be
/// matched.
fn check_forward(
    auth: &Authenticator,
    user: &str,
    target: &ForwardTarget,
    head: &Parts,
) -> Result<(), Rejection> {
    let name = target.upstream_registry.name();
    let refused = |what: &str| Rejection::NotAllowed(format!("{name}/{what}"));
    for source in &target.mount_sources {
        if !auth.allows(user, name, source) {
            return Err(refused(source.as_str()));
        }
    }
    if target.is_ambiguous && auth.has_allows() {
        return Err(refused(head.uri.path().trim_start_matches('/')));
    }
    Ok(())
}

/// Head, connection, time and trace of a request.
struct RequestInfo<'a> {
    head: &'a Parts,
    peer: &'a ConnectionInfo,
    at: SystemTime,
    trace: &'a TraceContext,
}

fn forward_kind(target: &ForwardTarget, head: &Parts) -> ResourceKind {
    let path = head.uri.path();
    if target.change.is_some() || path.contains("/blobs/uploads") {
        ResourceKind::Write
    } else if matches!(path, "/v2" | "/v2/") {
        ResourceKind::Ping
    } else {
        ResourceKind::Other
    }
}
