//! The certificate that clients see: made from a CA of our own at the first start, or brought by the operator.
//!
//! Keys are files of mode 0600; a wider one stops the start, because a CA key that others can read lets them be any
//! registry to every host that trusts it.

mod folder;

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{Acceptor, NoClientAuth, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};

use super::certificate::{self, Certificate};
use super::mint::{ByName, Mint, MintError, Only};
use crate::clock::Clock;
use crate::config::Tls;
use folder::{Folder, RENEW_BEFORE, read_chain, read_key};
pub(super) use folder::{good_until, lasting};

/// How much encrypted data may wait for the socket. rustls' 64 KiB would cut our steps of 256 KiB into four writes.
const WRITE_BUFFER_BYTES_MAX: usize = 512 * 1024;

/// So long before the CA's end the operator is warned: each client has to be told of a new one.
const CA_WARN_BEFORE: Duration = Duration::from_secs(180 * 86_400);

/// Why there is no TLS. The operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{deed} {}: {error}{}", path.display(), cure(deed))]
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
    RequestError {
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

/// What to do about a folder of certificates that takes no file. Files that are only read are named by other settings.
fn cure(deed: &str) -> &'static str {
    if deed == "cannot read" {
        ""
    } else {
        "; let this user write there, or choose another folder with `[tls] folder` (IFNEWER_TLS_FOLDER=PATH)"
    }
}

/// Speaks TLS with clients.
pub struct ServerTls {
    acceptor: TlsAcceptor,
    good_until: Vec<(&'static str, SystemTime)>,
    mint: Option<Arc<Mint>>,
    clients: Arc<dyn ClientCertVerifier>,
    origin: Origin,
}

/// What a [`ServerTls`] is made from.
struct Origin {
    tls: Tls,
    addresses: Vec<IpAddr>,
    hosts: HashSet<String>,
    client_roots: Vec<Vec<u8>>,
    clock: Clock,
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
        let origin = Origin {
            tls: tls.clone(),
            addresses: addresses.to_vec(),
            hosts: hosts.clone(),
            client_roots: client_roots.to_vec(),
            clock,
        };
        let now = clock.now();
        let folder = Folder {
            path: &tls.folder,
            constrained: tls.constrained,
        };
        let own_names = names(tls, addresses);
        let authority = folder.authority(&own_names, &hosts, now);
        let (chain, key, authority) = match (&tls.certificate, authority) {
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
        let ends = |chain: &[CertificateDer<'_>]| chain.iter().filter_map(certificate::end).min();
        let ca = authority.as_ref().and_then(|ca| ends(&ca.certificate));
        let good_until = [("server", ends(&chain)), ("ca", ca)];
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
            good_until: good_until
                .into_iter()
                .filter_map(|(name, at)| Some((name, at?)))
                .collect(),
            mint,
            clients,
            origin,
        })
    }

    /// A new one in its place, if the server certificate is ours and ends soon. Blocks.
    pub fn renewed(&self) -> Option<Result<Self, TlsError>> {
        let Origin {
            tls,
            addresses,
            hosts,
            client_roots,
            clock,
        } = &self.origin;
        let is_due = self.end("server")? < clock.now() + RENEW_BEFORE;
        (is_due && tls.certificate.is_none())
            .then(|| Self::prepare(tls, addresses, hosts.clone(), client_roots, *clock))
    }

    /// Warns of certificates that end before long and that only the operator can renew. Whether there are any.
    pub fn warn_of_ends(&self, now: SystemTime) -> bool {
        let ends_within = |name, before| self.end(name).filter(|end| *end < now + before);
        let ca = ends_within("ca", CA_WARN_BEFORE);
        if let Some(end) = ca {
            tracing::warn!(
                until = %humantime::format_rfc3339_seconds(end), ca = %self.origin.tls.folder.join("ca.pem").display(),
                "the CA ends; run `ifnewer ca rotate`, reload, and have clients trust the new one before"
            );
        }
        let own = self.origin.tls.certificate.as_ref();
        let own = own.zip(ends_within("server", RENEW_BEFORE));
        if let Some((own, end)) = own {
            tracing::warn!(
                until = %humantime::format_rfc3339_seconds(end), certificate = %own.certificate.display(),
                "the server certificate ends; renew it and reload"
            );
        }
        ca.is_some() || own.is_some()
    }

    fn end(&self, name: &str) -> Option<SystemTime> {
        let end = self.good_until.iter().find(|(known, _)| *known == name);
        end.map(|(_, at)| *at)
    }

    /// Until when the certificates are good, `server` and `ca`, as they say themselves.
    pub fn good_until(&self) -> Vec<(&'static str, SystemTime)> {
        self.good_until.clone()
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
