//! Who may come in at all, before anything else is looked at: by a certificate of a CA that the operator named, or by a
//! password of the cache's own. Either opens.
//!
//! A certificate takes no header, so `Authorization` stays the upstream's, at every door. Where there are passwords, that
//! header is ours at the cache's own address and goes no further, whoever sends it: an upstream is then asked with the
//! cache's own credential (`auth = "shared"`) or as everybody would. By an upstream's own name the header is the
//! upstream's, so a password is shown before, to the proxy: in the `Proxy-Authorization` of a `CONNECT`.

mod checks;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::HeaderName;
use http::header::{AUTHORIZATION, PROXY_AUTHORIZATION};
use http::request::Parts;
use quick_cache::sync::Cache;
use tokio::task::spawn_blocking;
use zeroize::Zeroizing;

use self::checks::Checks;
use super::certificate::{Authorities, Certificate};
use super::door::Peer;
use super::gate::Turned;
use super::tls::TlsError;
use crate::config::{AccessConfig as Settings, Allow, User};
use crate::oci::Repository;
use crate::oci::digest::hmac_sha256;

/// bcrypt reads no more of a password. A longer one would open with anything after that.
const PASSWORD_BYTES_MAX: usize = 72;

/// Credentials found right that are known again without another check.
const KNOWN_MAX: usize = 4096;

/// The end of nobody's hash. Who is no user is to take as long to be refused as who is one.
const NOBODY: &str = "CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";

/// Keeps the door.
pub struct Entry {
    authorities: Option<Authorities>,
    users: HashMap<String, Arc<User>>,
    /// A hash that costs as much to check as that of a user.
    nobody: String,
    allows: Vec<Allow>,
    secret: [u8; 32],
    passwords: Arc<Passwords>,
}

/// Passwords verified, and being verified: state that outlives reloads.
pub struct Passwords {
    /// By the keyed hash of the credential: the user as it was configured then. Another hash makes another user.
    known: Cache<[u8; 32], Arc<User>>,
    checks: Checks,
}

impl Default for Passwords {
    fn default() -> Self {
        Self {
            known: Cache::new(KNOWN_MAX),
            checks: Checks::default(),
        }
    }
}

/// What a connection has shown of who is at its other end, before any request.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    pub(super) certificate: Option<Arc<Certificate>>,
    /// Whose password came with the `CONNECT`, and what it was checked against.
    pub(super) user: Option<Arc<User>>,
}

/// How a request came, and so where a password of ours may stand in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By the cache's own address: in `Authorization`.
    Own,
    /// By an upstream's name: nowhere.
    Named,
    /// By `CONNECT`: in `Proxy-Authorization` (RFC 9110 §11.7.2).
    Connect,
}

/// Who came in.
#[derive(Debug)]
pub(super) enum Who {
    /// The holder of a certificate.
    Holder(Arc<str>),
    /// One who knows a password.
    User(Arc<User>),
}

impl Who {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Holder(name) => name,
            Self::User(user) => &user.name,
        }
    }

    pub(super) fn user(self) -> Option<Arc<User>> {
        match self {
            Self::Holder(_) => None,
            Self::User(user) => Some(user),
        }
    }
}

impl Entry {
    /// For these users and holders of certificates. `secret` keys what is remembered of passwords.
    pub fn new(settings: &Settings, secret: [u8; 32], passwords: Arc<Passwords>) -> Result<Self, TlsError> {
        let users = settings
            .users
            .iter()
            .map(|user| (user.name.clone(), Arc::new(user.clone())));
        let cost = settings.users.iter().filter_map(|user| user.hash.get(4..6)).max();
        let roots = &settings.client_roots;
        let authorities = (!roots.is_empty()).then(|| Authorities::new(roots));
        Ok(Self {
            authorities: authorities.transpose()?,
            users: users.collect(),
            nobody: format!("$2b${}${NOBODY}", cost.unwrap_or("10")),
            allows: settings.allows.clone(),
            secret,
            passwords,
        })
    }

    /// Whether `Authorization` at the cache's own address is ours.
    pub(super) fn takes_passwords(&self) -> bool {
        !self.users.is_empty()
    }

    /// Who sent this request.
    pub(super) async fn who(
        &self,
        head: &Parts,
        peer: &Peer,
        way: Way,
        now: SystemTime,
    ) -> Result<Who, Turned> {
        let mut refused = Turned::NoClientCertificate;
        if let (Some(authorities), Some(certificate)) = (&self.authorities, &peer.shown.certificate) {
            match authorities.holder(certificate, now) {
                Ok(name) => return Ok(Who::Holder(name)),
                Err(why) => refused = Turned::ClientCertificate(why),
            }
        }
        if !self.takes_passwords() {
            return Err(refused);
        }
        // Right for as long as the user has the hash that it was checked against.
        if let Some(user) = &peer.shown.user
            && self.users.get(&user.name) == Some(user)
        {
            return Ok(Who::User(Arc::clone(user)));
        }
        let (header, unauthenticated) = match way {
            Way::Own => (AUTHORIZATION, Turned::Unauthenticated),
            Way::Connect => (PROXY_AUTHORIZATION, Turned::ProxyUnauthenticated),
            Way::Named => return Err(Turned::NotByThisDoor),
        };
        // On the heap: the state of requests that need no password stays as small as it is.
        match Box::pin(self.by_password(head, &header, peer.address)).await? {
            Some(user) => Ok(Who::User(user)),
            None => Err(unauthenticated),
        }
    }

    /// The user whose name and password stand in this header.
    async fn by_password(
        &self,
        head: &Parts,
        header: &HeaderName,
        peer: Option<IpAddr>,
    ) -> Result<Option<Arc<User>>, Turned> {
        let mut lines = head.headers.get_all(header).iter();
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Ok(None);
        };
        let right = hmac_sha256(&self.secret, &[b"entry\0", line.as_bytes()].concat());
        if let Some(user) = self.known(&right) {
            return Ok(Some(user));
        }
        let Some((name, password)) = credential(line.as_bytes()) else {
            return Ok(None);
        };
        if password.len() > PASSWORD_BYTES_MAX {
            let to_proxy = *header == PROXY_AUTHORIZATION;
            return Err(Turned::PasswordTooLong { to_proxy });
        }
        let user = self.users.get(&name).cloned();
        let hash = user
            .as_ref()
            .map_or_else(|| self.nobody.clone(), |user| user.hash.clone());
        // Wrong for this hash: what a reload changes is checked again.
        let wrong = hmac_sha256(
            &self.secret,
            &[b"wrong\0", hash.as_bytes(), b"\0", line.as_bytes()].concat(),
        );
        let checks = &self.passwords.checks;
        if checks.is_wrong(&wrong) {
            return Ok(None);
        }
        let Some(turn) = checks.turn(peer).await else {
            return Err(Turned::EntryBusy);
        };
        // The same credential may have been checked in a turn before.
        if let Some(user) = self.known(&right) {
            return Ok(Some(user));
        }
        if checks.is_wrong(&wrong) {
            return Ok(None);
        }
        // The turn lasts until the result is known to whoever is next, or if the client leaves, as long as the check.
        let checked = spawn_blocking(move || (bcrypt::verify(password.as_bytes(), &hash), turn));
        let (is_right, turn) = match checked.await {
            Ok((checked, turn)) => (checked.unwrap_or(false), Some(turn)),
            Err(_) => (false, None),
        };
        let user = user.filter(|_| is_right);
        match &user {
            Some(user) => self.passwords.known.insert(right, Arc::clone(user)),
            None => checks.note_wrong(wrong, turn.as_ref()),
        }
        Ok(user)
    }

    /// The user whose credential was found right before.
    fn known(&self, credential: &[u8; 32]) -> Option<Arc<User>> {
        let is_user = |user: &Arc<User>| self.users.get(&user.name) == Some(user);
        self.passwords.known.get(credential).filter(is_user)
    }

    /// Whether not every user may pull everything.
    pub(super) fn has_allows(&self) -> bool {
        !self.allows.is_empty()
    }

    /// Whether this user may pull from this repository.
    pub(super) fn allows(&self, user: &str, upstream: &str, repository: &Repository) -> bool {
        self.allows.is_empty()
            || self
                .allows
                .iter()
                .any(|allow| allow.applies_to(user) && allow.images.contains(upstream, repository))
    }
}

/// User and password of a `Basic` credential (RFC 7617).
fn credential(line: &[u8]) -> Option<(String, Zeroizing<String>)> {
    let (scheme, rest) = line.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"basic ") {
        return None;
    }
    let pair = Zeroizing::new(BASE64_STANDARD.decode(rest.trim_ascii()).ok()?);
    let (name, password) = std::str::from_utf8(&pair).ok()?.split_once(':')?;
    Some((name.to_owned(), Zeroizing::new(password.to_owned())))
}

#[cfg(test)]
mod tests;
