//! Certificate folder: loads the CA and the server certificate, and generates missing ones.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::error::{TlsError, provider};
use super::leaf_issuer::CertAuthority;

const CA_DAYS: u64 = 3_650;
const SERVER_DAYS: u64 = 825;

/// A generated certificate is renewed this long before it expires.
pub(super) const RENEW_BEFORE: Duration = Duration::from_secs(30 * 86_400);

/// The certificate folder: `ca.pem`, `ca.key`, `server.pem`, `server.key`.
pub(super) struct CertDir<'a> {
    pub(super) path: &'a Path,
    /// Whether a generated CA gets name constraints for the names known now.
    pub(super) constrained: bool,
}

pub(super) type ChainAndKey = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl CertDir<'_> {
    pub(super) fn server(
        &self,
        authority: &CertAuthority,
        names: &[String],
        now: SystemTime,
    ) -> Result<ChainAndKey, TlsError> {
        let (certificate, key) = (self.path.join("server.pem"), self.path.join("server.key"));
        let names = &self.permitted_names(authority, names, now)?;
        if certificate.exists() && key.exists() {
            let chain = read_chain(&certificate)?;
            if verifies_at(&authority.certificate, &chain, names, now + RENEW_BEFORE) {
                return Ok((chain, read_key(&key)?));
            }
            tracing::info!("server certificate lacks a name or expires soon, generating a new one");
        }
        let server_key = KeyPair::generate()?;
        let server = server_params(names, now)?.signed_by(&server_key, &authority.issuer)?;
        write(&key, &server_key.serialize_pem(), 0o600)?;
        write(&certificate, &server.pem(), 0o644)?;
        Ok((read_chain(&certificate)?, read_key(&key)?))
    }

    /// The `names` that the CA's name constraints permit. Clients reject a certificate with a name outside of them
    /// entirely.
    fn permitted_names(
        &self,
        authority: &CertAuthority,
        names: &[String],
        now: SystemTime,
    ) -> Result<Vec<String>, TlsError> {
        let key = KeyPair::generate()?;
        let mut permitted = Vec::new();
        for name in names {
            let one = std::slice::from_ref(name);
            let chain = vec![
                server_params(one, now)?
                    .signed_by(&key, &authority.issuer)?
                    .der()
                    .clone(),
            ];
            if verifies_at(&authority.certificate, &chain, one, now) {
                permitted.push(name.clone());
            } else {
                tracing::warn!(
                    name, ca = %self.path.join("ca.pem").display(),
                    "the name constraints of the CA do not permit this name; run `ifnewer ca rotate`, reload, and \
                     have clients trust the new CA"
                );
            }
        }
        Ok(permitted)
    }

    /// The CA. It is generated once and then kept, because clients trust it.
    pub(super) fn authority(
        &self,
        names: &[String],
        hosts: &HashSet<String>,
        now: SystemTime,
    ) -> Result<CertAuthority, TlsError> {
        std::fs::create_dir_all(self.path).map_err(|error| TlsError::File {
            action: "cannot create the folder",
            path: self.path.into(),
            error,
        })?;
        let (certificate, key) = (self.path.join("ca.pem"), self.path.join("ca.key"));
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "ifnewer local CA");
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pair = if key.exists() {
            check_mode(&key)?;
            let text = std::fs::read_to_string(&key).map_err(|error| TlsError::File {
                action: "cannot read",
                path: key.clone(),
                error,
            })?;
            KeyPair::from_pem(&text).map_err(|error| malformed(&key, "a private key", &error))?
        } else {
            set_validity(&mut params, now, CA_DAYS);
            params.name_constraints = self.constrained.then(|| constraints(names, hosts));
            let pair = KeyPair::generate()?;
            let ca = params.self_signed(&pair)?;
            write(&key, &pair.serialize_pem(), 0o600)?;
            write(&certificate, &ca.pem(), 0o644)?;
            tracing::info!(
                "generated CA {}, clients that verify TLS must trust it",
                certificate.display()
            );
            pair
        };
        Ok(CertAuthority {
            issuer: Issuer::new(params, pair),
            certificate: read_chain(&certificate)?,
        })
    }
}

/// Name constraints (RFC 5280 §4.2.1.10): a stolen CA key can impersonate the cache and its upstreams, but no other
/// host. IP addresses are not constrained, because those of a machine change.
fn constraints(names: &[String], hosts: &HashSet<String>) -> NameConstraints {
    let is_name = |name: &&String| name.parse::<IpAddr>().is_err();
    let mut permitted: Vec<_> = names
        .iter()
        .map(|name| {
            name.strip_prefix("*.")
                .map_or_else(|| name.clone(), str::to_owned)
        })
        .chain(hosts.iter().cloned())
        .collect();
    permitted.retain(|name| is_name(&name));
    permitted.sort();
    permitted.dedup();
    NameConstraints {
        permitted_subtrees: permitted.into_iter().map(GeneralSubtree::DnsName).collect(),
        excluded_subtrees: Vec::new(),
    }
}

fn server_params(names: &[String], now: SystemTime) -> Result<CertificateParams, TlsError> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name.push(DnType::CommonName, "ifnewer");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, now, SERVER_DAYS);
    Ok(params)
}

/// Sets the validity, from a day ago for clients whose clock is slow.
pub(in crate::server) fn set_validity(params: &mut CertificateParams, now: SystemTime, days: u64) {
    let day = Duration::from_secs(86_400);
    let date = |at: SystemTime| {
        let text = humantime::format_rfc3339_seconds(at).to_string();
        let mut parts = text
            .splitn(3, '-')
            .map(|part| part.get(..part.len().min(4)).unwrap_or_default());
        let year = parts.next().and_then(|year| year.parse().ok()).unwrap_or(1970);
        let month = parts.next().and_then(|month| month.parse().ok()).unwrap_or(1);
        let day = parts
            .next()
            .and_then(|day| day.get(..2)?.parse().ok())
            .unwrap_or(1);
        rcgen::date_time_ymd(year, month, day)
    };
    params.not_before = date(now - day);
    params.not_after = date(now + day * u32::try_from(days).unwrap_or(u32::MAX));
}

pub(in crate::server) fn verifies_at(
    ca: &[CertificateDer<'static>],
    chain: &[CertificateDer<'static>],
    names: &[String],
    moment: SystemTime,
) -> bool {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in ca {
        if roots.add(certificate.clone()).is_err() {
            return false;
        }
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    let (Ok(verifier), Some((server, rest))) = (verifier, chain.split_first()) else {
        return false;
    };
    let moment =
        UnixTime::since_unix_epoch(moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    names.iter().all(|name| {
        let Ok(name) = ServerName::try_from(name.as_str()) else {
            return false;
        };
        verifier
            .verify_server_cert(server, rest, &name, &[], moment)
            .is_ok()
    })
}

pub(super) fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(chain) if chain.is_empty() => Err(malformed(path, "a certificate", &"it is empty")),
        Ok(chain) => Ok(chain),
        Err(rustls_pki_types::pem::Error::Io(error)) => Err(TlsError::File {
            action: "cannot read",
            path: path.into(),
            error,
        }),
        Err(error) => Err(malformed(path, "a certificate", &error)),
    }
}

pub(super) fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    check_mode(path)?;
    PrivateKeyDer::from_pem_file(path).map_err(|error| malformed(path, "a private key", &error))
}

fn check_mode(path: &Path) -> Result<(), TlsError> {
    let metadata = std::fs::metadata(path).map_err(|error| TlsError::File {
        action: "cannot read",
        path: path.into(),
        error,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    let others = mode & 0o077;
    if others == 0 {
        Ok(())
    } else {
        Err(TlsError::Exposed {
            path: path.into(),
            mode,
        })
    }
}

fn malformed(path: &Path, what: &'static str, detail: &dyn std::fmt::Display) -> TlsError {
    TlsError::Malformed {
        path: path.into(),
        what,
        detail: detail.to_string(),
    }
}

/// Writes to a temporary file and renames it, so that an interruption leaves no partial key.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    let temporary = path.with_extension("new");
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|error| TlsError::File {
        action: "cannot write",
        path: path.into(),
        error,
    })
}
