//! Token service requests of clients: distribution's `docs/spec/auth/token.md` and `oauth.md`.
//!
//! A request is read only to learn which account a token is issued to. The token service decides whether it issues one.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::HeaderValue;
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
    /// give the same bytes in `Authorization: Basic` and in a form. `None` without a credential, or with one of an
    /// unknown kind.
    pub credential: Option<Zeroizing<Vec<u8>>>,
    /// Repositories that the client wants to pull from.
    pub repositories: Vec<Repository>,
}

impl TokenRequest {
    /// Reads it from header, query and form. Unreadable parts count as absent.
    pub fn read(authorization: Option<&HeaderValue>, query: Option<&str>, form: &[u8]) -> Self {
        let query = Pairs::read(query.unwrap_or_default());
        let form = Pairs::read(std::str::from_utf8(form).unwrap_or_default());
        let credential = match authorization {
            Some(header) => basic(header),
            None => form.credential(),
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

    fn credential(&self) -> Option<Zeroizing<Vec<u8>>> {
        match self.all("grant_type").next()? {
            "password" => {
                let (user, password) = (self.all("username").next()?, self.all("password").next()?);
                Some(tagged(b"password", &[user.as_bytes(), b":", password.as_bytes()]))
            }
            "refresh_token" => Some(tagged(
                b"refresh",
                &[self.all("refresh_token").next()?.as_bytes()],
            )),
            _ => None,
        }
    }
}

/// Basic credential (RFC 7617). podman sends an empty one (`Og==`) if it has none; it counts as absent.
fn basic(header: &HeaderValue) -> Option<Zeroizing<Vec<u8>>> {
    let (scheme, encoded) = header.to_str().ok()?.split_once(' ')?;
    let plain = Zeroizing::new(BASE64_STANDARD.decode(encoded.trim()).ok()?);
    (scheme.eq_ignore_ascii_case("basic") && *plain != b":").then(|| tagged(b"password", &[&plain]))
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

    fn header(text: &str) -> HeaderValue {
        HeaderValue::from_str(text).unwrap()
    }

    #[test]
    fn same_password_in_header_and_form_is_one_credential() {
        let by_header = TokenRequest::read(Some(&header("Basic Ym9iOnB3IDE=")), None, b"");
        let by_form = TokenRequest::read(
            None,
            None,
            b"grant_type=password&username=bob&password=pw+1&scope=",
        );
        assert!(by_header.credential.is_some());
        assert_eq!(by_header.credential, by_form.credential);
        let by_token = TokenRequest::read(None, None, b"grant_type=refresh_token&refresh_token=bob:pw%201");
        assert!(by_token.credential.is_some());
        assert_ne!(by_token.credential, by_form.credential);
    }

    #[test]
    fn empty_or_malformed_credential_is_none() {
        for value in ["Basic Og==", "Basic", "Basic ???", "Bearer Ym9iOnB3"] {
            assert_eq!(
                TokenRequest::read(Some(&header(value)), None, b"").credential,
                None,
                "{value}"
            );
        }
        for form in [
            &b""[..],
            b"grant_type=password&username=bob",
            b"\xff\xfe",
            b"username=bob&password=x",
        ] {
            assert_eq!(TokenRequest::read(None, None, form).credential, None);
        }
    }

    #[test]
    fn repositories_come_from_pull_scopes() {
        let read = |query: &str, form: &[u8]| {
            let request = TokenRequest::read(None, Some(query), form);
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
