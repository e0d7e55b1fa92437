//! Upstream: nginx with images of any number of layers, on one port for everybody, and on another one only with a
//! bearer token, of which it accepts any.

use super::cache::milliseconds;
use crate::Outcome;
use crate::client;
use crate::connection::Connection;
use crate::content::{
    MANIFEST_TYPE, REPOSITORY, blob, digest_of, manifest_by_digest, manifest_by_tag, write_noise,
};
use crate::program::{Running, free_address};
use crate::servers::start_nginx;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Size above which noise is made in large chunks.
const SMALL_MAX: u64 = 1024 * 1024;

pub(super) struct Registry {
    pub(super) open: SocketAddr,
    /// Requires a bearer token.
    pub(super) private: SocketAddr,
    log: PathBuf,
    _running: Running,
}

/// Content of the registry, to be made before it starts.
pub(super) struct Repository {
    folder: PathBuf,
    images: Vec<Image>,
    seed: u64,
}

#[derive(Clone)]
pub(super) struct Image {
    pub(super) tag: String,
    pub(super) digest: String,
    /// Path, digest and length of each request of a pull: the manifest by tag, the configuration, the layers.
    pub(super) requests: Vec<(String, String, u64)>,
}

impl Repository {
    pub(super) fn make(folder: &Path) -> Outcome<Self> {
        let folder = folder.join("www");
        for part in ["blobs", "manifests"] {
            std::fs::create_dir_all(folder.join("v2").join(REPOSITORY).join(part))?;
        }
        Ok(Repository {
            folder,
            images: Vec::new(),
            seed: 1,
        })
    }

    /// Adds an image whose configuration and layers no other image has.
    pub(super) fn image(&mut self, layers: usize, layer_bytes: u64) -> Outcome<Image> {
        let number = self.images.len();
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"Labels":{{"number":"{number}"}}}},"rootfs":{{"type":"layers","diff_ids":[]}}}}"#
        );
        let descriptor = |kind: &str, digest: &str, size: u64| {
            format!(r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{digest}","size":{size}}}"#)
        };
        let config_digest = digest_of(config.as_bytes());
        std::fs::write(self.path("blobs", &config_digest), &config)?;
        let mut requests = vec![(blob(&config_digest), config_digest.clone(), config.len() as u64)];
        let mut list = Vec::new();
        for _ in 0..layers {
            let digest = self.blob(layer_bytes)?;
            list.push(descriptor("layer.v1.tar", &digest, layer_bytes));
            requests.push((blob(&digest), digest, layer_bytes));
        }
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_TYPE}","config":{},"layers":[{}]}}"#,
            descriptor("config.v1+json", &config_digest, config.len() as u64),
            list.join(",")
        );
        let (tag, digest) = (format!("v{number}"), digest_of(manifest.as_bytes()));
        std::fs::write(self.path("manifests", &tag), &manifest)?;
        std::fs::write(self.path("manifests", &digest), &manifest)?;
        requests.insert(0, (manifest_by_tag(&tag), digest.clone(), manifest.len() as u64));
        let image = Image {
            tag,
            digest,
            requests,
        };
        self.images.push(image.clone());
        Ok(image)
    }

    /// Adds a blob of its own bytes. Returns its digest.
    pub(super) fn blob(&mut self, bytes: u64) -> Outcome<String> {
        self.seed += 1;
        if bytes > SMALL_MAX {
            return write_noise(
                &self.folder.join("v2").join(REPOSITORY).join("blobs"),
                self.seed,
                bytes,
            );
        }
        let mut noise = Vec::new();
        for block in 0..bytes.div_ceil(32) {
            noise.extend_from_slice(&Sha256::digest(
                [self.seed.to_le_bytes(), block.to_le_bytes()].concat(),
            ));
        }
        noise.truncate(usize::try_from(bytes)?);
        let digest = digest_of(&noise);
        std::fs::write(self.path("blobs", &digest), noise)?;
        Ok(digest)
    }

    fn path(&self, kind: &str, name: &str) -> PathBuf {
        [
            &self.folder,
            Path::new("v2"),
            Path::new(REPOSITORY),
            Path::new(kind),
            Path::new(name),
        ]
        .iter()
        .collect()
    }

    /// Starts nginx with this content.
    pub(super) fn serve(self, folder: &Path) -> Outcome<Registry> {
        let (open, private) = (free_address()?, free_address()?);
        let log = folder.join("upstream.log");
        let mut manifests = String::new();
        for image in &self.images {
            for path in [manifest_by_tag(&image.tag), manifest_by_digest(&image.digest)] {
                let _ = write!(
                    manifests,
                    "location = {path} {{ default_type {MANIFEST_TYPE}; add_header Docker-Content-Digest {}; }}",
                    image.digest
                );
            }
        }
        let site = |listen: SocketAddr, options: &str| {
            format!(
                "server {{ listen {listen}; root {root}; types {{ }} {options}
                   location = /v2/ {{ default_type application/json; return 200 '{{}}'; }}
                   {manifests}
                   location /v2/{REPOSITORY}/blobs/ {{ default_type application/octet-stream; }}
                 }}",
                root = self.folder.display(),
            )
        };
        let challenge = format!(
            r#"if ($http_authorization !~ "^Bearer .") {{ return 401; }}
               error_page 401 @challenge;
               location @challenge {{
                 add_header WWW-Authenticate 'Bearer realm="http://{private}/token",service="bench"' always;
                 return 401;
               }}"#,
        );
        let sites = format!(
            "access_log {} combined; {} {}",
            log.display(),
            site(open, ""),
            site(private, &challenge)
        );
        let running = start_nginx(&folder.join("upstream"), &sites, open)?;
        Ok(Registry {
            open,
            private,
            log,
            _running: running,
        })
    }
}

impl Registry {
    /// Number of requests so far.
    pub(super) fn requests(&self) -> Outcome<usize> {
        Ok(std::fs::read_to_string(&self.log)?.lines().count())
    }
}

impl Image {
    /// A pull whose lengths are checked. Adds the latency of each request in milliseconds.
    pub(super) fn pull(
        &self,
        connection: &mut Connection,
        buffer: &mut [u8],
        latencies: &mut Vec<f64>,
    ) -> Outcome<()> {
        for (path, _, bytes) in &self.requests {
            let began = Instant::now();
            let received = connection.fetch(path, buffer)?;
            if received != *bytes {
                return Err(format!("{path}: {received} bytes instead of {bytes}").into());
            }
            latencies.push(milliseconds(began.elapsed()));
        }
        Ok(())
    }

    /// A pull whose every byte is checked.
    pub(super) fn check(&self, connection: &mut Connection) -> Outcome<()> {
        self.requests
            .iter()
            .try_for_each(|(path, digest, _)| client::expect_digest_on(connection, path, digest))
    }
}

/// The configuration of an upstream.
pub(super) fn upstream(address: SocketAddr) -> String {
    format!("[upstream.\"docker.io\"]\nurl = \"http://{address}\"\n")
}
