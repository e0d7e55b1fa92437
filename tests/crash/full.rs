//! A disk that is full (of bytes, inodes, or a quota), read-only or failing: every pull succeeds, health says why nothing
//! is kept, and where the disk recovers it is used again.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::damage::pulls_all;
use crate::disk::Disk;
use crate::proxy::Proxy;
use crate::refusal::Refusal;
use crate::world::{Pulled, World, asks, pull, store_status, until_kept};

/// Within this time the cache keeps things again.
const RECOVERS_WITHIN: Duration = Duration::from_secs(30);

/// So many clients at once.
const AT_ONCE: usize = 8;

pub async fn pulls(world: &mut World, proxy: &Proxy, count: u32) {
    let mut left = count as usize;
    while left > 0 {
        let now = left.min(AT_ONCE);
        left -= now;
        all_whole(world.pull_new(proxy, now)).await;
    }
}

pub async fn all_whole(mut pulls: JoinSet<Pulled>) {
    while let Some(pulled) = pulls.join_next().await {
        let (number, is_whole) = pulled.unwrap();
        assert!(is_whole, "image {number} failed because it could not be kept");
    }
}

/// Pulls while the disk refuses: every one succeeds, what was held is still served, and health says why.
async fn goes_on(world: &mut World, proxy: &Proxy, count: u32, why: &str) {
    pulls(world, proxy, count).await;
    world.verify(proxy).await;
    says(proxy, why).await;
}

pub async fn says(proxy: &Proxy, why: &str) {
    let health = health(proxy).await;
    assert!(
        health.contains("degraded") && health.contains(why),
        "health does not say `{why}`: {health}"
    );
}

async fn health(proxy: &Proxy) -> String {
    let told = proxy.admin("/readyz").await;
    assert_eq!(told.status, 200);
    String::from_utf8_lossy(&told.body).into_owned()
}

/// How long until a new image is kept.
#[expect(clippy::disallowed_methods, reason = "the time is what is measured")]
pub async fn until_caching(world: &mut World, proxy: &Proxy) -> Duration {
    let began = Instant::now();
    loop {
        let number = world.image();
        let image = world.of(number);
        assert!(pull(asks(proxy, number, &image), &image).await);
        until_kept(proxy).await;
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

/// A small disk that fills up with what is pulled, and then with something else.
pub async fn full(count: u32) -> Result<String, String> {
    let mut world = World::new(4).await;
    let setup = world.setup();
    let disk = Disk::in_memory(&setup.data(), 24 * 1024 * 1024)?;
    let proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 5).await;
    let filler = disk.at().join("filler");
    let filled = fill(&filler);
    goes_on(&mut world, &proxy, count, "No space left").await;
    std::fs::remove_file(filler).unwrap();
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a full disk ({filled} bytes of it not ours); kept again after {took:?}"
    ))
}

fn fill(path: &Path) -> u64 {
    let mut file = std::fs::File::create(path).unwrap();
    let mut filled = 0;
    for bytes in [65_536, 4096, 512, 1] {
        while file.write_all(&vec![7; bytes]).is_ok() {
            filled += bytes as u64;
        }
    }
    filled
}

/// A disk with room, and no name left to give.
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
    goes_on(&mut world, &proxy, count, "No space left").await;
    std::fs::remove_dir_all(fillers).unwrap();
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded without an inode ({filled} of them not ours); kept again after {took:?}"
    ))
}

/// A disk that is read-only when the program starts, and then is not.
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
    goes_on(&mut world, &proxy, count, "read-only").await;
    disk.remount("rw")?;
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a read-only disk; kept again after {took:?}"
    ))
}

/// A disk on which every call fails from one moment on, while pulls are under way.
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
    all_whole(under_way).await;
    pulls(&mut world, &proxy, count).await;
    says(&proxy, "Input/output error").await;
    proxy.kill();
    drop(proxy);
    Ok(format!(
        "{AT_ONCE} pulls under way and {count} after them succeeded on a failing disk"
    ))
}

/// A quota that is used up: no file may grow. Not every kernel has quotas, so their error is given to the calls that
/// would get it.
pub async fn quota(count: u32) -> Result<String, String> {
    let refused = refusing(count, "pwrite64,fallocate", "EDQUOT", "quota exceeded").await?;
    Ok(format!(
        "{count} of {count} pulls succeeded beyond the quota; {refused}"
    ))
}

/// A disk with bad sectors: some calls fail, in the middle of what is written and then of what is read.
pub async fn bad_sectors(count: u32) -> Result<String, String> {
    let refused = refusing(count, "pwrite64,fsync", "EIO:when=3+5", "Input/output error").await?;
    let mut world = World::new(11).await;
    let proxy = world.setup().start().await;
    world.acknowledge_new(&proxy, count as usize).await;
    let refusal = Refusal::of(proxy.program(), "pread64,preadv2", "EIO:when=5+20").await?;
    let retried = pulls_all(&world, &proxy).await;
    let unread = refusal.end();
    // What could not be read was fetched again: now nothing of it is asked for.
    until_kept(&proxy).await;
    world.verify(&proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a disk with bad sectors; {refused}; {unread} while reading, {retried} \
         replies broke off and came right"
    ))
}

/// The system calls themselves are refused for a time.
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
    Ok(format!("refused {refused}; kept again after {took:?}"))
}
