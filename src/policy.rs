//! The decision: what to do with a request, given everything that is known. Pure; the product's heart.
//!
//! [`decide`] is called at most three times for one request. Before asking, it may say [`Verdict::Ask`]; the road then
//! sends one `HEAD` **with the client's own credential** and calls it again with what was [`Heard`]. That `HEAD` is
//! both the freshness check and the authorisation check, which is how a held copy never becomes a way around a private
//! registry's authentication. Should what followed fail, a fetch or a [`Verdict::Check`], it is called once more with
//! [`Heard::Undelivered`].
//!
//! There is no clock, no I/O and no handle here: a [`Situation`] can be printed, kept in a failing test, or shown by
//! the admin API, and always yields the same [`Verdict`]. `policy/tests.rs` enumerates every situation against laws of
//! safety (what may never be served) and of economy (what may never be asked or fetched).

pub mod authz;
pub mod rules;
mod verdict;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

pub use verdict::{Refusal, Served, Verdict, Why};

use crate::age;
use crate::oci::{Cause, Digest};

/// Decides what to do. Total: every situation has a verdict.
pub fn decide(situation: &Situation) -> Verdict {
    let s = &situation.heeding_doubt();
    match s.heard {
        Heard::Nothing => before_asking(s),
        Heard::Named { digest, holding } => named(s, digest, holding),
        Heard::Unnamed => unnamed(s),
        Heard::Absent => absent(s),
        Heard::Refused(Whose::Client) => Verdict::Refuse(Refusal::Forbidden),
        Heard::Refused(Whose::Proxy) => own_credential_refused(s),
        Heard::Silent(cause) => silent(s, cause, Served::Stale(cause)),
        Heard::Undelivered(cause) => silent(s, cause, Served::NewUnavailable(cause)),
    }
}

/// Everything the decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// The policy of the rule that matched.
    pub policy: Policy,
    /// What is asked for.
    pub subject: Subject,
    /// The copy that could be served, if there is one.
    pub held: Option<Held>,
    /// What the upstream has shown about this principal's right to read.
    pub standing: Standing,
    /// What the upstream said to the question, once it was put.
    pub heard: Heard,
    /// What to do when the upstream says that the tag is gone.
    pub absent: Absence,
    /// For how long after a confirmation a tag is served without asking.
    pub fresh: Duration,
    /// For how long after a confirmation a tag is served while the upstream is silent; `None`: forever.
    pub stale: Option<Duration>,
    /// The time of the request.
    pub now: SystemTime,
}

impl Situation {
    /// The same situation after something was heard.
    #[must_use]
    pub fn having_heard(self, heard: Heard) -> Self {
        Self { heard, ..self }
    }

    /// A tag that a write may have changed is judged as under `if-newer`, and is fresh for nobody. Only `never`, which asks
    /// nobody, stays what it is.
    fn heeding_doubt(self) -> Self {
        if self.subject != Subject::Tag || !self.is_in_doubt() {
            return self;
        }
        let policy = match self.policy {
            Policy::IfNotPresent => Policy::IfNewer,
            policy @ (Policy::Always | Policy::IfNewer | Policy::Never) => policy,
        };
        Self {
            policy,
            fresh: Duration::ZERO,
            ..self
        }
    }

    fn is_in_doubt(&self) -> bool {
        self.held.is_some_and(|held| held.is_in_doubt)
    }

    /// Whether the copy of a tag may be served without asking. A copy that was confirmed in the future is none: asking
    /// costs one question.
    fn is_fresh(&self, held: Held) -> bool {
        !held.is_moved && age::is_within(held.confirmed_at, self.fresh, self.now)
    }

    /// What counts of the rest. By digest nothing better exists than what is cached, and its reader asks for the parts it
    /// wants: clients read manifests and configs of every platform, and layers of one. Completeness is a rule for tags.
    fn rest(&self, held: Held) -> Rest {
        match self.subject {
            Subject::Tag => held.rest,
            Subject::Manifest | Subject::Blob => Rest::Held,
        }
    }
}

/// The pull policies, in the words of GitLab Runner and Kubernetes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Nothing is served that the upstream has not confirmed now.
    Always,
    /// The upstream is asked; the held copy is served when it is unchanged or the upstream is silent.
    #[default]
    IfNewer,
    /// What is held is served without asking for a newer one.
    IfNotPresent,
    /// Only what is held; the upstream is never contacted.
    Never,
}

impl Policy {
    /// Every policy, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Always, Self::IfNewer, Self::IfNotPresent, Self::Never];

    /// The name as written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::IfNewer => "if-newer",
            Self::IfNotPresent => "if-not-present",
            Self::Never => "never",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.name() == word)
            .ok_or(UnknownWord)
    }
}

/// What to do with a held tag that the upstream says does not exist (404).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Absence {
    /// A tag deleted upstream is gone here too.
    #[default]
    Refuse,
    /// Keep serving it to those who have had the right to read it: an archive.
    Serve,
}

impl Absence {
    /// Both choices.
    pub const ALL: [Self; 2] = [Self::Refuse, Self::Serve];

    /// The name as written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Serve => "serve",
        }
    }
}

impl FromStr for Absence {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        Self::ALL
            .into_iter()
            .find(|absence| absence.name() == word)
            .ok_or(UnknownWord)
    }
}

/// A word that is none of the choices. The configuration reader adds where it stands and what the choices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not one of the choices")]
pub struct UnknownWord;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A manifest by tag: the only thing that can be stale.
    Tag,
    /// A manifest by digest: immutable.
    Manifest,
    /// A blob: immutable, and its download is shared.
    Blob,
}

/// A copy in the store, verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// What the copy is.
    pub digest: Digest,
    /// When the upstream last said that the tag names this digest. Without meaning for what is asked by digest.
    pub confirmed_at: SystemTime,
    /// Whether the tag was seen to name another digest since, in a response to any client.
    pub is_moved: bool,
    /// What the manifest points to. A blob points to nothing.
    pub rest: Rest,
    /// Whether a write that was handed on may have changed it upstream, and the upstream has not been asked since.
    pub is_in_doubt: bool,
}

impl Held {
    /// Whether there is a whole image to serve, should this digest's own image turn out not to be had.
    fn has_other_whole(&self, digest: Digest) -> bool {
        match self.rest {
            Rest::Held => self.digest != digest,
            Rest::Missing { earlier } => earlier.is_some(),
        }
    }
}

/// The rest of a held manifest's image: config, layers, manifests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Held, or arriving now: the image can be pulled whole without another word of the upstream.
    Held,
    /// Some of it must still be fetched. A client given such a manifest while the upstream is silent fails halfway,
    /// with no way back for most (`docs` of podman, kaniko): better no manifest than half an image.
    Missing {
        /// When the upstream last confirmed the newest whole image that the tag named before, if one is held.
        earlier: Option<SystemTime>,
    },
}

/// A principal's right to read, as far as the upstream has shown it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Standing {
    /// Never shown, or withdrawn, or too long ago even for an outage.
    Unknown,
    /// Shown before, but longer ago than a grant lives: good only while the upstream is silent.
    Lapsed,
    /// Shown recently enough to serve without asking.
    Vouched,
}

/// What the upstream answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing was asked yet.
    Nothing,
    /// 2xx, and the digest that the reference names now.
    Named {
        /// The digest named.
        digest: Digest,
        /// How much of it is in the store.
        holding: Holding,
    },
    /// 2xx, but without a digest that can be verified.
    Unnamed,
    /// 404: there is no such thing.
    Absent,
    /// 401 or 403 to this credential.
    Refused(Whose),
    /// No usable answer. Never a refusal and never an absence.
    Silent(Cause),
    /// It named something new, but the fetch of it failed.
    Undelivered(Cause),
}

/// How much of an image is in the store, the upstream having been seen to have it in this repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holding {
    /// Not even the manifest.
    Nothing,
    /// The manifest.
    Manifest,
    /// The manifest and all that it points to, or that much of it arriving.
    Whole,
}

/// Whose credential the upstream refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Whose {
    /// The client's: it may not read.
    Client,
    /// The proxy's own: the operator has something to mend, the client has done nothing wrong.
    Proxy,
}

#[expect(
    clippy::match_same_arms,
    reason = "a table: rows that agree are still rows of their own"
)]
fn before_asking(s: &Situation) -> Verdict {
    // Before the look at what is held: a refusal must not tell a stranger of it.
    if s.policy == Policy::Never && s.standing == Standing::Unknown {
        return Verdict::Refuse(Refusal::NotVouched);
    }
    let Some(held) = s.held else {
        return match s.policy {
            Policy::Never => Verdict::Refuse(Refusal::NotHeld),
            Policy::Always | Policy::IfNewer | Policy::IfNotPresent => Verdict::Fetch(Why::NotHeld),
        };
    };
    match (s.policy, s.standing, s.subject) {
        (Policy::Never, _, _) => match s.rest(held) {
            Rest::Held => Verdict::Serve(Served::Unasked),
            Rest::Missing { earlier: Some(_) } => Verdict::Serve(Served::LastComplete(None)),
            Rest::Missing { earlier: None } => Verdict::Refuse(Refusal::NotHeld),
        },
        (_, Standing::Unknown | Standing::Lapsed, _) => Verdict::Ask,
        // Of use only if the upstream has the rest, so it must be there to be asked.
        (_, Standing::Vouched, _) if s.rest(held) != Rest::Held => Verdict::Ask,
        (_, Standing::Vouched, Subject::Manifest | Subject::Blob) if held.is_in_doubt => Verdict::Ask,
        (_, Standing::Vouched, Subject::Manifest | Subject::Blob) => Verdict::Serve(Served::Immutable),
        (Policy::IfNotPresent, Standing::Vouched, Subject::Tag) => Verdict::Serve(Served::Unasked),
        (Policy::IfNewer, Standing::Vouched, Subject::Tag) if s.is_fresh(held) => {
            Verdict::Serve(Served::Fresh)
        }
        (Policy::Always | Policy::IfNewer, Standing::Vouched, Subject::Tag) => Verdict::Ask,
    }
}

/// A 2xx with a digest: this principal may read, so standing plays no part any more.
fn named(s: &Situation, digest: Digest, holding: Holding) -> Verdict {
    match (s.subject, s.held) {
        (Subject::Manifest | Subject::Blob, Some(_)) => Verdict::Serve(Served::Immutable),
        (Subject::Tag, Some(held)) if held.digest == digest => {
            serve_or_check(held, digest, Served::Unchanged)
        }
        // It was asked for the right to read, or for the rest, not for something newer.
        (Subject::Tag, Some(held)) if s.policy == Policy::IfNotPresent => {
            serve_or_check(held, held.digest, Served::Unasked)
        }
        (Subject::Tag, Some(held)) => match holding {
            Holding::Whole => Verdict::Serve(Served::Moved),
            Holding::Manifest => serve_or_check(held, digest, Served::Moved),
            Holding::Nothing => Verdict::Fetch(Why::Newer),
        },
        (Subject::Tag, None) if holding != Holding::Nothing => Verdict::Serve(Served::Moved),
        (_, None) => Verdict::Fetch(Why::NotHeld),
    }
}

/// A manifest without its rest is checked where something better could be served instead; where not, the upstream that
/// has just answered is taken to have the rest.
fn serve_or_check(held: Held, digest: Digest, served: Served) -> Verdict {
    if held.has_other_whole(digest) {
        Verdict::Check(served)
    } else {
        Verdict::Serve(served)
    }
}

fn unnamed(s: &Situation) -> Verdict {
    match (s.subject, s.held) {
        (Subject::Manifest | Subject::Blob, Some(_)) => Verdict::Serve(Served::Immutable),
        (Subject::Tag, Some(held)) if s.policy == Policy::IfNotPresent => {
            serve_or_check(held, held.digest, Served::Unasked)
        }
        (_, _) => Verdict::Fetch(Why::Unnamed),
    }
}

/// Some registries answer 404 where they mean 403, so a 404 never helps a principal that was not vouched for before.
fn absent(s: &Situation) -> Verdict {
    let keep = s.absent == Absence::Serve && s.standing != Standing::Unknown && s.policy != Policy::Always;
    match s.held {
        Some(held) if keep => Verdict::Serve(match s.rest(held) {
            Rest::Missing { earlier: Some(_) } => Served::LastComplete(None),
            Rest::Held | Rest::Missing { earlier: None } => Served::KeptAbsent,
        }),
        _ => Verdict::Refuse(Refusal::Absent),
    }
}

/// The operator's mistake must not stop the builds of those who are entitled anyway.
fn own_credential_refused(s: &Situation) -> Verdict {
    match silent(s, Cause::Status(403), Served::CredentialRefused) {
        serve @ Verdict::Serve(_) => serve,
        _ => Verdict::Refuse(Refusal::Forbidden),
    }
}

/// The upstream gave no usable answer: the held copy, for those entitled, within `stale`.
fn silent(s: &Situation, cause: Cause, served: Served) -> Verdict {
    let Some(held) = s.held else {
        return Verdict::Refuse(Refusal::Silent(cause));
    };
    if s.policy == Policy::Always || s.standing == Standing::Unknown {
        return Verdict::Refuse(Refusal::Silent(cause));
    }
    let (confirmed_at, served) = match s.rest(held) {
        Rest::Held => (held.confirmed_at, served),
        Rest::Missing { earlier: Some(at) } => (at, Served::LastComplete(Some(cause))),
        // Who limits the rate of questions still gives the bytes: the Hub counts manifests alone.
        Rest::Missing { earlier: None } if cause == Cause::RateLimited => (held.confirmed_at, served),
        Rest::Missing { earlier: None } => return Verdict::Refuse(Refusal::Incomplete(cause)),
    };
    match s.subject {
        Subject::Manifest | Subject::Blob => Verdict::Serve(Served::PastGrant(cause)),
        Subject::Tag => match s.stale {
            Some(limit) if !age::is_within_or_ahead(confirmed_at, limit, s.now) => {
                Verdict::Refuse(Refusal::TooStale(cause))
            }
            _ => Verdict::Serve(served),
        },
    }
}
