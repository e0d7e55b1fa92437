//! Verifier of server certificates: webpki, and pinned certificates in addition.
//!
//! webpki rejects a server certificate with CA:TRUE, and a leaf that no trust anchor issued. OpenSSL (with partial
//! chains, as curl uses it) and Go accept either if it is itself trusted, and so do docker and containerd. `openssl
//! req -x509` creates the first kind.

use std::collections::HashSet;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Version;

use super::TlsError;
use super::failure::untrusted;
use crate::oci::digest::{Algorithm, Digest};

/// Trusted certificates: as authorities, and each as a pinned server certificate.
#[derive(Clone, Debug)]
pub(in crate::upstream) struct Trust {
    anchors: Arc<RootCertStore>,
    pinned: Arc<HashSet<Digest>>,
}

impl Trust {
    /// The operating system's certificates, or the bundled ones if there are none (scratch images). Reads files.
    pub(in crate::upstream) fn system() -> Trust {
        let native = rustls_native_certs::load_native_certs();
        let mut trust = Trust {
            anchors: Arc::new(RootCertStore::empty()),
            pinned: Arc::default(),
        };
        let ignored = native.certs.iter().filter(|der| !trust.add(der)).count();
        tracing::debug!(
            added = trust.pinned.len(),
            ignored,
            errors = native.errors.len(),
            "read the system's certificate authorities"
        );
        if trust.anchors.is_empty() {
            Arc::make_mut(&mut trust.anchors).extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        trust
    }

    /// These certificates and further ones, in DER.
    pub(in crate::upstream) fn with(&self, further: &[Vec<u8>]) -> Result<Trust, TlsError> {
        let mut trust = self.clone();
        for (position, der) in further.iter().enumerate() {
            if !trust.add(&CertificateDer::from(der.as_slice())) {
                return Err(TlsError::Root(position));
            }
        }
        Ok(trust)
    }

    /// The number of trusted authorities.
    pub(in crate::upstream) fn anchors(&self) -> usize {
        self.anchors.len()
    }

    fn add(&mut self, der: &CertificateDer<'_>) -> bool {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else {
            return false;
        };
        let may_issue = may_issue(&certificate);
        if may_issue
            && Arc::make_mut(&mut self.anchors)
                .add(der.clone().into_owned())
                .is_err()
        {
            return false;
        }
        Arc::make_mut(&mut self.pinned).insert(Digest::of(Algorithm::Sha256, der));
        true
    }

    pub(super) fn verifier(&self) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.anchors), provider)
            .build()
            .map_err(|error| TlsError::Provider(error.to_string()))?;
        Ok(Arc::new(Verifier {
            webpki,
            pinned: Arc::clone(&self.pinned),
        }))
    }
}

/// Whether the certificate may issue others (RFC 5280 §4.2.1.9), so that it becomes a trust anchor. A pinned leaf must
/// not, because webpki accepts any anchor as an authority.
fn may_issue(certificate: &X509Certificate<'_>) -> bool {
    certificate.version() != X509Version::V3 || certificate.is_ca()
}

#[derive(Debug)]
struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    pinned: Arc<HashSet<Digest>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.webpki
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let verified = match verified {
            Err(_) if self.pinned.contains(&Digest::of(Algorithm::Sha256, end_entity)) => {
                pinned(end_entity, server_name, now)
            }
            verified => verified,
        };
        verified.map_err(|error| untrusted(error, end_entity, server_name, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Verifies a pinned certificate: validity period, name and extended key usage.
fn pinned(
    certificate: &CertificateDer<'_>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Result<ServerCertVerified, Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    let Ok((_, read)) = X509Certificate::from_der(certificate) else {
        return Err(CertificateError::BadEncoding.into());
    };
    let seconds =
        |at: i64| UnixTime::since_unix_epoch(std::time::Duration::from_secs(at.max(0).unsigned_abs()));
    let not_before = seconds(read.validity().not_before.timestamp());
    let not_after = seconds(read.validity().not_after.timestamp());
    if now < not_before {
        return Err(CertificateError::NotValidYetContext {
            time: now,
            not_before,
        }
        .into());
    }
    if now > not_after {
        return Err(CertificateError::ExpiredContext { time: now, not_after }.into());
    }
    // RFC 5280 §4.2.1.12: without the extension, any purpose.
    let purposes = read
        .extended_key_usage()
        .map_err(|_| CertificateError::BadEncoding)?;
    if purposes.is_some_and(|purposes| !purposes.value.server_auth && !purposes.value.any) {
        return Err(CertificateError::InvalidPurpose.into());
    }
    verify_server_name(&parsed, name)?;
    Ok(ServerCertVerified::assertion())
}
