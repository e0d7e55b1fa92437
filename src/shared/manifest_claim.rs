//! Claims of manifests: of several caches that lack a manifest at the same moment, one requests it from the upstream.
//!
//! A registry may count each `GET` of a manifest as a pull. A manifest is small, so its claim has no parts and is written once:
//! the other caches wait until the bucket has the manifest, at most for [`FOLLOW_MAX`], and then request it from their own
//! upstreams. If the bucket is slow, no cache waits.

#[cfg(all(test, feature = "shared"))]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::breaker::{Admission, Breaker, Outcome, Transition};
use super::claim::{ClaimRecord, Look, Written};
use super::claims::LeaseGuard;
use super::upload::upload_at_once;
use super::{Active, SharedContent, SharedStorage};
use crate::bucket::ObjectKey;
use crate::oci::Digest;
use crate::store::AsyncStore;

/// Longest wait for the manifest that another cache requests, of which that for the create is a part. Most registries answer
/// within half of it.
const FOLLOW_MAX: Duration = Duration::from_secs(1);

/// Longest wait for the create of a claim. It takes one round trip, and a bucket that is slower would delay every cold
/// manifest by more than a second request costs.
const CREATE_WAIT: Duration = Duration::from_millis(300);

/// Interval of reads of the claim and of the manifest meanwhile.
const LOOK: Duration = Duration::from_millis(150);

/// A claim that is older than this by the bucket's clock is followed by no cache: its owner has ended, or its upstream is slow.
const DEAD_AGE: Duration = Duration::from_secs(5);

/// How long a claim outlives the upload of its manifest. A cache that looked for the manifest just before the upload, and
/// creates its claim after that, finds this one instead and reads the manifest.
const LINGER: Duration = Duration::from_secs(1);

/// Manifests that are uploaded at once beside the queue of uploads. Each is in memory.
const UPLOADS_MAX: usize = 4;

/// Claims that were waited for in vain and are remembered.
const VAIN_MAX: usize = 1024;

/// Which cache requests a manifest from the upstream.
pub enum ManifestTurn {
    /// This one, without a claim.
    Alone,
    /// This one, which owns the claim.
    Leads(ManifestLease),
    /// Another one did: the bucket has the manifest by now.
    Written,
}

/// State of claims of manifests in one bucket.
pub(super) struct ManifestClaims {
    /// Stops claims while the bucket is slow to create them.
    breaker: Mutex<Breaker>,
    /// Versions of claims that were waited for in vain.
    vain: Cache<ObjectKey, String>,
    uploads: Semaphore,
    /// Claims that this process has created.
    created: AtomicU64,
}

impl Default for ManifestClaims {
    fn default() -> Self {
        Self {
            breaker: Mutex::default(),
            vain: Cache::new(VAIN_MAX),
            uploads: Semaphore::new(UPLOADS_MAX),
            created: AtomicU64::new(0),
        }
    }
}

/// A claim that this cache owns. Dropping it deletes the claim, because the request has failed or was abandoned.
pub struct ManifestLease {
    active: Arc<Active>,
    digest: Digest,
    stored: oneshot::Sender<()>,
}

impl ManifestLease {
    fn start(active: &Arc<Active>, store: AsyncStore, digest: Digest, guard: LeaseGuard) -> Self {
        let (stored, is_stored) = oneshot::channel();
        tokio::spawn(keep(Arc::clone(active), store, digest, is_stored, guard));
        Self {
            active: Arc::clone(active),
            digest,
            stored,
        }
    }

    /// The manifest with this digest was fetched and stored. If the claim is for it, it is uploaded at once in the background,
    /// and the claim is deleted after that. Returns whether it is uploaded.
    pub fn stored(self, digest: Digest) -> bool {
        digest == self.digest && !self.active.uploads.is_closed() && self.stored.send(()).is_ok()
    }
}

/// Keeps a claim until the manifest is in the bucket or the request has ended without it, and deletes it then.
async fn keep(
    active: Arc<Active>,
    store: AsyncStore,
    digest: Digest,
    stored: oneshot::Receiver<()>,
    guard: LeaseGuard,
) {
    let mut closing = active.claims.leases.closing();
    let mut closed = std::pin::pin!(async { drop(closing.wait_for(|is_closing| *is_closing).await) });
    let is_stored = tokio::select! {
        biased;
        stored = stored => stored.is_ok(),
        () = &mut closed => false,
    };
    if is_stored {
        let uploading = async {
            let (content, permits) = (SharedContent::Manifest(digest), &active.claims.manifests.uploads);
            if upload_at_once(&active, &store, content, permits).await {
                sleep(LINGER).await;
            }
        };
        tokio::select! {
            () = uploading => {}
            // Claims are handed over after the uploads of a shutdown.
            () = &mut closed => {}
        }
    }
    active.delete_of_claim(&ObjectKey::manifest_claim(&digest)).await;
    drop(guard);
}

/// Result of the create of a claim.
enum Created {
    Lease(ManifestLease),
    /// The claim of another cache, or none.
    Not(Look),
}

/// A claim that this cache waits for. Dropped without an end, it was in vain.
struct Following<'a> {
    active: &'a Active,
    key: &'a ObjectKey,
    etag: Option<String>,
}

impl Drop for Following<'_> {
    fn drop(&mut self) {
        if let Some(etag) = self.etag.take() {
            self.active.claims.manifests.vain.insert(self.key.clone(), etag);
            self.active.telemetry.shared().record_claim("manifest-late");
        }
    }
}

impl SharedStorage {
    /// Claims a manifest that the bucket lacks, or waits for the cache that has claimed it, at most for a second. The wait ends
    /// when it is dropped, and a claim that is won after that is deleted.
    pub async fn claim_manifest(&self, digest: Digest) -> ManifestTurn {
        match self.readable() {
            Some(active) => active.manifest_turn(digest, &self.store).await,
            None => ManifestTurn::Alone,
        }
    }
}

impl Active {
    async fn manifest_turn(self: &Arc<Self>, digest: Digest, store: &AsyncStore) -> ManifestTurn {
        let (began, claims) = (Instant::now(), &self.claims);
        if !self.settings.claims || !self.settings.write || !self.may_claim() {
            return ManifestTurn::Alone;
        }
        let content = SharedContent::Manifest(digest);
        let Some(guard) = claims.leases.register(content).filter(|_| claims.may_look()) else {
            return ManifestTurn::Alone;
        };
        let admission = claims.manifests.breaker.lock().admit(began);
        if matches!(admission, Admission::Later(_)) {
            return self.alone(digest, "manifest-slow");
        }
        let creating = self.created_or_found(digest, store, guard);
        let created = timeout_at(began + CREATE_WAIT, creating).await;
        self.record_create(created.is_ok());
        let look = match created {
            Ok(Created::Lease(lease)) => {
                self.telemetry.shared().record_claim("manifest-won");
                return ManifestTurn::Leads(lease);
            }
            Ok(Created::Not(look)) => look,
            Err(_) => return self.alone(digest, "manifest-slow"),
        };
        let following = self.follow_manifest(content, look);
        match timeout_at(began + FOLLOW_MAX, following).await {
            Ok(Ok(())) => {
                self.telemetry.shared().record_claim("manifest-followed");
                ManifestTurn::Written
            }
            Ok(Err(reason)) => self.alone(digest, reason),
            // Recorded by `Following`.
            Err(_) => ManifestTurn::Alone,
        }
    }

    fn record_create(&self, is_in_time: bool) {
        let outcome = if is_in_time {
            Outcome::Answered
        } else {
            Outcome::Silent
        };
        let transition = self
            .claims
            .manifests
            .breaker
            .lock()
            .record(outcome, Instant::now());
        match transition {
            Transition::Opened => tracing::warn!(bucket = %self.settings.name,
                "shared storage is slow to create claims, several caches may request a manifest at once"),
            Transition::Closed(after) => tracing::info!(bucket = %self.settings.name,
                seconds = after.as_secs(), "shared storage creates claims in time again"),
            Transition::None => {}
        }
    }

    fn alone(&self, digest: Digest, reason: &'static str) -> ManifestTurn {
        tracing::debug!(%digest, reason, "no claim of a manifest in the shared storage is used");
        self.telemetry.shared().record_claim(reason);
        ManifestTurn::Alone
    }

    /// Creates the claim. Storages are slow to refuse a create where many caches create at once, so the claim is looked for
    /// meanwhile.
    async fn created_or_found(
        self: &Arc<Self>,
        digest: Digest,
        store: &AsyncStore,
        guard: LeaseGuard,
    ) -> Created {
        let (sender, mut created) = oneshot::channel();
        let (active, store) = (Arc::clone(self), store.clone());
        // In a task of its own: a lease that no one receives is dropped, which deletes its claim.
        tokio::spawn(async move {
            let created = active.create_manifest_claim(digest, store, guard).await;
            drop(sender.send(created));
        });
        loop {
            let looking = async {
                sleep(LOOK).await;
                self.look(&ObjectKey::manifest_claim(&digest)).await
            };
            let look = tokio::select! {
                biased;
                created = &mut created => return created.unwrap_or(Created::Not(Look::Failed)),
                look = looking => look,
            };
            if let Look::Present { record, .. } = &look
                && !record
                    .as_ref()
                    .is_some_and(|record| record.is_of(&self.claims.leases.me))
            {
                return Created::Not(look);
            }
        }
    }

    async fn create_manifest_claim(
        self: &Arc<Self>,
        digest: Digest,
        store: AsyncStore,
        guard: LeaseGuard,
    ) -> Created {
        let (key, me) = (ObjectKey::manifest_claim(&digest), &self.claims.leases.me);
        let number = self.claims.manifests.created.fetch_add(1, Ordering::Relaxed);
        let written = self.send_create(&key, &ClaimRecord::numbered(me, number)).await;
        if !matches!(written, Written::Done(_)) {
            let look = self.look(&key).await;
            // Otherwise the reply to the create was lost.
            let is_own = matches!(&look, Look::Present { record: Some(record), .. } if record.is_of(me));
            if !is_own {
                return Created::Not(look);
            }
        }
        Created::Lease(ManifestLease::start(self, store, digest, guard))
    }

    /// Waits until the bucket has the manifest, beginning with the content at the key of its claim. Fails with the reason if
    /// nothing is to be waited for.
    async fn follow_manifest(&self, content: SharedContent, mut look: Look) -> Result<(), &'static str> {
        let key = ObjectKey::manifest_claim(&content.digest());
        let etag = match &look {
            Look::Present { etag, .. } => Some(etag.clone()),
            Look::Absent | Look::Failed => None,
        };
        let mut following = Following {
            active: self,
            key: &key,
            etag,
        };
        loop {
            // After the read of the claim, because its owner deletes it after the upload.
            if self.claims.may_look() && self.has(content).await {
                following.etag = None;
                return Ok(());
            }
            following.etag = None;
            following.etag = Some(self.followed_version(&key, look)?);
            sleep(LOOK).await;
            look = self.look(&key).await;
        }
    }

    /// Version of a claim that is worth a wait.
    fn followed_version(&self, key: &ObjectKey, look: Look) -> Result<String, &'static str> {
        match look {
            Look::Absent => Err("manifest-ended"),
            Look::Failed => Err("manifest-unavailable"),
            Look::Present { record: None, .. } => Err("manifest-invalid"),
            Look::Present { age, etag, .. } => {
                let is_old = age.is_some_and(|age| age > DEAD_AGE);
                let was_in_vain = self.claims.manifests.vain.get(key).as_ref() == Some(&etag);
                if is_old || was_in_vain {
                    Err("manifest-dead")
                } else {
                    Ok(etag)
                }
            }
        }
    }
}
