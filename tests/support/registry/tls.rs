//! A CA for one test, and server certificates of every kind.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use std::sync::Arc;

pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(super) fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "scripted upstream");
        let pem = params.self_signed(&key).unwrap().pem();
        Authority {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for `localhost` and `127.0.0.1`; h2 and HTTP/1.1 by ALPN.
    pub(super) fn server_config(&self) -> Arc<rustls::ServerConfig> {
        self.issues(&params(&["localhost", "127.0.0.1"])).config(None)
    }

    fn issues(&self, params: &CertificateParams) -> Presented {
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Presented::new(&leaf, &key)
    }
}

fn params(names: &[&str]) -> CertificateParams {
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    CertificateParams::new(names).unwrap()
}

/// A server certificate with its key, and as PEM for those who pin it.
pub struct Presented {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pub pem: String,
}

impl Presented {
    fn new(certificate: &rcgen::Certificate, key: &KeyPair) -> Presented {
        Presented {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            pem: certificate.pem(),
        }
    }

    /// As `openssl req -x509` makes it: its own authority (CA:TRUE).
    pub fn self_signed(names: &[&str]) -> Presented {
        let mut params = params(names);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Presented::signs_itself(&params)
    }

    /// Signed with its own key, and no authority.
    pub fn self_signed_leaf(names: &[&str]) -> Presented {
        let mut params = params(names);
        params.is_ca = IsCa::ExplicitNoCa;
        Presented::signs_itself(&params)
    }

    /// An expired [`Presented::self_signed`].
    pub fn self_signed_and_expired(names: &[&str]) -> Presented {
        let mut params = params(names);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 2, 3);
        Presented::signs_itself(&params)
    }

    /// Issued by an unknown CA.
    pub fn of_an_unknown_authority(names: &[&str]) -> Presented {
        Authority::new().issues(&params(names))
    }

    /// Issued with the key of a leaf that others pin.
    pub fn issued_by_a_leaf(names: &[&str]) -> (Presented, String) {
        let (mut pinned, key) = (params(&["pinned.example"]), KeyPair::generate().unwrap());
        pinned.is_ca = IsCa::ExplicitNoCa;
        pinned
            .distinguished_name
            .push(rcgen::DnType::CommonName, "pinned");
        let pem = pinned.self_signed(&key).unwrap().pem();
        let own = KeyPair::generate().unwrap();
        let issued = params(names).signed_by(&own, &Issuer::new(pinned, key)).unwrap();
        (Presented::new(&issued, &own), pem)
    }

    fn signs_itself(params: &CertificateParams) -> Presented {
        let key = KeyPair::generate().unwrap();
        Presented::new(&params.self_signed(&key).unwrap(), &key)
    }

    /// h2 and HTTP/1.1 by ALPN. With `client_ca`, clients are asked for a certificate of that authority, and refused
    /// without one if they must.
    fn config(self, client_ca: Option<(&str, bool)>) -> Arc<rustls::ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let config = match client_ca {
            None => config.with_no_client_auth(),
            Some((pem, must)) => {
                let mut roots = rustls::RootCertStore::empty();
                roots
                    .add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
                    .unwrap();
                let mut clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                if !must {
                    clients = clients.allow_unauthenticated();
                }
                config.with_client_cert_verifier(clients.build().unwrap())
            }
        };
        let mut config = config.with_single_cert(self.chain, self.key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Arc::new(config)
    }
}

impl super::Upstream {
    /// Presents this certificate from the next connection on.
    pub fn presents(&self, presented: Presented) {
        let config = presented.config(None);
        self.state(|state| state.tls = Some(config));
        self.shared.hang_up();
    }

    /// Speaks only with clients that show a certificate of this authority, from the next connection on. Its own
    /// certificate stays as it is.
    pub fn wants_client_certificates_of(&self, ca_pem: &str) {
        self.asks(ca_pem, true);
    }

    /// The same, and speaks with all others too.
    pub fn asks_for_client_certificates_of(&self, ca_pem: &str) {
        self.asks(ca_pem, false);
    }

    fn asks(&self, ca_pem: &str, must: bool) {
        let authority = self.authority.as_ref().unwrap();
        let own = authority.issues(&params(&["localhost", "127.0.0.1"]));
        let config = own.config(Some((ca_pem, must)));
        self.state(|state| state.tls = Some(config));
        self.shared.hang_up();
    }

    /// Speaks plain HTTP from the next connection on, at the same port.
    pub fn speaks_plain(&self) {
        self.state(|state| state.tls = None);
        self.shared.hang_up();
    }

    /// Connections on which a client certificate was shown.
    pub fn client_certificates(&self) -> usize {
        self.state(|state| state.client_certificates)
    }
}
