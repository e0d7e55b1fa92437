//! Sections `[access]` and `[[allow]]`: users of the cache, client CAs, and the images that users may pull.

use std::fmt;

use super::diagnostic::{Checked, Report};
use super::document::Document;
use super::files::{self, File};
use super::schema::{self, Access};
use super::setting::Table;
use super::upstreams::ParsedUpstream;
use super::value::{ValueError, invalid};
use super::{PlainHttp, validate};
use crate::policy::rules::ImageMatcher;

/// Default cost of `htpasswd -B`; lower costs protect too little.
const COST_MIN: u32 = 5;

/// Highest accepted cost: higher ones take seconds and would delay other logins.
const COST_MAX: u32 = 14;

/// Client authentication at the cache.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    /// Users with a password; names are unique.
    pub users: Vec<User>,
    /// CAs of client certificates, DER. `users` and this together have at least one entry.
    pub client_roots: Vec<Vec<u8>>,
    /// Allow lists. Without any list, users may pull every image. Otherwise, images in no list are denied.
    pub allows: Vec<Allow>,
}

/// A user of the cache itself.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    /// User name.
    pub name: String,
    /// bcrypt hash of the password.
    pub hash: String,
}

/// Images that some users may pull.
#[derive(Clone, Debug)]
pub struct Allow {
    /// User names; a trailing `*` matches any suffix.
    pub users: Vec<String>,
    /// Images that these users may pull.
    pub images: ImageMatcher,
}

impl Allow {
    /// Whether the list applies to this user.
    pub fn applies_to(&self, user: &str) -> bool {
        self.users.iter().any(|name| match name.strip_suffix('*') {
            Some(beginning) => user.starts_with(beginning),
            None => user == name,
        })
    }
}

/// Omits the hash, which would allow offline guessing.
impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

pub(super) fn read(
    document: &Document<'_>,
    plain_http: Option<PlainHttp>,
    configured: &[ParsedUpstream],
    report: &mut Report<'_>,
) -> Checked<Option<AccessConfig>> {
    let keys = Access::of(document, report);
    let users = users_of(&keys.htpasswd, plain_http, report);
    let client_roots = files::roots(&keys.client_ca, report);
    let lists = document.allows.iter();
    let allows: Vec<_> = lists.map(|table| allow(table, configured, report)).collect();
    let (users, client_roots) = (users?, client_roots?);
    match document.allows.first() {
        _ if !users.is_empty() || !client_roots.is_empty() => Ok(Some(AccessConfig {
            users,
            client_roots,
            allows: allows.into_iter().collect::<Result<_, _>>()?,
        })),
        None => Ok(None),
        Some(first) => {
            let help = "name the file with the users as `htpasswd` in [access], or that with their certificates' CAs \
                        as `client_ca`";
            Err(report.emit(&first.subject(), "[[allow]] without users", help))
        }
    }
}

/// Users of `htpasswd`; empty if it is not set.
fn users_of(field: &File, plain_http: Option<PlainHttp>, report: &mut Report<'_>) -> Checked<Vec<User>> {
    if field.is_set && plain_http == Some(PlainHttp::Any) {
        let message = "with listen.plain_http = \"any\", passwords would cross the network in plain text";
        let help = "set listen.plain_http to \"loopback\" or \"off\"";
        return Err(report.emit(&field.subject, message, help));
    }
    let Some((_, bytes)) = files::read(field, report)? else {
        return Ok(Vec::new());
    };
    users(&bytes).map_err(|error| report.emit(&field.subject, error.message, error.help))
}

fn allow(table: &Table<'_>, configured: &[ParsedUpstream], report: &mut Report<'_>) -> Checked<Allow> {
    let keys = schema::Allow::read(table, report);
    let users: Vec<String> = keys.users.get()?.values();
    let images = keys.images.get()?.0;
    let without = |is_empty: bool, subject| is_empty.then_some(subject);
    let users_missing = without(users.is_empty(), &keys.users.subject);
    let empty = users_missing.or(without(images.is_empty(), &keys.images.subject));
    if let Some(empty) = empty {
        let message = format!("an allow list without `{}` has no effect", empty.name());
        return Err(report.emit(empty, message, ""));
    }
    for (subject, glob) in &images {
        if glob.has_tag() {
            let message = "an allow list applies to repositories, not to tags, because layers have no tag";
            return Err(report.emit(subject, message, "remove the `:` and the tag"));
        }
        if let Some(upstream) = glob.upstream() {
            validate::find(upstream, subject, configured, report)?;
        }
    }
    let globs: Vec<_> = images.into_iter().map(|(_, glob)| glob).collect();
    match ImageMatcher::new(&globs) {
        Ok(images) => Ok(Allow { users, images }),
        Err(error) => Err(report.emit(&keys.images.subject, error.to_string(), "")),
    }
}

/// Parses `name:hash` lines; ignores empty lines and `#` comments. Errors never quote a hash.
fn users(bytes: &[u8]) -> Result<Vec<User>, ValueError> {
    const MAKE: &str = "create the file with: htpasswd -B -c FILE USER";
    let text = std::str::from_utf8(bytes).map_err(|_| ValueError::new("the file is not text", MAKE))?;
    let mut users: Vec<User> = Vec::new();
    for (line, number) in text.lines().map(str::trim).zip(1..) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, hash)) = line.split_once(':').filter(|(name, _)| !name.is_empty()) else {
            return invalid(format!("line {number} is not a name, a colon and a hash"), MAKE);
        };
        if users.iter().any(|user| user.name == name) {
            let message = format!("line {number}: `{name}` is listed twice");
            return invalid(message, "keep one of the lines");
        }
        let Some(cost) = cost(hash) else {
            let message = format!("line {number}: the hash of `{name}` is not a bcrypt hash");
            return invalid(
                message,
                "only bcrypt is supported, as created by: htpasswd -B FILE USER",
            );
        };
        if !(COST_MIN..=COST_MAX).contains(&cost) {
            let range = format!("outside of {COST_MIN} to {COST_MAX}");
            let message = format!("line {number}: the hash of `{name}` has cost {cost}, {range}");
            return invalid(message, "recreate it with: htpasswd -B -C 10 FILE USER");
        }
        users.push(User {
            name: name.to_owned(),
            hash: hash.to_owned(),
        });
    }
    if users.is_empty() {
        return invalid("the file has no users", MAKE);
    }
    Ok(users)
}

/// Cost of a bcrypt hash: `$2b$10$` and 53 characters.
fn cost(hash: &str) -> Option<u32> {
    let rest = ["$2a$", "$2b$", "$2y$"]
        .iter()
        .find_map(|prefix| hash.strip_prefix(prefix))?;
    let (cost, rest) = rest.split_once('$')?;
    let is_legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/');
    (cost.len() == 2 && rest.len() == 53 && rest.chars().all(is_legal)).then(|| cost.parse().ok())?
}
