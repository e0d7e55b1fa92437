//! What the registry's words entitle a client to. Written from the rules in `docs/security.md`, not from the code.

use std::time::{Duration, SystemTime};

use ifnewer::oci::Digest;

use super::registry::Word;

pub const GRANT: Duration = Duration::from_secs(300);
pub const OFFLINE_GRANT: Duration = Duration::from_secs(12 * 3600);

/// What a client asked for, as far as rights go.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    pub shows: &'a str,
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
    seen && (is_granted(words, claim) || is_public(words, claim))
}

fn is_granted(words: &[Word], claim: &Claim<'_>) -> bool {
    let lifetime = if claim.silent { OFFLINE_GRANT } else { GRANT };
    standing_yeses(words, claim, claim.shows).any(|word| {
        // A list was shown now, or a right to content was shown lately.
        let counts = word.is_content || (claim.digest.is_none() && word.at == claim.now);
        counts && is_within(word.at, lifetime, claim.now)
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
    let own = move |word: &&Word| word.to == to && is_there(word, claim);
    let noes = words[..claim.before].iter().filter(own).filter(|word| !word.yes);
    let taken_back = noes.map(|word| word.decided).max();
    words
        .iter()
        .filter(own)
        .filter(move |word| word.yes && taken_back.is_none_or(|no| word.decided > no))
}

fn is_there(word: &Word, claim: &Claim<'_>) -> bool {
    word.site == claim.site && word.repository == claim.repository
}

fn is_within(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    now.duration_since(at).is_ok_and(|age| age < lifetime)
}
