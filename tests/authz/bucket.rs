//! In-memory bucket of several caches: conditional writes, a clock of its own, delays, and reads that wait for the test.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ifnewer::bucket::{
    BucketError, BucketFuture, Object, ObjectBody, ObjectChunk, ObjectInfo, ObjectKey, ObjectStorage,
    StorageClock, Upload,
};
use ifnewer::oci::UpstreamFailure;
use ifnewer::shared::{RecordKeys, RecordSettings, RedirectSettings, SharedSettings};
use tokio::time::{Instant, sleep};

use super::registry::now;

/// The bucket's clock when it is made, decades behind those of the caches.
const START: Duration = Duration::from_secs(883_612_800);

/// Limit of the client for a read: `wait_max`, and later than a caller that waits as long itself.
const READ_TIMEOUT: Duration = Duration::from_millis(1_001);

#[derive(Default)]
struct Content {
    objects: BTreeMap<String, (Bytes, u64)>,
    versions: u64,
    requests: Vec<String>,
    delay: Duration,
    is_failing: bool,
    is_silent: bool,
    /// Blobs stop after the first half of the rest.
    stalls: bool,
    /// How far its clock was set forward.
    stepped: Duration,
    /// Reads of names with this beginning wait.
    held: Option<(String, tokio::sync::watch::Receiver<bool>)>,
}

/// A bucket.
#[derive(Clone)]
pub struct Bucket {
    content: Arc<Mutex<Content>>,
    started: Instant,
    /// Its clock when it is made.
    start: Duration,
}

/// The bucket as one cache sees it.
struct View {
    bucket: Bucket,
    clock: StorageClock,
    /// Difference of its clock, for a cache that writes records from the future.
    ahead: Duration,
}

impl Bucket {
    pub fn new() -> Bucket {
        Bucket {
            content: Arc::default(),
            started: Instant::now(),
            start: START,
        }
    }

    /// A bucket whose clock is right.
    pub fn with_right_clock() -> Bucket {
        Bucket {
            start: now().duration_since(SystemTime::UNIX_EPOCH).unwrap(),
            ..Bucket::new()
        }
    }

    /// Sets the bucket's clock to this much more than that of its start.
    pub fn steps(&self, by: Duration) {
        self.content.lock().unwrap().stepped = by;
    }

    /// Sets the bucket's clock right.
    pub fn sets_clock_right(&self) {
        let now = now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let shown = self.start + self.started.elapsed();
        self.steps(now.checked_sub(shown).unwrap());
    }

    /// Settings of a cache with the key of this digit.
    pub fn settings(&self, digit: &str) -> SharedSettings {
        self.settings_ahead(digit, Duration::ZERO)
    }

    /// The same for a cache to which the bucket's clock seems to be ahead.
    pub fn settings_ahead(&self, digit: &str, ahead: Duration) -> SharedSettings {
        SharedSettings {
            bucket: Arc::new(View {
                bucket: self.clone(),
                clock: StorageClock::default(),
                ahead,
            }),
            name: "s3://images".into(),
            write: true,
            claims: false,
            wait_max: Duration::from_secs(1),
            keep: Duration::from_secs(28 * 86_400),
            uploads_max: 1,
            records: Some(RecordSettings {
                keys: RecordKeys::parse(&digit.repeat(64)).unwrap(),
                prefix: "".into(),
                grants: true,
            }),
            redirect: RedirectSettings::default(),
        }
    }

    /// Reads take this long.
    pub fn delays(&self, delay: Duration) {
        self.content.lock().unwrap().delay = delay;
    }

    /// Deletes the objects whose names begin with this.
    pub fn loses(&self, prefix: &str) {
        let mut content = self.content.lock().unwrap();
        content.objects.retain(|name, _| !name.starts_with(prefix));
    }

    /// Reads fail from now on.
    pub fn fails(&self) {
        self.content.lock().unwrap().is_failing = true;
    }

    /// The bucket has this object.
    pub fn puts(&self, key: &ObjectKey, bytes: Bytes) {
        let mut content = self.content.lock().unwrap();
        content.versions += 1;
        let version = content.versions;
        content.objects.insert(key.to_string(), (bytes, version));
    }

    /// Blobs stop after the first half of the rest.
    pub fn stalls(&self) {
        self.content.lock().unwrap().stalls = true;
    }

    /// Reads wait until `true` is sent.
    pub fn holds_reads(&self) -> tokio::sync::watch::Sender<bool> {
        self.holds_reads_of("")
    }

    /// Reads of names with this beginning wait until `true` is sent.
    pub fn holds_reads_of(&self, prefix: &str) -> tokio::sync::watch::Sender<bool> {
        let (release, held) = tokio::sync::watch::channel(false);
        self.content.lock().unwrap().held = Some((prefix.to_owned(), held));
        release
    }

    /// Reads get no response from now on, and fail just before `wait_max`.
    pub fn falls_silent(&self) {
        let mut content = self.content.lock().unwrap();
        (content.is_silent, content.delay) = (true, Duration::from_millis(990));
    }

    pub fn forget_requests(&self) {
        self.content.lock().unwrap().requests.clear();
    }

    /// The requests so far: method and name.
    pub fn requests(&self) -> Vec<String> {
        self.content.lock().unwrap().requests.clone()
    }

    /// Names of the objects that begin with this.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let content = self.content.lock().unwrap();
        let names = content.objects.keys().filter(|name| name.starts_with(prefix));
        names.cloned().collect()
    }

    /// How often the record of a tag was read.
    pub fn tag_reads(&self) -> usize {
        let requests = self.requests();
        let reads = requests
            .iter()
            .filter(|line| line.starts_with("GET v1/records/tag/"));
        reads.count()
    }
}

impl View {
    async fn begin(&self, method: &str, key: &ObjectKey) -> Result<(), BucketError> {
        let (delay, held) = {
            let mut content = self.bucket.content.lock().unwrap();
            content.requests.push(format!("{method} {key}"));
            match method {
                "GET" | "HEAD" => (content.delay, content.held.clone()),
                _ => (Duration::ZERO, None),
            }
        };
        // Lets other tasks run.
        sleep(delay.clamp(Duration::from_millis(1), READ_TIMEOUT)).await;
        if delay > READ_TIMEOUT {
            return Err(BucketError::Silent(UpstreamFailure::Timeout));
        }
        if let Some((prefix, mut held)) = held
            && key.as_str().starts_with(&prefix)
        {
            let _ = held.wait_for(|is_released| *is_released).await;
        }
        let now = Instant::now();
        let stepped = self.bucket.content.lock().unwrap().stepped;
        let elapsed = (now - self.bucket.started) + self.ahead + stepped;
        let date = SystemTime::UNIX_EPOCH + self.bucket.start + Duration::from_secs(elapsed.as_secs());
        self.clock.learn(date, now, now);
        Ok(())
    }

    fn info(&self, key: &ObjectKey) -> Result<(Bytes, ObjectInfo), BucketError> {
        let content = self.bucket.content.lock().unwrap();
        if content.is_silent {
            return Err(BucketError::Silent(UpstreamFailure::Timeout));
        }
        if content.is_failing {
            return Err(BucketError::Busy(503));
        }
        let (bytes, version) = content.objects.get(key.as_str()).ok_or(BucketError::Absent)?;
        let info = ObjectInfo {
            size: bytes.len() as u64,
            etag: Some(version.to_string()),
            age: Some(Duration::ZERO),
            media_type: None,
        };
        Ok((bytes.clone(), info))
    }

    /// Writes the object if the version of the present one, if any, satisfies the condition.
    fn write(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        condition: impl FnOnce(Option<&str>) -> bool,
    ) -> BucketResult {
        let mut content = self.bucket.content.lock().unwrap();
        let found = content
            .objects
            .get(key.as_str())
            .map(|(_, version)| version.to_string());
        if !condition(found.as_deref()) {
            return Err(BucketError::Exists);
        }
        content.versions += 1;
        let version = content.versions;
        content.objects.insert(key.to_string(), (bytes, version));
        Ok(Some(version.to_string()))
    }
}

type BucketResult = Result<Option<String>, BucketError>;

struct Body {
    bytes: Option<Bytes>,
    stalls: bool,
}

impl ObjectBody for Body {
    fn chunk(&mut self) -> ObjectChunk<'_> {
        let (chunk, stalls) = (self.bytes.take(), self.stalls);
        Box::pin(async move {
            match chunk {
                Some(bytes) if stalls => Some(Ok(bytes.slice(..bytes.len() / 2))),
                Some(bytes) => Some(Ok(bytes)),
                None if stalls => std::future::pending().await,
                None => None,
            }
        })
    }
}

impl ObjectStorage for View {
    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        Box::pin(async move {
            self.begin("GET", key).await?;
            let (bytes, info) = self.info(key)?;
            let rest = bytes.slice(usize::try_from(from).unwrap()..);
            let stalls = self.bucket.content.lock().unwrap().stalls && key.as_str().starts_with("v1/blobs/");
            Ok(Object {
                info,
                body: Box::new(Body {
                    bytes: Some(rest),
                    stalls,
                }),
            })
        })
    }

    fn head<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo> {
        Box::pin(async move {
            self.begin("HEAD", key).await?;
            Ok(self.info(key)?.1)
        })
    }

    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        _: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(async move {
            self.begin("CREATE", key).await?;
            self.write(key, bytes, |found| found.is_none())
        })
    }

    fn update<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        etag: &'a str,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(async move {
            self.begin("UPDATE", key).await?;
            self.write(key, bytes, |found| found == Some(etag))
        })
    }

    fn put<'a>(&'a self, key: &'a ObjectKey, bytes: Bytes, _: Option<&'a str>) -> BucketFuture<'a, ()> {
        Box::pin(async move {
            self.begin("PUT", key).await?;
            self.write(key, bytes, |_| true).map(drop)
        })
    }

    fn upload<'a>(&'a self, _: &'a ObjectKey) -> BucketFuture<'a, Box<dyn Upload>> {
        // No test has a blob of several parts.
        Box::pin(async { Err(BucketError::Malformed) })
    }

    fn delete<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ()> {
        Box::pin(async move {
            self.begin("DELETE", key).await?;
            let mut content = self.bucket.content.lock().unwrap();
            content.objects.remove(key.as_str());
            Ok(())
        })
    }

    fn clock(&self) -> Option<&StorageClock> {
        Some(&self.clock)
    }
}
