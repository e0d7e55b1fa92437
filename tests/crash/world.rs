//! What is pulled, and what was acknowledged of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream, noise, sha256, within};

pub const REPOSITORY: &str = "library/demo";

/// So many of the last images are looked for, and so many of those before: those of some rounds.
const VERIFIED: usize = 10;

/// Numbers that look like chance and are the same in every run.
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

/// An upstream with images by number, and what the cache has acknowledged.
pub struct World {
    pub upstream: Upstream,
    pub chance: Chance,
    images: BTreeMap<u64, Arc<Image>>,
    next: u64,
    /// Everything of these was received, and the cache said that it had finished keeping it.
    pub acknowledged: Vec<u64>,
    pub checked: u64,
}

/// One image pulled: its number, whether every byte came.
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

    /// A new image: a layer that all have, and one of its own.
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

    /// Pulls new images at once, in tasks of their own.
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

    /// Pulls new images to the end, waits until all of it is kept, and counts it as acknowledged.
    pub async fn acknowledge_new(&mut self, proxy: &Proxy, count: usize) {
        let mut pulls = self.pull_new(proxy, count);
        let mut numbers = Vec::new();
        while let Some(pulled) = pulls.join_next().await {
            let (number, is_whole) = pulled.unwrap();
            assert!(is_whole, "image {number} did not come whole from a healthy cache");
            numbers.push(number);
        }
        until_kept(proxy).await;
        self.acknowledged.extend(numbers);
    }

    /// With the upstream gone, everything acknowledged must come, whole and right: all of the last, and some of the rest.
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

/// Whether all of it came, whole. Wrong bytes end the program: every reply that is whole is checked.
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

/// Waits until no transfer runs: each has its name then, durably, or has failed.
pub async fn until_kept(proxy: &Proxy) {
    within("all transfers to be kept", async {
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

/// What `/api/v1/status` says of the store.
pub async fn store_status(proxy: &Proxy) -> serde_json::Value {
    proxy.admin("/api/v1/status").await.json()["store"].clone()
}

/// A record with its checksum, as the store writes it.
pub fn sealed(record: &serde_json::Value) -> Vec<u8> {
    let mut record = record.clone();
    record.as_object_mut().unwrap().remove("checksum");
    let text = record.to_string();
    let text = text.strip_suffix('}').unwrap();
    let sum = &sha256(text.as_bytes())[7..23];
    format!("{text},\"checksum\":\"{sum}\"}}\n").into_bytes()
}

/// Whether these bytes are a record with the right checksum.
pub fn is_sealed(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let Some((text, sum)) = text.rsplit_once(",\"checksum\":\"") else {
        return false;
    };
    sum.trim_end() == format!("{}\"}}", &sha256(text.as_bytes())[7..23])
}

/// So long ago.
#[expect(clippy::disallowed_methods, reason = "files are given times of the past")]
pub fn past(age: Duration) -> std::time::SystemTime {
    std::time::SystemTime::now() - age
}
