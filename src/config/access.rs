//! Who may come in at all: by a password or a certificate of the cache's own, and what each may pull.

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

/// What `htpasswd -B` makes by itself; anything below is no protection at all.
const COST_MIN: u32 = 5;

/// A hash that takes longer to check (some seconds) would keep everybody waiting.
const COST_MAX: u32 = 14;

/// Who may come in.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    /// Who may come in by a password; no two of the same name.
    pub users: Vec<User>,
    /// The CAs whose certificates open as well, DER. At least one of these and `users` together.
    pub client_roots: Vec<Vec<u8>>,
    /// What they may pull; none: everything. What no list allows is refused.
    pub allows: Vec<Allow>,
}

/// A user of the cache itself.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its password, hashed by bcrypt.
    pub hash: String,
}

/// What some users may pull.
#[derive(Clone, Debug)]
pub struct Allow {
    /// Names; one that ends in `*` stands for all that begin so.
    pub users: Vec<String>,
    /// What they may pull.
    pub images: ImageMatcher,
}

impl Allow {
    /// Whether it is about this user.
    pub fn applies_to(&self, user: &str) -> bool {
        self.users.iter().any(|name| match name.strip_suffix('*') {
            Some(beginning) => user.starts_with(beginning),
            None => user == name,
        })
    }
}

/// A hash can be guessed at, so it is not shown.
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

/// The users of `htpasswd`; none if it is not set.
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
        let help = "set listen.plain to \"loopback\" or \"off\"".to_owned();
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
            let message = format!("a list without `{key}` allows nothing");
            return Err(report.emit(table.at(key), table.path(key), message, None));
        }
    }
    for (at, glob) in &images {
        if glob.has_tag() {
            let message = "a right is to a repository, and not to a tag: layers have none";
            let help = Some("write it without what follows the `:`".to_owned());
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

/// `name:hash` a line; empty lines and those that begin with `#` do not count. An error never quotes a hash.
fn users(bytes: &[u8]) -> Result<Vec<User>, (String, &'static str)> {
    const MAKE: &str = "make the file with: htpasswd -B -c FILE USER";
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
                format!("line {number}: `{name}` stands here twice"),
                "keep one of the lines",
            ));
        }
        let Some(cost) = cost(hash) else {
            let help = "only bcrypt is taken, as made by: htpasswd -B FILE USER";
            return Err((
                format!("line {number}: the hash of `{name}` is not one of bcrypt"),
                help,
            ));
        };
        if !(COST_MIN..=COST_MAX).contains(&cost) {
            let message = format!(
                "line {number}: the hash of `{name}` has cost {cost}, outside of {COST_MIN} to {COST_MAX}"
            );
            return Err((message, "make it anew with: htpasswd -B -C 10 FILE USER"));
        }
        users.push(User {
            name: name.to_owned(),
            hash: hash.to_owned(),
        });
    }
    if users.is_empty() {
        return Err(("there is no user in the file".to_owned(), MAKE));
    }
    Ok(users)
}

/// The cost of a bcrypt hash: `$2b$10$` and 53 characters.
fn cost(hash: &str) -> Option<u32> {
    let rest = ["$2a$", "$2b$", "$2y$"]
        .iter()
        .find_map(|prefix| hash.strip_prefix(prefix))?;
    let (cost, rest) = rest.split_once('$')?;
    let is_legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/');
    (cost.len() == 2 && rest.len() == 53 && rest.chars().all(is_legal)).then(|| cost.parse().ok())?
}
