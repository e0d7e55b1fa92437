//! Redirects of clients to the bucket: which objects are known to be there, and their presigned URLs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::{Active, SharedContent};
use crate::bucket::{ObjectInfo, ObjectKey};
use crate::oci::{Digest, Hasher};

/// Smaller blobs are served by this cache: a further connection would take longer.
pub const REDIRECT_BYTES_MIN: u64 = 1024 * 1024;

/// How long an object is taken to exist after the bucket said so.
const PRESENT_PERIOD: Duration = Duration::from_secs(5 * 60);

/// Objects of which the presence is remembered.
const PRESENT_MAX: usize = 8192;

/// An object that the bucket's lifecycle rule may delete within this time is written again instead.
const EXPIRY_MARGIN: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// Of so many redirects, one is verified.
const VERIFIED_ONE_OF: u32 = 256;

/// Which requests are redirected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedirectMode {
    /// None.
    #[default]
    Never,
    /// Those for blobs that are not cached here.
    Uncached,
    /// All that the bucket can serve.
    Always,
}

/// Settings of redirects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RedirectSettings {
    /// Which requests are redirected.
    pub mode: RedirectMode,
    /// How long a URL is valid.
    pub valid: Duration,
}

/// Objects that are known to be in the bucket, and the redirects to them.
pub(super) struct Redirects {
    present: Cache<ObjectKey, Present>,
    sent: AtomicU32,
    is_verifying: AtomicBool,
}

/// An object that was in the bucket.
#[derive(Clone, Copy)]
struct Present {
    until: Instant,
    size: u64,
}

impl Default for Redirects {
    fn default() -> Self {
        Self {
            present: Cache::new(PRESENT_MAX),
            sent: AtomicU32::new(0),
            is_verifying: AtomicBool::new(false),
        }
    }
}

/// Result of the search for an object.
pub(super) enum Found {
    /// Its presigned URL.
    Url(String),
    /// It is so old that it must be written again first.
    Expiring(Option<Duration>),
    /// It cannot be used.
    Nothing,
}

impl Active {
    /// The URL of a blob of this size, if the bucket has it and will have it while the URL is valid.
    pub(super) async fn find(self: &Arc<Self>, digest: Digest, size: Option<u64>) -> Found {
        let key = ObjectKey::blob(&digest);
        let now = Instant::now();
        let known = self.redirects.present.get(&key).filter(|known| now < known.until);
        let found = match known {
            _ if self.is_refused(&key) => return Found::Nothing,
            Some(known) => known.size,
            None => match self.size_of(&key).await {
                Ok(size) => size,
                Err(found) => return found,
            },
        };
        if found < REDIRECT_BYTES_MIN || size.is_some_and(|size| size != found) {
            return Found::Nothing;
        }
        let signed = self
            .settings
            .bucket
            .presign(&key, self.settings.redirect.valid)
            .await;
        match signed {
            Ok(url) => {
                self.telemetry.shared().record_redirect();
                self.verify_some(digest);
                Found::Url(url)
            }
            Err(error) => {
                tracing::debug!(object = %key, %error, "failed to sign the URL of an object");
                Found::Nothing
            }
        }
    }

    async fn size_of(self: &Arc<Self>, key: &ObjectKey) -> Result<u64, Found> {
        if !self.may_read(key) {
            return Err(Found::Nothing);
        }
        let began = Instant::now();
        let head = self.settings.bucket.head(key).await;
        self.record_read("head", &head, began.elapsed());
        let ObjectInfo { size, age, .. } = head.map_err(|_| Found::Nothing)?;
        let left = self.settings.keep.saturating_sub(EXPIRY_MARGIN);
        let Some(left) = left.checked_sub(age.unwrap_or_default()) else {
            return Err(Found::Expiring(age));
        };
        let until = began + left.min(PRESENT_PERIOD);
        self.redirects
            .present
            .insert(key.clone(), Present { until, size });
        Ok(size)
    }

    /// Reads one of many objects to which clients were redirected: the cache does not see their bytes.
    fn verify_some(self: &Arc<Self>, digest: Digest) {
        let count = self.redirects.sent.fetch_add(1, Ordering::Relaxed);
        let is_due = count.is_multiple_of(VERIFIED_ONE_OF);
        if is_due && !self.redirects.is_verifying.swap(true, Ordering::Relaxed) {
            tokio::spawn(verify(Arc::clone(self), digest));
        }
    }

    /// The object is not there any more, or is not what it was.
    pub(super) fn forget_present(&self, key: &ObjectKey) {
        self.redirects.present.remove(key);
    }
}

async fn verify(active: Arc<Active>, digest: Digest) {
    let content = SharedContent::Blob(digest);
    if let Some(mut object) = active.open(content, 0).await {
        let mut hasher = Hasher::new(digest.algorithm());
        let mut is_whole = true;
        while let Some(chunk) = object.chunk().await {
            match chunk {
                Ok(bytes) => hasher.update(&bytes),
                Err(_) => is_whole = false,
            }
        }
        if is_whole && hasher.finish() != digest {
            active.report_wrong(&content.key());
        }
    }
    active.redirects.is_verifying.store(false, Ordering::Relaxed);
}
