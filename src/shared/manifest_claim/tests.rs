//! Tests of claims of manifests between caches over one bucket in memory. Time is paused.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use tokio::task::JoinHandle;
use tokio::time::advance;

use super::*;
use crate::bucket::{ObjectStorage, in_memory};
use crate::oci::Algorithm;
use crate::shared::upload::{Item, Mode};
use crate::shared::{RedirectSettings, SharedSettings};
use crate::telemetry::Telemetry;

fn cache(bucket: &Arc<dyn ObjectStorage>) -> Arc<Active> {
    let settings = SharedSettings {
        bucket: Arc::clone(bucket),
        name: "s3://images".into(),
        write: true,
        claims: true,
        wait_max: Duration::from_secs(1),
        keep: Duration::from_secs(1000),
        uploads_max: 1,
        records: None,
        redirect: RedirectSettings::default(),
    };
    let active = Arc::new(Active::new(settings, &Arc::default(), Telemetry::new()));
    active.conditions.set(true).unwrap();
    active
}

fn digest() -> Digest {
    Digest::of(Algorithm::Sha256, b"manifest")
}

async fn leads(cache: &Arc<Active>) -> ManifestLease {
    match cache.manifest_turn(digest()).await {
        ManifestTurn::Leads(lease) => lease,
        ManifestTurn::Alone => panic!("without a claim"),
        ManifestTurn::Written => panic!("the bucket has it"),
    }
}

/// Another cache that lacks the manifest, and what it does in the end.
fn follower(bucket: &Arc<dyn ObjectStorage>) -> JoinHandle<&'static str> {
    let cache = cache(bucket);
    tokio::spawn(async move {
        match cache.manifest_turn(digest()).await {
            ManifestTurn::Leads(_) => "leads",
            ManifestTurn::Alone => "alone",
            ManifestTurn::Written => "reads",
        }
    })
}

async fn write(bucket: &Arc<dyn ObjectStorage>) {
    let key = ObjectKey::manifest(&digest());
    bucket
        .put(&key, b"manifest".as_slice().into(), None)
        .await
        .unwrap();
}

async fn has_claim(bucket: &Arc<dyn ObjectStorage>) -> bool {
    bucket.head(&ObjectKey::manifest_claim(&digest())).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn one_cache_requests_a_manifest_and_others_read_it() {
    let bucket = in_memory();
    let lease = leads(&cache(&bucket)).await;
    let followers = [follower(&bucket), follower(&bucket)];
    sleep(Duration::from_millis(600)).await;
    assert!(followers.iter().all(|follower| !follower.is_finished()));
    write(&bucket).await;
    drop(lease);
    for follower in followers {
        assert_eq!(follower.await.unwrap(), "reads");
    }
    assert!(!has_claim(&bucket).await);
    // Written before it was claimed.
    assert_eq!(follower(&bucket).await.unwrap(), "reads");
}

#[tokio::test(start_paused = true)]
async fn claim_that_ends_without_a_manifest_ends_the_wait() {
    let bucket = in_memory();
    let lease = leads(&cache(&bucket)).await;
    let follower = follower(&bucket);
    sleep(Duration::from_millis(600)).await;
    let began = Instant::now();
    drop(lease);
    assert_eq!(follower.await.unwrap(), "alone");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn claim_of_a_killed_cache_delays_once() {
    let bucket = in_memory();
    std::mem::forget(leads(&cache(&bucket)).await);
    let began = Instant::now();
    assert_eq!(follower(&bucket).await.unwrap(), "alone");
    assert!(
        began.elapsed() <= WAIT_MAX + Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    sleep(LOOK).await;
    let began = Instant::now();
    assert_eq!(follower(&bucket).await.unwrap(), "leads");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

/// The one bad interleaving: the claim must not end between the end of the request and that of the upload.
#[tokio::test(start_paused = true)]
async fn claim_ends_after_the_upload() {
    let bucket = in_memory();
    let owner = cache(&bucket);
    let lease = leads(&owner).await;
    let follower = follower(&bucket);
    owner
        .uploads
        .push(Item::new(SharedContent::Manifest(digest()), Mode::Create));
    drop(lease);
    advance(Duration::from_secs(1)).await;
    sleep(Duration::from_secs(1)).await;
    assert!(has_claim(&bucket).await && !follower.is_finished());
    write(&bucket).await;
    assert_eq!(follower.await.unwrap(), "reads");
    owner.uploads.close();
    sleep(LOOK).await;
    assert!(!has_claim(&bucket).await);
}
