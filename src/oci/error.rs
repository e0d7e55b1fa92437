//! OCI error bodies (spec, "Error Codes"), sent to clients and read from upstreams.

use std::fmt;

use bytes::Bytes;
use serde_json::{Value, json};

/// Largest upstream error body read, in bytes.
pub const ERROR_BODY_BYTES_MAX: usize = 64 * 1024;
/// Longest message kept from an upstream error, in bytes.
pub const ERROR_MESSAGE_BYTES_MAX: usize = 512;

/// Codes of the spec, and older docker codes that clients know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// Unknown blob.
    BlobUnknown,
    /// Invalid upload.
    BlobUploadInvalid,
    /// Unknown upload.
    BlobUploadUnknown,
    /// Invalid digest.
    DigestInvalid,
    /// The manifest refers to an unknown blob.
    ManifestBlobUnknown,
    /// Invalid manifest.
    ManifestInvalid,
    /// Unknown manifest.
    ManifestUnknown,
    /// Invalid repository name.
    NameInvalid,
    /// Unknown repository.
    NameUnknown,
    /// Invalid length.
    SizeInvalid,
    /// A credential is required.
    Unauthorized,
    /// The credential is insufficient.
    Denied,
    /// Unsupported operation.
    Unsupported,
    /// Too many requests.
    TooManyRequests,
    /// Docker: the registry is unavailable.
    Unavailable,
    /// Docker: any other error.
    Unknown,
    /// Docker: invalid tag.
    TagInvalid,
}

impl ErrorCode {
    /// Code in the body.
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

/// Error body of a response. If several hosts of a registry fail, containerd shows the message of the *first*, and
/// mirrors come first. So the message should name the upstream and the cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorBody {
    /// Machine-readable code.
    pub code: ErrorCode,
    /// Human-readable message.
    pub message: String,
    /// Additional JSON.
    pub detail: Option<Value>,
}

impl ErrorBody {
    /// An error without detail.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            detail: None,
        }
    }

    /// The body, to be sent as `application/json`, because docker reads no other type.
    pub fn body(&self) -> Bytes {
        let mut error = json!({ "code": self.code.as_str(), "message": self.message });
        if let (Some(detail), Some(fields)) = (&self.detail, error.as_object_mut()) {
            fields.insert("detail".to_owned(), detail.clone());
        }
        json!({ "errors": [error] }).to_string().into()
    }

    /// Code and message of an upstream's error body, truncated and safe to log.
    ///
    /// Reads the form of the spec, `{"message": …}` (Docker Hub's 429) and `{"details": …}`. `None` for
    /// anything else.
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

/// Removes control characters and truncates to [`ERROR_MESSAGE_BYTES_MAX`].
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
