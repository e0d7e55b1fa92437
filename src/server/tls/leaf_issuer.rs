//! Leaf certificates for upstream hosts, issued by the CA during the client's handshake.
//!
//! A leaf is valid for a week at most and kept in memory only, because clients trust the CA alone. Whether the CA's
//! name constraints permit a host is tested as a client would: the leaf is issued, then verified.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::cert_dir::{set_validity, verifies_at};
use crate::clock::Clock;

/// A leaf is backdated by a day and expires in six days.
const LEAF_DAYS: u64 = 6;
/// A leaf is replaced this long before it expires.
const RENEW_BEFORE: Duration = Duration::from_secs(3 * 86_400);
/// Leaves cached, one per upstream host.
const LEAVES_MAX: usize = 1024;
/// RFC 5280, ub-common-name.
const COMMON_NAME_BYTES_MAX: usize = 64;

/// Why there is no certificate for a host.
#[derive(Clone, Debug, thiserror::Error)]
pub(in crate::server) enum LeafError {
    /// The name constraints of the CA do not permit the host.
    #[error(
        "the name constraints of the CA do not permit {0}, which was configured later; run `ifnewer ca rotate`, reload, \
         and have clients trust the new CA"
    )]
    NotPermitted(Arc<str>),
    /// Generation failed.
    #[error("failed to issue a certificate for {0}: {1}")]
    Failed(Arc<str>, String),
}

/// The CA: its key, and the certificate that clients trust.
pub(in crate::server) struct CertAuthority {
    pub(in crate::server) issuer: Issuer<'static, KeyPair>,
    pub(in crate::server) certificate: Vec<CertificateDer<'static>>,
}

/// Issues leaves, each once.
pub(in crate::server) struct LeafIssuer {
    authority: CertAuthority,
    provider: Arc<CryptoProvider>,
    clock: Clock,
    leaves: Cache<Arc<str>, Leaf>,
}

#[derive(Clone)]
struct Leaf {
    made: Result<Arc<CertifiedKey>, LeafError>,
    made_at: SystemTime,
    renew_at: SystemTime,
}

impl LeafIssuer {
    pub(in crate::server) fn new(
        authority: CertAuthority,
        provider: Arc<CryptoProvider>,
        clock: Clock,
    ) -> Self {
        Self {
            authority,
            provider,
            clock,
            leaves: Cache::new(LEAVES_MAX),
        }
    }

    /// The leaf for `host` (a name or an address without port). Concurrent callers wait for the first to issue it.
    pub(in crate::server) fn leaf(&self, host: &str) -> Result<Arc<CertifiedKey>, LeafError> {
        let now = self.clock.now();
        let host: Arc<str> = host.into();
        // If the clock was set back, a leaf may not be valid yet.
        let is_good = |leaf: &Leaf| leaf.made_at <= now + Duration::from_secs(86_400) && now < leaf.renew_at;
        if self.leaves.get(&host).is_some_and(|leaf| !is_good(&leaf)) {
            self.leaves.remove(&host);
        }
        let make = || Ok::<_, std::convert::Infallible>(self.make(&host, now));
        match self.leaves.get_or_insert_with(&host, make) {
            Ok(leaf) => leaf.made,
            Err(never) => match never {},
        }
    }

    fn make(&self, host: &Arc<str>, now: SystemTime) -> Leaf {
        let made = self.sign(host, now);
        match &made {
            Ok(_) => tracing::debug!(%host, "made a certificate"),
            Err(error) => {
                tracing::warn!(%error, "failed to issue a leaf certificate, host cannot be intercepted");
            }
        }
        let renew_at = now + Duration::from_secs(LEAF_DAYS * 86_400) - RENEW_BEFORE;
        Leaf {
            made,
            made_at: now,
            renew_at,
        }
    }

    fn sign(&self, host: &Arc<str>, now: SystemTime) -> Result<Arc<CertifiedKey>, LeafError> {
        let failed = |error: &dyn std::fmt::Display| LeafError::Failed(Arc::clone(host), error.to_string());
        let mut params = CertificateParams::new(vec![host.to_string()]).map_err(|error| failed(&error))?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        if host.len() <= COMMON_NAME_BYTES_MAX {
            params.distinguished_name.push(DnType::CommonName, &**host);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, LEAF_DAYS);
        let key = KeyPair::generate().map_err(|error| failed(&error))?;
        let leaf = params
            .signed_by(&key, &self.authority.issuer)
            .map_err(|error| failed(&error))?;
        let chain = vec![leaf.der().clone()];
        if !verifies_at(&self.authority.certificate, &chain, &[host.to_string()], now) {
            return Err(LeafError::NotPermitted(Arc::clone(host)));
        }
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        CertifiedKey::from_der(chain, key.into(), &self.provider)
            .map(Arc::new)
            .map_err(|error| failed(&error))
    }
}

/// Chooses the certificate by SNI: a leaf for an upstream host, the server certificate otherwise.
pub(in crate::server) struct SniResolver {
    own: Arc<CertifiedKey>,
    issuer: Option<Arc<LeafIssuer>>,
    hosts: HashSet<String>,
}

impl SniResolver {
    pub(in crate::server) fn new(
        own: Arc<CertifiedKey>,
        issuer: Option<Arc<LeafIssuer>>,
        hosts: HashSet<String>,
    ) -> Self {
        Self { own, issuer, hosts }
    }
}

impl ResolvesServerCert for SniResolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let issued = name
            .filter(|name| self.hosts.contains(name))
            .zip(self.issuer.as_ref())
            .and_then(|(name, issuer)| issuer.leaf(&name).ok());
        Some(issued.unwrap_or_else(|| Arc::clone(&self.own)))
    }
}

/// A fixed certificate, for a client that named its host by `CONNECT` and sends no SNI.
#[derive(Debug)]
pub(in crate::server) struct FixedCert(pub(in crate::server) Arc<CertifiedKey>);

impl ResolvesServerCert for FixedCert {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl std::fmt::Debug for SniResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ByName")
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}
