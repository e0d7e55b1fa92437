//! The program under test: the real binary with its own configuration, free ports and a temporary folder.
//!
//! `Setup::over(&upstream).start().await` waits until the ports are printed. Dropping the value kills the process.
//! Its standard error is printed if a test fails.

mod check;
mod client;
mod identity;
mod program;
mod raw;
mod reply;
mod setup;

pub use client::{Ask, Flow, Session};
pub use identity::{Authority, Identity};
pub use program::Program;
pub use raw::{RawReply, raw};
pub use reply::Reply;
pub use setup::{Setup, files_below};

use crate::registry::{Image, Upstream};
use std::net::SocketAddr;
use std::path::PathBuf;

/// The running program.
pub struct Proxy {
    program: Program,
    registry: SocketAddr,
    admin: SocketAddr,
    setup: Setup,
}

impl Proxy {
    /// With docker.io at this upstream and defaults otherwise.
    pub async fn over(upstream: &Upstream) -> Proxy {
        Setup::over(upstream).start().await
    }

    /// A request to the registry port.
    pub fn ask(&self, method: &str, path: &str) -> Ask {
        Ask::new(self.registry, method, path).with_usual_accept()
    }

    /// `GET` on the registry port.
    pub fn get(&self, path: &str) -> Ask {
        self.ask("GET", path)
    }

    /// `HEAD` on the registry port.
    pub fn head(&self, path: &str) -> Ask {
        self.ask("HEAD", path)
    }

    /// `GET` on the admin port.
    pub fn admin(&self, path: &str) -> Ask {
        Ask::new(self.admin, "GET", path).unchecked()
    }

    /// The registry port.
    pub fn registry_address(&self) -> SocketAddr {
        self.registry
    }

    /// The admin port.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// The process.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Its configuration.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// The CA that the program generated.
    pub fn ca_pem(&self) -> String {
        std::fs::read_to_string(self.setup.folder().join("certs/ca.pem")).unwrap()
    }

    /// `GET` of a manifest.
    pub fn manifest(&self, repository: &str, reference: &str) -> Ask {
        self.get(&manifest_path(repository, reference))
    }

    /// `GET` of a blob.
    pub fn blob(&self, repository: &str, digest: &str) -> Ask {
        self.get(&blob_path(repository, digest))
    }

    /// Pulls like a client: the manifest by tag, then its blobs. All content must be complete and right.
    pub async fn pull(&self, repository: &str, tag: &str, image: &Image) -> Reply {
        self.pull_with(repository, tag, image, |ask| ask).await
    }

    /// `pull`, each request changed by `dress` (credentials, say).
    pub async fn pull_with(
        &self,
        repository: &str,
        tag: &str,
        image: &Image,
        dress: impl Fn(Ask) -> Ask,
    ) -> Reply {
        let reply = dress(self.manifest(repository, tag)).await;
        reply.is_image(image);
        for blob in &image.blobs {
            dress(self.blob(repository, &blob.digest)).await.is_blob(blob);
        }
        for blob in &image.blobs {
            self.until_kept(&blob.digest).await;
            self.until_known(&blob.digest).await;
        }
        reply
    }

    /// Stops it like a service manager, and starts it again on the same folder.
    pub async fn restart(self) -> Proxy {
        let setup = self.setup.clone();
        self.restart_as(setup).await
    }

    /// `restart` with another configuration over the same folder.
    pub async fn restart_as(mut self, setup: Setup) -> Proxy {
        self.program.terminate();
        let ended = self.program.exit().await;
        assert_eq!(ended, Some(0), "an orderly end");
        setup.start().await
    }

    /// kill -9, and starts it again on the same folder.
    pub async fn crash(mut self) -> Proxy {
        self.program.kill();
        self.setup.clone().start().await
    }

    /// kill -9.
    #[allow(dead_code, reason = "tests/crash uses it")]
    pub fn kill(&mut self) {
        self.program.kill();
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.program.terminate();
    }

    /// Waits for exit and returns the exit code.
    pub async fn exit(&mut self) -> Option<i32> {
        self.program.exit().await
    }

    /// Waits until a blob is committed. Clients have their last byte before that.
    pub async fn until_kept(&self, digest: &str) -> PathBuf {
        crate::registry::within("the blob to be on the disk", async {
            loop {
                if let Some(path) = self.setup.kept_blob(digest) {
                    return path;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await
    }

    /// Waits until a file names the repository of this digest, so that a kill cannot lose it.
    async fn until_known(&self, digest: &str) {
        crate::registry::within("the membership to be on the disk", async {
            while !self.setup.has_member(digest) {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// Sends this many requests that need no upstream. Earlier requests have been handled by then.
    pub async fn has_turned(&self, times: usize) {
        for _ in 0..times {
            assert_eq!(self.get("/v2/").await.status, 200);
        }
    }

    /// Waits until the registry port takes no new connection.
    pub async fn until_closed(&self) {
        crate::registry::within("the port to be closed", async {
            while tokio::net::TcpStream::connect(self.registry).await.is_ok() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Repeats a request until the response satisfies the test, for background work.
    pub async fn until(
        &self,
        what: &str,
        ask: impl Fn(&Proxy) -> Ask,
        enough: impl Fn(&Reply) -> bool,
    ) -> Reply {
        crate::registry::within(what, async {
            loop {
                let reply = ask(self).await;
                if enough(&reply) {
                    return reply;
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        })
        .await
    }
}

/// `/v2/…/manifests/…`
pub fn manifest_path(repository: &str, reference: &str) -> String {
    format!("/v2/{repository}/manifests/{reference}")
}

/// `/v2/…/blobs/…`
pub fn blob_path(repository: &str, digest: &str) -> String {
    format!("/v2/{repository}/blobs/{digest}")
}
