//! Errors as the protocol words them (spec, "Error Codes"): the ones we answer with, and those of upstreams.

use std::fmt;

use bytes::Bytes;
use serde_json::{Value, json};

/// Largest error body of an upstream that is read, in bytes.
pub const ERROR_BODY_BYTES_MAX: usize = 64 * 1024;
/// Longest message kept of an upstream's error, in bytes.
pub const ERROR_MESSAGE_BYTES_MAX: usize = 512;

/// The codes of the spec, and docker's older ones that clients know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The blob is not known to the registry.
    BlobUnknown,
    /// The upload is wrong.
    BlobUploadInvalid,
    /// The upload is not known.
    BlobUploadUnknown,
    /// The digest is wrong.
    DigestInvalid,
    /// A manifest names a blob that is not known.
    ManifestBlobUnknown,
    /// The manifest is wrong.
    ManifestInvalid,
    /// The manifest is not known.
    ManifestUnknown,
    /// The repository's name is wrong.
    NameInvalid,
    /// The repository is not known.
    NameUnknown,
    /// The length is wrong.
    SizeInvalid,
    /// A credential is needed.
    Unauthorized,
    /// The credential is not enough.
    Denied,
    /// Not done here.
    Unsupported,
    /// Too many requests.
    TooManyRequests,
    /// Docker's: the registry is not available.
    Unavailable,
    /// Docker's: anything else.
    Unknown,
    /// Docker's: the tag is wrong.
    TagInvalid,
}

impl ErrorCode {
    /// The code as written in a body.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BlobUnknown => "BLOB_UNKNOWN",
            Self::BlobUploadInvalid => "BLOB_UPLOAD_INVALID",
            Self::BlobUploadUnknown => "BLOB_UPLOAD_UNKNOWN",
            Self::DigestInvalid => "DIGEST_INVALID",
            Self::ManifestBlobUnknown => "MANIFEST_BLOB_UNKNOWN",
            Self::ManifestInvalid => "MANIFEST_INVALID",
            Self::ManifestUnknown => "MANIFEST_UNKNOWN",
            Self::NameInvalid => "NAME_INVALID",
            Self::NameUnknown => "NAME_UNKNOWN",
            Self::SizeInvalid => "SIZE_INVALID",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Denied => "DENIED",
            Self::Unsupported => "UNSUPPORTED",
            Self::TooManyRequests => "TOOMANYREQUESTS",
            Self::Unavailable => "UNAVAILABLE",
            Self::Unknown => "UNKNOWN",
            Self::TagInvalid => "TAG_INVALID",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One error, as answered to a client. With containerd the user sees the *first* registry's message: it
/// should name the upstream and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorBody {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
    /// Anything more, as JSON.
    pub detail: Option<Value>,
}

impl ErrorBody {
    /// A problem without detail.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            detail: None,
        }
    }

    /// The body, to be sent as `application/json`: docker reads no other.
    pub fn body(&self) -> Bytes {
        let mut error = json!({ "code": self.code.as_str(), "message": self.message });
        if let (Some(detail), Some(fields)) = (&self.detail, error.as_object_mut()) {
            fields.insert("detail".to_owned(), detail.clone());
        }
        json!({ "errors": [error] }).to_string().into()
    }

    /// Code and message of an upstream's error body, cut to a decent length and safe to log.
    ///
    /// Reads the spec's form, `{"message": …}` (Docker Hub's 429) and `{"details": …}`; `None` for anything
    /// else.
    pub fn read(body: &[u8]) -> Option<(String, String)> {
        if body.len() > ERROR_BODY_BYTES_MAX {
            return None;
        }
        let value: Value = serde_json::from_slice(body).ok()?;
        let error = value
            .get("errors")
            .and_then(|errors| errors.get(0))
            .unwrap_or(&value);
        let text = |key: &str| {
            error
                .get(key)
                .and_then(Value::as_str)
                .map(clean)
                .filter(|text| !text.is_empty())
        };
        let code = text("code");
        let message = ["message", "details", "detail"].into_iter().find_map(text);
        if code.is_none() && message.is_none() {
            return None;
        }
        let code = code.unwrap_or_else(|| ErrorCode::Unknown.as_str().to_owned());
        Some((code, message.unwrap_or_default()))
    }
}

/// The text without control characters, cut to [`ERROR_MESSAGE_BYTES_MAX`].
fn clean(text: &str) -> String {
    let mut clean = String::new();
    for character in text.trim().chars().filter(|character| !character.is_control()) {
        if clean.len() + character.len_utf8() > ERROR_MESSAGE_BYTES_MAX {
            break;
        }
        clean.push(character);
    }
    clean
}

#[cfg(test)]
mod tests;
