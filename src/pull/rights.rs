//! What the upstream's answers show of who may read: a yes is a grant, a no ends it, anything else says nothing.
//!
//! Only a yes to a manifest or a blob counts, and only one that is proven (`upstream/proof.rs`). Many registries show their lists to those who may not pull, and answer
//! a question about referrers with an empty list whoever asks.
//!
//! Answers overtake each other. A yes to a question that was put before a no was heard is the older word, however late
//! it comes, and brings no right back.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::fetching::Wanted;
use super::{Pull, Site};
use crate::age;
use crate::oci::{Operation, Repository};
use crate::upstream::{Answer, Credential, Said};

/// How much older than now a kept grant or public mark may be before it is written again: a busy tag must not mean a
/// write per pull.
const RENEW_AFTER: Duration = Duration::from_secs(60);

/// How often at most a public repository is doubted because somebody with a credential was refused there. A wrong
/// password is refused too.
const DOUBT_AFTER: Duration = Duration::from_secs(60);

/// How often at most a repository that is read by tokens is asked for as by everybody.
const TRY_AFTER: Duration = Duration::from_secs(3600);

/// Refusals remembered, for answers that were overtaken.
const REFUSED_MAX: usize = 16_384;

type Place = (Arc<str>, Repository);
/// Without a repository: to get a token.
type Right = (Arc<str>, Option<Repository>, [u8; 32]);

/// Whom the upstream refused where, and when it was heard.
pub(super) struct Refused {
    last: Cache<Right, Instant>,
    doubted: Cache<Place, Instant>,
    tried: Cache<Place, Instant>,
    /// A look at `last` and the note that follows from it are one step. Whoever is refused after another waits here until
    /// that the right ended is on the disk.
    grants: Mutex<()>,
    /// The same for public marks.
    publics: Mutex<()>,
}

impl Default for Refused {
    fn default() -> Self {
        Self {
            last: Cache::new(REFUSED_MAX),
            doubted: Cache::new(REFUSED_MAX),
            tried: Cache::new(REFUSED_MAX),
            grants: Mutex::default(),
            publics: Mutex::default(),
        }
    }
}

impl Pull {
    /// Keeps what an answer shows of the caller's right. `asked_at` is when the question was put.
    pub(super) async fn learn(self: &Arc<Self>, wanted: &Wanted, answer: &Answer, asked_at: Instant) {
        match answer.said {
            Said::Is(_) => self.learn_yes(wanted, asked_at).await,
            Said::Forbidden => self.learn_no(wanted, answer).await,
            Said::Unproven(_) | Said::Unnamed | Said::Absent | Said::Silent(_) | Said::Other(_) => {}
        }
    }

    /// The upstream said yes to this caller in this repository: by the registry's own marks, or by bytes that were
    /// verified. Never because of a status alone.
    pub(super) async fn learn_yes(self: &Arc<Self>, wanted: &Wanted, asked_at: Instant) {
        if !matches!(
            wanted.operation,
            Operation::Manifest { .. } | Operation::Blob { .. }
        ) {
            return;
        }
        let Wanted {
            site,
            repository,
            caller,
            ..
        } = wanted;
        let now = self.clock.now();
        if is_anonymous(wanted) {
            if outdated(self.store.public_since(site.name(), repository), now) {
                let _order = self.refused.publics.lock().await;
                if !self.overtaken(&self.right_of_all(site, repository), asked_at) {
                    self.note_public(site, repository, Some(now)).await;
                }
            }
        } else {
            let account = self.account(site, repository, wanted.shown());
            for principal in [Some(caller.principal), account].into_iter().flatten() {
                if outdated(self.store.grant(site.name(), repository, &principal), now) {
                    let _order = self.refused.grants.lock().await;
                    if !self.overtaken(&right(site, Some(repository), principal), asked_at) {
                        self.store.note_grant(site.name(), repository, &principal, now);
                    }
                }
            }
        }
        if is_token(wanted) && !site.is_shared() && self.store.public_since(site.name(), repository).is_none()
        {
            self.ask_as_everybody(wanted, &self.refused.tried, TRY_AFTER);
        }
    }

    async fn learn_no(self: &Arc<Self>, wanted: &Wanted, answer: &Answer) {
        let Wanted {
            site,
            repository,
            caller,
            ..
        } = wanted;
        let is_public = || self.store.public_since(site.name(), repository).is_some();
        if is_anonymous(wanted) {
            self.keep_challenge(site, repository, answer).await;
            let _order = self.refused.publics.lock().await;
            let right = self.right_of_all(site, repository);
            self.refused.last.insert(right, Instant::now());
            if is_public() {
                self.note_public(site, repository, None).await;
            }
            return;
        }
        let account = self.account(site, repository, wanted.shown());
        for principal in [Some(caller.principal), account].into_iter().flatten() {
            self.drop_right(site, Some(repository), principal).await;
        }
        if !site.is_shared() && is_public() {
            self.ask_as_everybody(wanted, &self.refused.doubted, DOUBT_AFTER);
        }
    }

    /// Asks the same without a credential, in the background, unless it was done since `after`.
    ///
    /// After a refusal: a repository that was closed refuses those with a credential first, and what everyone could read
    /// there must not stay readable because nobody asks as everyone. After a yes to a token: clients get a new one for
    /// every pull, also those without a login, so no grant of theirs outlasts it; what is public must be known to be.
    fn ask_as_everybody(self: &Arc<Self>, wanted: &Wanted, asked: &Cache<Place, Instant>, after: Duration) {
        let place = (Arc::from(wanted.site.name()), wanted.repository.clone());
        let now = Instant::now();
        let lately = |at: Instant| now.saturating_duration_since(at) < after;
        if asked.get(&place).is_some_and(lately) {
            return;
        }
        asked.insert(place, now);
        let caller = self.principals.stranger(&wanted.caller.trace);
        let wanted = Wanted {
            caller,
            ..wanted.clone()
        };
        // The question goes on by itself, and its answer is learnt from.
        let (pull, asked) = (Arc::clone(self), self.question(&wanted));
        tokio::spawn(async move {
            let answer = asked.landed().await;
            let is_unproven = answer.is_some_and(|answer| matches!(answer.said, Said::Unproven(_)));
            if is_unproven && matches!(wanted.operation, Operation::Manifest { .. }) {
                // Only the bytes can prove it.
                let _ = pull.fetch_manifest(wanted).await;
            }
        });
    }

    /// The token service gave this account a token.
    pub(super) async fn learn_yes_login(&self, site: &Arc<Site>, account: [u8; 32], asked_at: Instant) {
        let now = self.clock.now();
        if outdated(self.store.login(site.name(), &account), now) {
            let _order = self.refused.grants.lock().await;
            if !self.overtaken(&right(site, None, account), asked_at) {
                self.store.note_login(site.name(), &account, now);
            }
        }
    }

    /// The token service refused this account. Its grants are worth nothing without it.
    pub(super) async fn learn_no_login(&self, site: &Arc<Site>, account: [u8; 32]) {
        self.drop_right(site, None, account).await;
    }

    /// On the disk before the client hears of its refusal.
    async fn drop_right(&self, site: &Arc<Site>, repository: Option<&Repository>, principal: [u8; 32]) {
        let _order = self.refused.grants.lock().await;
        self.refused
            .last
            .insert(right(site, repository, principal), Instant::now());
        let (store, site, repository) = (Arc::clone(&self.store), Arc::clone(site), repository.cloned());
        let dropped = spawn_blocking(move || match &repository {
            Some(repository) => store.drop_grant(site.name(), repository, &principal),
            None => store.drop_login(site.name(), &principal),
        });
        if !matches!(dropped.await, Ok(true)) {
            tracing::error!("a right was taken back, and a crash soon after might bring it back");
        }
    }

    /// Whether the upstream has refused this caller in this repository since `at`.
    pub(super) fn refused_since(&self, wanted: &Wanted, at: Instant) -> bool {
        self.denied_at(wanted).is_some_and(|denied| denied >= at)
    }

    /// When the upstream last denied this caller this repository.
    pub(super) fn denied_at(&self, wanted: &Wanted) -> Option<Instant> {
        let (site, repository) = (&wanted.site, &wanted.repository);
        let right = if is_anonymous(wanted) {
            self.right_of_all(site, repository)
        } else {
            right(site, Some(repository), wanted.caller.principal)
        };
        self.refused.last.get(&right)
    }

    /// The right of whoever has no credential. The cache asks without one also in its own name (`shared`), and a reload
    /// may come between that and a client's question.
    fn right_of_all(&self, site: &Site, repository: &Repository) -> Right {
        right(site, Some(repository), self.principals.anonymous())
    }

    /// Whether a no was heard since the question was put.
    fn overtaken(&self, right: &Right, asked_at: Instant) -> bool {
        let last = self.refused.last.get(right);
        last.is_some_and(|heard| heard >= asked_at)
    }

    async fn note_public(&self, site: &Arc<Site>, repository: &Repository, since: Option<SystemTime>) {
        let (store, site, repository) = (Arc::clone(&self.store), Arc::clone(site), repository.clone());
        let noted = spawn_blocking(move || store.note_public(site.name(), &repository, since)).await;
        super::asking::report(noted, "keep whether a repository is public");
    }
}

fn right(site: &Site, repository: Option<&Repository>, principal: [u8; 32]) -> Right {
    (site.name().into(), repository.cloned(), principal)
}

/// A moment in the future, from before the clock was set back, is written anew too.
fn outdated(at: Option<SystemTime>, now: SystemTime) -> bool {
    !at.is_some_and(|at| age::is_within(at, RENEW_AFTER, now))
}

/// RFC 6750: what a token service gives, for minutes. Other credentials are the same at the next pull.
fn is_token(wanted: &Wanted) -> bool {
    let scheme = wanted
        .shown()
        .and_then(|shown| shown.as_bytes().split(|byte| *byte == b' ').next());
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"Bearer"))
}

fn is_anonymous(wanted: &Wanted) -> bool {
    matches!(wanted.caller.credential, Credential::Anonymous)
}
