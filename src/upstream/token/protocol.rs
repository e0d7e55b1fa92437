//! Encoding and parsing for token authentication: realm, query, form and response. No I/O.

use std::time::Duration;

use http::uri::Scheme;
use http::{HeaderValue, Uri};
use zeroize::Zeroizing;

use crate::oci::percent;
use crate::upstream::origin::{Origin, is_loopback, is_one_of, same_host, same_site};

/// Maximum size of a token, which must fit into a header line.
const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Lifetime if `expires_in` is missing, and the minimum (token.md: "no less than 60 seconds").
const LIFE_MIN: Duration = Duration::from_secs(60);
/// The maximum lifetime.
const LIFE_MAX: Duration = Duration::from_secs(12 * 3600);

/// The URL of a token service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Realm {
    pub(super) uri: Uri,
    /// The challenge names an http URL although the registry has https; the URL is upgraded to https.
    pub(super) is_upgraded: bool,
}

/// The realm, if a credential may be sent to it on behalf of the registry at `origin`. It must use https (or http if
/// the registry does), contain no user name, and have the same host or site or a host in `token_hosts`. Otherwise a
/// registry could collect credentials for other hosts (CVE-2020-15157).
///
/// Behind a load balancer that terminates TLS, Artifactory and Harbor name an http realm. No credential is sent in
/// clear text: the request goes to https at that host.
pub(super) fn realm_allowed(origin: &Origin, realm: &str, hosts: &[String]) -> Option<Realm> {
    let named: Uri = realm.parse().ok()?;
    let plain = match named.scheme_str()? {
        "https" => false,
        "http" => true,
        _ => return None,
    };
    let is_upgraded = plain && !origin.is_plain();
    let uri = if is_upgraded {
        upgrade_to_https(origin, &named)?
    } else {
        named
    };
    let host = uri.host().filter(|host| !host.is_empty())?;
    if uri.authority()?.as_str().contains('@') {
        return None;
    }
    let known = origin.join("/").is_some_and(|own| same_host(&own, &uri))
        || same_site(origin.host(), host)
        || (is_loopback(origin.host()) && is_loopback(host))
        || is_one_of(hosts, &uri);
    known.then_some(Realm { uri, is_upgraded })
}

/// The same URL with https. On the registry's own host, it uses the registry's port, because the named port is the
/// one without TLS. Elsewhere it keeps the named port, unless that is 80.
fn upgrade_to_https(origin: &Origin, named: &Uri) -> Option<Uri> {
    let own = origin.root().join("/")?;
    let authority = if same_host(&own, named) {
        own.authority()?.clone()
    } else if named.port_u16().is_none_or(|port| port == 80) {
        named.host()?.parse().ok()?
    } else {
        named.authority()?.clone()
    };
    let mut parts = named.clone().into_parts();
    (parts.scheme, parts.authority) = (Some(Scheme::HTTPS), Some(authority));
    Uri::from_parts(parts).ok().filter(|_| {
        !named
            .authority()
            .is_some_and(|named| named.as_str().contains('@'))
    })
}

/// The `Authorization` of a token response, and its lifetime. `token` and `access_token` are equivalent. `issued_at`
/// is ignored: the lifetime is counted from the response's arrival, so the clocks need not agree.
pub(in crate::upstream) fn parse(body: &[u8]) -> Option<(Zeroizing<String>, Duration)> {
    let json: serde_json::Value = serde_json::from_slice(body).ok()?;
    let text = |name| {
        json.get(name)
            .and_then(serde_json::Value::as_str)
            .filter(|text: &&str| !text.is_empty())
    };
    let token = text("token")
        .or_else(|| text("access_token"))
        .filter(|token| token.len() <= TOKEN_BYTES_MAX)?;
    let header = Zeroizing::new(format!("Bearer {token}"));
    HeaderValue::from_str(&header).ok()?;
    // Some services send a string or a fraction.
    let seconds = json
        .get("expires_in")
        .and_then(|value| value.as_f64().or_else(|| value.as_str()?.trim().parse().ok()));
    let life = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    Some((header, life.unwrap_or(LIFE_MIN).clamp(LIFE_MIN, LIFE_MAX)))
}

/// Service and scopes as a query, one parameter per scope.
pub(super) fn query(service: Option<&str>, scopes: &[String]) -> String {
    let service = service.map(|service| ("service", service));
    let scopes = scopes.iter().map(|scope| ("scope", scope.as_str()));
    encoded(&service.into_iter().chain(scopes).collect::<Vec<_>>())
}

/// Appends a query to the realm's own.
pub(super) fn with_query(realm: &Uri, query: &str) -> Option<Uri> {
    let path = match realm.query() {
        _ if query.is_empty() => realm.path_and_query()?.to_string(),
        Some(own) if !own.is_empty() => format!("{}?{own}&{query}", realm.path()),
        _ => format!("{}?{query}", realm.path()),
    };
    let mut parts = realm.clone().into_parts();
    parts.path_and_query = Some(path.parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// `application/x-www-form-urlencoded`. The reserved characters of scopes stay readable.
pub(super) fn encoded(pairs: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        text.extend(percent::scope(value));
    }
    text
}
