//! `WWW-Authenticate`: how a registry wants to be asked (RFC 9110 §11.6.1).
//!
//! Registries send several lines, several challenges in a line, quoted commas, schemes and keys in any case.
//! All are read; a broken challenge is passed over and does not spoil its neighbours. This is for our own use
//! of a challenge: what a client gets is the line as it came, byte for byte.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;
use http_auth::{ChallengeRef, parser::ChallengeParser};

/// Most challenges read from one answer.
pub const CHALLENGES_MAX: usize = 16;
/// Longest line read, in bytes; a longer one is passed over.
pub const CHALLENGE_LINE_BYTES_MAX: usize = 8 * 1024;

/// One way a registry says it can be authenticated to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Challenge {
    /// A token from a token service.
    Bearer {
        /// The URL of the token service; unchecked.
        realm: String,
        /// What the token is for.
        service: Option<String>,
        /// What it must allow, one item per scope.
        scopes: Vec<String>,
        /// Why the credential sent was not enough (`insufficient_scope`, `invalid_token`).
        error: Option<String>,
    },
    /// User name and password.
    Basic {
        /// What they are for; may be empty.
        realm: String,
    },
    /// A scheme that we do not speak, in lower case.
    Other(String),
}

impl Challenge {
    /// All challenges of all lines, in order.
    pub fn read(headers: &HeaderMap) -> Vec<Self> {
        headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter(|line| line.len() <= CHALLENGE_LINE_BYTES_MAX)
            .filter_map(|line| line.to_str().ok())
            .flat_map(|line| split_challenges(line).into_iter().filter_map(read_one))
            .take(CHALLENGES_MAX)
            .collect()
    }
}

fn read_one(text: &str) -> Option<Challenge> {
    // RFC 9110 §11.6.1 allows any number of spaces after the scheme, the parser one.
    if let Some((scheme, rest)) = text.split_once([' ', '\t'])
        && rest.starts_with([' ', '\t'])
    {
        return read_one(&format!("{scheme} {}", rest.trim_start()));
    }
    match ChallengeParser::new(text).next() {
        Some(Ok(challenge)) => understand(&challenge),
        // `Negotiate <token68>`: legal, and unknown to the parser.
        _ => token68_scheme(text).map(|scheme| Challenge::Other(scheme.to_ascii_lowercase())),
    }
}

fn understand(challenge: &ChallengeRef<'_>) -> Option<Challenge> {
    let value = |key: &str| {
        let found = challenge
            .params
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(key));
        found.map(|(_, value)| value.to_unescaped())
    };
    if challenge.scheme.eq_ignore_ascii_case("bearer") {
        Some(Challenge::Bearer {
            realm: value("realm").filter(|realm| !realm.is_empty())?,
            service: value("service"),
            scopes: value("scope")
                .unwrap_or_default()
                .split_ascii_whitespace()
                .map(str::to_owned)
                .collect(),
            error: value("error"),
        })
    } else if challenge.scheme.eq_ignore_ascii_case("basic") {
        Some(Challenge::Basic {
            realm: value("realm").unwrap_or_default(),
        })
    } else {
        Some(Challenge::Other(challenge.scheme.to_ascii_lowercase()))
    }
}

/// Divides a line into its challenges. The comma divides both challenges and parameters; a part begins a
/// challenge when its first word is not followed by `=`.
fn split_challenges(line: &str) -> Vec<&str> {
    let (mut starts, mut in_quotes, mut escaped) = (vec![0], false, false);
    for (at, byte) in line.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_quotes => escaped = true,
            b'"' => in_quotes = !in_quotes,
            b',' if !in_quotes && line.get(at + 1..).is_some_and(begins_challenge) => starts.push(at + 1),
            _ => {}
        }
    }
    let ends = starts.iter().skip(1).map(|next| next - 1).chain([line.len()]);
    let parts = starts
        .iter()
        .zip(ends)
        .filter_map(|(start, end)| line.get(*start..end));
    parts
        .map(|part| part.trim_matches([' ', '\t', ',']))
        .filter(|part| !part.is_empty())
        .collect()
}

fn begins_challenge(part: &str) -> bool {
    let part = part.trim_start();
    let after = part.trim_start_matches(is_token_character);
    after.len() < part.len() && !after.trim_start().starts_with('=')
}

fn token68_scheme(text: &str) -> Option<&str> {
    let (scheme, token) = text.split_once(' ')?;
    let body = token.trim().trim_end_matches('=');
    let is_token68 = |c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c);
    let right = scheme.chars().all(is_token_character) && !body.is_empty() && body.chars().all(is_token68);
    right.then_some(scheme)
}

fn is_token_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests;
