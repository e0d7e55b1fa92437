//! Files that settings name: passwords, certificates, keys. Invalid ones are reported before any port is bound.

use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::diagnostic::{Checked, Report};
use super::parsers::FilePath;
use super::schema::Upstream;
use super::setting::{Field, both};
use crate::upstream::{ClientCertificate, ClientCertificateError, DockerConfig};

/// Maximum size of such a file.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// A key that names a file.
pub(super) type File = Field<Option<FilePath>>;

/// Path and content of a file; `None`: the key is not set.
type Content = Option<(PathBuf, Zeroizing<Vec<u8>>)>;

pub(super) fn read(field: &File, report: &mut Report<'_>) -> Checked<Content> {
    let Some(path) = report.path(field)? else {
        return Ok(None);
    };
    let message = match read_limited(&path) {
        Ok(bytes) if bytes.len() as u64 <= FILE_BYTES_MAX => return Ok(Some((path, bytes))),
        Ok(_) => format!("{} is longer than {FILE_BYTES_MAX} bytes", path.display()),
        Err(error) => format!("cannot read {}: {error}", path.display()),
    };
    Err(report.emit(&field.subject, message, ""))
}

/// Permission bits of group and others.
const GROUP_OTHER_BITS: u32 = 0o077;

/// As [`read`], for a file that only its owner may access.
pub(super) fn read_private(field: &File, report: &mut Report<'_>) -> Checked<Content> {
    let found = read(field, report)?;
    if let Some((path, _)) = &found
        && let Ok(mode) = std::fs::metadata(path).map(|metadata| metadata.permissions().mode())
        && mode & GROUP_OTHER_BITS != 0
    {
        let message = format!(
            "other users may access {} (mode {:04o})",
            path.display(),
            mode & 0o7777
        );
        let help = format!("run `chmod 600 {}`", path.display());
        return Err(report.emit(&field.subject, message, help));
    }
    Ok(found)
}

fn read_limited(path: &Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::new());
    std::fs::File::open(path)?
        .take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Path of a text file that passes a check.
fn checked_text(
    field: &File,
    check: impl FnOnce(&str) -> Result<(), String>,
    help: &str,
    report: &mut Report<'_>,
) -> Checked<Option<PathBuf>> {
    let Some((path, bytes)) = read(field, report)? else {
        return Ok(None);
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| "the file is not text".to_owned());
    match text.and_then(check) {
        Ok(()) => Ok(Some(path)),
        Err(message) => Err(report.emit(&field.subject, message, help)),
    }
}

pub(super) fn password_file(field: &File, report: &mut Report<'_>) -> Checked<Option<PathBuf>> {
    let check = |text: &str| match text.trim_end_matches(['\r', '\n']) {
        "" => Err("the file is empty".to_owned()),
        _ => Ok(()),
    };
    checked_text(field, check, "", report)
}

pub(super) fn docker_config(field: &File, report: &mut Report<'_>) -> Checked<Option<PathBuf>> {
    let check = |text: &str| {
        DockerConfig::read(text)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let help = "expected the format of `docker login`: {\"auths\": {\"host\": {\"auth\": \"…\"}}}";
    checked_text(field, check, help, report)
}

/// Certificates of a file, DER; empty if the key is not set.
pub(super) fn roots(field: &File, report: &mut Report<'_>) -> Checked<Vec<Vec<u8>>> {
    let Some((_, pem)) = read(field, report)? else {
        return Ok(Vec::new());
    };
    let certificates = CertificateDer::pem_slice_iter(&pem).map(|der| der.map(|der| der.to_vec()));
    let (message, help) = match certificates.collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => return Ok(certificates),
        Ok(_) => (
            "the file has no certificate".to_owned(),
            "expected -----BEGIN CERTIFICATE-----",
        ),
        Err(error) => (format!("the file is not PEM: {error}"), ""),
    };
    Err(report.emit(&field.subject, message, help))
}

/// Client certificate and its private key: both or neither, and matching.
pub(super) fn client_certificate(
    keys: &Upstream,
    report: &mut Report<'_>,
) -> Checked<Option<ClientCertificate>> {
    let hint = ": the certificate's chain and its private key, both PEM";
    both(&keys.client_certificate, &keys.client_key, hint, report)?;
    let chain = read(&keys.client_certificate, report)?;
    let Some(((_, chain), (_, private))) = chain.zip(read(&keys.client_key, report)?) else {
        return Ok(None);
    };
    ClientCertificate::read(&chain, &private)
        .map(Some)
        .map_err(|error| {
            let (field, help) = match error {
                ClientCertificateError::NoCertificate => {
                    (&keys.client_certificate, "expected -----BEGIN CERTIFICATE-----")
                }
                ClientCertificateError::NoKey => (
                    &keys.client_key,
                    "expected -----BEGIN PRIVATE KEY-----, without a password",
                ),
                ClientCertificateError::Key(_) => (&keys.client_key, "use an RSA or an ECDSA key"),
                ClientCertificateError::Mismatch => {
                    (&keys.client_key, "use the private key of this certificate")
                }
            };
            report.emit(&field.subject, error.to_string(), help)
        })
}
