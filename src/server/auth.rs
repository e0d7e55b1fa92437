//! Client authentication, by a client certificate or by a password of the cache. Either is enough.
//!
//! A certificate needs no header, so `Authorization` stays the upstream's on every route. With passwords,
//! `Authorization` at the cache's own address belongs to the cache and is never forwarded. The upstream is then asked
//! with the cache's own credential (`auth = "shared"`) or anonymously. Under an upstream's host name the header
//! belongs to the upstream, so the password comes earlier, in the `Proxy-Authorization` of a `CONNECT`.

mod password_checks;

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

use self::password_checks::PasswordChecks;
use super::error::Rejection;
use super::routing::ConnectionInfo;
use super::tls::TlsError;
use super::tls::client_cert::{ClientCaVerifier, ClientCert};
use crate::config::{AccessConfig as Settings, Allow, User};
use crate::oci::Repository;
use crate::oci::digest::hmac_sha256;

/// bcrypt ignores further bytes, so a longer password would match with any ending.
const PASSWORD_BYTES_MAX: usize = 72;

/// Verified credentials that are remembered.
const VERIFIED_MAX: usize = 4096;

/// End of the dummy bcrypt hash, verified for unknown users so that response time does not reveal whether a user
/// exists.
const DUMMY_HASH_SUFFIX: &str = "CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";

/// Authenticates clients and applies their allow lists.
pub struct Authenticator {
    client_ca: Option<ClientCaVerifier>,
    users: HashMap<String, Arc<User>>,
    /// Dummy hash with the highest bcrypt cost among the users.
    dummy_hash: String,
    allows: Vec<Allow>,
    secret: [u8; 32],
    passwords: Arc<PasswordCache>,
}

/// Verified passwords and running checks. Outlives reloads.
pub struct PasswordCache {
    /// From the keyed hash of the credential to the user. A changed password hash makes a different user.
    verified: Cache<[u8; 32], Arc<User>>,
    checks: PasswordChecks,
}

impl Default for PasswordCache {
    fn default() -> Self {
        Self {
            verified: Cache::new(VERIFIED_MAX),
            checks: PasswordChecks::default(),
        }
    }
}

/// Credentials of a connection, established before any request.
#[derive(Clone, Debug, Default)]
pub(super) struct PeerCredentials {
    pub(super) certificate: Option<Arc<ClientCert>>,
    /// The user of the `CONNECT`, with the password hash that was checked.
    pub(super) user: Option<Arc<User>>,
}

/// The header that carries the cache's password, by the route of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CredentialHeader {
    /// At the cache's own address: `Authorization`.
    Authorization,
    /// Under an upstream's host name: none.
    None,
    /// For `CONNECT`: `Proxy-Authorization` (RFC 9110 §11.7.2).
    ProxyAuthorization,
}

/// An authenticated client.
#[derive(Debug)]
pub(super) enum Identity {
    /// Subject of a client certificate.
    Certificate(Arc<str>),
    /// User of the cache, by password.
    User(Arc<User>),
}

impl Identity {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Certificate(name) => name,
            Self::User(user) => &user.name,
        }
    }

    pub(super) fn user(self) -> Option<Arc<User>> {
        match self {
            Self::Certificate(_) => None,
            Self::User(user) => Some(user),
        }
    }
}

impl Authenticator {
    /// For the configured users and client CAs. `secret` keys the hashes of remembered credentials.
    pub fn new(
        settings: &Settings,
        secret: [u8; 32],
        passwords: Arc<PasswordCache>,
    ) -> Result<Self, TlsError> {
        let users = settings
            .users
            .iter()
            .map(|user| (user.name.clone(), Arc::new(user.clone())));
        let cost = settings.users.iter().filter_map(|user| user.hash.get(4..6)).max();
        let roots = &settings.client_roots;
        let client_ca = (!roots.is_empty()).then(|| ClientCaVerifier::new(roots));
        Ok(Self {
            client_ca: client_ca.transpose()?,
            users: users.collect(),
            dummy_hash: format!("$2b${}${DUMMY_HASH_SUFFIX}", cost.unwrap_or("10")),
            allows: settings.allows.clone(),
            secret,
            passwords,
        })
    }

    /// Whether there are users with passwords, so that `Authorization` at the cache's own address belongs to the
    /// cache.
    pub(super) fn has_passwords(&self) -> bool {
        !self.users.is_empty()
    }

    /// Authenticates the client of a request.
    pub(super) async fn authenticate(
        &self,
        head: &Parts,
        peer: &ConnectionInfo,
        credential_header: CredentialHeader,
        now: SystemTime,
    ) -> Result<Identity, Rejection> {
        let mut refused = Rejection::NoClientCertificate;
        if let (Some(client_ca), Some(certificate)) = (&self.client_ca, &peer.credentials.certificate) {
            match client_ca.identify(certificate, now) {
                Ok(name) => return Ok(Identity::Certificate(name)),
                Err(why) => refused = Rejection::ClientCertificateRejected(why),
            }
        }
        if !self.has_passwords() {
            return Err(refused);
        }
        // Valid as long as the user has the password hash that was checked.
        if let Some(user) = &peer.credentials.user
            && self.users.get(&user.name) == Some(user)
        {
            return Ok(Identity::User(Arc::clone(user)));
        }
        let (header, unauthenticated) = match credential_header {
            CredentialHeader::Authorization => (AUTHORIZATION, Rejection::Unauthenticated),
            CredentialHeader::ProxyAuthorization => (PROXY_AUTHORIZATION, Rejection::ProxyUnauthenticated),
            CredentialHeader::None => return Err(Rejection::PasswordNotPossible),
        };
        // Boxed, so that requests without a password check keep a small future.
        match Box::pin(self.user_by_password(head, &header, peer.address)).await? {
            Some(user) => Ok(Identity::User(user)),
            None => Err(unauthenticated),
        }
    }

    /// Checks the `Basic` credential in this header.
    async fn user_by_password(
        &self,
        head: &Parts,
        header: &HeaderName,
        peer: Option<IpAddr>,
    ) -> Result<Option<Arc<User>>, Rejection> {
        let mut lines = head.headers.get_all(header).iter();
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Ok(None);
        };
        let right = hmac_sha256(&self.secret, &[b"entry\0", line.as_bytes()].concat());
        if let Some(user) = self.verified_user(&right) {
            return Ok(Some(user));
        }
        let Some((name, password)) = credential(line.as_bytes()) else {
            return Ok(None);
        };
        if password.len() > PASSWORD_BYTES_MAX {
            let to_proxy = *header == PROXY_AUTHORIZATION;
            return Err(Rejection::PasswordTooLong { to_proxy });
        }
        let user = self.users.get(&name).cloned();
        let hash = user
            .as_ref()
            .map_or_else(|| self.dummy_hash.clone(), |user| user.hash.clone());
        // Keyed by the password hash too, so that a changed password is checked again.
        let wrong = hmac_sha256(
            &self.secret,
            &[b"wrong\0", hash.as_bytes(), b"\0", line.as_bytes()].concat(),
        );
        let checks = &self.passwords.checks;
        if checks.is_wrong(&wrong) {
            return Ok(None);
        }
        let Some(permit) = checks.acquire(peer).await else {
            return Err(Rejection::TooManyPasswordChecks);
        };
        // Another request may have checked the same credential meanwhile.
        if let Some(user) = self.verified_user(&right) {
            return Ok(Some(user));
        }
        if checks.is_wrong(&wrong) {
            return Ok(None);
        }
        // The permit moves into the check, which may outlive the client. It is released after the result is recorded.
        let checked = spawn_blocking(move || (bcrypt::verify(password.as_bytes(), &hash), permit));
        let (is_right, permit) = match checked.await {
            Ok((checked, permit)) => (checked.unwrap_or(false), Some(permit)),
            Err(_) => (false, None),
        };
        let user = user.filter(|_| is_right);
        match &user {
            Some(user) => self.passwords.verified.insert(right, Arc::clone(user)),
            None => checks.record_wrong(wrong, permit.as_ref()),
        }
        Ok(user)
    }

    /// The user of a credential that was verified before.
    fn verified_user(&self, credential: &[u8; 32]) -> Option<Arc<User>> {
        let is_user = |user: &Arc<User>| self.users.get(&user.name) == Some(user);
        self.passwords.verified.get(credential).filter(is_user)
    }

    /// Whether allow lists are configured.
    pub(super) fn has_allows(&self) -> bool {
        !self.allows.is_empty()
    }

    /// Whether the allow lists let this user pull from this repository.
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
