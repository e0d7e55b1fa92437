//! Access control of the registry: open, Basic, or Bearer with its own token service.

use super::{Seen, Upstream};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::StatusCode;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(super) struct Rights {
    login: Login,
    /// user → password, repositories
    users: BTreeMap<String, (String, BTreeSet<String>)>,
    /// Readable with an anonymous token.
    public: BTreeSet<String>,
    /// 403 for every client.
    forbidden: BTreeSet<String>,
    /// token → user
    tokens: BTreeMap<String, Option<String>>,
    tokens_made: usize,
    style: TokenStyle,
}

#[derive(Default, PartialEq, Eq)]
enum Login {
    #[default]
    Open,
    Basic,
    Bearer,
}

#[derive(Default)]
struct TokenStyle {
    without_expiry: bool,
    as_access_token: bool,
    realm: Option<String>,
    /// Whole `WWW-Authenticate` lines, in which `{realm}` and `{scope}` are replaced.
    lines: Vec<String>,
    /// The response to an expired token, without a challenge.
    expired: Option<u16>,
}

/// Why a request is denied.
pub(super) struct Denial {
    pub(super) status: StatusCode,
    pub(super) challenges: Vec<String>,
    pub(super) code: &'static str,
}

impl Upstream {
    /// Every request needs a Bearer token of this registry's token service. Repositories are private until
    /// `makes_public` or `lets`.
    pub fn requires_token(&self) {
        self.state(|state| state.rights.login = Login::Bearer);
    }

    /// Every request needs `Basic` with this user and password. The user may read everything.
    pub fn requires_basic(&self, user: &str, password: &str) {
        self.lets(user, password, "*");
        self.state(|state| state.rights.login = Login::Basic);
    }

    /// This user may read this repository (`*`: all).
    pub fn lets(&self, user: &str, password: &str, repository: &str) {
        self.state(|state| {
            let entry = state.rights.users.entry(user.to_owned()).or_default();
            password.clone_into(&mut entry.0);
            entry.1.insert(repository.to_owned());
        });
    }

    /// Revokes the user's access, also for issued tokens.
    pub fn revokes(&self, user: &str) {
        self.state(|state| state.rights.users.get_mut(user).unwrap().1.clear());
    }

    /// Any client with an anonymous token may read this repository.
    pub fn makes_public(&self, repository: &str) {
        self.state(|state| state.rights.public.insert(repository.to_owned()));
    }

    /// 403 for every client in this repository.
    pub fn forbids(&self, repository: &str) {
        self.state(|state| state.rights.forbidden.insert(repository.to_owned()));
    }

    /// Tokens come without `expires_in`, as at ghcr.io.
    pub fn omits_expires_in(&self) {
        self.state(|state| state.rights.style.without_expiry = true);
    }

    /// Tokens come as `access_token`.
    pub fn names_it_access_token(&self) {
        self.state(|state| state.rights.style.as_access_token = true);
    }

    /// Challenges name this realm instead of our own.
    pub fn names_realm(&self, realm: &str) {
        self.state(|state| state.rights.style.realm = Some(realm.to_owned()));
    }

    /// Challenges are exactly these lines, in which `{realm}` and `{scope}` are replaced.
    pub fn challenges_with(&self, lines: &[&str]) {
        self.state(|state| state.rights.style.lines = lines.iter().map(|line| (*line).to_owned()).collect());
    }

    /// An expired token gets this status without a challenge: 400 at public.ecr.aws, 403 at ECR.
    pub fn answers_expired_tokens_with(&self, status: u16) {
        self.state(|state| state.rights.style.expired = Some(status));
    }

    /// Expires all issued tokens.
    pub fn expires_tokens(&self) {
        self.state(|state| state.rights.tokens.clear());
    }

    /// A token, as for a client that follows the challenge.
    pub fn token_for(&self, user: &str) -> String {
        self.state(|state| state.rights.new_token(Some(user.to_owned())))
    }
}

impl Rights {
    /// Whether this request is authorized.
    pub(super) fn check(&self, base: &str, seen: &Seen, repository: Option<&str>) -> Result<(), Denial> {
        if repository.is_some_and(|name| self.forbidden.contains(name)) {
            return Err(Denial {
                status: StatusCode::FORBIDDEN,
                challenges: Vec::new(),
                code: "DENIED",
            });
        }
        let authorization = seen.header("authorization");
        match self.login {
            Login::Open => Ok(()),
            Login::Basic => {
                let Some(user) = authorization.and_then(basic).filter(|pair| self.knows(pair)) else {
                    return Err(unauthorized(vec!["Basic realm=\"scripted upstream\"".to_owned()]));
                };
                match repository {
                    Some(name) if !self.may(Some(&user.0), name) => Err(Denial {
                        status: StatusCode::FORBIDDEN,
                        challenges: Vec::new(),
                        code: "DENIED",
                    }),
                    _ => Ok(()),
                }
            }
            Login::Bearer => {
                let token = authorization.and_then(|line| line.strip_prefix("Bearer "));
                let holder = token.and_then(|token| self.tokens.get(token));
                match (token, holder, repository) {
                    (None, ..) => Err(unauthorized(self.challenge(base, repository, None))),
                    (_, None, _) if self.style.expired.is_some() => Err(Denial {
                        status: StatusCode::from_u16(self.style.expired.unwrap()).unwrap(),
                        challenges: Vec::new(),
                        code: "Your authorization token has expired",
                    }),
                    (_, None, _) => Err(unauthorized(self.challenge(
                        base,
                        repository,
                        Some("invalid_token"),
                    ))),
                    (_, Some(user), Some(name)) if !self.may(user.as_deref(), name) => Err(unauthorized(
                        self.challenge(base, repository, Some("insufficient_scope")),
                    )),
                    _ => Ok(()),
                }
            }
        }
    }

    /// The token service: status and JSON.
    pub(super) fn token(&mut self, seen: &Seen) -> (StatusCode, String) {
        let credential = seen.header("authorization");
        let known = credential.and_then(basic).filter(|pair| self.knows(pair));
        if credential.is_some() && known.is_none() {
            let problem = json!({"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]});
            return (StatusCode::UNAUTHORIZED, problem.to_string());
        }
        let user = known.map(|(user, _)| user);
        let token = self.new_token(user);
        let name = if self.style.as_access_token {
            "access_token"
        } else {
            "token"
        };
        let mut answer = json!({name: token});
        if !self.style.without_expiry {
            answer["expires_in"] = json!(300);
        }
        (StatusCode::OK, answer.to_string())
    }

    fn new_token(&mut self, user: Option<String>) -> String {
        self.tokens_made += 1;
        let token = format!(
            "token-{}-{}",
            user.as_deref().unwrap_or("anonymous"),
            self.tokens_made
        );
        self.tokens.insert(token.clone(), user);
        token
    }

    fn challenge(&self, base: &str, repository: Option<&str>, error: Option<&str>) -> Vec<String> {
        let realm = self
            .style
            .realm
            .clone()
            .unwrap_or_else(|| format!("{base}/token"));
        let scope = repository
            .map(|name| format!(",scope=\"repository:{name}:pull\""))
            .unwrap_or_default();
        if !self.style.lines.is_empty() {
            let scope = format!("repository:{}:pull", repository.unwrap_or_default());
            let fill = |line: &String| line.replace("{realm}", &realm).replace("{scope}", &scope);
            return self.style.lines.iter().map(fill).collect();
        }
        let error = error
            .map(|error| format!(",error=\"{error}\""))
            .unwrap_or_default();
        vec![format!(
            "Bearer realm=\"{realm}\",service=\"scripted\"{scope}{error}"
        )]
    }

    fn knows(&self, (user, password): &(String, String)) -> bool {
        self.users.get(user).is_some_and(|(right, _)| right == password)
    }

    fn may(&self, user: Option<&str>, repository: &str) -> bool {
        let own = user
            .and_then(|user| self.users.get(user))
            .map(|(_, repositories)| repositories);
        self.public.contains(repository)
            || own.is_some_and(|own| own.contains("*") || own.contains(repository))
    }
}

fn unauthorized(challenges: Vec<String>) -> Denial {
    Denial {
        status: StatusCode::UNAUTHORIZED,
        challenges,
        code: "UNAUTHORIZED",
    }
}

/// `Basic` credentials of an `Authorization` line.
fn basic(line: &str) -> Option<(String, String)> {
    let decoded = BASE64_STANDARD.decode(line.strip_prefix("Basic ")?).ok()?;
    let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}
