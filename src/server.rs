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
use crate::event::{Answered, Events, Kind, agent};
use crate::pull::{Pull, Site};
use crate::store::step::Buffers;
use crate::trace::Trace;
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
        let trace = self.events.trace(&head.headers);
        let place = Place {
            head: &head,
            peer,
            at,
            began,
            trace: &trace,
        };
        let (mut response, about) = self.respond(&registry, &place, body).await;
        self.tell(&place, &about, response.status());
        if gate::ends_connection(&head) {
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
        body: Incoming,
    ) -> (Response<Body>, About) {
        let head = place.head;
        let pull = &registry.pull;
        let read = gate::read(head, place.peer, &registry.doors, (place.at, place.trace));
        let read = match (&registry.entry, read) {
            (Some(entry), Ok(wanted)) => admitted(entry, place, wanted).await,
            (_, read) => read,
        };
        let wanted = match read {
            Ok(wanted) => wanted,
            Err(turned) => {
                let about = About {
                    whither: None,
                    subject: (Kind::Other, told::path(&head.uri)),
                    told: Told::turned(turned.name()),
                };
                return (reply::turned(&turned, &head.method), about);
            }
        };
        let (site, _, door) = wanted.subject();
        let whither = Some((Arc::clone(site), door));
        let by_path = |kind| (kind, told::path(&head.uri));
        let (response, subject, told) = match wanted {
            Wanted::Read(request, _) => {
                let subject = told::subject(&request.operation);
                let asked = reply::Asked::new(head, &request);
                let outcome = pull.answer(request).await;
                let told = Told::of(&outcome);
                (reply::answer(outcome, &asked, self, pull.store()), subject, told)
            }
            Wanted::Knock(request, _) => {
                let asked = reply::Asked::new(head, &request);
                let outcome = pull.knock(&request).await;
                let told = Told::of(&outcome);
                let response = reply::answer(outcome, &asked, self, pull.store());
                (response, by_path(Kind::Ping), told)
            }
            Wanted::Pass(passage) => {
                let subject = by_path(passed_kind(&passage, head));
                let site = Arc::clone(&passage.site);
                match self.pass(pull, passage, place, body).await {
                    Ok(response) => (response, subject, Told::passed()),
                    Err(cause) => {
                        let is_head = head.method == Method::HEAD;
                        let response = reply::not_passed(site.name(), cause, is_head);
                        (response, subject, Told::not_passed(cause))
                    }
                }
            }
            Wanted::Login(passage, realm) => {
                let (response, told) = self.log_in(pull, passage, &realm, place, body).await;
                (response, by_path(Kind::Other), told)
            }
        };
        let about = About {
            whither,
            subject,
            told,
        };
        (response, about)
    }

    fn tell(&self, place: &Place<'_>, about: &About, status: StatusCode) {
        let headers = &place.head.headers;
        let About {
            whither,
            subject: (kind, image),
            told,
        } = about;
        let (upstream, door) = whither
            .as_ref()
            .map_or(("-", "-"), |(site, door)| (site.name(), door.name()));
        let age = told.confirmed_at.and_then(|at| place.at.duration_since(at).ok());
        self.events.answered(&Answered {
            at: place.at,
            upstream,
            door,
            kind: *kind,
            image,
            result: told.result,
            reason: told.reason,
            cause: told.cause,
            digest: told.digest,
            age,
            status: status.as_u16(),
            took: place.began.elapsed(),
            client: place.peer.address,
            agent: &agent(headers.get(USER_AGENT)),
            trace: place.trace,
        });
    }
}

/// What is told of a request and its answer.
struct About {
    /// To which upstream, by which door; `None` where it was turned away before.
    whither: Option<(Arc<Site>, Door)>,
    subject: (Kind, String),
    told: Told,
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
    trace: &'a Trace,
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
