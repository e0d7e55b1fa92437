//! Certificates by which clients show who they are: those of the CAs that the operator named, for client authentication
//! (RFC 5280 §4.2.1.12).
//!
//! rustls looks at one in the handshake, where a wrong one ends the connection with the alert that says why. It is looked
//! at again for each request, from memory mostly: a connection may outlive its certificate, a resumed session was not
//! asked for it again, and what the operator takes back counts for who is there already.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, Error, RootCertStore};
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use super::tls::{TlsError, provider};
use crate::oci::digest::hmac_sha256;

/// Certificates found right that are known again without another check.
const KNOWN_MAX: usize = 4096;

/// What a client showed in its handshake.
#[derive(Debug)]
pub(super) struct Certificate {
    chain: Vec<CertificateDer<'static>>,
    digest: [u8; 32],
}

impl Certificate {
    /// Its own certificate first, then those that lead from it to a CA.
    pub(super) fn new(chain: &[CertificateDer<'static>]) -> Self {
        let chain: Vec<_> = chain.iter().map(|der| der.clone().into_owned()).collect();
        // Each with its length, so that no two chains are one text.
        let text = chain.iter().flat_map(|der| {
            let length = (der.len() as u64).to_be_bytes();
            length.into_iter().chain(der.iter().copied())
        });
        let digest = hmac_sha256(b"client certificate", &text.collect::<Vec<_>>());
        Self { chain, digest }
    }
}

/// Who vouches for clients.
pub(super) struct Authorities {
    verifier: Arc<dyn ClientCertVerifier>,
    known: Cache<[u8; 32], Known>,
}

#[derive(Clone)]
struct Known {
    name: Arc<str>,
    /// The first end of all that was shown; from then on it is looked at anew.
    until: SystemTime,
}

impl Authorities {
    /// `roots`: the CAs, DER.
    pub(super) fn new(roots: &[Vec<u8>]) -> Result<Self, TlsError> {
        Ok(Self {
            verifier: verifier(roots)?,
            known: Cache::new(KNOWN_MAX),
        })
    }

    /// Whose certificate it is, or why it counts for nothing.
    pub(super) fn holder(&self, shown: &Certificate, now: SystemTime) -> Result<Arc<str>, String> {
        if let Some(known) = self.known.get(&shown.digest)
            && now < known.until
        {
            return Ok(known.name);
        }
        let (own, others) = shown.chain.split_first().ok_or("it is empty")?;
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.verifier
            .verify_client_cert(own, others, UnixTime::since_unix_epoch(since))
            .map_err(|error| why(&error))?;
        let name =
            name(own).ok_or("it names nobody: a common name, or else a URI, DNS name or e-mail address")?;
        let ends = shown.chain.iter().map(end);
        let known = Known {
            name: Arc::from(name),
            until: ends.min().flatten().unwrap_or(SystemTime::UNIX_EPOCH),
        };
        self.known.insert(shown.digest, known.clone());
        Ok(known.name)
    }
}

/// Takes certificates of these CAs, and connections without any: what those are told is said in HTTP.
pub(super) fn verifier(roots: &[Vec<u8>]) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store
            .add(CertificateDer::from(root.clone()))
            .map_err(|error| TlsError::ClientCa(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| TlsError::ClientCa(error.to_string()))
}

/// Why a handshake failed, if it was for the client's certificate.
pub(super) fn refused(error: &std::io::Error) -> Option<String> {
    match error.get_ref()?.downcast_ref::<Error>()? {
        error @ Error::InvalidCertificate(_) => Some(why(error)),
        _ => None,
    }
}

fn why(error: &Error) -> String {
    match error {
        // A CA of the same name with another key signed it badly.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "no CA of `access.client_ca` has signed it".to_owned()
        }
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "it has expired".to_owned()
        }
        Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => "it is not valid yet; is a clock wrong?".to_owned(),
        Error::InvalidCertificate(
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
        ) => "it is not made for clients (extended key usage)".to_owned(),
        error => error.to_string(),
    }
}

/// The subject's common name; without one the first URI, DNS name or e-mail address among the alternative names. Several
/// common names, or one that no list could name, are nobody's.
fn name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut common = certificate.subject().iter_common_name();
    let name = match (common.next(), common.next()) {
        (Some(name), None) => name.as_str().ok()?.to_owned(),
        (Some(_), Some(_)) => return None,
        (None, _) => {
            let alternatives = certificate.subject_alternative_name().ok()??;
            let mut names = alternatives.value.general_names.iter();
            names.find_map(|name| match name {
                GeneralName::URI(name) | GeneralName::DNSName(name) | GeneralName::RFC822Name(name) => {
                    Some((*name).to_owned())
                }
                _ => None,
            })?
        }
    };
    (!name.is_empty() && !name.chars().any(char::is_control)).then_some(name)
}

pub(super) fn end(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests;
