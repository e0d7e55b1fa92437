//! The network inwards: connections, TLS, and the one place where requests come in and answers go out.
//!
//! * `entry`: who may come in at all. * `listen`, `forwarded`: listeners, and who is at the other end. * `accept`: connections, limits, drain. * `tls`, `mint`:
//!   the CA, our certificate, and those for upstreams' own hosts.
//! * `gate`, `door`: an HTTP request becomes a [`crate::pull::Request`], or one to be handed on, or is turned away before
//!   anything else runs. * `connect`: what comes by `CONNECT`. * `pass`: what is handed on.
//! * `reply`: an outcome becomes an HTTP response; nothing else builds one but what is handed back. * `body`: bytes on
//!   their way out. * `idle`: connections that make no progress.

pub mod accept;
mod body;
mod connect;
mod door;
mod entry;
mod forwarded;
mod gate;
mod idle;
pub mod listen;
mod mint;
mod pass;
mod reply;
pub mod tls;

use std::sync::Arc;

use arc_swap::ArcSwap;
use http::header::{CONNECTION, USER_AGENT};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response};
use hyper::body::Incoming;

pub use body::{Body, Sound};
pub use connect::Tunnels;
pub use door::{Door, Doors, Peer};
pub use entry::Entry;
use gate::{Passage, Turned, Wanted};
pub use idle::Pardon;

use crate::clock::Clock;
use crate::event::{Answered, Decision, Events, Kind, Outcome};
use crate::oci::{Operation, Reference};
use crate::pull::Pull;
use crate::store::step::Buffers;

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
        let mut response;
        let read = gate::read(&head, peer, &registry.doors, self.clock.now());
        let read = match (&registry.entry, read) {
            (Some(entry), Ok(wanted)) => admitted(entry, &head, wanted).await,
            (_, read) => read,
        };
        match read {
            Ok(Wanted::Read(wanted, door)) => {
                let (site, kind) = (Arc::clone(&wanted.site), kind(&wanted.operation));
                let asked = reply::Asked::new(&head, &wanted);
                let decision = decision(&head, &wanted, peer, door);
                let outcome = registry.pull.answer(wanted).await;
                let (result, reason) = reply::told(&outcome);
                response = reply::answer(outcome, &asked, self, registry.pull.store());
                if let Some(decision) = decision {
                    self.events.decided(Decision {
                        outcome: result,
                        reason,
                        status: response.status().as_u16(),
                        took: began.elapsed(),
                        ..decision
                    });
                }
                self.tell(
                    (site.name(), door.name()),
                    kind,
                    &head,
                    result,
                    reason,
                    &response,
                    began,
                );
            }
            Ok(Wanted::Knock(wanted, door)) => {
                let site = Arc::clone(&wanted.site);
                let asked = reply::Asked::new(&head, &wanted);
                let outcome = registry.pull.knock(&wanted).await;
                let (result, reason) = reply::told(&outcome);
                response = reply::answer(outcome, &asked, self, registry.pull.store());
                let place = (site.name(), door.name());
                self.tell(place, Kind::Ping, &head, result, reason, &response, began);
            }
            Ok(Wanted::Pass(passage)) => {
                let (site, door) = (Arc::clone(&passage.site), passage.door);
                let kind = passed_kind(&passage, &head);
                let (result, reason);
                (response, result, reason) = match self
                    .pass(&registry.pull, passage, &head, body, &peer.pardon)
                    .await
                {
                    Ok(response) => (response, Outcome::Passed, "passed"),
                    Err(cause) => {
                        let is_head = head.method == Method::HEAD;
                        let response = reply::not_passed(site.name(), cause, is_head);
                        (response, Outcome::Refused, cause.name())
                    }
                };
                self.tell(
                    (site.name(), door.name()),
                    kind,
                    &head,
                    result,
                    reason,
                    &response,
                    began,
                );
            }
            Err(turned) => {
                response = reply::turned(&turned, &head.method);
                let reason = turned.name();
                let refused = Outcome::Refused;
                self.tell(("-", "-"), Kind::Other, &head, refused, reason, &response, began);
            }
        }
        if gate::ends_connection(&head) {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the facts of one log line, all of them different"
    )]
    fn tell(
        &self,
        (upstream, door): (&str, &'static str),
        kind: Kind,
        head: &Parts,
        result: Outcome,
        reason: &'static str,
        response: &Response<Body>,
        began: tokio::time::Instant,
    ) {
        let status = response.status().as_u16();
        let (path, took) = (head.uri.path(), began.elapsed());
        self.events.answered(&Answered {
            upstream,
            door,
            kind,
            path,
            result,
            reason,
            status,
            took,
        });
    }
}

/// What is wanted, if its user may have it. The credential was ours, and goes no further.
async fn admitted(entry: &Entry, head: &Parts, wanted: Wanted) -> Result<Wanted, Turned> {
    let Wanted::Read(mut wanted, door) = wanted else {
        return Err(Turned::NotByThisDoor);
    };
    let user = entry.who(head).await?;
    if let Some(repository) = wanted.operation.repository()
        && !entry.allows(&user, wanted.site.name(), repository)
    {
        return Err(Turned::NotAllowed(format!("{}/{repository}", wanted.site.name())));
    }
    wanted.authorization = None;
    if let Door::Host | Door::Connect = door {
        return Err(Turned::NotByThisDoor);
    }
    Ok(Wanted::Read(wanted, door))
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

/// What a pull asks for, to be kept with what comes of it.
fn decision(head: &Parts, wanted: &crate::pull::Request, peer: &Peer, door: Door) -> Option<Decision> {
    let Operation::Manifest {
        repository,
        reference,
    } = &wanted.operation
    else {
        return None;
    };
    let user_agent = head.headers.get(USER_AGENT).and_then(|value| value.to_str().ok());
    Some(Decision {
        number: 0,
        at: wanted.now,
        client: peer.address,
        user_agent: Decision::shortened(user_agent.unwrap_or_default()),
        door: door.name(),
        upstream: wanted.site.name().to_owned(),
        repository: repository.to_string(),
        reference: reference.to_string(),
        outcome: Outcome::Refused,
        reason: "",
        status: 0,
        took: std::time::Duration::ZERO,
    })
}

fn kind(operation: &Operation) -> Kind {
    match operation {
        Operation::Ping => Kind::Ping,
        Operation::Manifest {
            reference: Reference::Tag(_),
            ..
        } => Kind::Tag,
        Operation::Manifest {
            reference: Reference::Digest(_),
            ..
        } => Kind::Manifest,
        Operation::Blob { .. } => Kind::Blob,
        Operation::Tags { .. } | Operation::Referrers { .. } => Kind::Listing,
    }
}
