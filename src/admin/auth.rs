//! Authorization of admin requests: token, host check and CSRF protection.
//!
//! The admin API names private repositories and can change the cache. It is reachable over loopback, over a unix
//! socket and, if the operator configures an address and a token, over the network. Browsers can send requests on
//! behalf of pages of other sites. Therefore:
//!
//! * The `Host` header must name this machine or an IP address. Otherwise a name that resolves to this address (DNS
//!   rebinding) would make the attacker's page same-origin.
//! * If a token is configured, TCP requests must carry it, except for health and metrics. Wrong tokens are
//!   rate-limited (`failed_tokens`), logged and counted.
//! * A change must come from a form of the admin page, which carries a secret of this process, or from a program. A
//!   page of another site can send JSON or `DELETE` only after a CORS preflight, and preflights are never allowed.

mod failed_tokens;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, Method, StatusCode};
use tokio::time::Instant;
use zeroize::Zeroizing;

use self::failed_tokens::FailedTokens;
use super::archive::TAR;
use super::health;
use super::response::Problem;
use crate::config::Listen;
use crate::oci::digest::hmac_sha256;
use crate::store::LogLimit;
use crate::telemetry::{Telemetry, TokenRejection};

/// The kind of listener that accepted a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ListenerKind {
    /// A loopback TCP address.
    Loopback,
    /// A TCP address reachable from other machines.
    Network,
    /// A unix socket, protected by its file permissions.
    Socket,
}

/// The origin of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) listener: ListenerKind,
    /// The client address; `None` on a unix socket.
    pub(super) client: Option<IpAddr>,
}

const TOKEN_REQUIRED: &str =
    "admin token required: Authorization: Bearer <content of listen.admin_token_file>";

/// Minimum length; shorter tokens can be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// The configured admin token cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("listen.admin_token_file = \"{}\": {reason}", .path.display())]
pub struct TokenError {
    /// The file.
    pub path: PathBuf,
    /// The reason.
    pub reason: String,
}

/// Reads the configured admin token, without the trailing line feed that editors add.
pub fn token(listen: &Listen) -> Result<Option<Zeroizing<String>>, TokenError> {
    let Some(path) = &listen.admin_token_file else {
        return Ok(None);
    };
    let refused = |reason: String| TokenError {
        path: path.clone(),
        reason,
    };
    let text = std::fs::read_to_string(path).map(Zeroizing::new);
    let text = text.map_err(|error| refused(error.to_string()))?;
    let token = text.trim();
    if token.len() < TOKEN_BYTES_MIN {
        return Err(refused(format!(
            "a token has at least {TOKEN_BYTES_MIN} characters; make one with: openssl rand -hex 32"
        )));
    }
    Ok(Some(Zeroizing::new(token.to_owned())))
}

/// Authorization rules of the admin listener.
pub struct AdminAuth {
    token: Option<Zeroizing<String>>,
    /// Host names accepted in `Host`, besides IP addresses.
    names: Vec<String>,
    /// Key for comparing tokens and for the form secret. New with each process.
    secret: [u8; 32],
    failed_tokens: FailedTokens,
    logged: LogLimit,
}

impl AdminAuth {
    /// Requires `token` if it is set. `names` are accepted hosts besides IP addresses; `secret` is new with each
    /// process.
    pub fn new(token: Option<Zeroizing<String>>, names: Vec<String>, secret: [u8; 32]) -> Arc<Self> {
        Arc::new(Self {
            token,
            names,
            secret,
            failed_tokens: FailedTokens::default(),
            logged: LogLimit::default(),
        })
    }

    /// Authorizes a request. The secret of a form is checked separately, by [`Self::authorize_form`].
    pub(super) fn authorize(
        &self,
        head: &Parts,
        caller: Caller,
        telemetry: &Telemetry,
    ) -> Result<(), Problem> {
        let listener = caller.listener;
        if listener != ListenerKind::Socket {
            self.host(head, listener)?;
        }
        let path = head.uri.path();
        let is_open = health::PATHS.contains(&path);
        if !is_open && listener != ListenerKind::Socket {
            self.token(&head.headers, caller.client, telemetry)?;
        }
        if head.method == Method::GET || head.method == Method::HEAD {
            return Ok(());
        }
        same_origin(head)?;
        let kind = head
            .headers
            .get(CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        let is_form = kind.eq_ignore_ascii_case("application/x-www-form-urlencoded");
        // A form of another site's page cannot send either of these content types.
        let expected = if path == "/api/v1/import" {
            TAR
        } else {
            "application/json"
        };
        if path.starts_with("/api/") && head.method != Method::DELETE && !kind.eq_ignore_ascii_case(expected)
        {
            return Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("Content-Type must be {expected}"),
            ));
        }
        if !path.starts_with("/api/") && !is_form {
            return Err(Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{path} does not accept changes; the API is under /api/v1/"),
            ));
        }
        Ok(())
    }

    /// Delay before the token of a request is compared, if its address has exceeded the limit of wrong tokens.
    pub(super) fn delay(&self, head: &Parts, caller: Caller) -> Option<Duration> {
        let client = caller.client.filter(|_| self.token.is_some())?;
        token_of(&head.headers)?;
        self.failed_tokens.wait(client, Instant::now())
    }

    /// The CSRF secret in the forms of the admin page.
    pub(super) fn form_secret(&self) -> String {
        let sum = hmac_sha256(&self.secret, b"form");
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(sum)
    }

    /// Checks the CSRF secret of a form.
    pub(super) fn authorize_form(&self, secret: &str) -> Result<(), Problem> {
        if self.is_same(secret, &self.form_secret()) {
            return Ok(());
        }
        Err(Problem::new(
            StatusCode::FORBIDDEN,
            "invalid form secret: the form belongs to another page or an earlier run of ifnewer; reload the page",
        ))
    }

    fn host(&self, head: &Parts, listener: ListenerKind) -> Result<(), Problem> {
        let mut hosts = head.headers.get_all(HOST).iter();
        let host = hosts.next().and_then(|host| host.to_str().ok());
        let authority = host.and_then(|host| host.parse::<Authority>().ok());
        let name = authority.as_ref().map_or("", Authority::host);
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let is_local = match (listener, name.parse::<IpAddr>()) {
            (ListenerKind::Network | ListenerKind::Socket, Ok(_)) => true,
            (ListenerKind::Loopback, Ok(address)) => address.is_loopback(),
            (_, Err(_)) => {
                let named = |own: &String| own.eq_ignore_ascii_case(name);
                name.eq_ignore_ascii_case("localhost") || self.names.iter().any(named)
            }
        };
        if is_local && hosts.next().is_none() {
            return Ok(());
        }
        Err(Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "the Host header must name this machine: use its address or localhost, or add the name to tls.names",
        ))
    }

    /// Checks the admin token. An address that exceeds the limit of wrong tokens gets 429 without a comparison; other
    /// addresses are not affected.
    fn token(
        &self,
        headers: &HeaderMap,
        client: Option<IpAddr>,
        telemetry: &Telemetry,
    ) -> Result<(), Problem> {
        let Some(token) = &self.token else { return Ok(()) };
        let now = Instant::now();
        let Some(sent) = token_of(headers) else {
            return Err(Problem::new(StatusCode::UNAUTHORIZED, TOKEN_REQUIRED));
        };
        let wait = client.and_then(|client| self.failed_tokens.wait(client, now));
        if let Some(wait) = wait {
            telemetry.record_admin_token_refused(TokenRejection::TooMany);
            let detail = "too many wrong admin tokens from this address; try again later";
            let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, detail);
            return Err(problem.retry_after(wait.as_secs() + 1));
        }
        if self.is_same(&sent, token) {
            return Ok(());
        }
        telemetry.record_admin_token_refused(TokenRejection::Wrong);
        let wrong = client.map_or(1, |client| self.failed_tokens.note(client, now));
        if let Some(skipped) = self.logged.admits() {
            let client = client.map(tracing::field::display);
            tracing::warn!(client, wrong, skipped, "wrong admin token");
        }
        Err(Problem::new(StatusCode::UNAUTHORIZED, TOKEN_REQUIRED))
    }

    /// Compares keyed hashes, so that the duration does not reveal where the values differ.
    fn is_same(&self, one: &str, other: &str) -> bool {
        hmac_sha256(&self.secret, one.as_bytes()) == hmac_sha256(&self.secret, other.as_bytes())
    }
}

/// The token of a `Bearer` header, or the password of a `Basic` header, for which browsers can prompt.
fn token_of(headers: &HeaderMap) -> Option<Zeroizing<String>> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, value) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Zeroizing::new(value.trim().to_owned()));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let plain = Zeroizing::new(STANDARD.decode(value.trim()).ok()?);
    let (_, password) = std::str::from_utf8(&plain).ok()?.split_once(':')?;
    Some(Zeroizing::new(password.to_owned()))
}

/// Rejects changes that a browser marks as coming from another site. Programs send none of these headers.
fn same_origin(head: &Parts) -> Result<(), Problem> {
    let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    let is_cross_site = matches!(text("sec-fetch-site"), Some("cross-site" | "same-site"));
    let origin = text(ORIGIN.as_str()).and_then(|origin| origin.split_once("://"));
    let host = text(HOST.as_str()).unwrap_or_default();
    let is_cross_origin = match (text(ORIGIN.as_str()), origin) {
        (None, _) => false,
        (Some(_), Some((_, origin))) => !origin.eq_ignore_ascii_case(host),
        (Some(_), None) => true,
    };
    if is_cross_site || is_cross_origin {
        return Err(Problem::new(StatusCode::FORBIDDEN, "cross-site request rejected"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use http::Request;

    /// Method, path, headers and the expected error status.
    type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], Option<u16>);

    fn auth(token: Option<&str>) -> Arc<AdminAuth> {
        let token = token.map(|token| Zeroizing::new(token.to_owned()));
        AdminAuth::new(token, vec!["cache.example.org".to_owned()], [7; 32])
    }

    fn status(
        auth: &AdminAuth,
        listener: ListenerKind,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Option<u16> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (head, ()) = request.body(()).unwrap().into_parts();
        let client = (listener != ListenerKind::Socket).then_some(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
        auth.authorize(&head, Caller { listener, client }, &Telemetry::new())
            .err()
            .map(|problem| problem.status.as_u16())
    }

    #[test]
    fn unknown_host_is_misdirected() {
        let auth = auth(None);
        for (listener, host, expected) in [
            (ListenerKind::Loopback, "127.0.0.1:5001", None),
            (ListenerKind::Loopback, "[::1]:5001", None),
            (ListenerKind::Loopback, "localhost:5001", None),
            (ListenerKind::Loopback, "cache.example.org", None),
            (ListenerKind::Loopback, "evil.example", Some(421)),
            (ListenerKind::Loopback, "192.0.2.7:5001", Some(421)),
            (ListenerKind::Network, "192.0.2.7:5001", None),
            (ListenerKind::Network, "evil.example", Some(421)),
            (ListenerKind::Socket, "anything", None),
        ] {
            assert_eq!(
                status(&auth, listener, "GET", "/api/v1/status", &[("host", host)]),
                expected,
                "{host}"
            );
        }
        assert_eq!(
            status(&auth, ListenerKind::Loopback, "GET", "/", &[]),
            Some(421),
            "no host at all"
        );
    }

    #[test]
    fn token_required_on_tcp_except_health_and_metrics() {
        let auth = auth(Some("canary"));
        let host = ("host", "127.0.0.1");
        let basic = format!("Basic {}", STANDARD.encode("anyone:canary"));
        for (path, authorization, expected) in [
            ("/healthz", "", None),
            ("/metrics", "", None),
            ("/api/v1/images", "", Some(401)),
            ("/", "", Some(401)),
            ("/api/v1/images", "Bearer canary", None),
            ("/api/v1/images", "bearer canary", None),
            ("/api/v1/images", &basic, None),
            ("/api/v1/images", "Bearer canar", Some(401)),
            ("/api/v1/images", "Bearer canaryy", Some(401)),
            ("/api/v1/images", "Basic canary", Some(401)),
        ] {
            let headers = [host, ("authorization", authorization)];
            assert_eq!(
                status(&auth, ListenerKind::Loopback, "GET", path, &headers),
                expected,
                "{path} {authorization}"
            );
        }
        assert_eq!(
            status(&auth, ListenerKind::Socket, "GET", "/api/v1/images", &[]),
            None
        );
    }

    #[test]
    fn cross_site_change_is_rejected() {
        let auth = auth(None);
        let (host, json) = (("host", "127.0.0.1:5001"), ("content-type", "application/json"));
        let form = ("content-type", "application/x-www-form-urlencoded");
        let cases: [Case<'_>; 8] = [
            ("POST", "/api/v1/offline", &[host, json], None),
            ("POST", "/api/v1/offline", &[host, form], Some(415)),
            ("POST", "/api/v1/offline", &[host], Some(415)),
            ("POST", "/act", &[host, form], None),
            ("POST", "/act", &[host, json], Some(405)),
            (
                "POST",
                "/act",
                &[host, form, ("origin", "http://127.0.0.1:5001")],
                None,
            ),
            (
                "POST",
                "/act",
                &[host, form, ("origin", "http://evil.example")],
                Some(403),
            ),
            (
                "DELETE",
                "/api/v1/image",
                &[host, ("sec-fetch-site", "cross-site")],
                Some(403),
            ),
        ];
        for (method, path, headers, expected) in cases {
            assert_eq!(
                status(&auth, ListenerKind::Loopback, method, path, headers),
                expected,
                "{method} {headers:?}"
            );
        }
        assert!(auth.authorize_form(&auth.form_secret()).is_ok());
        assert!(auth.authorize_form("").is_err());
    }
}
