//! Classification of TLS errors: from a rustls error to a [`TlsFailure`], and to a description with names and dates for
//! the operator.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, OtherError, RootCertStore};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Name;

use crate::oci::failure::TlsFailure;

/// Maximum number of certificate names in a description.
const NAMES_MAX: usize = 5;
/// Maximum length of a name in a description.
const NAME_CHARS_MAX: usize = 100;

/// A rejected server certificate with its description, created where the certificate is available.
#[derive(Debug)]
struct Untrusted {
    failure: TlsFailure,
    detail: String,
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Untrusted {}

/// Adds classification and description to a certificate error.
pub(super) fn untrusted(
    error: Error,
    certificate: &CertificateDer<'_>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Error {
    let Error::InvalidCertificate(why) = &error else {
        return error;
    };
    let read = X509Certificate::from_der(certificate).map(|(_, read)| read).ok();
    let (failure, detail) = match why {
        CertificateError::Expired => (TlsFailure::Expired, "its certificate has expired".to_owned()),
        CertificateError::ExpiredContext { not_after, .. } => (
            TlsFailure::Expired,
            format!(
                "{} expired on {}",
                which(read.as_ref(), *not_after),
                date(*not_after)
            ),
        ),
        CertificateError::NotValidYet => (
            TlsFailure::NotYetValid,
            "its certificate is not valid yet".to_owned(),
        ),
        CertificateError::NotValidYetContext { not_before, .. } => (
            TlsFailure::NotYetValid,
            format!(
                "its certificate is valid from {} on; check the clocks",
                date(*not_before)
            ),
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
            TlsFailure::WrongName,
            format!(
                "its certificate is for {}, not for {}",
                read.as_ref().map_or_else(|| "other names".to_owned(), names),
                name.to_str()
            ),
        ),
        CertificateError::UnknownIssuer | CertificateError::BadSignature | CertificateError::Other(_)
            if read.as_ref().is_some_and(|read| read.subject() == read.issuer())
                && is_self_signed(certificate, name, now) =>
        {
            (
                TlsFailure::SelfSigned,
                "its certificate is self-signed; if it is correct, add it to `ca_file`".to_owned(),
            )
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => (
            TlsFailure::UnknownIssuer,
            format!(
                "its certificate is issued by {}, an unknown authority; if it is correct, add the \
                     authority's certificate to `ca_file`",
                read.as_ref()
                    .map_or_else(|| "an unnamed issuer".to_owned(), |read| issuer(read.issuer()))
            ),
        ),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => (
            TlsFailure::WrongPurpose,
            "its certificate is not for servers (extended key usage)".to_owned(),
        ),
        CertificateError::Other(_) if read.as_ref().is_some_and(|read| read.is_ca()) => (
            TlsFailure::WrongPurpose,
            "its certificate is an authority's (CA:TRUE); if it is correct, add it to `ca_file`".to_owned(),
        ),
        other => (TlsFailure::Other, other.to_string()),
    };
    let untrusted = Untrusted { failure, detail };
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(untrusted))))
}

/// Whether the certificate is signed by its own key. Equal subject and issuer do not prove it.
fn is_self_signed(certificate: &CertificateDer<'_>, name: &ServerName<'_>, now: UnixTime) -> bool {
    let mut itself = RootCertStore::empty();
    if itself.add(certificate.clone().into_owned()).is_err() {
        return false;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let Ok(webpki) = WebPkiServerVerifier::builder_with_provider(Arc::new(itself), provider).build() else {
        return false;
    };
    !matches!(
        webpki.verify_server_cert(certificate, &[], name, &[], now),
        Err(Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature
        ))
    )
}

/// The TLS error inside an I/O error, classified.
pub(super) fn of(error: &io::Error) -> Option<(TlsFailure, String)> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    Some(classify(error))
}

/// Classifies a rustls error.
pub(super) fn classify(error: &Error) -> (TlsFailure, String) {
    let text = |failure, detail: &str| (failure, detail.to_owned());
    match error {
        Error::InvalidCertificate(CertificateError::Other(other)) => {
            match other.0.downcast_ref::<Untrusted>() {
                Some(untrusted) => (untrusted.failure, untrusted.detail.clone()),
                None => (TlsFailure::Other, other.0.to_string()),
            }
        }
        Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied,
        ) => (
            TlsFailure::ClientCertificate,
            format!(
                "the server requires another client certificate, or one at all ({error}); see `client_certificate` and \
                 `client_key`"
            ),
        ),
        Error::AlertReceived(AlertDescription::UnrecognisedName) => {
            text(TlsFailure::WrongName, "the server does not know this host name")
        }
        Error::AlertReceived(
            AlertDescription::ProtocolVersion
            | AlertDescription::HandshakeFailure
            | AlertDescription::InsufficientSecurity,
        )
        | Error::PeerIncompatible(_) => (
            TlsFailure::Version,
            format!("no protocol version (TLS 1.2, 1.3) and cipher suite in common: {error}"),
        ),
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => text(
            TlsFailure::NotTls,
            "the server does not speak TLS; if it is plain HTTP, use http:// in `url`",
        ),
        error => (TlsFailure::Other, error.to_string()),
    }
}

/// The certificate with this expiry: the server's own, or an intermediate.
fn which(read: Option<&X509Certificate<'_>>, not_after: UnixTime) -> &'static str {
    let own = read.and_then(|read| u64::try_from(read.validity().not_after.timestamp()).ok());
    if own.is_none_or(|own| own == not_after.as_secs()) {
        "its certificate"
    } else {
        "the certificate of an issuing authority"
    }
}

fn date(at: UnixTime) -> String {
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(at.as_secs()));
    let text = at.map(|at| humantime::format_rfc3339_seconds(at).to_string());
    text.and_then(|text| text.get(..10).map(str::to_owned))
        .unwrap_or_else(|| "an unknown date".to_owned())
}

/// The subject alternative names, up to the maximum.
fn names(read: &X509Certificate<'_>) -> String {
    let alternatives = read.subject_alternative_name().ok().flatten();
    let names = alternatives.iter().flat_map(|names| &names.value.general_names);
    let listed = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(printable(name)),
        GeneralName::IPAddress(bytes) => address(bytes).map(|address| address.to_string()),
        _ => None,
    });
    let listed: Vec<_> = listed.collect();
    let more = listed.len().saturating_sub(NAMES_MAX);
    let mut text = listed.into_iter().take(NAMES_MAX).collect::<Vec<_>>().join(", ");
    if text.is_empty() {
        "no host (it has no subject alternative name, and a common name does not count)"
            .clone_into(&mut text);
    } else if more > 0 {
        text = format!("{text} and {more} more");
    }
    text
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn issuer(name: &X509Name<'_>) -> String {
    let common = name.iter_common_name().next().and_then(|name| name.as_str().ok());
    let complete = || name.to_string();
    format!("\"{}\"", printable(&common.map_or_else(complete, str::to_owned)))
}

/// Makes an untrusted text safe for a terminal.
fn printable(text: &str) -> String {
    let fit = |c: char| {
        if c.is_ascii_graphic() || c == ' ' || (c.is_alphanumeric()) {
            c
        } else {
            '?'
        }
    };
    text.chars().take(NAME_CHARS_MAX).map(fit).collect()
}
