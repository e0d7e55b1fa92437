//! Kinds of objects in the bucket, by their names. Pure.

use crate::bucket::ObjectKey;
use crate::oci::Digest;
use crate::shared::record::CLASS_NAMES;

/// Kind of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// A blob.
    Blob,
    /// A manifest.
    Manifest,
    /// A record of this class; empty for a class of a later version of the program.
    Record(&'static str),
    /// A claim.
    Claim,
    /// A part of a blob that a cache fetches.
    Part,
    /// An object of a probe.
    Probe,
    /// Not an object of a cache.
    Foreign,
}

impl ObjectKind {
    /// The kind of the object with this name.
    pub fn of(key: &ObjectKey) -> Self {
        Self::of_name(key.as_str()).unwrap_or(Self::Foreign)
    }

    fn of_name(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("v1/")?;
        let (folder, rest) = rest.split_once('/')?;
        match folder {
            "blobs" => digest(rest).map(|_| Self::Blob),
            "manifests" => digest(rest).map(|_| Self::Manifest),
            "claims" if rest.strip_prefix("probe/").is_some_and(is_word) => Some(Self::Probe),
            // `m-`: of a manifest.
            "claims" => digest(rest.strip_prefix("m-").unwrap_or(rest)).map(|_| Self::Claim),
            "parts" => {
                let (blob, start) = rest.rsplit_once('/')?;
                let is_start = !start.is_empty() && start.bytes().all(|byte| byte.is_ascii_digit());
                digest(blob).filter(|_| is_start).map(|_| Self::Part)
            }
            "probe" => is_word(rest).then_some(Self::Probe),
            "records" => record(rest),
            _ => None,
        }
    }

    /// Name for the operator: the folder of its objects. Stable.
    pub fn name(self) -> String {
        match self {
            Self::Blob => "blobs".to_owned(),
            Self::Manifest => "manifests".to_owned(),
            Self::Record("") => "records/other".to_owned(),
            Self::Record(class) => format!("records/{class}"),
            Self::Claim => "claims".to_owned(),
            Self::Part => "parts".to_owned(),
            Self::Probe => "probe".to_owned(),
            Self::Foreign => "other".to_owned(),
        }
    }
}

/// `sha256/ab/ab12…`, in no other spelling.
fn digest(rest: &str) -> Option<Digest> {
    let mut segments = rest.split('/');
    let (algorithm, first, hex) = (segments.next()?, segments.next()?, segments.next()?);
    if segments.next().is_some() || !hex.starts_with(first) || first.len() != 2 {
        return None;
    }
    Digest::from_hex(algorithm.parse().ok()?, hex).ok()
}

fn record(rest: &str) -> Option<ObjectKind> {
    let (class, name) = rest.split_once('/')?;
    let (first, hex) = name.split_once('/')?;
    let is_name = hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !is_word(class) || !is_name || first.len() != 2 || !hex.starts_with(first) {
        return None;
    }
    let known = CLASS_NAMES.into_iter().find(|known| *known == class);
    Some(ObjectKind::Record(known.unwrap_or_default()))
}

/// A segment that needs no escaping, so that it names the same object again.
fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}
