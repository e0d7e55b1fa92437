//! Recently seen clients, so that the operator can check that they use the cache.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::SystemTime;

use parking_lot::Mutex;

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
    pub agent: Box<str>,
    /// Requests since it was first seen.
    pub requests: u64,
    /// Pulls by tag among them.
    pub pulls: u64,
    /// When it was last seen.
    pub last_at: SystemTime,
    /// The last image that it requested.
    pub last_image: Option<Box<str>>,
}

/// The recently seen clients.
#[derive(Default)]
pub(super) struct Clients(Mutex<HashMap<(IpAddr, &'static str), Client>>);

impl Clients {
    pub(super) fn record(&self, address: IpAddr, agent: &str, at: SystemTime, pulled: Option<&str>) {
        let kind = kind_of(agent);
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
            agent: "".into(),
            requests: 0,
            pulls: 0,
            last_at: at,
            last_image: None,
        });
        if *client.agent != *agent {
            client.agent = agent.into();
        }
        client.requests += 1;
        client.last_at = client.last_at.max(at);
        if let Some(image) = pulled {
            client.pulls += 1;
            if client.last_image.as_deref() != Some(image) {
                client.last_image = Some(image.into());
            }
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

/// A `User-Agent` reduced to at most 96 printable characters.
pub fn agent(header: Option<&http::HeaderValue>) -> Box<str> {
    let text = header.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
    if text.len() <= AGENT_BYTES_MAX && text.bytes().all(is_printable) {
        return text.into();
    }
    let printable = text.chars().filter(|c| c.is_ascii_graphic() || *c == ' ');
    printable.take(AGENT_BYTES_MAX).collect::<String>().into()
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

    #[test]
    fn client_is_keyed_by_program_and_address() {
        let (clients, here) = (Clients::default(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        let docker = "docker/20.10.24+dfsg1 go/go1.19.8 UpstreamClient(Docker-Client/28.2.2)";
        clients.record(here, docker, at(1), Some("library/alpine:3"));
        clients.record(here, docker, at(2), None);
        clients.record(here, "containerd/1.6.20~ds1", at(3), None);
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
            clients.record(IpAddr::V4(number.into()), "x", at(u64::from(number)), None);
        }
        assert_eq!(clients.seen().len(), CLIENTS_MAX);
        let long = http::HeaderValue::from_str(&"a".repeat(500)).unwrap();
        assert_eq!(agent(Some(&long)).len(), AGENT_BYTES_MAX);
    }
}
