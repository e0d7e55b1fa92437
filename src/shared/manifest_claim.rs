//! Claims of manifests: of several caches that lack a manifest at the same moment, one requests it from the upstream.
//!
//! A registry may count each `GET` of a manifest as a pull. A manifest is small, so its claim has no parts and is written once:
//! the other caches wait for a bounded time until the bucket has the manifest, and then request it from their own upstreams.

#[cfg(all(test, feature = "shared"))]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::claim::{ClaimRecord, Look, Written};
use super::{Active, SharedContent, SharedStorage};
use crate::bucket::{BucketError, ObjectKey};
use crate::oci::{Digest, UpstreamFailure};

/// Longest wait for the manifest that another cache requests. Registries answer within a second.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// Interval of reads of the claim and of the manifest meanwhile.
const LOOK: Duration = Duration::from_millis(250);

/// Longest time for which a claim waits for the upload of its manifest. No other cache waits for it by then.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Which cache requests a manifest from the upstream.
pub enum ManifestTurn {
    /// This one, without a claim.
    Alone,
    /// This one, which owns the claim.
    Leads(ManifestLease),
    /// Another one did: the bucket has the manifest by now.
    Written,
}

/// A claim that this cache owns. Once this is dropped, and an upload of the manifest that was queued before has ended, the
/// claim is deleted.
pub struct ManifestLease {
    active: Arc<Active>,
    digest: Digest,
}

impl Drop for ManifestLease {
    fn drop(&mut self) {
        // Without a runtime, the process ends. Then other caches wait for the claim in vain, once.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (active, digest) = (Arc::clone(&self.active), self.digest);
        runtime.spawn(async move {
            let uploaded = active.uploads.over(SharedContent::Manifest(digest));
            let _late = timeout(UPLOAD_TIMEOUT, uploaded).await;
            active.delete_of_claim(&ObjectKey::manifest_claim(&digest)).await;
        });
    }
}

impl SharedStorage {
    /// Claims a manifest that the bucket lacks, or waits for the cache that has claimed it.
    pub async fn claim_manifest(&self, digest: Digest) -> ManifestTurn {
        let Some(active) = self.readable() else {
            return ManifestTurn::Alone;
        };
        if !active.settings.claims || !active.settings.write || !active.may_claim() {
            return ManifestTurn::Alone;
        }
        // In a task of its own, so that a claim that is won although the client has left is deleted.
        let claiming = tokio::spawn(async move { active.manifest_turn(digest).await });
        claiming.await.unwrap_or(ManifestTurn::Alone)
    }
}

impl Active {
    async fn manifest_turn(self: &Arc<Self>, digest: Digest) -> ManifestTurn {
        let (key, began) = (ObjectKey::manifest_claim(&digest), Instant::now());
        let record = ClaimRecord::new(&self.claims.leases.me);
        let writing = self.create_claim(&key, &record);
        // Another cache may have written the manifest since it was looked for.
        let entering = async { tokio::join!(writing, self.has(SharedContent::Manifest(digest))) };
        let Ok((written, is_there)) = timeout(self.settings.wait_max, entering).await else {
            // So that only a few clients wait in vain.
            let silent = Err::<(), _>(BucketError::Silent(UpstreamFailure::Timeout));
            self.record_claim("claim-enter", &silent, began);
            return self.alone("unavailable");
        };
        match written {
            Written::Done(_) => {
                self.telemetry.shared().record_claim("manifest-won");
                let lease = ManifestLease {
                    active: Arc::clone(self),
                    digest,
                };
                // Otherwise the lease ends here.
                if is_there {
                    ManifestTurn::Written
                } else {
                    ManifestTurn::Leads(lease)
                }
            }
            Written::Refused if is_there => ManifestTurn::Written,
            Written::Refused => self.follow_manifest(digest, &key).await,
            Written::Unknown => self.alone("unavailable"),
        }
    }

    fn alone(&self, reason: &'static str) -> ManifestTurn {
        self.telemetry.shared().record_claim(reason);
        ManifestTurn::Alone
    }

    /// Waits until the bucket has the manifest, the claim ends, or the time is over.
    async fn follow_manifest(self: &Arc<Self>, digest: Digest, key: &ObjectKey) -> ManifestTurn {
        let content = SharedContent::Manifest(digest);
        let following = async {
            loop {
                sleep(LOOK).await;
                let look = self.look(key).await;
                // The owner deletes its claim after the upload.
                if self.has(content).await {
                    return Some("manifest-followed");
                }
                if !matches!(look, Look::Present { .. }) {
                    return None;
                }
            }
        };
        match timeout(WAIT_MAX, following).await {
            Ok(Some(result)) => {
                self.telemetry.shared().record_claim(result);
                ManifestTurn::Written
            }
            Ok(None) => self.alone("unavailable"),
            Err(_) => {
                // Its owner may have ended. A claim that is lost costs a request, and one that is left delays every cache.
                let (active, key) = (Arc::clone(self), key.clone());
                tokio::spawn(async move { active.delete_of_claim(&key).await });
                self.alone("manifest-late")
            }
        }
    }
}
