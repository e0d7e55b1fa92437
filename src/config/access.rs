//! Sections `[access]` and `[[allow]]`: users of the cache, client CAs, and the images that users may pull.

use std::fmt;

use super::PlainHttp;
use super::diagnostic::{Report, Reported};
use super::document::Document;
use super::files::{read_file, roots};
use super::schema::Section;
use super::table::Table;
use super::upstream::ParsedUpstream;
use super::{parsers, validate};
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
    document: &Document,
    plain_http: Option<PlainHttp>,
    configured: &[ParsedUpstream],
    report: &mut Report<'_>,
) -> Result<Option<AccessConfig>, Reported> {
    let table = document.fixed(Section::Access);
    let users = users_of(&table, plain_http, report);
    let client_roots = roots(&table, "client_ca", report);
    let allows: Vec<_> = document
        .allows
        .iter()
        .map(|table| allow(table, configured, report))
        .collect();
    let (users, client_roots) = (users?, client_roots?);
    if users.is_empty() && client_roots.is_empty() {
        if let Some(first) = document.allows.first() {
            let help = "name the file with the users as `htpasswd` in [access], or that with their certificates' CAs as \
                        `client_ca`";
            return Err(report.emit(
                &first.at,
                "allow",
                "[[allow]] without users",
                Some(help.to_owned()),
            ));
        }
        return Ok(None);
    }
    Ok(Some(AccessConfig {
        users,
        client_roots,
        allows: allows.into_iter().collect::<Result<_, Reported>>()?,
    }))
}

/// Users of `htpasswd`; empty if it is not set.
fn users_of(
    table: &Table,
    plain_http: Option<PlainHttp>,
    report: &mut Report<'_>,
) -> Result<Vec<User>, Reported> {
    let Some(file) = table.text_if_set(report, "htpasswd", &parsers::PATH)? else {
        return Ok(Vec::new());
    };
    if plain_http == Some(PlainHttp::Any) {
        let message = "with listen.plain_http = \"any\", passwords would cross the network in plain text";
        let help = "set listen.plain_http to \"loopback\" or \"off\"".to_owned();
        return Err(report.emit(table.at("htpasswd"), table.path("htpasswd"), message, Some(help)));
    }
    let bytes = read_file(table, "htpasswd", &file, report)?;
    users(&bytes).map_err(|(message, help)| {
        report.emit(
            table.at("htpasswd"),
            table.path("htpasswd"),
            message,
            Some(help.to_owned()),
        )
    })
}

fn allow(table: &Table, configured: &[ParsedUpstream], report: &mut Report<'_>) -> Result<Allow, Reported> {
    let users = table
        .list_if_set(report, "users", &parsers::USER, true)?
        .unwrap_or_default();
    let images = table
        .list_if_set(report, "images", &parsers::PATTERN, true)?
        .unwrap_or_default();
    for (key, is_empty) in [("users", users.is_empty()), ("images", images.is_empty())] {
        if is_empty {
            let message = format!("an allow list without `{key}` has no effect");
            return Err(report.emit(table.at(key), table.path(key), message, None));
        }
    }
    for (at, glob) in &images {
        if glob.has_tag() {
            let message = "an allow list applies to repositories, not to tags, because layers have no tag";
            let help = Some("remove the `:` and the tag".to_owned());
            return Err(report.emit(at, table.path("images"), message, help));
        }
        if let Some(upstream) = glob.upstream()
            && let Err(error) = validate::find(upstream, configured)
        {
            return Err(report.emit(at, table.path("images"), error.message, error.help));
        }
    }
    let globs: Vec<_> = images.into_iter().map(|(_, glob)| glob).collect();
    let images = ImageMatcher::new(&globs)
        .map_err(|error| report.emit(table.at("images"), table.path("images"), error.to_string(), None))?;
    Ok(Allow {
        users: users.into_iter().map(|(_, name)| name).collect(),
        images,
    })
}

/// Parses `name:hash` lines; ignores empty lines and `#` comments. Errors never quote a hash.
fn users(bytes: &[u8]) -> Result<Vec<User>, (String, &'static str)> {
    const MAKE: &str = "create the file with: htpasswd -B -c FILE USER";
    let text = std::str::from_utf8(bytes).map_err(|_| ("the file is not text".to_owned(), MAKE))?;
    let mut users: Vec<User> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let number = index + 1;
        let Some((name, hash)) = line.split_once(':').filter(|(name, _)| !name.is_empty()) else {
            return Err((format!("line {number} is not a name, a colon and a hash"), MAKE));
        };
        if users.iter().any(|user| user.name == name) {
            return Err((
                format!("line {number}: `{name}` is listed twice"),
                "keep one of the lines",
            ));
        }
        let Some(cost) = cost(hash) else {
            let help = "only bcrypt is supported, as created by: htpasswd -B FILE USER";
            return Err((
                format!("line {number}: the hash of `{name}` is not a bcrypt hash"),
                help,
            ));
        };
        if !(COST_MIN..=COST_MAX).contains(&cost) {
            let message = format!(
                "line {number}: the hash of `{name}` has cost {cost}, outside of {COST_MIN} to {COST_MAX}"
            );
            return Err((message, "recreate it with: htpasswd -B -C 10 FILE USER"));
        }
        users.push(User {
            name: name.to_owned(),
            hash: hash.to_owned(),
        });
    }
    if users.is_empty() {
        return Err(("the file has no users".to_owned(), MAKE));
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
