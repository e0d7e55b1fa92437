//! The network inwards: connections, TLS, and the one place where requests come in and answers go out.
//!
//! * `entry`, `certificate`: who may come in at all. * `listen`, `forwarded`: listeners, and who is at the other end.
//! * `accept`: connections, limits, drain. * `tls`, `mint`: the CA, our certificate, and those for upstreams' own hosts.
//! * `gate`, `door`: an HTTP request becomes a [`crate::pull::Request`], or one to be handed on, or is turned away before
//!   anything else runs. * `connect`: what comes by `CONNECT`. * `pass`: what is handed on. `login`: questions to a token service.
//! * `reply`: an outcome becomes an HTTP response; nothing else builds one but what is handed back. * `body`: bytes on
//!   their way out. * `told`: what is told of it all. * `idle`: connections that make no progress.

pub mod accept;
mod body;
mod certificate;
mod connect;
mod door;
mod entry;
mod forwarded;
mod gate;
mod idle;
pub mod listen;
mod login;
mod mint;
mod pass;
mod reply;
pub mod tls;
mod told;

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use http::header::{CONNECTION, USER_AGENT};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;

pub use body::{Body, Sound};
pub use connect::Tunnels;
pub use door::{Door, Doors, Peer};
pub use entry::Entry;
use entry::Way;
use gate::{Passage, Turned, Wanted};
pub use idle::Pardon;

use crate::clock::Clock;
use crate::event::{Answered, Events, Kind, Trace, agent};
use crate::pull::Pull;
use crate::store::step::Buffers;
use told::Told;

/// What serves requests. Exchanged whole when the configuration is read again.
pub struct Registry {
    /// Which upstreams there are, and how a client names them.
    pub doors: Doors,
    /// The road that answers.
    pub pull: Arc<Pull>,
    /// Where `CONNECT` may lead besides.
    pub tunnels: Tunnels,
    /// Who may come in; `None`: whoever reaches us.
    pub entry: Option<Entry>,
}

/// What every connection shares.
#[derive(Clone)]
pub struct Front {
    /// The registry now in effect.
    pub registry: Arc<ArcSwap<Registry>>,
    /// What is told.
    pub events: Events,
    /// Buffers for reading blobs.
    pub buffers: Buffers,
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
        let at = self.clock.now();
        let place = Place {
            head: &head,
            peer,
            at,
            began,
        };
        let mut response;
        let read = gate::read(&head, peer, &registry.doors, at);
        let read = match (&registry.entry, read) {
            (Some(entry), Ok(wanted)) => admitted(entry, &place, wanted).await,
            (_, read) => read,
        };
        match read {
            Ok(Wanted::Read(wanted, door)) => {
                let (site, subject) = (Arc::clone(&wanted.site), told::subject(&wanted.operation));
                let asked = reply::Asked::new(&head, &wanted);
                let outcome = registry.pull.answer(wanted).await;
                let told = Told::of(&outcome);
                response = reply::answer(outcome, &asked, self, registry.pull.store());
                self.tell(
                    &place,
                    (site.name(), door.name()),
                    subject,
                    &told,
                    response.status(),
                );
            }
            Ok(Wanted::Knock(wanted, door)) => {
                let site = Arc::clone(&wanted.site);
                let asked = reply::Asked::new(&head, &wanted);
                let outcome = registry.pull.knock(&wanted).await;
                let told = Told::of(&outcome);
                response = reply::answer(outcome, &asked, self, registry.pull.store());
                let subject = (Kind::Ping, told::path(&head.uri));
                self.tell(
                    &place,
                    (site.name(), door.name()),
                    subject,
                    &told,
                    response.status(),
                );
            }
            Ok(Wanted::Pass(passage)) => {
                let (site, door) = (Arc::clone(&passage.site), passage.door);
                let subject = (passed_kind(&passage, &head), told::path(&head.uri));
                let told;
                (response, told) = match self
                    .pass(&registry.pull, passage, &head, body, &peer.pardon)
                    .await
                {
                    Ok(response) => (response, Told::passed()),
                    Err(cause) => {
                        let is_head = head.method == Method::HEAD;
                        let response = reply::not_passed(site.name(), cause, is_head);
                        (response, Told::not_passed(cause))
                    }
                };
                self.tell(
                    &place,
                    (site.name(), door.name()),
                    subject,
                    &told,
                    response.status(),
                );
            }
            Ok(Wanted::Login(passage, realm)) => {
                let (site, door) = (Arc::clone(&passage.site), passage.door);
                let subject = (Kind::Other, told::path(&head.uri));
                let told;
                (response, told) = self.log_in(&registry.pull, passage, &realm, &head, body).await;
                self.tell(
                    &place,
                    (site.name(), door.name()),
                    subject,
                    &told,
                    response.status(),
                );
            }
            Err(turned) => {
                response = reply::turned(&turned, &head.method);
                let subject = (Kind::Other, told::path(&head.uri));
                let told = Told::turned(turned.name());
                self.tell(&place, ("-", "-"), subject, &told, response.status());
            }
        }
        if gate::ends_connection(&head) {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn tell(
        &self,
        place: &Place<'_>,
        (upstream, door): (&str, &'static str),
        (kind, image): (Kind, String),
        told: &Told,
        status: StatusCode,
    ) {
        let headers = &place.head.headers;
        let age = told.confirmed_at.and_then(|at| place.at.duration_since(at).ok());
        self.events.answered(&Answered {
            at: place.at,
            upstream,
            door,
            kind,
            image: &image,
            result: told.result,
            reason: told.reason,
            cause: told.cause,
            digest: told.digest,
            age,
            status: status.as_u16(),
            took: place.began.elapsed(),
            client: place.peer.address,
            agent: &agent(headers.get(USER_AGENT)),
            trace: Trace::of_request(headers),
        });
    }
}

/// What is wanted, if whoever asks may have it. A password of ours goes no further.
async fn admitted(entry: &Entry, place: &Place<'_>, mut wanted: Wanted) -> Result<Wanted, Turned> {
    let (site, repository, door) = wanted.subject();
    let way = match door {
        Door::Mirror | Door::Namespace | Door::Prefix => Way::Own,
        Door::Host | Door::Connect => Way::Named,
    };
    let who = entry.who(place.head, place.peer, way, place.at).await?;
    if let Some(repository) = repository
        && !entry.allows(who.name(), site.name(), repository)
    {
        return Err(Turned::NotAllowed(format!("{}/{repository}", site.name())));
    }
    if let (Wanted::Read(request, _), Way::Own) = (&mut wanted, way)
        && entry.takes_passwords()
    {
        request.authorization = None;
    }
    Ok(wanted)
}

/// Where and when a request came in.
struct Place<'a> {
    head: &'a Parts,
    peer: &'a Peer,
    at: SystemTime,
    began: tokio::time::Instant,
}

fn passed_kind(passage: &Passage, head: &Parts) -> Kind {
    let path = head.uri.path();
    if passage.change.is_some() || path.contains("/blobs/uploads") {
        Kind::Write
    } else if matches!(path, "/v2" | "/v2/") {
        Kind::Ping
    } else {
        Kind::Other
    }
}
