//! Server TLS: the CA and server certificate, generated at the first start or provided by the operator.
//!
//! Key files have mode 0600. A wider mode fails the start, because a CA key that others can read lets them
//! impersonate any registry to every host that trusts the CA.

mod cert_dir;
pub(super) mod client_cert;
mod error;
pub(super) mod leaf_issuer;
mod records;

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{Acceptor, NoClientAuth, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};

use crate::clock::Clock;
use crate::config::Tls;
use crate::server::egress::Unsent;
use cert_dir::{CertDir, RENEW_BEFORE, read_chain, read_key};
use client_cert::ClientCert;
pub use error::TlsError;
use error::provider;
use leaf_issuer::{FixedCert, LeafError, LeafIssuer, SniResolver};
use records::RecordStream;

/// The CA's expiry is logged this long before, because each client must trust a new one.
const CA_WARN_BEFORE: Duration = Duration::from_secs(180 * 86_400);

/// TLS configuration and handshakes.
pub struct ServerTls {
    acceptor: TlsAcceptor,
    expiries: Vec<(&'static str, SystemTime)>,
    leaf_issuer: Option<Arc<LeafIssuer>>,
    clients: Arc<dyn ClientCertVerifier>,
    inputs: Inputs,
}

/// Inputs of a [`ServerTls`], for renewal.
struct Inputs {
    tls: Tls,
    addresses: Vec<IpAddr>,
    hosts: HashSet<String>,
    client_roots: Vec<Vec<u8>>,
    clock: Clock,
}

/// A completed handshake.
pub(super) struct Handshake<S> {
    pub(super) stream: RecordStream<S>,
    /// The server name (SNI), in lower case.
    pub(super) server_name: Option<Arc<str>>,
    /// The client certificate, verified against the CAs configured at the handshake.
    pub(super) certificate: Option<Arc<ClientCert>>,
}

impl ServerTls {
    /// Loads the CA and certificates, and generates missing ones.
    ///
    /// `addresses` are the listen addresses, for the names of the certificate. `hosts` are the upstream hosts without
    /// ports, for which leaf certificates are issued. `client_roots` are the client CAs in DER; if empty, no client
    /// certificate is requested.
    pub fn prepare(
        tls: &Tls,
        addresses: &[IpAddr],
        hosts: HashSet<String>,
        client_roots: &[Vec<u8>],
        clock: Clock,
    ) -> Result<Self, TlsError> {
        let inputs = Inputs {
            tls: tls.clone(),
            addresses: addresses.to_vec(),
            hosts: hosts.clone(),
            client_roots: client_roots.to_vec(),
            clock,
        };
        let now = clock.now();
        let folder = CertDir {
            path: &tls.folder,
            constrained: tls.constrained,
        };
        let own_names = names(tls, addresses);
        let authority = folder.authority(&own_names, &hosts, now);
        let (chain, key, authority) = match (&tls.certificate, authority) {
            (Some(own), authority) => {
                let authority = match authority {
                    // With a certificate of the operator the folder need not be writable. Only the CA is missing
                    // then.
                    Err(error @ TlsError::File { .. }) => {
                        tracing::warn!(%error, "no CA available, upstream hosts cannot be intercepted");
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
        let ends = |chain: &[CertificateDer<'_>]| chain.iter().filter_map(client_cert::not_after).min();
        let ca = authority.as_ref().and_then(|ca| ends(&ca.certificate));
        let expiries = [("server", ends(&chain)), ("ca", ca)];
        let own = Arc::new(CertifiedKey::from_der(chain, key, &provider())?);
        let leaf_issuer = authority.map(|authority| Arc::new(LeafIssuer::new(authority, provider(), clock)));
        let by_name = SniResolver::new(own, leaf_issuer.clone(), hosts);
        let clients = if client_roots.is_empty() {
            Arc::new(NoClientAuth)
        } else {
            client_cert::verifier(client_roots)?
        };
        let config = server_config(Arc::new(by_name), Arc::clone(&clients))?;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            expiries: expiries
                .into_iter()
                .filter_map(|(name, at)| Some((name, at?)))
                .collect(),
            leaf_issuer,
            clients,
            inputs,
        })
    }

    /// The renewed configuration, if the server certificate was generated here and expires soon. Blocks.
    pub fn renew_if_due(&self) -> Option<Result<Self, TlsError>> {
        let Inputs {
            tls,
            addresses,
            hosts,
            client_roots,
            clock,
        } = &self.inputs;
        let is_due = self.expiry("server")? < clock.now() + RENEW_BEFORE;
        (is_due && tls.certificate.is_none())
            .then(|| Self::prepare(tls, addresses, hosts.clone(), client_roots, *clock))
    }

    /// Logs certificates that expire soon and that only the operator can renew. Returns whether there are any.
    pub fn warn_of_expiry(&self, now: SystemTime) -> bool {
        let ends_within = |name, before| self.expiry(name).filter(|end| *end < now + before);
        let ca = ends_within("ca", CA_WARN_BEFORE);
        if let Some(end) = ca {
            tracing::warn!(
                until = %humantime::format_rfc3339_seconds(end), ca = %self.inputs.tls.folder.join("ca.pem").display(),
                "CA certificate expires soon, run `ifnewer ca rotate`, reload, and have clients trust the new CA"
            );
        }
        let own = self.inputs.tls.certificate.as_ref();
        let own = own.zip(ends_within("server", RENEW_BEFORE));
        if let Some((own, end)) = own {
            tracing::warn!(
                until = %humantime::format_rfc3339_seconds(end), certificate = %own.certificate.display(),
                "server certificate expires soon, renew it and reload"
            );
        }
        ca.is_some() || own.is_some()
    }

    fn expiry(&self, name: &str) -> Option<SystemTime> {
        let end = self.expiries.iter().find(|(known, _)| *known == name);
        end.map(|(_, at)| *at)
    }

    /// Expiry of the `server` and `ca` certificates.
    pub fn expiries(&self) -> Vec<(&'static str, SystemTime)> {
        self.expiries.clone()
    }

    /// Performs the TLS handshake. `unsent` is charged for the records of the connection.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        unsent: Unsent,
    ) -> io::Result<Handshake<S>> {
        Ok(handshake(self.acceptor.accept(stream).await?, unsent))
    }

    /// Performs the handshake inside a `CONNECT` for `host`, with or without SNI.
    pub(super) async fn accept_for_host<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        host: &str,
        stream: S,
        unsent: Unsent,
    ) -> io::Result<Handshake<S>> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let config = if start.client_hello().server_name().is_some() {
            Arc::clone(self.acceptor.config())
        } else {
            let leaf = self.leaf(host).map_err(io::Error::other)?;
            let config = server_config(Arc::new(FixedCert(leaf)), Arc::clone(&self.clients));
            Arc::new(config.map_err(io::Error::other)?)
        };
        Ok(handshake(start.into_stream(config).await?, unsent))
    }

    /// The leaf certificate for an upstream host.
    pub(super) fn leaf(&self, host: &str) -> Result<Arc<CertifiedKey>, LeafError> {
        match &self.leaf_issuer {
            Some(leaf_issuer) => leaf_issuer.leaf(host),
            None => Err(LeafError::Failed(host.into(), "there is no CA".to_owned())),
        }
    }
}

/// TLS 1.2 and 1.3 with the provider's cipher suites, which all have forward secrecy and authenticated encryption.
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

fn handshake<S>(stream: TlsStream<S>, unsent: Unsent) -> Handshake<S> {
    let session = stream.get_ref().1;
    let server_name = session.server_name().map(|name| name.to_ascii_lowercase().into());
    let certificate = session
        .peer_certificates()
        .map(|chain| Arc::new(ClientCert::new(chain)));
    Handshake {
        stream: RecordStream::new(stream, unsent),
        server_name,
        certificate,
    }
}

/// The names of the server certificate: local names, listen addresses and configured names.
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
