//! Disk error campaigns: a disk that is full (bytes, inodes, quota), read-only or failing. Every pull must succeed,
//! health must state why nothing is stored, and a recovered disk must be used again.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::damage::pulls_all;
use crate::disk::Disk;
use crate::proxy::Proxy;
use crate::refusal::Refusal;
use crate::world::{Pulled, World, asks, pull, store_status, until_stored};

/// Longest time until the cache stores content again.
const RECOVERS_WITHIN: Duration = Duration::from_secs(30);

/// Concurrent clients.
const AT_ONCE: usize = 8;

pub async fn pulls(world: &mut World, proxy: &Proxy, count: u32) {
    let mut left = count as usize;
    while left > 0 {
        let now = left.min(AT_ONCE);
        left -= now;
        all_complete(world.pull_new(proxy, now)).await;
    }
}

pub async fn all_complete(mut pulls: JoinSet<Pulled>) {
    while let Some(pulled) = pulls.join_next().await {
        let (number, is_complete) = pulled.unwrap();
        assert!(
            is_complete,
            "image {number} failed because it could not be stored"
        );
    }
}

/// Pulls while the disk rejects writes. Every pull succeeds, stored content is still served, and health states the
/// reason.
async fn pulls_succeed(world: &mut World, proxy: &Proxy, count: u32, why: &str) {
    pulls(world, proxy, count).await;
    world.verify(proxy).await;
    says(proxy, why).await;
}

pub async fn says(proxy: &Proxy, why: &str) {
    let health = health(proxy).await;
    assert!(
        health.contains("degraded") && health.contains(why),
        "health does not report `{why}`: {health}"
    );
}

async fn health(proxy: &Proxy) -> String {
    let response = proxy.admin("/readyz").await;
    assert_eq!(response.status, 200);
    String::from_utf8_lossy(&response.body).into_owned()
}

/// Time until a new image is stored.
#[expect(clippy::disallowed_methods, reason = "this test measures time")]
pub async fn until_caching(world: &mut World, proxy: &Proxy) -> Duration {
    let began = Instant::now();
    loop {
        let number = world.image();
        let image = world.of(number);
        assert!(pull(asks(proxy, number, &image), &image).await);
        until_stored(proxy).await;
        let is_kept = image
            .blobs
            .iter()
            .all(|blob| proxy.setup().kept_blob(&blob.digest).is_some());
        if is_kept && !health(proxy).await.contains("degraded") {
            return began.elapsed();
        }
        assert!(began.elapsed() < RECOVERS_WITHIN, "{}", store_status(proxy).await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// A small disk that is filled by pulls, and then by another program.
pub async fn full(count: u32) -> Result<String, String> {
    let mut world = World::new(4).await;
    let setup = world.setup();
    let disk = Disk::in_memory(&setup.data(), 24 * 1024 * 1024)?;
    let proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 5).await;
    let filler = disk.at().join("filler");
    let filled = fill(&filler);
    pulls_succeed(&mut world, &proxy, count, "No space left").await;
    std::fs::remove_file(filler).unwrap();
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a full disk ({filled} bytes of it from another program); stored again after {took:?}"
    ))
}

pub fn fill(path: &Path) -> u64 {
    let mut file = std::fs::File::create(path).unwrap();
    let mut filled = 0;
    for bytes in [65_536, 4096, 512, 1] {
        while file.write_all(&vec![7; bytes]).is_ok() {
            filled += bytes as u64;
        }
    }
    filled
}

/// A disk with free bytes and no free inode.
pub async fn inodes(count: u32) -> Result<String, String> {
    let mut world = World::new(7).await;
    let setup = world.setup();
    let image = setup.folder().join("disk");
    let disk = Disk::in_file("ext4 -N 2048", image, &setup.data(), 256 * 1024 * 1024)?;
    let proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 5).await;
    let fillers = disk.at().join("fillers");
    std::fs::create_dir(&fillers).unwrap();
    let filled =
        (0..).take_while(|number: &u32| std::fs::File::create(fillers.join(number.to_string())).is_ok());
    let filled = filled.count();
    pulls_succeed(&mut world, &proxy, count, "No space left").await;
    std::fs::remove_dir_all(fillers).unwrap();
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded without an inode ({filled} of them used by another program); stored again after {took:?}"
    ))
}

/// A disk that is read-only at the start and writable later.
pub async fn read_only(count: u32) -> Result<String, String> {
    let mut world = World::new(5).await;
    let setup = world.setup();
    let disk = Disk::in_memory(&setup.data(), 64 * 1024 * 1024)?;
    let mut proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 5).await;
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
    disk.remount("ro")?;
    let proxy = setup.clone().start().await;
    pulls_succeed(&mut world, &proxy, count, "read-only").await;
    disk.remount("rw")?;
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a read-only disk; stored again after {took:?}"
    ))
}

/// A disk on which every call fails from one moment on, during pulls.
pub async fn failing(count: u32) -> Result<String, String> {
    let mut world = World::new(6).await;
    let setup = world.setup();
    let image = setup.folder().join("disk");
    let disk = Disk::in_file("ext4", image, &setup.data(), 128 * 1024 * 1024)?;
    let mut proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 5).await;
    let under_way = world.pull_new(&proxy, AT_ONCE);
    world.chance.pause(Duration::from_millis(50)).await;
    disk.cut()?;
    all_complete(under_way).await;
    pulls(&mut world, &proxy, count).await;
    says(&proxy, "Input/output error").await;
    proxy.kill();
    drop(proxy);
    Ok(format!(
        "{AT_ONCE} running pulls and {count} after them succeeded on a failing disk"
    ))
}

/// An exhausted quota: no file may grow. Some kernels have no quotas, so the error is injected into the system calls
/// concerned.
pub async fn quota(count: u32) -> Result<String, String> {
    let refused = refusing(count, "pwrite64,fallocate", "EDQUOT", "quota exceeded").await?;
    Ok(format!(
        "{count} of {count} pulls succeeded beyond the quota; {refused}"
    ))
}

/// A disk with bad sectors: some calls fail during writes, and later during reads.
pub async fn bad_sectors(count: u32) -> Result<String, String> {
    let refused = refusing(count, "pwrite64,fsync", "EIO:when=3+5", "Input/output error").await?;
    let mut world = World::new(11).await;
    let proxy = world.setup().start().await;
    world.acknowledge_new(&proxy, count as usize).await;
    let refusal = Refusal::of(proxy.program(), "pread64,preadv2", "EIO:when=5+20").await?;
    let retried = pulls_all(&world, &proxy).await;
    let unread = refusal.end();
    // The unreadable content was fetched again, so no further request reaches the upstream.
    until_stored(&proxy).await;
    world.verify(&proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a disk with bad sectors; {refused}; {unread} while reading, {retried} \
         replies broke off and came right"
    ))
}

/// Injects errors into the system calls for a time.
async fn refusing(count: u32, calls: &str, error: &str, why: &str) -> Result<String, String> {
    let mut world = World::new(8).await;
    let proxy = world.setup().start().await;
    world.acknowledge_new(&proxy, 5).await;
    let refusal = Refusal::of(proxy.program(), calls, error).await?;
    pulls(&mut world, &proxy, count).await;
    says(&proxy, why).await;
    let refused = refusal.end();
    for call in calls.split(',') {
        assert!(refused.contains(call), "no {call} was refused: {refused}");
    }
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!("rejected {refused}; stored again after {took:?}"))
}
