//! `WWW-Authenticate` challenge parser (RFC 9110 §11.6.1).
//!
//! Registries send several lines, several challenges per line, quoted commas, and schemes and keys in any case.
//! All are read. A malformed challenge is skipped without affecting its neighbours. The parsed form is for the
//! cache's own requests; clients get the original line, byte for byte.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;
use http_auth::{ChallengeRef, parser::ChallengeParser};

/// Most challenges read from one response.
pub const CHALLENGES_MAX: usize = 16;
/// Longest line read, in bytes. Longer lines are skipped.
pub const CHALLENGE_LINE_BYTES_MAX: usize = 8 * 1024;

/// One authentication challenge of a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Challenge {
    /// Token from a token service.
    Bearer {
        /// URL of the token service, unvalidated.
        realm: String,
        /// Service that the token is for.
        service: Option<String>,
        /// Scopes that the token must grant, one item each.
        scopes: Vec<String>,
        /// Why the sent credential was insufficient (`insufficient_scope`, `invalid_token`).
        error: Option<String>,
    },
    /// User name and password.
    Basic {
        /// Protection space; may be empty.
        realm: String,
    },
    /// An unsupported scheme, in lower case.
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
    // RFC 9110 §11.6.1 allows any number of spaces after the scheme, the parser only one.
    if let Some((scheme, rest)) = text.split_once([' ', '\t'])
        && rest.starts_with([' ', '\t'])
    {
        return read_one(&format!("{scheme} {}", rest.trim_start()));
    }
    match ChallengeParser::new(text).next() {
        Some(Ok(challenge)) => parse_challenge(&challenge),
        // `Negotiate <token68>` is valid, but the parser does not support it.
        _ => token68_scheme(text).map(|scheme| Challenge::Other(scheme.to_ascii_lowercase())),
    }
}

fn parse_challenge(challenge: &ChallengeRef<'_>) -> Option<Challenge> {
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

/// Splits a line into its challenges. Commas separate both challenges and parameters. A part begins a new
/// challenge if its first word is not followed by `=`.
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
    let is_valid = scheme.chars().all(is_token_character) && !body.is_empty() && body.chars().all(is_token68);
    is_valid.then_some(scheme)
}

fn is_token_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests;
