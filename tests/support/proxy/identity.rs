//! Client certificates for tests.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;

/// A client CA.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key.
#[derive(Clone)]
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: Arc<Vec<u8>>,
}

impl Authority {
    /// Of this name.
    pub fn new(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// Its certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate of a client with this common name.
    pub fn client(&self, common_name: &str) -> Identity {
        self.signed(|params| params.distinguished_name.push(DnType::CommonName, common_name))
    }

    /// One without a common name, with this URI as its name.
    pub fn workload(&self, uri: &str) -> Identity {
        let uri = SanType::URI(uri.try_into().unwrap());
        self.signed(|params| params.subject_alt_names.push(uri))
    }

    /// An expired one.
    pub fn expired(&self, common_name: &str) -> Identity {
        self.signed(|params| {
            params.distinguished_name.push(DnType::CommonName, common_name);
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        })
    }

    /// One for server authentication.
    pub fn server(&self, common_name: &str) -> Identity {
        self.signed(|params| {
            params.distinguished_name.push(DnType::CommonName, common_name);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        })
    }

    fn signed(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Identity {
            certificate,
            key: Arc::new(key.serialize_der()),
        }
    }
}

impl Identity {
    /// A client with this certificate that resumes its sessions with a server of this CA.
    pub fn remembering(&self, ca_pem: &str) -> tokio_rustls::TlsConnector {
        super::client::connector(ca_pem, &[], Some(self))
    }

    /// Certificate and key, PEM, as a configuration names them.
    pub fn pem(&self) -> (String, String) {
        (
            pem("CERTIFICATE", &self.certificate),
            pem("PRIVATE KEY", &self.key),
        )
    }

    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.to_vec()).unwrap()
    }
}

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::prelude::BASE64_STANDARD.encode(der);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}
