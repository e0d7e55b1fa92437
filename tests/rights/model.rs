//! What the registry's words entitle a client to. Written from the rules in `docs/security.md`, not from the code.

use std::time::{Duration, SystemTime};

use ifnewer::oci::Digest;

use super::registry::Word;

pub const GRANT: Duration = Duration::from_secs(300);
pub const OFFLINE_GRANT: Duration = Duration::from_secs(12 * 3600);
/// How far the clock may be set back in an outage.
pub const AHEAD_MAX: Duration = Duration::from_secs(3600);

/// What a client asked for, as far as rights go.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    pub shows: &'a str,
    /// The credential for which it fetched what it shows just before, for this repository; empty for none.
    pub account: &'a str,
    pub site: &'a str,
    pub repository: &'a str,
    /// The content it got; `None` for a list.
    pub digest: Option<Digest>,
    /// How many words had been said, and heard, before it asked.
    pub before: usize,
    /// Whether the registry was silent at any time while it asked.
    pub silent: bool,
    pub now: SystemTime,
}

/// Whether the words allow it.
pub fn entitles(words: &[Word], claim: &Claim<'_>) -> bool {
    let seen = claim.digest.is_none_or(|digest| {
        words
            .iter()
            .any(|word| word.yes && is_there(word, claim) && word.digest == Some(digest))
    });
    seen && (is_granted(words, claim) || is_public(words, claim) || is_known_by_account(words, claim))
}

/// Only in an outage, and only where tokens of ours are given: the token service took the credential, and the registry let
/// some token of it read here.
fn is_known_by_account(words: &[Word], claim: &Claim<'_>) -> bool {
    if claim.account.is_empty() || !claim.silent {
        return false;
    }
    let of_account = |word: &Word| word.account == claim.account && is_there(word, claim);
    let at_service =
        |word: &Word| word.to == claim.account && word.site == claim.site && word.repository.is_empty();
    let lately = |word: &&Word| is_within_or_ahead(word.at, OFFLINE_GRANT, claim.now);
    standing(words, claim, of_account).any(|word| word.is_content && lately(&word))
        && standing(words, claim, at_service).any(|word| lately(&word))
}

fn is_granted(words: &[Word], claim: &Claim<'_>) -> bool {
    let lifetime = if claim.silent { OFFLINE_GRANT } else { GRANT };
    standing_yeses(words, claim, claim.shows).any(|word| {
        // A list was shown now, or a right to content was shown lately.
        let counts = word.is_content || (claim.digest.is_none() && word.at == claim.now);
        let is_young = if claim.silent {
            is_within_or_ahead(word.at, lifetime, claim.now)
        } else {
            is_within(word.at, lifetime, claim.now)
        };
        counts && is_young
    })
}

fn is_public(words: &[Word], claim: &Claim<'_>) -> bool {
    standing_yeses(words, claim, "")
        .filter(|word| word.is_content)
        .any(|word| claim.silent || is_within(word.at, OFFLINE_GRANT, claim.now))
}

/// Every yes that no no took back which was decided later and heard before the client asked.
fn standing_yeses<'a>(
    words: &'a [Word],
    claim: &'a Claim<'_>,
    to: &'a str,
) -> impl Iterator<Item = &'a Word> {
    standing(words, claim, move |word| word.to == to && is_there(word, claim))
}

fn standing<'a>(
    words: &'a [Word],
    claim: &'a Claim<'_>,
    own: impl Fn(&Word) -> bool + 'a,
) -> impl Iterator<Item = &'a Word> {
    let noes = words[..claim.before].iter().filter(|word| own(word) && !word.yes);
    let taken_back = noes.map(|word| word.decided).max();
    words
        .iter()
        .filter(move |word| own(word) && word.yes && taken_back.is_none_or(|no| word.decided > no))
}

fn is_there(word: &Word, claim: &Claim<'_>) -> bool {
    word.site == claim.site && word.repository == claim.repository
}

fn is_within(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    now.duration_since(at).is_ok_and(|age| age < lifetime)
}

/// In an outage the time before a clock was set back counts, up to an hour.
fn is_within_or_ahead(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    match now.duration_since(at) {
        Ok(age) => age < lifetime,
        Err(ahead) => ahead.duration() <= AHEAD_MAX,
    }
}
