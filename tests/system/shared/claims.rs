//! Claims: two caches that miss a blob at once, over one bucket. One fetches it, the other follows.

use super::bucket::{Bucket, Mode};
use super::{DEMO, MIB, metric};
use crate::proxy::{Proxy, Setup};
use crate::registry::{Blob, Gate, Image, Upstream};

/// Two caches over one bucket, with an image that neither has.
struct Pair {
    upstream: Upstream,
    bucket: Bucket,
    layer: Blob,
    one: Proxy,
    other: Proxy,
}

impl Pair {
    async fn start() -> Pair {
        Self::start_with("", "").await
    }

    /// With further keys of `[shared]`, and further sections of the first cache.
    async fn start_with(keys: &str, tail: &str) -> Pair {
        let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
        let image = upstream.push(DEMO, "latest", Image::of_noise(11, 9 * MIB));
        let setup = bucket.behind_with(Setup::over(&upstream), keys);
        let one = setup.tail(tail).start().await;
        let setup = bucket.behind_with(Setup::over(&upstream), keys);
        let other = setup.start().await;
        for proxy in [&one, &other] {
            proxy.manifest(DEMO, "latest").await.is_image(&image);
        }
        bucket.has_no_claims().await;
        Pair {
            layer: image.layer(0).clone(),
            upstream,
            bucket,
            one,
            other,
        }
    }

    /// The upstream sends this many bytes of the layer, and waits.
    fn holds(&self, bytes: usize) -> Gate {
        self.upstream.holds_blob(&self.layer.digest, bytes)
    }

    async fn is_claimed(&self) {
        self.bucket
            .until("the claim", |bucket| !bucket.names("claims").is_empty())
            .await;
    }

    /// The ranges for which the upstream was asked; empty for the complete layer.
    fn ranges(&self) -> Vec<String> {
        let requests = self.upstream.requests();
        let gets = requests
            .iter()
            .filter(|seen| seen.method == "GET" && seen.path.ends_with(&self.layer.digest));
        gets.map(|seen| seen.header("range").unwrap_or_default().to_owned())
            .collect()
    }

    /// Nothing of the claim is left.
    async fn is_clean(&self) {
        self.bucket
            .until("no claim and no part", |bucket| {
                bucket.names("claims").is_empty() && bucket.names("parts").is_empty()
            })
            .await;
    }
}

#[tokio::test]
async fn two_caches_at_once_fetch_a_blob_once() {
    let pair = Pair::start().await;
    let (layer, gate) = (&pair.layer, pair.holds(4 * MIB));
    pair.bucket.has_claims_for(2).await;
    let mut first = pair.one.blob(DEMO, &layer.digest).stream().await;
    gate.reached().await;
    pair.is_claimed().await;
    let before = pair.upstream.bytes_sent();
    let mut second = pair.other.blob(DEMO, &layer.digest).stream().await;
    assert_eq!(second.headers["cache-status"], "ifnewer; hit; detail=shared");
    assert_eq!(second.headers["content-length"], (9 * MIB).to_string());
    // The upstream has sent less than half of it.
    assert_eq!(second.read(MIB).await, layer.bytes[..MIB]);
    let mut third = pair.other.blob(DEMO, &layer.digest).stream().await;
    assert_eq!(third.read(MIB).await, layer.bytes[..MIB]);
    gate.release();
    for flow in [&mut second, &mut third] {
        assert_eq!(flow.rest().await.unwrap(), layer.bytes[MIB..]);
    }
    assert_eq!(first.rest().await.unwrap(), layer.bytes);
    assert_eq!(pair.ranges(), [""], "one fetch for three responses");
    assert!(pair.upstream.bytes_sent() - before < 10 * MIB as u64);
    pair.bucket.has([layer.digest.as_str()]).await;
    pair.is_clean().await;
    let won = "ifnewer_shared_claims_total{result=\"won\"}";
    assert_eq!(metric(&pair.one, won).await, "1");
    let followed = "ifnewer_shared_claims_total{result=\"followed\"}";
    assert_eq!(metric(&pair.other, followed).await, "1");
    assert_eq!(
        metric(&pair.other, "ifnewer_shared_follow_wait_seconds_count").await,
        "1"
    );
}

#[tokio::test]
async fn blob_without_a_length_is_followed() {
    let pair = Pair::start().await;
    pair.upstream.omits_length();
    let (layer, gate) = (&pair.layer, pair.holds(4 * MIB));
    pair.bucket.has_claims_for(2).await;
    let first = pair.one.blob(DEMO, &layer.digest).stream();
    let second = async {
        gate.reached().await;
        pair.is_claimed().await;
        let part_arrived = async {
            let has_part = |bucket: &Bucket| !bucket.names("parts").is_empty();
            pair.bucket.until("a part", has_part).await;
            gate.release();
        };
        let second = pair.other.blob(DEMO, &layer.digest).stream();
        tokio::join!(second, part_arrived).0
    };
    let (mut first, mut second) = tokio::join!(first, second);
    assert_eq!(first.rest().await.unwrap(), layer.bytes);
    assert_eq!(second.rest().await.unwrap(), layer.bytes);
    // The others are samples, because a head without a length proves nothing.
    assert_eq!(pair.ranges().iter().filter(|range| range.is_empty()).count(), 1);
    pair.is_clean().await;
}

#[tokio::test]
async fn killed_owner_is_succeeded_from_its_last_part() {
    let mut pair = Pair::start().await;
    let (layer, gate) = (pair.layer.clone(), pair.holds(4 * MIB));
    pair.bucket.has_claims_for(2).await;
    let first = pair.one.blob(DEMO, &layer.digest).stream().await;
    gate.reached().await;
    pair.is_claimed().await;
    let mut second = pair.other.blob(DEMO, &layer.digest).stream().await;
    assert_eq!(second.read(MIB).await, layer.bytes[..MIB]);
    pair.one.kill();
    drop(first);
    gate.release();
    // By the bucket's clock, the claim has rested.
    pair.bucket.pass(16);
    assert_eq!(second.rest().await.unwrap(), layer.bytes[MIB..]);
    assert_eq!(pair.ranges(), ["", "bytes=1048576-"]);
    let taken_over = "ifnewer_shared_claims_total{result=\"taken-over\"}";
    assert_eq!(metric(&pair.other, taken_over).await, "1");
    pair.bucket.has([layer.digest.as_str()]).await;
    pair.is_clean().await;
}

#[tokio::test]
async fn claim_is_handed_over_at_shutdown() {
    let mut pair = Pair::start_with("", "[limits]\ndrain = \"1s\"").await;
    let (layer, gate) = (pair.layer.clone(), pair.holds(4 * MIB));
    pair.bucket.has_claims_for(2).await;
    let first = pair.one.blob(DEMO, &layer.digest).stream().await;
    gate.reached().await;
    pair.is_claimed().await;
    let mut second = pair.other.blob(DEMO, &layer.digest).stream().await;
    assert_eq!(second.read(MIB).await, layer.bytes[..MIB]);
    pair.one.terminate();
    assert_eq!(pair.one.exit().await, Some(0));
    drop(first);
    gate.release();
    assert_eq!(second.rest().await.unwrap(), layer.bytes[MIB..]);
    assert_eq!(pair.ranges(), ["", "bytes=1048576-"]);
    let won = "ifnewer_shared_claims_total{result=\"won\"}";
    assert_eq!(
        metric(&pair.other, won).await,
        "1",
        "nobody waited until it was dead"
    );
}

#[tokio::test]
async fn bucket_without_conditions_has_no_claims() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    bucket.set(Mode::IgnoresConditions);
    let image = upstream.push(DEMO, "latest", Image::of_noise(12, 2 * MIB));
    for _ in 0..2 {
        let proxy = bucket.behind(Setup::over(&upstream)).start().await;
        proxy.program().says("ignores conditions").await;
        proxy.pull(DEMO, "latest", &image).await;
        bucket.has([image.layer(0).digest.as_str()]).await;
    }
    let asked = bucket.asked_with_probes();
    assert!(
        asked.iter().all(|asked| !asked.object.contains("/claims/")),
        "{asked:?}"
    );
}

#[tokio::test]
async fn denied_claims_delay_no_pull() {
    let pair = Pair::start().await;
    let layer = &pair.layer;
    pair.bucket.has_claims_for(2).await;
    pair.bucket.set(Mode::DeniesClaims);
    for proxy in [&pair.one, &pair.other] {
        let gate = pair.holds(4 * MIB);
        let mut flow = proxy.blob(DEMO, &layer.digest).stream().await;
        gate.reached().await;
        gate.release();
        assert_eq!(flow.rest().await.unwrap(), layer.bytes);
        proxy.program().says("shared storage accepts no claims").await;
        if pair.ranges().len() == 1 {
            pair.bucket.has([layer.digest.as_str()]).await;
            pair.bucket.put(&pair.bucket.names("blobs")[0], "");
        }
    }
    assert_eq!(pair.ranges(), ["", ""]);
    let up = "ifnewer_shared_up{bucket=\"s3://images/team-a\"}";
    assert_eq!(metric(&pair.other, up).await, "1", "only claims are denied");
}

/// The claim of a cache that was killed and that no other cache followed.
#[tokio::test]
async fn old_claim_costs_nobody_a_wait() {
    let pair = Pair::start().await;
    let hex = pair.layer.digest.trim_start_matches("sha256:").to_owned();
    let claim = format!("v1/claims/sha256/{}/{hex}", &hex[..2]);
    let left = r#"{"owner":"a","beat":7,"size":null,"received":0,"published":0,"wanted":false}"#;
    pair.bucket.put(&claim, left);
    pair.bucket.pass(16);
    pair.bucket.has_claims_for(2).await;
    pair.one.blob(DEMO, &pair.layer.digest).await.is_blob(&pair.layer);
    let taken_over = "ifnewer_shared_claims_total{result=\"taken-over\"}";
    assert_eq!(metric(&pair.one, taken_over).await, "1");
    pair.is_clean().await;
}

#[tokio::test]
async fn wrong_parts_complete_no_response() {
    let pair = Pair::start().await;
    let (layer, gate) = (&pair.layer, pair.holds(4 * MIB));
    pair.bucket.has_claims_for(2).await;
    pair.bucket.set(Mode::CorruptsParts);
    let mut first = pair.one.blob(DEMO, &layer.digest).stream().await;
    gate.reached().await;
    pair.is_claimed().await;
    let mut second = pair.other.blob(DEMO, &layer.digest).stream().await;
    assert_ne!(second.read(MIB).await, layer.bytes[..MIB]);
    gate.release();
    assert!(second.rest().await.is_err(), "it has wrong bytes already");
    assert_eq!(first.rest().await.unwrap(), layer.bytes);
    pair.other
        .program()
        .says("the parts of a blob in the shared storage do not match")
        .await;
    pair.other.until_kept(&layer.digest).await;
    pair.other.blob(DEMO, &layer.digest).await.is_blob(layer);
    assert_eq!(pair.ranges(), ["", ""], "from the upstream, whole");
}

#[tokio::test]
async fn claims_can_be_switched_off() {
    let pair = Pair::start_with("claims = false", "").await;
    pair.one.blob(DEMO, &pair.layer.digest).await.is_blob(&pair.layer);
    pair.bucket.has([pair.layer.digest.as_str()]).await;
    let asked = pair.bucket.asked_with_probes();
    assert!(
        asked.iter().all(|asked| !asked.object.contains("/claims/")),
        "{asked:?}"
    );
}

/// The owner moves to another bucket, so the blob never arrives in this one.
#[tokio::test]
async fn reload_of_the_owner_ends_its_claim() {
    let pair = Pair::start().await;
    let (layer, gate) = (&pair.layer, pair.holds(4 * MIB));
    pair.bucket.has_claims_for(2).await;
    let mut first = pair.one.blob(DEMO, &layer.digest).stream().await;
    gate.reached().await;
    pair.is_claimed().await;
    let mut second = pair.other.blob(DEMO, &layer.digest).stream().await;
    assert_eq!(second.read(MIB).await, layer.bytes[..MIB]);
    let other = Bucket::start().await;
    let toml = pair.one.setup().toml();
    let toml = toml.replace(pair.bucket.address(), other.address());
    pair.one.setup().file("ifnewer.toml", &toml);
    pair.one.program().reload();
    pair.one.program().says("configuration reloaded").await;
    gate.release();
    assert_eq!(first.rest().await.unwrap(), layer.bytes);
    assert_eq!(second.rest().await.unwrap(), layer.bytes[MIB..]);
    pair.is_clean().await;
}
