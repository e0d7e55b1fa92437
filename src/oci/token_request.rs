//! Token service requests of clients: distribution's `docs/spec/auth/token.md` and `oauth.md`.
//!
//! A request is read only to learn which account a token is issued to. The token service decides whether it issues one, and
//! may read the request in another way. So a credential counts only if the request has one, in one place where each service
//! looks for it. Otherwise a token for no account would count as a login of the account in the part that the service ignored.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use zeroize::Zeroizing;

use super::Repository;
use super::query::decode;

/// Most repositories recorded per request. A pull by Docker requests one. A push that mounts a blob of another
/// repository requests two.
pub const SCOPES_MAX: usize = 16;

/// A request to a token service.
#[derive(Default)]
pub struct TokenRequest {
    /// The user name and password, or the refresh token, after a prefix that names the kind. A user name and password
    /// give the same bytes in `Authorization: Basic` and in a form. `None` without a credential, with several, or with one of
    /// an unknown kind.
    pub credential: Option<Zeroizing<Vec<u8>>>,
    /// Repositories that the client wants to pull from.
    pub repositories: Vec<Repository>,
}

impl TokenRequest {
    /// Reads it from headers, query and the form, which is the body of a `POST`. Unreadable parts count as absent.
    pub fn read(method: &Method, headers: &HeaderMap, query: Option<&str>, body: &[u8]) -> Self {
        let query = Pairs::read(query.unwrap_or_default());
        let form = if *method == Method::POST && is_form(headers) {
            Pairs::read(std::str::from_utf8(body).unwrap_or_default())
        } else {
            Pairs::read("")
        };
        let mut lines = headers.get_all(AUTHORIZATION).iter();
        let credential = match (lines.next(), lines.next(), form.has_credential()) {
            (Some(header), None, false) => Self::basic(header),
            (None, _, true) => form.credential(),
            _ => None,
        };
        let mut repositories: Vec<Repository> = Vec::new();
        let scopes = query.all("scope").chain(form.all("scope"));
        for repository in scopes.flat_map(|line| line.split(' ')).filter_map(pull_scope) {
            if repositories.len() < SCOPES_MAX && !repositories.contains(&repository) {
                repositories.push(repository);
            }
        }
        Self {
            credential,
            repositories,
        }
    }

    /// The credential in a Basic header (RFC 7617), as [`Self::credential`]. podman sends an empty one (`Og==`) if it has none;
    /// it counts as absent. So does one in a spelling that not each server accepts.
    pub fn basic(header: &HeaderValue) -> Option<Zeroizing<Vec<u8>>> {
        let (scheme, encoded) = header.to_str().ok()?.split_once(' ')?;
        let plain = Zeroizing::new(BASE64_STANDARD.decode(encoded).ok()?);
        (scheme.eq_ignore_ascii_case("basic") && *plain != b":").then(|| tagged(b"password", &[&plain]))
    }
}

/// Whether the body is a form that each service reads.
fn is_form(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default();
    kind.trim()
        .eq_ignore_ascii_case("application/x-www-form-urlencoded")
        && !headers.contains_key(CONTENT_ENCODING)
}

/// `application/x-www-form-urlencoded`, zeroized on drop.
struct Pairs(Vec<(String, Zeroizing<String>)>);

impl Pairs {
    fn read(text: &str) -> Self {
        let pair = |part: &str| {
            let (key, value) = part.split_once('=')?;
            Some((decode(key).ok()?, Zeroizing::new(decode(value).ok()?)))
        };
        Self(text.split('&').filter_map(pair).collect())
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let matching = self.0.iter().filter(move |(key, _)| key == name);
        matching.map(|(_, value)| value.as_str())
    }

    /// The value of `name`, if it occurs once. Of several values, services choose differently.
    fn single<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let mut values = self.all(name);
        values.next().filter(|_| values.next().is_none())
    }

    fn has_credential(&self) -> bool {
        const NAMES: [&str; 3] = ["username", "password", "refresh_token"];
        self.0.iter().any(|(key, _)| NAMES.contains(&key.as_str()))
    }

    fn credential(&self) -> Option<Zeroizing<Vec<u8>>> {
        match self.single("grant_type")? {
            "password" => {
                let (user, password) = (self.single("username")?, self.single("password")?);
                Some(tagged(b"password", &[user.as_bytes(), b":", password.as_bytes()]))
            }
            "refresh_token" => {
                let token = self.single("refresh_token")?;
                Some(tagged(b"refresh", &[token.as_bytes()]))
            }
            _ => None,
        }
    }
}

/// Tags the bytes with their kind, so that a password never equals a refresh token.
fn tagged(kind: &[u8], parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(
        kind.len() + 1 + parts.iter().map(|part| part.len()).sum::<usize>(),
    ));
    for part in [kind, b"\0"].iter().chain(parts) {
        bytes.extend_from_slice(part);
    }
    bytes
}

/// Repository of a scope with pull access: `repository:NAME:ACTIONS`. NAME may contain a port, so the actions
/// follow the last colon.
fn pull_scope(scope: &str) -> Option<Repository> {
    let (kind, rest) = scope.split_once(':')?;
    let (name, actions) = rest.rsplit_once(':')?;
    let pulls = actions.split(',').any(|action| matches!(action, "pull" | "*"));
    let is_repository = kind == "repository" || kind.starts_with("repository(");
    name.parse().ok().filter(|_| is_repository && pulls)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn headers(pairs: &[(http::HeaderName, &str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()));
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        headers
    }

    fn by_header(lines: &[&str]) -> Option<Zeroizing<Vec<u8>>> {
        let lines: Vec<_> = lines.iter().map(|line| (AUTHORIZATION, *line)).collect();
        TokenRequest::read(&Method::GET, &headers(&lines), None, b"").credential
    }

    fn post(form: &[u8]) -> TokenRequest {
        TokenRequest::read(&Method::POST, &headers(&[(CONTENT_TYPE, FORM)]), None, form)
    }

    const FORM: &str = "application/x-www-form-urlencoded";

    const BOB: &[u8] = b"grant_type=password&username=bob&password=pw+1&scope=";

    #[test]
    fn same_password_in_header_and_form_is_one_credential() {
        let (by_header, by_form) = (by_header(&["Basic Ym9iOnB3IDE="]), post(BOB).credential);
        assert!(by_header.is_some());
        assert_eq!(by_header, by_form);
        let by_token = post(b"grant_type=refresh_token&refresh_token=bob:pw%201").credential;
        assert!(by_token.is_some());
        assert_ne!(by_token, by_form);
    }

    #[test]
    fn empty_or_malformed_credential_is_none() {
        for value in ["Basic Og==", "Basic", "Basic ???", "Bearer Ym9iOnB3"] {
            assert_eq!(by_header(&[value]), None, "{value}");
        }
        for form in [
            &b""[..],
            b"grant_type=password&username=bob",
            b"\xff\xfe",
            b"username=bob&password=x",
        ] {
            assert_eq!(post(form).credential, None);
        }
    }

    #[test]
    fn credential_that_a_service_may_ignore_is_none() {
        let basic = (AUTHORIZATION, "Basic Ym9iOnB3");
        assert_eq!(by_header(&["Basic  Ym9iOnB3"]), None);
        assert_eq!(by_header(&["Basic Ym9iOnB3", "Basic Ym9iOnB3"]), None);
        let read =
            |method: Method, lines: &[_]| TokenRequest::read(&method, &headers(lines), None, BOB).credential;
        assert_eq!(read(Method::GET, &[(CONTENT_TYPE, FORM)]), None);
        assert_eq!(read(Method::POST, &[]), None);
        assert_eq!(read(Method::POST, &[(CONTENT_TYPE, "text/plain")]), None);
        assert_eq!(
            read(Method::POST, &[(CONTENT_TYPE, FORM), (CONTENT_ENCODING, "gzip")]),
            None
        );
        assert_eq!(read(Method::POST, &[(CONTENT_TYPE, FORM), basic]), None);
        assert_eq!(post(&[BOB, b"&username=eve"].concat()).credential, None);
        let with_charset = format!("{FORM}; charset=utf-8");
        assert!(read(Method::POST, &[(CONTENT_TYPE, &with_charset)]).is_some());
    }

    #[test]
    fn repositories_come_from_pull_scopes() {
        let read = |query: &str, form: &[u8]| {
            let headers = headers(&[(CONTENT_TYPE, FORM)]);
            let request = TokenRequest::read(&Method::POST, &headers, Some(query), form);
            request
                .repositories
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            read(
                "service=x&scope=repository%3Aacme%2Fapp%3Apull%2Cpush&scope=repository:b/c:*",
                b""
            ),
            ["acme/app", "b/c"]
        );
        assert_eq!(
            read(
                "",
                b"scope=repository%3Aacme%2Fapp%3Apull+repository(plugin):b/c:pull"
            ),
            ["acme/app", "b/c"]
        );
        let none: [&str; 0] = [];
        assert_eq!(
            read(
                "scope=repository:a/b:push&scope=registry:catalog:*&scope=x&scope=repository:A//b:pull",
                b""
            ),
            none
        );
        let many: Vec<_> = (0..40)
            .map(|nth| format!("scope=repository:a/r{nth}:pull"))
            .collect();
        assert_eq!(read(&many.join("&"), b"").len(), SCOPES_MAX);
    }
}
