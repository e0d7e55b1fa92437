//! The network inwards: connections, TLS, and the one place where requests come in and answers go out.
//!
//! * `accept`: listeners, limits, drain. * `tls`: the CA and the certificate. * `gate`: an HTTP request becomes a
//!   [`crate::pull::Request`], or is turned away before anything else runs. * `reply`: an outcome becomes an HTTP
//!   response; nothing else builds one. * `body`: bytes on their way out. * `idle`: connections that make no progress.

pub mod accept;
mod body;
mod gate;
mod idle;
mod reply;
pub mod tls;

use std::sync::Arc;

use arc_swap::ArcSwap;
use http::{Request, Response};
use hyper::body::Incoming;

pub use body::{Body, Sound};
pub use gate::Doors;

use crate::clock::Clock;
use crate::event::{Answered, Events, Kind, Outcome};
use crate::oci::{Operation, Reference};
use crate::pull::Pull;
use crate::store::step::Buffers;

/// What serves requests. Exchanged whole when the configuration is read again.
pub struct Registry {
    /// Which upstreams there are, and how a client names them.
    pub doors: Doors,
    /// The road that answers.
    pub pull: Arc<Pull>,
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
    pub async fn answer(&self, request: Request<Incoming>, peer: gate::Peer) -> Response<Body> {
        let began = tokio::time::Instant::now();
        let registry = self.registry.load_full();
        let (head, _) = request.into_parts();
        let wanted = match gate::read(&head, peer, &registry.doors, self.clock.now()) {
            Ok(wanted) => wanted,
            Err(turned) => {
                let response = reply::turned(&turned, &head.method);
                self.tell(
                    "-",
                    Kind::Other,
                    &head,
                    Outcome::Refused,
                    turned.name(),
                    &response,
                    began,
                );
                return response;
            }
        };
        let (site, kind) = (Arc::clone(&wanted.site), kind(&wanted.operation));
        let asked = reply::Asked::new(&head, &wanted);
        let outcome = registry.pull.answer(wanted).await;
        let (result, reason) = reply::told(&outcome);
        let response = reply::answer(outcome, &asked, self, registry.pull.store());
        self.tell(site.name(), kind, &head, result, reason, &response, began);
        response
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the facts of one log line, all of them different"
    )]
    fn tell(
        &self,
        upstream: &str,
        kind: Kind,
        head: &http::request::Parts,
        result: Outcome,
        reason: &'static str,
        response: &Response<Body>,
        began: tokio::time::Instant,
    ) {
        let status = response.status().as_u16();
        let (path, took) = (head.uri.path(), began.elapsed());
        self.events.answered(&Answered {
            upstream,
            kind,
            path,
            result,
            reason,
            status,
            took,
        });
    }
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
