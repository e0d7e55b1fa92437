//! The network inwards: connections, TLS, and the one place where requests come in and answers go out.
//!
//! * `entry`, `certificate`: who may come in at all. * `listen`, `forwarded`: listeners, and who is at the other end.
//! * `connections`: their places. * `accept`: protocols, limits, drain. * `tls`, `mint`: the CA, our certificate, and those for upstreams' own hosts.
//! * `gate`, `door`: an HTTP request becomes a [`crate::proxy::Request`], or one to be handed on, or is turned away before
//!   anything else runs. * `connect`: what comes by `CONNECT`. * `pass`: what is handed on. `login`: questions to a token service.
//! * `reply`: an outcome becomes an HTTP response; nothing else builds one but what is handed back. * `body`: bytes on
//!   their way out. `egress`: how many of them may be in memory. * `received`: bodies of requests. `told`: what is told of it all, in a `record` that goes with the body.
//!   `idle`: connections that make no progress.

pub mod accept;
mod address;
mod body;
mod certificate;
mod connect;
pub(crate) mod connections;
mod door;
mod egress;
mod entry;
mod forwarded;
mod gate;
mod idle;
pub mod listen;
mod login;
mod mint;
mod pass;
mod received;
mod record;
mod reply;
pub mod tls;
mod told;

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use http::header::CONNECTION;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, Version};
use hyper::body::Incoming;

pub(crate) use address::host_network;
pub use body::{Body, Sound};
pub use connect::Tunnels;
pub use door::{Door, Doors, Peer};
pub use egress::{Egress, Outstanding};
use entry::Way;
pub use entry::{Entry, Passwords};
use gate::{Passage, Turned, Wanted};
pub use idle::Pardon;
pub(crate) use idle::{Pardoned, Watched};

use crate::clock::Clock;
use crate::proxy::ProxyService;
use crate::store::file_read::BufferPool;
use crate::telemetry::{ResourceKind, Telemetry};
use crate::trace_context::TraceContext;
use received::Received;
use told::Told;

/// What serves requests. Exchanged whole when the configuration is read again.
pub struct Registry {
    /// Which upstreams there are, and how a client names them.
    pub doors: Doors,
    /// The road that answers.
    pub proxy: Arc<ProxyService>,
    /// Where `CONNECT` may lead besides.
    pub tunnels: Tunnels,
    /// Who may come in; `None`: whoever reaches us.
    pub entry: Option<Entry>,
}

impl Registry {
    /// Puts the settings of its upstreams into effect.
    pub fn activate(&self) {
        for upstream_registry in self.doors.all() {
            upstream_registry.upstream().activate();
            let transfers_max = upstream_registry.upstream().downloads_max();
            self.proxy
                .downloads()
                .resize_upstream(upstream_registry.name(), transfers_max);
        }
    }
}

/// What every connection shares.
#[derive(Clone)]
pub struct Front {
    /// The registry now in effect.
    pub registry: Arc<ArcSwap<Registry>>,
    /// What is told.
    pub telemetry: Telemetry,
    /// BufferPool for reading blobs.
    pub buffers: BufferPool,
    /// The budget of response bytes.
    pub egress: Egress,
    /// The held blobs found right since the start.
    pub sound: Sound,
    /// The time of day.
    pub clock: Clock,
}

impl Front {
    /// Answers one request. Total.
    pub async fn answer(&self, request: Request<Incoming>, peer: &Peer) -> Response<Body> {
        let began = tokio::time::Instant::now();
        let registry = self.registry.load_full();
        let (head, body) = request.into_parts();
        let (body, ended) = Received::new(body);
        let at = self.clock.now();
        let trace = self.telemetry.trace(&head.headers);
        let place = Place {
            head: &head,
            peer,
            at,
            trace: &trace,
        };
        let mut record = record::Open::new(&self.telemetry, &head, peer, (at, began, &trace));
        let (response, told) = self.respond(&registry, &place, body, &mut record).await;
        let mut response = record.answered(told, &head.method, response);
        response.body_mut().count(self.egress.body(peer.address));
        response.body_mut().pardon_by(&peer.pardon);
        if gate::ends_connection(&head) || (head.version < Version::HTTP_2 && !ended.is_true()) {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn respond(
        &self,
        registry: &Registry,
        place: &Place<'_>,
        body: Received,
        record: &mut record::Open,
    ) -> (Response<Body>, Told) {
        let head = place.head;
        let proxy = &registry.proxy;
        let read = gate::read(head, place.peer, &registry.doors, (place.at, place.trace));
        let read = match (&registry.entry, read) {
            (Some(entry), Ok(wanted)) => admitted(entry, place, wanted).await,
            (_, read) => read,
        };
        let wanted = match read {
            Ok(wanted) => wanted,
            Err(turned) => {
                let told = Told::turned(turned.name());
                return (reply::turned(&turned, &head.method), told);
            }
        };
        let (upstream_registry, _, door) = wanted.subject();
        record.leads_to(Some(upstream_registry), door);
        let by_path = |kind| (kind, told::path(&head.uri));
        match wanted {
            Wanted::Read(request, _) => {
                record.asks_for(told::subject(&request.endpoint));
                let asked = reply::Asked::new(head, &request);
                let pardoned = place.peer.pardon.hold();
                let outcome = proxy.handle(request).await;
                drop(pardoned);
                let told = Told::of(&outcome);
                (reply::answer(outcome, &asked, self, proxy.store()), told)
            }
            Wanted::Knock(request, _) => {
                record.asks_for(by_path(ResourceKind::Ping));
                let asked = reply::Asked::new(head, &request);
                let outcome = proxy.api_challenge(&request).await;
                let told = Told::of(&outcome);
                (reply::answer(outcome, &asked, self, proxy.store()), told)
            }
            Wanted::Pass(passage) => {
                record.asks_for(by_path(passed_kind(&passage, head)));
                let upstream_registry = Arc::clone(&passage.upstream_registry);
                match self.pass(proxy, passage, place, body).await {
                    Ok(response) => (response, Told::passed()),
                    Err(cause) => {
                        let is_head = head.method == Method::HEAD;
                        let response = reply::not_passed(upstream_registry.name(), cause, is_head);
                        (response, Told::not_passed(cause))
                    }
                }
            }
            Wanted::Login(passage, realm) => self.log_in(proxy, passage, &realm, place, body).await,
        }
    }
}

/// What is wanted, if whoever asks may have it. A password of ours goes no further.
async fn admitted(entry: &Entry, place: &Place<'_>, mut wanted: Wanted) -> Result<Wanted, Turned> {
    let (upstream_registry, repository, door) = wanted.subject();
    let way = match door {
        Door::Mirror | Door::Namespace | Door::Prefix => Way::Own,
        Door::Host | Door::Connect => Way::Named,
    };
    let who = entry.who(place.head, place.peer, way, place.at).await?;
    if let Some(repository) = repository
        && !entry.allows(who.name(), upstream_registry.name(), repository)
    {
        return Err(Turned::NotAllowed(format!(
            "{}/{repository}",
            upstream_registry.name()
        )));
    }
    if let Wanted::Pass(passage) = &wanted {
        may_pass(entry, who.name(), passage, place.head)?;
    }
    if let (Wanted::Read(request, _), Way::Own) = (&mut wanted, way)
        && entry.takes_passwords()
    {
        request.authorization = None;
    }
    Ok(wanted)
}

/// Refuses what a list of repositories does not allow, or cannot be compared with.
fn may_pass(entry: &Entry, user: &str, passage: &Passage, head: &Parts) -> Result<(), Turned> {
    let name = passage.upstream_registry.name();
    let refused = |what: &str| Turned::NotAllowed(format!("{name}/{what}"));
    for source in &passage.sources {
        if !entry.allows(user, name, source) {
            return Err(refused(source.as_str()));
        }
    }
    if passage.is_unclear && entry.has_allows() {
        return Err(refused(head.uri.path().trim_start_matches('/')));
    }
    Ok(())
}

/// Where and when a request came in.
struct Place<'a> {
    head: &'a Parts,
    peer: &'a Peer,
    at: SystemTime,
    trace: &'a TraceContext,
}

fn passed_kind(passage: &Passage, head: &Parts) -> ResourceKind {
    let path = head.uri.path();
    if passage.change.is_some() || path.contains("/blobs/uploads") {
        ResourceKind::Write
    } else if matches!(path, "/v2" | "/v2/") {
        ResourceKind::Ping
    } else {
        ResourceKind::Other
    }
}
