//! Who may come in at all: the cache's own users, before anything else is looked at.
//!
//! Where this is on, `Authorization` is ours and goes no further: an upstream is then asked with the cache's own
//! credential (`access = "shared"`) or as everybody would. For the same reason nobody comes in by an upstream's own name:
//! there the header is the upstream's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::header::AUTHORIZATION;
use http::request::Parts;
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::gate::Turned;
use crate::config::{Allow, Entry as Settings};
use crate::oci::Repository;
use crate::oci::digest::keyed;

/// Passwords checked at a time: each costs a tenth of a second of a processor, and who guesses must not have them all.
const CHECKS_MAX: usize = 2;

/// How long a check waits for its turn.
const CHECK_WITHIN: Duration = Duration::from_secs(10);

/// Credentials found right that are known again without another check.
const KNOWN_MAX: usize = 4096;

/// The end of nobody's hash. Who is no user is to take as long to be refused as who is one.
const NOBODY: &str = "CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";

/// Keeps the door.
pub struct Entry {
    users: HashMap<String, String>,
    /// A hash that costs as much to check as that of a user.
    nobody: String,
    allows: Vec<Allow>,
    secret: [u8; 32],
    /// By the keyed hash of the credential.
    known: Cache<[u8; 32], Arc<str>>,
    checks: Arc<Semaphore>,
}

impl Entry {
    /// For these users. `secret` keys what is remembered of their passwords.
    pub fn new(settings: &Settings, secret: [u8; 32]) -> Self {
        let users = settings
            .users
            .iter()
            .map(|user| (user.name.clone(), user.hash.clone()));
        let cost = settings.users.iter().filter_map(|user| user.hash.get(4..6)).max();
        Self {
            users: users.collect(),
            nobody: format!("$2b${}${NOBODY}", cost.unwrap_or("10")),
            allows: settings.allows.clone(),
            secret,
            known: Cache::new(KNOWN_MAX),
            checks: Arc::new(Semaphore::new(CHECKS_MAX)),
        }
    }

    /// Which user sent this request.
    pub(super) async fn who(&self, head: &Parts) -> Result<Arc<str>, Turned> {
        let mut lines = head.headers.get_all(AUTHORIZATION).iter();
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err(Turned::Unauthenticated);
        };
        let key = keyed(&self.secret, &[b"entry\0", line.as_bytes()].concat());
        if let Some(user) = self.known.get(&key) {
            return Ok(user);
        }
        let (name, password) = credential(line.as_bytes()).ok_or(Turned::Unauthenticated)?;
        let turn = timeout(CHECK_WITHIN, Arc::clone(&self.checks).acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            return Err(Turned::EntryBusy);
        };
        let hash = self.users.get(&name).cloned();
        let is_user = hash.is_some();
        let hash = hash.unwrap_or_else(|| self.nobody.clone());
        let checked = spawn_blocking(move || {
            let _turn = turn;
            bcrypt::verify(password.as_bytes(), &hash).unwrap_or(false)
        });
        if !(checked.await.unwrap_or(false) && is_user) {
            return Err(Turned::Unauthenticated);
        }
        let user: Arc<str> = name.into();
        self.known.insert(key, Arc::clone(&user));
        Ok(user)
    }

    /// Whether this user may pull from this repository.
    pub(super) fn allows(&self, user: &str, upstream: &str, repository: &Repository) -> bool {
        self.allows.is_empty()
            || self
                .allows
                .iter()
                .any(|allow| allow.is_for(user) && allow.images.contain(upstream, repository))
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
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::config::User;

    fn entry() -> Entry {
        let user = User {
            name: "alice".to_owned(),
            hash: bcrypt::hash("secret", 5).unwrap(),
        };
        let settings = Settings {
            users: vec![user],
            allows: Vec::new(),
        };
        Entry::new(&settings, [7; 32])
    }

    fn head(authorization: &[&str]) -> Parts {
        let request = authorization
            .iter()
            .fold(http::Request::builder(), |request, line| {
                request.header(AUTHORIZATION, *line)
            });
        request.body(()).unwrap().into_parts().0
    }

    fn basic(pair: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(pair))
    }

    #[tokio::test]
    async fn the_right_password_and_nothing_else_opens() {
        let entry = entry();
        for _ in 0..2 {
            assert_eq!(
                &*entry.who(&head(&[&basic("alice:secret")])).await.unwrap(),
                "alice"
            );
        }
        let (right, bearer) = (basic("alice:secret"), "Bearer secret".to_owned());
        for lines in [
            &[] as &[&str],
            &[&basic("alice:wrong")],
            &[&basic("alice:")],
            &[&basic("bob:secret")],
            &[&basic(":")],
            &["Basic !"],
            &[&bearer],
            &[&right, &right],
        ] {
            let refused = entry.who(&head(lines)).await;
            assert!(matches!(refused, Err(Turned::Unauthenticated)), "{lines:?}");
        }
    }

    #[tokio::test]
    async fn a_password_found_right_is_not_hashed_again() {
        let entry = entry();
        entry.who(&head(&[&basic("alice:secret")])).await.unwrap();
        entry.checks.close();
        entry.who(&head(&[&basic("alice:secret")])).await.unwrap();
        assert!(matches!(
            entry.who(&head(&[&basic("alice:wrong")])).await,
            Err(Turned::EntryBusy)
        ));
    }

    #[test]
    fn nobodys_hash_is_one_that_is_checked_in_full() {
        assert!(!bcrypt::verify("x", &entry().nobody).unwrap());
        assert!(entry().nobody.starts_with("$2b$05$"), "as dear as the users' own");
    }
}
