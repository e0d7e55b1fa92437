//! Files that settings name: passwords, certificates, keys. Invalid ones are reported before any port is bound.

use std::io::Read;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::diagnostic::{Report, Reported};
use super::parsers;
use super::table::Table;
use crate::upstream::{ClientCertificate, ClientCertificateError, DockerConfig};

/// Maximum size of such a file.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

pub(super) fn password_file(
    table: &Table,
    file: PathBuf,
    report: &mut Report<'_>,
) -> Result<PathBuf, Reported> {
    const KEY: &str = "password_file";
    let text = Zeroizing::new(read_file(table, KEY, &file, report)?);
    let message = match std::str::from_utf8(&text).map(|text| text.trim_end_matches(['\r', '\n'])) {
        Ok("") => "the file is empty",
        Ok(_) => return Ok(report.resolve(table.at(KEY), file)),
        Err(_) => "the file is not text",
    };
    Err(report.emit(table.at(KEY), table.path(KEY), message, None))
}

pub(super) fn docker_config(
    table: &Table,
    file: PathBuf,
    report: &mut Report<'_>,
) -> Result<PathBuf, Reported> {
    const KEY: &str = "docker_config";
    let text = Zeroizing::new(read_file(table, KEY, &file, report)?);
    let message = match std::str::from_utf8(&text).map(DockerConfig::read) {
        Ok(Ok(_)) => return Ok(report.resolve(table.at(KEY), file)),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the file is not text".to_owned(),
    };
    let help = "expected the format of `docker login`: {\"auths\": {\"host\": {\"auth\": \"…\"}}}".to_owned();
    Err(report.emit(table.at(KEY), table.path(KEY), message, Some(help)))
}

/// Certificates of the file that `key` names, DER; empty if `key` is not set.
pub(super) fn roots(table: &Table, key: &str, report: &mut Report<'_>) -> Result<Vec<Vec<u8>>, Reported> {
    let Some(file) = table.text_if_set(report, key, &parsers::PATH)? else {
        return Ok(Vec::new());
    };
    let pem = read_file(table, key, &file, report)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem)
        .map(|der| der.map(|der| der.to_vec()))
        .collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => {
            let help = "expected -----BEGIN CERTIFICATE-----".to_owned();
            let message = "the file has no certificate";
            Err(report.emit(table.at(key), table.path(key), message, Some(help)))
        }
        Err(error) => {
            let message = format!("the file is not PEM: {error}");
            Err(report.emit(table.at(key), table.path(key), message, None))
        }
    }
}

pub(super) fn read_file(
    table: &Table,
    key: &str,
    path: &Path,
    report: &mut Report<'_>,
) -> Result<Vec<u8>, Reported> {
    let path = report.resolve(table.at(key), path.to_owned());
    let mut bytes = Vec::new();
    let read =
        std::fs::File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    let message = match read {
        Ok(_) if bytes.len() as u64 <= FILE_BYTES_MAX => return Ok(bytes),
        Ok(_) => format!("{} is longer than {FILE_BYTES_MAX} bytes", path.display()),
        Err(error) => format!("cannot read {}: {error}", path.display()),
    };
    Err(report.emit(table.at(key), table.path(key), message, None))
}

/// Client certificate and its private key: both or neither, and matching.
pub(super) fn client_certificate(
    table: &Table,
    report: &mut Report<'_>,
) -> Result<Option<ClientCertificate>, Reported> {
    const KEYS: [&str; 2] = ["client_certificate", "client_key"];
    let [certificate, key] = KEYS.map(|key| table.text_if_set(report, key, &parsers::PATH));
    let (certificate, key) = match (certificate?, key?) {
        (None, None) => return Ok(None),
        (Some(certificate), Some(key)) => (certificate, key),
        (certificate, _) => {
            let [given, missing] = if certificate.is_some() {
                KEYS
            } else {
                [KEYS[1], KEYS[0]]
            };
            let message = format!("`{given}` without `{missing}`");
            let help = Some(format!(
                "add `{missing}`: the certificate's chain and its private key, both PEM"
            ));
            return Err(report.emit(table.at(given), table.path(given), message, help));
        }
    };
    let [of_certificate, of_key] = KEYS;
    let chain = read_file(table, of_certificate, &certificate, report)?;
    let private = Zeroizing::new(read_file(table, of_key, &key, report)?);
    ClientCertificate::read(&chain, &private)
        .map(Some)
        .map_err(|error| {
            let (at, help) = match error {
                ClientCertificateError::NoCertificate => {
                    (of_certificate, "expected -----BEGIN CERTIFICATE-----")
                }
                ClientCertificateError::NoKey => {
                    (of_key, "expected -----BEGIN PRIVATE KEY-----, without a password")
                }
                ClientCertificateError::Key(_) => (of_key, "use an RSA or an ECDSA key"),
                ClientCertificateError::Mismatch => (of_key, "use the private key of this certificate"),
            };
            report.emit(
                table.at(at),
                table.path(at),
                error.to_string(),
                Some(help.to_owned()),
            )
        })
}
