//! Servers in front of a registry that respond instead of it: login page, captive portal, firewall.

use super::faults::Instead;
use super::serve::{self, sent};
use super::{Piped, Plan, Seen, Shared, Upstream};
use http::{HeaderName, HeaderValue, Response};
use std::sync::Arc;

/// A response that is not the registry's.
#[derive(Clone, Debug)]
pub struct Front {
    pub name: String,
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    is_chunked: bool,
}

impl Front {
    /// A status with this `Content-Type`, unless it is empty, and body.
    pub fn new(status: u16, media_type: &str, body: &[u8]) -> Front {
        let mut headers = Vec::new();
        if !media_type.is_empty() {
            headers.push(("content-type", media_type.to_owned()));
        }
        Front {
            name: format!("{status} {media_type} of {} bytes", body.len()),
            status,
            headers,
            body: body.to_vec(),
            is_chunked: false,
        }
    }

    /// A login page.
    pub fn page(status: u16) -> Front {
        Front::new(status, "text/html; charset=utf-8", b"<html>Please log in</html>")
    }

    /// A redirect with this status to this location.
    pub fn redirect(status: u16, location: &str) -> Front {
        Front::new(status, "", b"").header("location", location)
    }

    /// A further header, in which `{reference}` is replaced by the requested reference.
    pub fn header(mut self, name: &'static str, value: &str) -> Front {
        self.headers.push((name, value.to_owned()));
        self.name = format!("{}, {name}: {value}", self.name);
        self
    }

    /// Without a length.
    pub fn chunked(self) -> Front {
        Front {
            name: format!("{}, chunked", self.name),
            is_chunked: true,
            ..self
        }
    }
}

impl Upstream {
    /// The front-end responds to these requests.
    pub fn is_fronted(&self, which: impl Fn(&Seen) -> bool + Send + Sync + 'static, front: &Front) {
        self.instead(Arc::new(which), Instead::Front(front.clone()));
    }
}

pub(super) fn answer(shared: &Arc<Shared>, seen: &Seen, front: Front) -> Response<Piped> {
    let reference = seen.path.rsplit('/').next().unwrap_or_default();
    let plan = Plan {
        bytes: front.body.into(),
        unsized_body: front.is_chunked,
        ..serve::text(String::new())
    };
    let mut response = sent(shared, seen, Response::builder().status(front.status), plan);
    let headers = response.headers_mut();
    headers.remove("docker-distribution-api-version");
    for (name, value) in front.headers {
        let value = value.replace("{reference}", reference);
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_str(&value).unwrap(),
        );
    }
    response
}
