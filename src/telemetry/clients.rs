//! Recently seen clients, so that the operator can check that they use the cache.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderValue;
use parking_lot::Mutex;

use crate::fast_map::FastMap;

/// Maximum number of clients; the least recently seen is dropped first.
const CLIENTS_MAX: usize = 512;

/// Maximum length of a stored `User-Agent`.
const AGENT_BYTES_MAX: usize = 96;

/// A client program on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its IP address.
    pub address: IpAddr,
    /// The kind of program: `docker`, `containerd`, …
    pub kind: &'static str,
    /// Its `User-Agent`.
    pub agent: Arc<str>,
    /// Requests since it was first seen.
    pub requests: u64,
    /// Pulls by tag among them.
    pub pulls: u64,
    /// When it was last seen.
    pub last_at: SystemTime,
    /// The last image that it requested.
    pub last_image: Option<Arc<str>>,
}

/// A `User-Agent`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Reduced to at most 96 printable characters.
    pub text: Arc<str>,
    /// The kind of program, by the first product.
    kind: &'static str,
}

/// The last `User-Agent` of a connection. A client sends the same one with each request.
#[derive(Clone, Debug, Default)]
pub struct LastAgent(Arc<Mutex<Option<Known>>>);

#[derive(Debug)]
struct Known {
    header: Option<HeaderValue>,
    agent: Agent,
}

impl LastAgent {
    /// The agent that sent this header.
    pub fn of(&self, header: Option<&HeaderValue>) -> Agent {
        let mut last = self.0.lock();
        if let Some(known) = &*last
            && known.header.as_ref() == header
        {
            return known.agent.clone();
        }
        let agent = Agent::of(header);
        *last = Some(Known {
            // A clone would keep the whole request header, with its credential.
            header: header.and_then(|header| HeaderValue::from_bytes(header.as_bytes()).ok()),
            agent: agent.clone(),
        });
        agent
    }
}

/// The recently seen clients.
#[derive(Default)]
pub(super) struct Clients(Mutex<FastMap<(IpAddr, &'static str), Client>>);

impl Clients {
    pub(super) fn record(&self, address: IpAddr, agent: &Agent, at: SystemTime, pulled: Option<&Arc<str>>) {
        let kind = agent.kind;
        let mut known = self.0.lock();
        if known.len() >= CLIENTS_MAX && !known.contains_key(&(address, kind)) {
            let oldest = known.iter().min_by_key(|(_, client)| client.last_at);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                known.remove(&oldest);
            }
        }
        let client = known.entry((address, kind)).or_insert_with(|| Client {
            address,
            kind,
            agent: Arc::clone(&agent.text),
            requests: 0,
            pulls: 0,
            last_at: at,
            last_image: None,
        });
        if client.agent != agent.text {
            client.agent = Arc::clone(&agent.text);
        }
        client.requests += 1;
        client.last_at = client.last_at.max(at);
        if let Some(image) = pulled {
            client.pulls += 1;
            client.last_image = Some(Arc::clone(image));
        }
    }

    /// The clients, most recently seen first.
    pub(super) fn seen(&self) -> Vec<Client> {
        let known = self.0.lock();
        let mut seen: Vec<Client> = known.values().cloned().collect();
        seen.sort_by(|a, b| (b.last_at, a.address, a.kind).cmp(&(a.last_at, b.address, b.kind)));
        seen
    }
}

impl Agent {
    fn of(header: Option<&HeaderValue>) -> Self {
        let text = header.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let is_printable = |c: &char| c.is_ascii_graphic() || *c == ' ';
        let text: String = text.chars().filter(is_printable).take(AGENT_BYTES_MAX).collect();
        Self {
            kind: kind_of(&text),
            text: text.into(),
        }
    }
}

/// The kind by the first product of the `User-Agent`.
fn kind_of(agent: &str) -> &'static str {
    const KINDS: [(&str, &str); 17] = [
        ("docker/", "docker"),
        ("moby/", "docker"),
        ("containerd/", "containerd"),
        ("containers/", "podman"),
        ("libpod/", "podman"),
        ("buildah/", "buildah"),
        ("cri-o/", "cri-o"),
        ("skopeo/", "skopeo"),
        ("buildkit/", "buildkit"),
        ("go-containerregistry/", "crane"),
        ("crane/", "crane"),
        ("kaniko/", "kaniko"),
        ("cosign/", "cosign"),
        ("helm/", "helm"),
        ("oras", "oras"),
        ("ifnewer/", "ifnewer"),
        ("curl/", "curl"),
    ];
    let is_of = |prefix: &str| {
        let first = agent.get(..prefix.len());
        first.is_some_and(|first| first.eq_ignore_ascii_case(prefix))
    };
    let known = KINDS.iter().find(|(prefix, _)| is_of(prefix));
    known.map_or("other", |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may fail loudly"
    )]
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn agent(text: &str) -> Agent {
        Agent::of(Some(&HeaderValue::from_str(text).unwrap()))
    }

    #[test]
    fn client_is_keyed_by_program_and_address() {
        let (clients, here) = (Clients::default(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        let docker = "docker/20.10.24+dfsg1 go/go1.19.8 UpstreamClient(Docker-Client/28.2.2)";
        let docker = agent(docker);
        clients.record(here, &docker, at(1), Some(&"library/alpine:3".into()));
        clients.record(here, &docker, at(2), None);
        clients.record(here, &agent("containerd/1.6.20~ds1"), at(3), None);
        let seen = clients.seen();
        assert_eq!(seen.len(), 2);
        assert_eq!((seen[0].kind, seen[1].kind), ("containerd", "docker"));
        assert_eq!((seen[1].requests, seen[1].pulls), (2, 1));
        assert_eq!(seen[1].last_image.as_deref(), Some("library/alpine:3"));
    }

    #[test]
    fn clients_are_bounded() {
        let clients = Clients::default();
        for number in 0..u32::try_from(CLIENTS_MAX).unwrap() + 9 {
            clients.record(
                IpAddr::V4(number.into()),
                &agent("x"),
                at(u64::from(number)),
                None,
            );
        }
        assert_eq!(clients.seen().len(), CLIENTS_MAX);
        assert_eq!(agent(&"a".repeat(500)).text.len(), AGENT_BYTES_MAX);
    }

    #[test]
    fn each_header_of_a_connection_has_its_own_agent() {
        let last = LastAgent::default();
        let header = |text| HeaderValue::from_static(text);
        let of = |text| last.of(Some(&header(text))).text;
        assert_eq!(&*of("docker/28"), "docker/28");
        assert!(Arc::ptr_eq(&of("docker/28"), &of("docker/28")));
        assert_eq!(&*of("curl/8"), "curl/8");
        assert_eq!(&*last.of(None).text, "");
        let sent = header("podman/5");
        last.of(Some(&sent));
        // A view of the received bytes would keep the credential between them.
        let known = last.0.lock();
        let kept = known.as_ref().unwrap().header.as_ref().unwrap();
        assert_ne!(kept.as_bytes().as_ptr(), sent.as_bytes().as_ptr());
        drop(known);
        assert_eq!(&*of("docker/28"), "docker/28");
    }
}
