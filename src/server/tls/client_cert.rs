//! Client certificates (mTLS), verified against the configured CAs for client authentication (RFC 5280 §4.2.1.12).
//!
//! rustls verifies a certificate in the handshake and sends the alert for a wrong one. It is verified again for each
//! request, mostly from a cache: a connection may outlive its certificate, a resumed session does not send it again,
//! and the operator may have removed its CA.

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

use super::error::{TlsError, provider};
use crate::oci::digest::hmac_sha256;

/// Verified certificates remembered.
const VERIFIED_MAX: usize = 4096;

/// The certificate chain of a client.
#[derive(Debug)]
pub(in crate::server) struct ClientCert {
    chain: Vec<CertificateDer<'static>>,
    digest: [u8; 32],
}

impl ClientCert {
    /// The client's certificate first, then the intermediate ones.
    pub(in crate::server) fn new(chain: &[CertificateDer<'static>]) -> Self {
        let chain: Vec<_> = chain.iter().map(|der| der.clone().into_owned()).collect();
        // Each is prefixed by its length, so that different chains have different digests.
        let text = chain.iter().flat_map(|der| {
            let length = (der.len() as u64).to_be_bytes();
            length.into_iter().chain(der.iter().copied())
        });
        let digest = hmac_sha256(b"client certificate", &text.collect::<Vec<_>>());
        Self { chain, digest }
    }
}

/// Verifies client certificates against the configured CAs.
pub(in crate::server) struct ClientCaVerifier {
    verifier: Arc<dyn ClientCertVerifier>,
    known: Cache<[u8; 32], VerifiedCert>,
}

#[derive(Clone)]
struct VerifiedCert {
    name: Arc<str>,
    /// The earliest expiry in the chain. The certificate is verified again from then on.
    until: SystemTime,
}

impl ClientCaVerifier {
    /// `roots`: the CAs, DER.
    pub(in crate::server) fn new(roots: &[Vec<u8>]) -> Result<Self, TlsError> {
        Ok(Self {
            verifier: verifier(roots)?,
            known: Cache::new(VERIFIED_MAX),
        })
    }

    /// The subject name of a valid certificate, or why it is rejected.
    pub(in crate::server) fn identify(
        &self,
        shown: &ClientCert,
        now: SystemTime,
    ) -> Result<Arc<str>, String> {
        if let Some(known) = self.known.get(&shown.digest)
            && now < known.until
        {
            return Ok(known.name);
        }
        let (own, others) = shown.chain.split_first().ok_or("it is empty")?;
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.verifier
            .verify_client_cert(own, others, UnixTime::since_unix_epoch(since))
            .map_err(|error| describe(&error))?;
        let name = subject_name(own)
            .ok_or("it has no usable name: a common name, or else a URI, DNS name or e-mail address")?;
        let ends = shown.chain.iter().map(not_after);
        let known = VerifiedCert {
            name: Arc::from(name),
            until: ends.min().flatten().unwrap_or(SystemTime::UNIX_EPOCH),
        };
        self.known.insert(shown.digest, known.clone());
        Ok(known.name)
    }
}

/// Accepts certificates of these CAs, and connections without one, which get an HTTP error instead.
pub(in crate::server) fn verifier(roots: &[Vec<u8>]) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
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

/// Why the client certificate failed the handshake, if it did.
pub(in crate::server) fn rejection_reason(error: &std::io::Error) -> Option<String> {
    match error.get_ref()?.downcast_ref::<Error>()? {
        error @ Error::InvalidCertificate(_) => Some(describe(error)),
        _ => None,
    }
}

fn describe(error: &Error) -> String {
    match error {
        // A CA with the same name and another key.
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
        ) => "it is not for client authentication (extended key usage)".to_owned(),
        error => error.to_string(),
    }
}

/// The subject's common name, or else the first URI, DNS name or e-mail address of the alternative names. `None` for
/// several common names, and for names that no allow list could contain.
fn subject_name(certificate: &CertificateDer<'_>) -> Option<String> {
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

pub(in crate::server) fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests;
