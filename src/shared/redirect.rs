//! Redirects of clients to the bucket: which objects are known to be there, and their presigned URLs.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

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

/// An object that the bucket's lifecycle rule may delete within this time, or within a quarter of its lifetime, is written
/// again instead.
const EXPIRY_MARGIN_MAX: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// A client that asks for a blob again so soon after its redirect could not read it in the bucket.
pub(super) const RETRY_PERIOD: Duration = Duration::from_secs(60);

/// Redirects that are remembered, each of one client to one blob.
const SENT_MAX: usize = 16_384;

/// The host's clock may differ from that of the storage by less than this part of the validity of a URL.
const CLOCK_PART: u32 = 4;

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedirectSettings {
    /// Which requests are redirected.
    pub mode: RedirectMode,
    /// How long a URL is valid.
    pub valid: Duration,
    /// Host of the storage in the URLs.
    pub host: Arc<str>,
}

/// A client that may be redirected.
#[derive(Clone, Copy, Debug)]
pub struct RedirectClient<'a> {
    /// Its address. Of an IPv6 address the first 64 bits count.
    pub address: IpAddr,
    /// The host by which it addressed this cache, without the port.
    pub host: Option<&'a str>,
    /// Whether it sent a credential.
    pub has_credential: bool,
    /// Whether it continues a response that broke off: its range begins after byte 0 and has no end.
    pub is_resuming: bool,
}

/// Whether clients in Go that follow a redirect from the host `from` to the host `to` send `Authorization` there too: they
/// do to the same host, at any port, and to its subdomains.
pub fn forwards_credential(from: &str, to: &str) -> bool {
    let Some((above, rest)) = to
        .len()
        .checked_sub(from.len())
        .and_then(|at| to.split_at_checked(at))
    else {
        return false;
    };
    rest.eq_ignore_ascii_case(from) && (above.is_empty() || above.ends_with('.'))
}

/// Objects that are known to be in the bucket, and the redirects to them.
pub(super) struct Redirects {
    pub(super) present: Cache<ObjectKey, Present>,
    sent: Cache<(IpAddr, Digest), Sent>,
    count: AtomicU32,
    pub(super) is_verifying: AtomicBool,
    has_logged_host: AtomicBool,
    has_logged_clock: AtomicBool,
}

/// The last redirect of a client to a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    at: Instant,
    /// Whether the client continued a response there.
    is_resumed: bool,
}

impl Sent {
    /// The redirect of a request at `now`. `None`: the client asks again too soon, and gets the bytes from here.
    fn after(earlier: Option<Sent>, is_resuming: bool, now: Instant) -> Option<Sent> {
        let recent = earlier.filter(|earlier| now.saturating_duration_since(earlier.at) < RETRY_PERIOD);
        match recent {
            // dockerd and containerd continue a response of the bucket that broke off by a request here.
            Some(earlier) => (is_resuming && !earlier.is_resumed).then_some(Sent {
                at: now,
                is_resumed: true,
            }),
            None => Some(Sent {
                at: now,
                is_resumed: false,
            }),
        }
    }
}

/// An object that was in the bucket.
#[derive(Clone, Copy)]
pub(super) struct Present {
    until: Instant,
    size: u64,
}

impl Default for Redirects {
    fn default() -> Self {
        Self {
            present: Cache::new(PRESENT_MAX),
            sent: Cache::new(SENT_MAX),
            count: AtomicU32::new(0),
            is_verifying: AtomicBool::new(false),
            has_logged_host: AtomicBool::new(false),
            has_logged_clock: AtomicBool::new(false),
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
    /// Whether this client is redirected to blobs that the bucket has; `is_cached`: to those that are cached here.
    pub(super) fn redirects(&self, is_cached: bool, client: &RedirectClient<'_>) -> bool {
        let is_wanted = match self.settings.redirect.mode {
            RedirectMode::Never => false,
            RedirectMode::Uncached => !is_cached,
            RedirectMode::Always => true,
        };
        is_wanted && !self.may_expose_credential(client)
    }

    /// Whether the client may send its credential to the storage too.
    fn may_expose_credential(&self, client: &RedirectClient<'_>) -> bool {
        let to = &*self.settings.redirect.host;
        let is_safe = client.host.is_some_and(|from| !forwards_credential(from, to));
        if is_safe || !client.has_credential {
            return false;
        }
        if !self.redirects.has_logged_host.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                host = client.host.unwrap_or_default(),
                storage = to,
                "clients with a credential are not redirected to the shared storage: its name is that of this cache or \
                 below, so they would send the credential there too; set `redirect_endpoint` to another name"
            );
        }
        true
    }

    /// The URL of a blob of this size, if the bucket has it and will have it while the URL is valid.
    pub(super) async fn find(
        self: &Arc<Self>,
        (digest, size): (Digest, Option<u64>),
        client: &RedirectClient<'_>,
        time: SystemTime,
    ) -> Found {
        let key = ObjectKey::blob(&digest);
        let now = Instant::now();
        let sent_to = (client.address, digest);
        let earlier = self.redirects.sent.get(&sent_to);
        let sent = Sent::after(earlier, client.is_resuming, now);
        if sent.is_none_or(|sent| sent.is_resumed) {
            // Perhaps the object is gone, or the bucket does not respond.
            self.forget_present(&key);
        }
        let Some(sent) = sent else {
            tracing::debug!(object = %key, client = %client.address,
                "a client asks again for a blob to which it was redirected, it is served from here");
            return Found::Nothing;
        };
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
        if !self.is_clock_right(time, now) {
            return Found::Nothing;
        }
        let signed = self
            .settings
            .bucket
            .presign(&key, self.settings.redirect.valid)
            .await;
        match signed {
            Ok(url) => {
                self.redirects.sent.insert(sent_to, sent);
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
        let keep = self.settings.keep;
        let left = keep.saturating_sub(EXPIRY_MARGIN_MAX.min(keep / 4));
        let Some(left) = left.checked_sub(age.unwrap_or_default()) else {
            return Err(Found::Expiring(age));
        };
        let until = began + left.min(PRESENT_PERIOD);
        self.redirects
            .present
            .insert(key.clone(), Present { until, size });
        Ok(size)
    }

    /// Whether URLs that are signed by the clock of this host, which showed `own` at `now`, are valid at the storage.
    fn is_clock_right(&self, own: SystemTime, now: Instant) -> bool {
        let clock = self.settings.bucket.clock();
        let difference = clock.and_then(|clock| clock.difference(own, now));
        if difference.is_some_and(|difference| difference < self.settings.redirect.valid / CLOCK_PART) {
            return true;
        }
        if !self.redirects.has_logged_clock.swap(true, Ordering::Relaxed) {
            tracing::warn!(bucket = %self.settings.name, seconds = difference.map(|difference| difference.as_secs()),
                "clients are not redirected to the shared storage: the clock of this host differs from that of the \
                 storage by a quarter of `redirect_ttl` or more, or the storage states no time; set the clock");
        }
        false
    }

    /// Reads one of many objects to which clients were redirected: the cache does not see their bytes.
    fn verify_some(self: &Arc<Self>, digest: Digest) {
        let count = self.redirects.count.fetch_add(1, Ordering::Relaxed);
        let is_due = count.is_multiple_of(VERIFIED_ONE_OF);
        if is_due && !self.redirects.is_verifying.swap(true, Ordering::Relaxed) {
            tokio::spawn(verify(Arc::clone(self), digest));
        }
    }

    /// The object may have been deleted or replaced.
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
