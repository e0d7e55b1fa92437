//! Authorization model: what the registry's responses authorize. Written from the rules in `docs/security.md`, not
//! from the code.

use std::time::{Duration, SystemTime};

use ifnewer::oci::Digest;

use super::registry::RegistryResponse;

pub const GRANT: Duration = Duration::from_secs(300);
pub const OFFLINE_GRANT: Duration = Duration::from_secs(12 * 3600);
/// Longest step back of the clock during an outage.
pub const AHEAD_MAX: Duration = Duration::from_secs(3600);

/// Authorization-relevant facts of a client's request.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    pub shows: &'a str,
    /// The login with which the client fetched its token for this repository; empty for none.
    pub account: &'a str,
    pub site: &'a str,
    pub repository: &'a str,
    /// Received content; `None` for a list.
    pub digest: Option<Digest>,
    /// Number of responses delivered before the request.
    pub before: usize,
    /// Whether the registry was unavailable at any time during the request.
    pub silent: bool,
    pub now: SystemTime,
}

/// Whether the responses authorize the claim.
pub fn entitles(responses: &[RegistryResponse], claim: &Claim<'_>) -> bool {
    let seen = claim.digest.is_none_or(|digest| {
        responses
            .iter()
            .any(|word| word.yes && is_there(word, claim) && word.digest == Some(digest))
    });
    seen && (is_granted(responses, claim)
        || is_public(responses, claim)
        || is_known_by_account(responses, claim))
}

/// Only in an outage, and only with local tokens: the token service accepted the login, and the registry accepted
/// some token of it here.
fn is_known_by_account(responses: &[RegistryResponse], claim: &Claim<'_>) -> bool {
    if claim.account.is_empty() || !claim.silent {
        return false;
    }
    let of_account = |word: &RegistryResponse| word.account == claim.account && is_there(word, claim);
    let at_service = |word: &RegistryResponse| {
        word.to == claim.account && word.site == claim.site && word.repository.is_empty()
    };
    let lately = |word: &&RegistryResponse| is_within_or_ahead(word.at, OFFLINE_GRANT, claim.now);
    effective_grant(responses, claim, of_account).any(|word| word.is_content && lately(&word))
        && effective_grant(responses, claim, at_service).any(|word| lately(&word))
}

fn is_granted(responses: &[RegistryResponse], claim: &Claim<'_>) -> bool {
    let lifetime = if claim.silent { OFFLINE_GRANT } else { GRANT };
    effective_grants(responses, claim, claim.shows).any(|word| {
        // A list counts only if it was served now, content also if it was served lately.
        let counts = word.is_content || (claim.digest.is_none() && word.at == claim.now);
        let is_young = if claim.silent {
            is_within_or_ahead(word.at, lifetime, claim.now)
        } else {
            is_within(word.at, lifetime, claim.now)
        };
        counts && is_young
    })
}

fn is_public(responses: &[RegistryResponse], claim: &Claim<'_>) -> bool {
    effective_grants(responses, claim, "")
        .filter(|word| word.is_content)
        .any(|word| claim.silent || is_within(word.at, OFFLINE_GRANT, claim.now))
}

/// Every success that no denial revoked, where the denial was decided later and delivered before the client's
/// request.
fn effective_grants<'a>(
    responses: &'a [RegistryResponse],
    claim: &'a Claim<'_>,
    to: &'a str,
) -> impl Iterator<Item = &'a RegistryResponse> {
    effective_grant(responses, claim, move |word| {
        word.to == to && is_there(word, claim)
    })
}

fn effective_grant<'a>(
    responses: &'a [RegistryResponse],
    claim: &'a Claim<'_>,
    own: impl Fn(&RegistryResponse) -> bool + 'a,
) -> impl Iterator<Item = &'a RegistryResponse> {
    let noes = responses[..claim.before]
        .iter()
        .filter(|word| own(word) && !word.yes);
    let taken_back = noes.map(|word| word.decided).max();
    responses
        .iter()
        .filter(move |word| own(word) && word.yes && taken_back.is_none_or(|no| word.decided > no))
}

fn is_there(word: &RegistryResponse, claim: &Claim<'_>) -> bool {
    word.site == claim.site && word.repository == claim.repository
}

fn is_within(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    now.duration_since(at).is_ok_and(|age| age < lifetime)
}

/// In an outage a time in the future counts up to an hour, because the clock was set back.
fn is_within_or_ahead(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    match now.duration_since(at) {
        Ok(age) => age < lifetime,
        Err(ahead) => ahead.duration() <= AHEAD_MAX,
    }
}
