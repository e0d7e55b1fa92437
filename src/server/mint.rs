//! Certificates for the hosts of configured upstreams, made by our own CA while a client waits.
//!
//! A leaf lives for a week at most and only in memory; a host's trust is in the CA alone. Whether the CA may vouch for a
//! host (see `tls`, name constraints) is found out the way a client will: the leaf is made, then verified.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::tls::{good_until, lasting};
use crate::clock::Clock;

/// A leaf is backdated by a day and ends six days from now.
const LEAF_DAYS: u64 = 6;
/// A leaf that ends sooner than this is replaced.
const RENEW_BEFORE: Duration = Duration::from_secs(3 * 86_400);
/// Leaves kept. There is one for each host of an upstream.
const LEAVES_MAX: usize = 1024;
/// RFC 5280, ub-common-name.
const COMMON_NAME_BYTES_MAX: usize = 64;

/// Why there is no certificate for a host.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum MintError {
    /// The CA was made for other names.
    #[error(
        "the CA may not vouch for {0}: it was made before {0} was configured. Run `ifnewer ca rotate`, reload, and have \
         clients trust the new one"
    )]
    NotVouched(Arc<str>),
    /// The certificate could not be made.
    #[error("cannot make a certificate for {0}: {1}")]
    Failed(Arc<str>, String),
}

/// Our CA: its key, and the certificate that clients trust.
pub(super) struct Authority {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) certificate: Vec<CertificateDer<'static>>,
}

/// Makes leaves, each once.
pub(super) struct Mint {
    authority: Authority,
    provider: Arc<CryptoProvider>,
    clock: Clock,
    leaves: Cache<Arc<str>, Leaf>,
}

#[derive(Clone)]
struct Leaf {
    made: Result<Arc<CertifiedKey>, MintError>,
    made_at: SystemTime,
    renew_at: SystemTime,
}

impl Mint {
    pub(super) fn new(authority: Authority, provider: Arc<CryptoProvider>, clock: Clock) -> Self {
        Self {
            authority,
            provider,
            clock,
            leaves: Cache::new(LEAVES_MAX),
        }
    }

    /// The certificate for `host` (a name or an address without port). Made by the first who asks; others wait for it.
    pub(super) fn leaf(&self, host: &str) -> Result<Arc<CertifiedKey>, MintError> {
        let now = self.clock.now();
        let host: Arc<str> = host.into();
        // After the clock was set back, a leaf may not be valid yet.
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
            Err(error) => tracing::warn!(%error, "this host cannot be intercepted"),
        }
        let renew_at = now + Duration::from_secs(LEAF_DAYS * 86_400) - RENEW_BEFORE;
        Leaf {
            made,
            made_at: now,
            renew_at,
        }
    }

    fn sign(&self, host: &Arc<str>, now: SystemTime) -> Result<Arc<CertifiedKey>, MintError> {
        let failed = |error: &dyn std::fmt::Display| MintError::Failed(Arc::clone(host), error.to_string());
        let mut params = CertificateParams::new(vec![host.to_string()]).map_err(|error| failed(&error))?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        if host.len() <= COMMON_NAME_BYTES_MAX {
            params.distinguished_name.push(DnType::CommonName, &**host);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        lasting(&mut params, now, LEAF_DAYS);
        let key = KeyPair::generate().map_err(|error| failed(&error))?;
        let leaf = params
            .signed_by(&key, &self.authority.issuer)
            .map_err(|error| failed(&error))?;
        let chain = vec![leaf.der().clone()];
        if !good_until(&self.authority.certificate, &chain, &[host.to_string()], now) {
            return Err(MintError::NotVouched(Arc::clone(host)));
        }
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        CertifiedKey::from_der(chain, key.into(), &self.provider)
            .map(Arc::new)
            .map_err(|error| failed(&error))
    }
}

/// Which certificate a client sees: for a host of an upstream one from the mint, for any other name our own.
pub(super) struct ByName {
    own: Arc<CertifiedKey>,
    mint: Option<Arc<Mint>>,
    hosts: HashSet<String>,
}

impl ByName {
    pub(super) fn new(own: Arc<CertifiedKey>, mint: Option<Arc<Mint>>, hosts: HashSet<String>) -> Self {
        Self { own, mint, hosts }
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let minted = name
            .filter(|name| self.hosts.contains(name))
            .zip(self.mint.as_ref())
            .and_then(|(name, mint)| mint.leaf(&name).ok());
        Some(minted.unwrap_or_else(|| Arc::clone(&self.own)))
    }
}

/// The certificate of one host, for a client that need not name it: it did so by `CONNECT`.
#[derive(Debug)]
pub(super) struct Only(pub(super) Arc<CertifiedKey>);

impl ResolvesServerCert for Only {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl std::fmt::Debug for ByName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ByName")
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}
