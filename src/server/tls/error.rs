//! TLS setup errors, and the shared crypto provider.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;

/// Why TLS cannot be set up. The operator must fix it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{action} {}: {error}{}", path.display(), hint(action))]
    File {
        /// The action that failed.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The I/O error.
        error: io::Error,
    },
    /// A key file that other users may read.
    #[error("the key {} may be read by others (mode {mode:o}); run: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its file mode.
        mode: u32,
    },
    /// A file with the wrong content.
    #[error("{} does not contain {what}: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The expected content.
        what: &'static str,
        /// The parse error.
        detail: String,
    },
    /// Certificate generation failed.
    #[error("failed to generate a certificate: {0}")]
    Generation(#[from] rcgen::Error),
    /// The client CAs are unusable.
    #[error("access.client_ca: {0}")]
    ClientCa(String),
    /// Certificate and key are unusable, for example because they do not match.
    #[error("the certificate cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// Advice for a certificate folder that is not writable. Files that are only read have their own settings.
fn hint(action: &str) -> &'static str {
    if action == "cannot read" {
        ""
    } else {
        "; make it writable for this user, or choose another folder with `[tls] folder` (IFNEWER_TLS_FOLDER=PATH)"
    }
}

pub(in crate::server) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
