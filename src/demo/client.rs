//! Pulling client: the manifest by tag, then all its children, verified.

use std::net::SocketAddr;
use std::time::Duration;

use http::HeaderValue;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::time::Instant;

use super::DemoError;
use crate::oci::header::CACHE_STATUS;
use crate::oci::{Accept, Algorithm, AnyDigest, Digest, Endpoint, Manifest, Reference, Repository};
use crate::queue::{Class, Peer};
use crate::trace_context::TraceContext;
use crate::upstream::{Caller, Credential, ProxyChoice, Settings, Transport, Upstream, UpstreamResponse};

/// Maximum size of a response.
const RESPONSE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A client of the cache, over TLS.
pub(super) struct Client {
    cache: Upstream,
    caller: Caller,
}

/// Result of a pull.
pub(super) struct PullResult {
    /// The digest of the manifest, if the image is complete and verified.
    pub(super) digest: Option<Digest>,
    /// Number of configs and layers.
    pub(super) blobs: usize,
    pub(super) bytes: u64,
    pub(super) status: u16,
    /// `Cache-Status` of the manifest.
    pub(super) cache_status: String,
    /// The error message.
    pub(super) message: String,
    pub(super) took: Duration,
}

impl Client {
    /// Creates a client that trusts the cache's CA and sends this credential.
    pub(super) fn new(
        address: SocketAddr,
        ca: &[u8],
        authorization: Option<&HeaderValue>,
    ) -> Result<Self, DemoError> {
        let wrong = |error: &dyn std::fmt::Display| DemoError::Client(error.to_string());
        let ca = CertificateDer::from_pem_slice(ca).map_err(|error| wrong(&error))?;
        let url = format!("https://{address}")
            .parse()
            .map_err(|error| wrong(&error))?;
        let mut settings = Settings::new("the cache", vec![url]);
        settings.roots = vec![ca.to_vec()];
        settings.proxy = ProxyChoice::None;
        let cache = Upstream::new(settings, &Transport::system()).map_err(|error| wrong(&error))?;
        let credential =
            authorization.map_or(Credential::Anonymous, |value| Credential::Client(value.clone()));
        Ok(Self {
            cache,
            caller: Caller {
                principal: [u8::from(authorization.is_some()); 32],
                credential,
                peer: Peer::Local,
                class: Class::Interactive,
                waiters: None,
                trace: TraceContext::new_root(),
                wait_deadline: None,
            },
        })
    }

    pub(super) async fn pull(&self, repository: &Repository, tag: &Reference) -> PullResult {
        let began = Instant::now();
        let mut got = PullResult {
            digest: None,
            blobs: 0,
            bytes: 0,
            status: 0,
            cache_status: String::new(),
            message: String::new(),
            took: Duration::ZERO,
        };
        if let Err(answer) = self.download(repository, tag, &mut got).await {
            got.digest = None;
            got.status = answer.status.map_or(0, |status| status.as_u16());
            got.message = answer.message.clone().unwrap_or_else(|| answer.kind.to_string());
        }
        got.took = began.elapsed();
        got
    }

    async fn download(
        &self,
        repository: &Repository,
        tag: &Reference,
        got: &mut PullResult,
    ) -> Result<(), Box<UpstreamResponse>> {
        let endpoint = Endpoint::Manifest {
            repository: repository.clone(),
            reference: tag.clone(),
        };
        let accept = Accept::manifests();
        let fetched = self
            .cache
            .get(&self.caller, &endpoint, &accept, None)
            .await
            .map_err(Box::new)?;
        got.status = fetched.status.as_u16();
        let status = fetched
            .headers
            .get(CACHE_STATUS)
            .and_then(|value| value.to_str().ok());
        status.unwrap_or_default().clone_into(&mut got.cache_status);
        let broken = |cause| Box::new(UpstreamResponse::unavailable(cause));
        let wrong = || broken(crate::oci::UpstreamFailure::DigestMismatch);
        let promised = fetched.digest;
        let bytes = fetched.collect(RESPONSE_BYTES_MAX).await.map_err(broken)?;
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        if promised != Some(digest) {
            return Err(wrong());
        }
        got.bytes += bytes.len() as u64;
        let manifest = Manifest::read(&bytes).map_err(|_| broken(crate::oci::UpstreamFailure::Malformed))?;
        for child in &manifest.descriptors {
            let AnyDigest::Supported(expected) = child.digest else {
                continue;
            };
            let endpoint = Endpoint::Blob {
                repository: repository.clone(),
                digest: child.digest.clone(),
            };
            let any = Accept::any();
            let fetched = self
                .cache
                .get(&self.caller, &endpoint, &any, None)
                .await
                .map_err(Box::new)?;
            let bytes = fetched.collect(RESPONSE_BYTES_MAX).await.map_err(broken)?;
            if Digest::of(expected.algorithm(), &bytes) != expected {
                return Err(wrong());
            }
            got.blobs += 1;
            got.bytes += bytes.len() as u64;
        }
        got.digest = Some(digest);
        Ok(())
    }
}
