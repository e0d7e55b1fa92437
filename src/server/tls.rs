//! The certificate that clients see: made from a CA of our own at the first start, or brought by the operator.
//!
//! Keys are files of mode 0600; a wider one stops the start, because a CA key that others can read lets them be any
//! registry to every host that trusts it.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints,
};
use rustls::ServerConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{Acceptor, NoClientAuth, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};

use super::certificate::{self, Certificate};
use super::mint::{Authority, ByName, Mint, MintError, Only};
use crate::clock::Clock;
use crate::config::Tls;

const CA_DAYS: u64 = 3_650;
const SERVER_DAYS: u64 = 825;

/// A certificate of ours that ends sooner than this is made anew at the next start.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 86_400);

/// How much encrypted data may wait for the socket. rustls' 64 KiB would cut our steps of 256 KiB into four writes.
const WRITE_BUFFER_BYTES_MAX: usize = 512 * 1024;

/// Why there is no TLS. The operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{deed} {}: {error}", path.display())]
    File {
        /// What was tried.
        deed: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        error: io::Error,
    },
    /// A key that others may read.
    #[error("the key {} may be read by others (mode {mode:o}); run: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file that is not what it should be.
    #[error("{} does not hold {what}: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why it does not.
        detail: String,
    },
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Minting(#[from] rcgen::Error),
    /// The CAs of client certificates cannot be used.
    #[error("access.client_ca: {0}")]
    ClientCa(String),
    /// Certificate and key do not go together, or the like.
    #[error("the certificate cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// Speaks TLS with clients.
pub struct ServerTls {
    acceptor: TlsAcceptor,
    mint: Option<Arc<Mint>>,
    clients: Arc<dyn ClientCertVerifier>,
}

/// What a client showed of itself in the handshake.
pub(super) struct Shaken<S> {
    pub(super) stream: TlsStream<S>,
    /// The name it asked for, in lower case.
    pub(super) server_name: Option<Arc<str>>,
    /// Of a CA that was named when the handshake's settings were made.
    pub(super) certificate: Option<Arc<Certificate>>,
}

impl ServerTls {
    /// Makes what is missing and loads the rest. `addresses` are those listened on, for the certificate's names; `hosts`
    /// those of the upstreams, without ports, for which certificates are made when they are asked for; `client_roots` the
    /// CAs, DER, of which clients are asked for a certificate; if there are none, they are not asked.
    pub fn prepare(
        tls: &Tls,
        addresses: &[IpAddr],
        hosts: HashSet<String>,
        client_roots: &[Vec<u8>],
        clock: Clock,
    ) -> Result<Self, TlsError> {
        let now = clock.now();
        let folder = Folder {
            path: &tls.folder,
            constrained: tls.constrained,
        };
        let own_names = names(tls, addresses);
        let authority = folder.authority(&own_names, &hosts, now);
        let (chain, key, authority) = match (&tls.own, authority) {
            (Some(own), authority) => {
                let authority = match authority {
                    // Brought certificates serve a cache whose folder cannot be written to; only a CA is missing then.
                    Err(error @ TlsError::File { .. }) => {
                        tracing::warn!(%error, "there is no CA, so no registry's own name can be served");
                        None
                    }
                    authority => Some(authority?),
                };
                (read_chain(&own.certificate)?, read_key(&own.key)?, authority)
            }
            (None, authority) => {
                let authority = authority?;
                let (chain, key) = folder.server(&authority, &own_names, now)?;
                (chain, key, Some(authority))
            }
        };
        let own = Arc::new(CertifiedKey::from_der(chain, key, &provider())?);
        let mint = authority.map(|authority| Arc::new(Mint::new(authority, provider(), clock)));
        let by_name = ByName::new(own, mint.clone(), hosts);
        let clients = if client_roots.is_empty() {
            Arc::new(NoClientAuth)
        } else {
            certificate::verifier(client_roots)?
        };
        let config = server_config(Arc::new(by_name), Arc::clone(&clients))?;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            mint,
            clients,
        })
    }

    /// Shakes hands.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<Shaken<S>> {
        Ok(shaken(self.acceptor.accept(stream).await?))
    }

    /// Shakes hands with a client that asked for `host` by `CONNECT`, whether or not its TLS names it again.
    pub(super) async fn accept_as<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        host: &str,
        stream: S,
    ) -> io::Result<Shaken<S>> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let config = if start.client_hello().server_name().is_some() {
            Arc::clone(self.acceptor.config())
        } else {
            let leaf = self.leaf(host).map_err(io::Error::other)?;
            let config = server_config(Arc::new(Only(leaf)), Arc::clone(&self.clients));
            Arc::new(config.map_err(io::Error::other)?)
        };
        Ok(shaken(start.into_stream(config).await?))
    }

    /// The certificate for a host of an upstream, or why there is none.
    pub(super) fn leaf(&self, host: &str) -> Result<Arc<CertifiedKey>, MintError> {
        match &self.mint {
            Some(mint) => mint.leaf(host),
            None => Err(MintError::Failed(host.into(), "there is no CA".to_owned())),
        }
    }
}

/// TLS 1.2 and 1.3 with the provider's suites, all of them with forward secrecy and authenticated encryption.
fn server_config(
    certificates: Arc<dyn ResolvesServerCert>,
    clients: Arc<dyn ClientCertVerifier>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn shaken<S>(mut stream: TlsStream<S>) -> Shaken<S> {
    let session = stream.get_mut().1;
    session.set_buffer_limit(Some(WRITE_BUFFER_BYTES_MAX));
    let server_name = session.server_name().map(|name| name.to_ascii_lowercase().into());
    let certificate = session
        .peer_certificates()
        .map(|chain| Arc::new(Certificate::new(chain)));
    Shaken {
        stream,
        server_name,
        certificate,
    }
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Every name by which a client on this host, or one that was told to, may reach us.
fn names(tls: &Tls, addresses: &[IpAddr]) -> Vec<String> {
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase();
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    let specified = addresses
        .iter()
        .filter(|address| !address.is_unspecified())
        .map(ToString::to_string);
    let usable = ServerName::try_from(host.as_str()).is_ok();
    for name in specified
        .chain(Some(host).filter(|_| usable))
        .chain(tls.names.iter().cloned())
    {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// `certs/`: `ca.pem`, `ca.key`, `server.pem`, `server.key`.
struct Folder<'a> {
    path: &'a Path,
    /// Whether a CA that is made may vouch only for the names known now.
    constrained: bool,
}

type ChainAndKey = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Folder<'_> {
    fn server(
        &self,
        authority: &Authority,
        names: &[String],
        now: SystemTime,
    ) -> Result<ChainAndKey, TlsError> {
        let (certificate, key) = (self.path.join("server.pem"), self.path.join("server.key"));
        let names = &self.vouched(authority, names, now)?;
        if certificate.exists() && key.exists() {
            let chain = read_chain(&certificate)?;
            if good_until(&authority.certificate, &chain, names, now + RENEW_BEFORE) {
                return Ok((chain, read_key(&key)?));
            }
            tracing::info!("the server certificate lacks a name or ends soon; it is made anew");
        }
        let server_key = KeyPair::generate()?;
        let server = server_params(names, now)?.signed_by(&server_key, &authority.issuer)?;
        write(&key, &server_key.serialize_pem(), 0o600)?;
        write(&certificate, &server.pem(), 0o644)?;
        Ok((read_chain(&certificate)?, read_key(&key)?))
    }

    /// Those of `names` for which the CA may vouch. With one that it may not, a client would take none of them.
    fn vouched(
        &self,
        authority: &Authority,
        names: &[String],
        now: SystemTime,
    ) -> Result<Vec<String>, TlsError> {
        let key = KeyPair::generate()?;
        let mut vouched = Vec::new();
        for name in names {
            let one = std::slice::from_ref(name);
            let chain = vec![
                server_params(one, now)?
                    .signed_by(&key, &authority.issuer)?
                    .der()
                    .clone(),
            ];
            if good_until(&authority.certificate, &chain, one, now) {
                vouched.push(name.clone());
            } else {
                tracing::warn!(
                    name, ca = %self.path.join("ca.pem").display(),
                    "the CA was made before this name was known and may not vouch for it; run `ifnewer ca rotate`, reload, and \
                     have clients trust the new one"
                );
            }
        }
        Ok(vouched)
    }

    /// The CA: made once, then always the same, because hosts have been told to trust it.
    fn authority(
        &self,
        names: &[String],
        hosts: &HashSet<String>,
        now: SystemTime,
    ) -> Result<Authority, TlsError> {
        std::fs::create_dir_all(self.path).map_err(|error| TlsError::File {
            deed: "cannot make the folder",
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
                deed: "cannot read",
                path: key.clone(),
                error,
            })?;
            KeyPair::from_pem(&text).map_err(|error| malformed(&key, "a private key", &error))?
        } else {
            lasting(&mut params, now, CA_DAYS);
            params.name_constraints = self.constrained.then(|| constraints(names, hosts));
            let pair = KeyPair::generate()?;
            let ca = params.self_signed(&pair)?;
            write(&key, &pair.serialize_pem(), 0o600)?;
            write(&certificate, &ca.pem(), 0o644)?;
            tracing::info!(
                "made a CA: {} (clients that verify TLS must trust it)",
                certificate.display()
            );
            pair
        };
        Ok(Authority {
            issuer: Issuer::new(params, pair),
            certificate: read_chain(&certificate)?,
        })
    }
}

/// RFC 5280 §4.2.1.10: with these, whoever steals the CA's key can be the cache and its upstreams, but not a bank.
/// Addresses are left free, because those of a machine change.
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
    lasting(&mut params, now, SERVER_DAYS);
    Ok(params)
}

/// From a day ago, for clients whose clock is behind.
pub(super) fn lasting(params: &mut CertificateParams, now: SystemTime, days: u64) {
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

pub(super) fn good_until(
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

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(chain) if chain.is_empty() => Err(malformed(path, "a certificate", &"it is empty")),
        Ok(chain) => Ok(chain),
        Err(rustls_pki_types::pem::Error::Io(error)) => Err(TlsError::File {
            deed: "cannot read",
            path: path.into(),
            error,
        }),
        Err(error) => Err(malformed(path, "a certificate", &error)),
    }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    check_mode(path)?;
    PrivateKeyDer::from_pem_file(path).map_err(|error| malformed(path, "a private key", &error))
}

fn check_mode(path: &Path) -> Result<(), TlsError> {
    let metadata = std::fs::metadata(path).map_err(|error| TlsError::File {
        deed: "cannot read",
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

/// Written under another name first, so that a stop in the middle leaves no half key.
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
        deed: "cannot write",
        path: path.into(),
        error,
    })
}
