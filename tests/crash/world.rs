//! Test images of the campaigns, and which of them the cache has acknowledged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream, noise, sha256, within};

pub const REPOSITORY: &str = "library/demo";

/// Number of recent images to verify, and of older ones.
const VERIFIED: usize = 10;

/// Pseudorandom numbers, the same in every run.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit.max(1) as u64).unwrap()
    }

    pub async fn pause(&mut self, most: Duration) {
        let micros = self.below(usize::try_from(most.as_micros()).unwrap());
        tokio::time::sleep(Duration::from_micros(micros as u64)).await;
    }
}

/// An upstream with numbered images, and the acknowledged ones.
pub struct World {
    pub upstream: Upstream,
    pub chance: Chance,
    images: BTreeMap<u64, Arc<Image>>,
    next: u64,
    /// Images that were received completely, after which the cache reported all downloads as finished.
    pub acknowledged: Vec<u64>,
    pub checked: u64,
}

/// Result of a pull: the image's number, and whether every byte arrived.
pub type Pulled = (u64, bool);

impl World {
    pub async fn new(seed: u64) -> World {
        World {
            upstream: Upstream::start().await,
            chance: Chance::new(seed),
            images: BTreeMap::new(),
            next: 0,
            acknowledged: Vec::new(),
            checked: 0,
        }
    }

    pub fn setup(&self) -> Setup {
        Setup::over(&self.upstream).tail("[store]\nfree = \"0 B\"")
    }

    /// Pushes a new image with a shared layer and a layer of its own.
    pub fn image(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        let bytes = [2_000, 70_000, 300_000][self.chance.below(3)];
        let image = Image::with_layers(&[noise(u64::MAX, 100_000), noise(number, bytes)]);
        let image = self.upstream.push(REPOSITORY, &tag(number), image);
        self.images.insert(number, Arc::new(image));
        number
    }

    pub fn of(&self, number: u64) -> Arc<Image> {
        Arc::clone(&self.images[&number])
    }

    /// Pulls new images concurrently.
    pub fn pull_new(&mut self, proxy: &Proxy, count: usize) -> JoinSet<Pulled> {
        let mut pulls = JoinSet::new();
        for _ in 0..count {
            let number = self.image();
            let image = self.of(number);
            let asks = asks(proxy, number, &image);
            pulls.spawn(async move { (number, pull(asks, &image).await) });
        }
        pulls
    }

    /// Pulls new images, waits until they are stored, and records them as acknowledged.
    pub async fn acknowledge_new(&mut self, proxy: &Proxy, count: usize) {
        let mut pulls = self.pull_new(proxy, count);
        let mut numbers = Vec::new();
        while let Some(pulled) = pulls.join_next().await {
            let (number, is_complete) = pulled.unwrap();
            assert!(
                is_complete,
                "image {number} is incomplete although the cache is healthy"
            );
            numbers.push(number);
        }
        until_stored(proxy).await;
        self.acknowledged.extend(numbers);
    }

    /// Without the upstream, acknowledged images must be complete and correct. Verifies all recent images and a
    /// sample of the older ones.
    pub async fn verify(&mut self, proxy: &Proxy) {
        self.upstream.resets();
        let last = self.acknowledged.len().saturating_sub(VERIFIED);
        let mut numbers = self.acknowledged[last..].to_vec();
        for _ in 0..VERIFIED.min(last) {
            numbers.push(self.acknowledged[self.chance.below(last)]);
        }
        for number in numbers {
            let image = self.of(number);
            assert!(
                pull(asks(proxy, number, &image), &image).await,
                "image {number} was acknowledged and is lost"
            );
            self.checked += 1;
        }
        self.upstream.recovers();
    }
}

pub fn tag(number: u64) -> String {
    format!("v{number}")
}

/// The requests of a pull.
pub fn asks(proxy: &Proxy, number: u64, image: &Image) -> Vec<Ask> {
    let manifest = proxy.manifest(REPOSITORY, &tag(number));
    let blobs = image
        .blobs
        .iter()
        .map(|blob| proxy.blob(REPOSITORY, &blob.digest));
    std::iter::once(manifest).chain(blobs).collect()
}

/// Returns whether the image is complete. Wrong bytes panic, because every complete response is verified.
pub async fn pull(asks: Vec<Ask>, image: &Image) -> bool {
    let mut asks = asks.into_iter();
    let manifest = asks.next().unwrap().tried().await;
    if !manifest.is_some_and(|reply| reply.status == 200 && reply.whole && reply.body == image.manifest) {
        return false;
    }
    for (ask, blob) in asks.zip(&image.blobs) {
        let reply = ask.tried().await;
        if !reply.is_some_and(|reply| reply.status == 200 && reply.whole && reply.body == blob.bytes) {
            return false;
        }
    }
    true
}

/// Waits until no download runs, so that every blob is committed or has failed.
pub async fn until_stored(proxy: &Proxy) {
    within("all downloads to be stored", async {
        loop {
            let metrics = proxy.admin("/metrics").await;
            let text = String::from_utf8_lossy(&metrics.body).into_owned();
            if text.contains("ifnewer_transfers_in_progress 0") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// The store's part of `/api/v1/status`.
pub async fn store_status(proxy: &Proxy) -> serde_json::Value {
    proxy.admin("/api/v1/status").await.json()["store"].clone()
}

/// A record with its checksum, in the store's format.
pub fn sealed(record: &serde_json::Value) -> Vec<u8> {
    let mut record = record.clone();
    record.as_object_mut().unwrap().remove("checksum");
    let text = record.to_string();
    let text = text.strip_suffix('}').unwrap();
    let sum = &sha256(text.as_bytes())[7..23];
    format!("{text},\"checksum\":\"{sum}\"}}\n").into_bytes()
}

/// Returns whether the bytes are a record with a valid checksum.
pub fn is_sealed(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let Some((text, sum)) = text.rsplit_once(",\"checksum\":\"") else {
        return false;
    };
    sum.trim_end() == format!("{}\"}}", &sha256(text.as_bytes())[7..23])
}

/// The time this long ago.
#[expect(clippy::disallowed_methods, reason = "sets file times in the past")]
pub fn past(age: Duration) -> std::time::SystemTime {
    std::time::SystemTime::now() - age
}
