//! Keys of records: names that reveal nothing, and seals that only holders of a key can make. Pure.
//!
//! A record is JSON whose last member is its seal: the HMAC of the object's full name and of every byte before. So a
//! record that was changed, or moved to another name, is none. The first key signs, and all of them verify, so that a
//! key can be replaced while caches run.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::bucket::ObjectKey;
use crate::oci::digest::hmac_sha256;

/// Keys in a file: one that signs, and earlier or later ones.
pub const KEYS_MAX: usize = 4;

/// Hex digits of a key.
const KEY_HEX: usize = 64;

/// Maximum size of a record.
pub(in crate::shared) const RECORD_BYTES_MAX: usize = 256 * 1024;

/// Version of the format. A record of a later one is not read, and not overwritten.
const VERSION: u32 = 1;

const MEMBER: &str = ",\"seal\":\"";
const END: &str = "\"}\n";
const SEAL_HEX: usize = 64;

/// Hex digits of the id of a key.
const ID_HEX: usize = 16;

const RANDOM_SOURCE: &str = "/dev/urandom";

/// Why a key file is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// It has no key.
    #[error("the file has no key")]
    Empty,
    /// A line is not a key.
    #[error("line {0} is not 64 hexadecimal digits")]
    Line(usize),
    /// A line repeats another.
    #[error("line {0} repeats an earlier key")]
    Repeated(usize),
    /// It has too many keys.
    #[error("the file has more than {KEYS_MAX} keys")]
    TooMany,
}

/// The keys of a fleet of caches. The first one signs.
#[derive(Clone, PartialEq, Eq)]
pub struct RecordKeys(Vec<Key>);

#[derive(Clone, PartialEq, Eq)]
struct Key {
    secret: Zeroizing<[u8; 32]>,
    name: Zeroizing<[u8; 32]>,
    seal: Zeroizing<[u8; 32]>,
    principal: Zeroizing<[u8; 32]>,
    /// Tells the hashes of a principal under several keys apart.
    id: String,
}

/// Shows no key.
impl fmt::Debug for RecordKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordKeys({})", self.0.len())
    }
}

impl Key {
    fn new(secret: Zeroizing<[u8; 32]>) -> Self {
        let derived = |label: &[u8]| Zeroizing::new(hmac_sha256(&*secret, label));
        let mut id = hex(&derived(b"ifnewer record key id"));
        id.truncate(ID_HEX);
        Self {
            name: derived(b"ifnewer record name"),
            seal: derived(b"ifnewer record seal"),
            principal: derived(b"ifnewer record principal"),
            id,
            secret,
        }
    }

    /// The hash under this key in the item of a grant record.
    fn principal_in<'a>(&self, item: &'a str) -> Option<&'a str> {
        let of_key = |part: &'a str| part.strip_prefix(self.id.as_str())?.strip_prefix(':');
        item.split(',').find_map(of_key)
    }

    fn seal_of(&self, path: &str, body: &str) -> String {
        let message = [path.as_bytes(), b"\0", body.as_bytes()].concat();
        hex(&hmac_sha256(&*self.seal, &message))
    }
}

/// Class of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::shared) enum Class {
    /// What a tag names.
    Tag,
    /// That a repository has a manifest, and which of its parts.
    Content,
    /// Whether a repository is public.
    Public,
    /// Whether a principal may read a repository.
    Grant,
}

/// Names of all classes.
pub(in crate::shared) const CLASS_NAMES: [&str; 4] = [
    Class::Tag.name(),
    Class::Content.name(),
    Class::Public.name(),
    Class::Grant.name(),
];

impl Class {
    /// Name in object names and metrics. Stable.
    pub(in crate::shared) const fn name(self) -> &'static str {
        match self {
            Self::Tag => "tag",
            Self::Content => "content",
            Self::Public => "public",
            Self::Grant => "grant",
        }
    }
}

/// Why the bytes of an object are not used as a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::shared) enum Unusable {
    /// No key of this cache sealed these bytes under this name.
    Unsealed,
    /// A later version of the program wrote it.
    Later,
}

impl Unusable {
    /// Label in the metrics. Stable.
    pub(in crate::shared) fn name(self) -> &'static str {
        match self {
            Self::Unsealed => "unsealed",
            Self::Later => "later-version",
        }
    }
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    version: u32,
    #[serde(flatten)]
    value: &'a T,
}

impl RecordKeys {
    /// Reads a key file: a key a line, of 64 hexadecimal digits.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        let mut keys: Vec<Key> = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let secret = parse_key(line).ok_or(KeyFileError::Line(at + 1))?;
            if keys.iter().any(|key| key.secret == secret) {
                return Err(KeyFileError::Repeated(at + 1));
            }
            if keys.len() >= KEYS_MAX {
                return Err(KeyFileError::TooMany);
            }
            keys.push(Key::new(secret));
        }
        if keys.is_empty() {
            return Err(KeyFileError::Empty);
        }
        Ok(Self(keys))
    }

    /// A fresh key, as a line of a key file.
    pub fn generate() -> io::Result<Zeroizing<String>> {
        let mut secret = Zeroizing::new([0; 32]);
        File::open(RANDOM_SOURCE)?.read_exact(&mut *secret)?;
        Ok(Zeroizing::new(hex(&secret)))
    }

    /// The objects that may have this record: that of the key that signs, and those of the others, which exist while a
    /// key is replaced. `place` are the upstream's identity and the repository; no part contains a NUL. The item of a grant
    /// record is a [`Self::principal`], which has no object under a key that it does not cover.
    pub(in crate::shared) fn names(&self, class: Class, place: [&str; 2], item: &str) -> Vec<ObjectKey> {
        let name = |key: &Key| {
            let item = match class {
                Class::Grant => key.principal_in(item)?,
                Class::Tag | Class::Content | Class::Public => item,
            };
            let [upstream, repository] = place;
            let message = [class.name(), upstream, repository, item].join("\0");
            let hash = hmac_sha256(&*key.name, message.as_bytes());
            Some(ObjectKey::record(class.name(), &hash))
        };
        self.0.iter().filter_map(name).collect()
    }

    /// A principal, which all holders of a key derive alike: for each key, its id and a hash of `identity` under it. The kind
    /// of a credential is a part of `identity`.
    pub(in crate::shared) fn principal(&self, identity: &[u8]) -> String {
        let hashed = |key: &Key| format!("{}:{}", key.id, hex(&hmac_sha256(&*key.principal, identity)));
        self.0.iter().map(hashed).collect::<Vec<_>>().join(",")
    }

    /// Encodes a value, which must serialise as a non-empty object without `version` and `seal`, for the object at `path`.
    pub(in crate::shared) fn seal(&self, path: &str, value: &impl Serialize) -> Vec<u8> {
        let envelope = Envelope {
            version: VERSION,
            value,
        };
        // Structs of strings and numbers always serialise; an empty record would not be sealed.
        let mut text = serde_json::to_string(&envelope).unwrap_or_default();
        text.pop();
        let Some(first) = self.0.first() else {
            return Vec::new();
        };
        let seal = first.seal_of(path, &text);
        text.push_str(MEMBER);
        text.push_str(&seal);
        text.push_str(END);
        text.into_bytes()
    }

    /// Decodes the object at `path`.
    pub(in crate::shared) fn open<T: DeserializeOwned>(
        &self,
        path: &str,
        record: &[u8],
    ) -> Result<T, Unusable> {
        let body = self.sealed_body(path, record).ok_or(Unusable::Unsealed)?;
        let value = [body, "}"].concat();
        let found: Versioned = serde_json::from_str(&value).map_err(|_| Unusable::Unsealed)?;
        if found.version != VERSION {
            return Err(Unusable::Later);
        }
        serde_json::from_str(&value).map_err(|_| Unusable::Unsealed)
    }

    fn sealed_body<'a>(&self, path: &str, record: &'a [u8]) -> Option<&'a str> {
        if record.len() > RECORD_BYTES_MAX {
            return None;
        }
        let text = std::str::from_utf8(record).ok()?.strip_suffix(END)?;
        let (text, seal) = text.split_at_checked(text.len().checked_sub(SEAL_HEX)?)?;
        let body = text.strip_suffix(MEMBER)?;
        let is_of = |key: &Key| is_equal(key.seal_of(path, body).as_bytes(), seal.as_bytes());
        self.0.iter().any(is_of).then_some(body)
    }
}

/// Compares without a time that depends on the first difference.
fn is_equal(one: &[u8], other: &[u8]) -> bool {
    let differences = one.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b));
    one.len() == other.len() && differences == 0
}

fn parse_key(line: &str) -> Option<Zeroizing<[u8; 32]>> {
    if line.len() != KEY_HEX || !line.is_ascii() {
        return None;
    }
    let mut secret = Zeroizing::new([0; 32]);
    for (slot, digits) in secret.iter_mut().zip(line.as_bytes().chunks_exact(2)) {
        // `from_str_radix` accepts a sign.
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        *slot = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(secret)
}

fn hex(bytes: &[u8; 32]) -> String {
    crate::oci::Digest::Sha256(*bytes).hex()
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may fail loudly"
    )]
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Value {
        text: String,
    }

    fn value(text: &str) -> Value {
        Value {
            text: text.to_owned(),
        }
    }

    fn keys(digits: &[&str]) -> RecordKeys {
        let lines = digits.iter().map(|digit| digit.repeat(KEY_HEX));
        RecordKeys::parse(&lines.collect::<Vec<_>>().join("\n")).unwrap()
    }

    fn tag_names(keys: &RecordKeys) -> Vec<ObjectKey> {
        keys.names(Class::Tag, ["u", "r"], "t")
    }

    const PATH: &str = "team-a/v1/records/tag/00/00";

    #[test]
    fn key_file_is_lines_of_64_digits() {
        let key = "0a".repeat(32);
        assert_eq!(RecordKeys::parse(&format!("{key}\r\n\n")).unwrap().0.len(), 1);
        let table = [
            (String::new(), KeyFileError::Empty),
            ("\n".to_owned(), KeyFileError::Empty),
            (format!("{key}\n+a{}", "0a".repeat(31)), KeyFileError::Line(2)),
            (key[1..].to_owned(), KeyFileError::Line(1)),
            ("ä".repeat(32), KeyFileError::Line(1)),
            (
                format!("{key}\n{}", key.to_uppercase()),
                KeyFileError::Repeated(2),
            ),
            (
                (0..5).map(|digit| digit.to_string().repeat(64) + "\n").collect(),
                KeyFileError::TooMany,
            ),
        ];
        for (text, error) in table {
            assert_eq!(RecordKeys::parse(&text), Err(error), "{text:?}");
        }
        assert!(!format!("{:?}", keys(&["a"])).contains("aa"));
    }

    #[test]
    fn generated_keys_differ_and_parse() {
        let (one, two) = (RecordKeys::generate().unwrap(), RecordKeys::generate().unwrap());
        assert_ne!(one, two);
        assert!(RecordKeys::parse(&one).is_ok());
    }

    #[test]
    fn second_key_verifies_and_signs_nothing() {
        let (old, new) = (keys(&["a"]), keys(&["b"]));
        let (before, after) = (keys(&["a", "b"]), keys(&["b", "a"]));
        let sealed = old.seal(PATH, &value("x"));
        assert_eq!(before.seal(PATH, &value("x")), sealed, "the first key signs");
        for reader in [&old, &before, &after] {
            assert_eq!(reader.open(PATH, &sealed), Ok(value("x")));
        }
        assert_eq!(new.open::<Value>(PATH, &sealed), Err(Unusable::Unsealed));
        let (names, others) = (tag_names(&before), tag_names(&after));
        assert_eq!(names[0], others[1]);
        assert_eq!(names[1], others[0]);
    }

    #[test]
    fn moved_or_changed_record_is_none() {
        let keys = keys(&["a"]);
        let sealed = keys.seal(PATH, &value("x"));
        for path in ["team-b/v1/records/tag/00/00", "team-a/v1/records/tag/00/01", ""] {
            assert_eq!(
                keys.open::<Value>(path, &sealed),
                Err(Unusable::Unsealed),
                "{path}"
            );
        }
        for length in 0..sealed.len() {
            assert_eq!(
                keys.open::<Value>(PATH, &sealed[..length]),
                Err(Unusable::Unsealed)
            );
        }
        // The name ends with a NUL, so a part of the body is no part of the name.
        let shifted = keys.seal("team-a", &value("x"));
        assert_eq!(keys.open::<Value>("team-a{", &shifted), Err(Unusable::Unsealed));
    }

    #[test]
    fn oversized_record_is_none() {
        let keys = keys(&["a"]);
        let sealed = keys.seal(PATH, &value(&"x".repeat(10 * 1024 * 1024)));
        assert_eq!(keys.open::<Value>(PATH, &sealed), Err(Unusable::Unsealed));
    }

    #[test]
    fn later_version_is_told_apart() {
        let keys = keys(&["a"]);
        let body = "{\"version\":2,\"other\":1";
        let seal = keys.0[0].seal_of(PATH, body);
        let later = format!("{body}{MEMBER}{seal}{END}");
        assert_eq!(keys.open::<Value>(PATH, later.as_bytes()), Err(Unusable::Later));
    }

    #[test]
    fn names_depend_on_class_and_parts() {
        let keys = keys(&["a"]);
        let names = [
            keys.names(Class::Tag, ["u", "r"], "t"),
            keys.names(Class::Content, ["u", "r"], "t"),
            keys.names(Class::Tag, ["u", "rt"], ""),
            keys.names(Class::Tag, ["u", "r"], ""),
        ];
        for (at, one) in names.iter().enumerate() {
            assert!(one[0].as_str().starts_with("v1/records/"));
            assert!(names.iter().skip(at + 1).all(|other| one != other));
        }
    }

    #[test]
    fn principal_is_found_under_each_key_it_covers() {
        let (old, both, new) = (keys(&["a"]), keys(&["b", "a"]), keys(&["b"]));
        let names = |keys: &RecordKeys, principal: &str| keys.names(Class::Grant, ["u", "r"], principal);
        let (early, late) = (old.principal(b"basic\0alice"), both.principal(b"basic\0alice"));
        assert_eq!(names(&both, &late)[1], names(&old, &early)[0]);
        assert_eq!(names(&both, &early), names(&old, &early), "before the new key");
        assert_eq!(names(&new, &late)[0], names(&both, &late)[0]);
        assert!(names(&new, &early).is_empty());
        assert_ne!(old.principal(b"basic\0bob"), early);
        assert!(!late.contains("alice") && late.len() < 200, "{late}");
    }

    proptest! {
        #[test]
        fn garbage_is_no_record(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(keys(&["a"]).open::<Value>(PATH, &bytes), Err(Unusable::Unsealed));
        }

        #[test]
        fn changed_byte_is_detected(position in 0_usize..200, change in 1_u8..) {
            let keys = keys(&["a"]);
            let mut sealed = keys.seal(PATH, &value("some text"));
            let position = position % sealed.len();
            sealed[position] ^= change;
            prop_assert_eq!(keys.open::<Value>(PATH, &sealed), Err(Unusable::Unsealed));
        }
    }
}
