//! The certificate that clients see: made from a CA of our own at the first start, or brought by the operator.
//!
//! Keys are files of mode 0600; a wider one stops the start, because a CA key that others can read lets them be any
//! registry to every host that trusts it.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::{OwnCertificate, Tls};

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
    /// Certificate and key do not go together, or the like.
    #[error("the certificate cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// Speaks TLS with clients.
pub struct ServerTls {
    acceptor: TlsAcceptor,
}

impl ServerTls {
    /// Makes what is missing and loads the rest. `addresses` are those listened on, for the certificate's names.
    pub fn prepare(tls: &Tls, addresses: &[IpAddr], now: SystemTime) -> Result<Self, TlsError> {
        let (chain, key) = match &tls.own {
            Some(OwnCertificate { certificate, key }) => (read_chain(certificate)?, read_key(key)?),
            None => Folder { path: &tls.folder }.server(&names(tls, addresses), now)?,
        };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
        })
    }

    /// Shakes hands.
    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let mut stream = self.acceptor.accept(stream).await?;
        stream.get_mut().1.set_buffer_limit(Some(WRITE_BUFFER_BYTES_MAX));
        Ok(stream)
    }
}

fn provider() -> Arc<CryptoProvider> {
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
}

type ChainAndKey = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Folder<'_> {
    fn server(&self, names: &[String], now: SystemTime) -> Result<ChainAndKey, TlsError> {
        std::fs::create_dir_all(self.path).map_err(|error| TlsError::File {
            deed: "cannot make the folder",
            path: self.path.into(),
            error,
        })?;
        let (certificate, key) = (self.path.join("server.pem"), self.path.join("server.key"));
        let ca = self.authority(now)?;
        let ca_certificate = read_chain(&self.path.join("ca.pem"))?;
        if certificate.exists() && key.exists() {
            let chain = read_chain(&certificate)?;
            if good_until(&ca_certificate, &chain, names, now + RENEW_BEFORE) {
                return Ok((chain, read_key(&key)?));
            }
            tracing::info!("the server certificate lacks a name or ends soon; it is made anew");
        }
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name.push(DnType::CommonName, "ifnewer");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        lasting(&mut params, now, SERVER_DAYS);
        let server_key = KeyPair::generate()?;
        let server = params.signed_by(&server_key, &ca)?;
        write(&key, &server_key.serialize_pem(), 0o600)?;
        write(&certificate, &server.pem(), 0o644)?;
        Ok((read_chain(&certificate)?, read_key(&key)?))
    }

    /// The CA: made once, then always the same, because hosts have been told to trust it.
    fn authority(&self, now: SystemTime) -> Result<Issuer<'static, KeyPair>, TlsError> {
        let (certificate, key) = (self.path.join("ca.pem"), self.path.join("ca.key"));
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "ifnewer local CA");
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        if key.exists() {
            check_mode(&key)?;
            let text = std::fs::read_to_string(&key).map_err(|error| TlsError::File {
                deed: "cannot read",
                path: key.clone(),
                error,
            })?;
            let pair = KeyPair::from_pem(&text).map_err(|error| malformed(&key, "a private key", &error))?;
            return Ok(Issuer::new(params, pair));
        }
        lasting(&mut params, now, CA_DAYS);
        let pair = KeyPair::generate()?;
        let ca = params.self_signed(&pair)?;
        write(&key, &pair.serialize_pem(), 0o600)?;
        write(&certificate, &ca.pem(), 0o644)?;
        tracing::info!(
            "made a CA: {} (clients that verify TLS must trust it)",
            certificate.display()
        );
        Ok(Issuer::new(params, pair))
    }
}

/// From a day ago, for clients whose clock is behind.
fn lasting(params: &mut CertificateParams, now: SystemTime, days: u64) {
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

fn good_until(
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
