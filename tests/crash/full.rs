//! A disk that is full, read-only or failing: every pull succeeds, and where the disk recovers it is used again.

use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::proxy::Proxy;
use crate::world::{World, asks, pull, store_status, until_kept};

/// Within this time the cache keeps things again.
const RECOVERS_WITHIN: Duration = Duration::from_secs(30);

/// So many clients at once.
const AT_ONCE: usize = 8;

async fn pulls(world: &mut World, proxy: &Proxy, count: u32) {
    let mut left = count as usize;
    while left > 0 {
        let now = left.min(AT_ONCE);
        left -= now;
        let mut pulls = world.pull_new(proxy, now);
        while let Some(pulled) = pulls.join_next().await {
            let (number, is_whole) = pulled.unwrap();
            assert!(is_whole, "image {number} failed because it could not be kept");
        }
    }
}

async fn is_degraded(proxy: &Proxy) -> bool {
    let text = proxy.admin("/readyz").await;
    assert_eq!(text.status, 200);
    String::from_utf8_lossy(&text.body).contains("degraded")
}

/// How long until a new image is kept.
#[expect(clippy::disallowed_methods, reason = "the time is what is measured")]
async fn until_caching(world: &mut World, proxy: &Proxy) -> Duration {
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
        if is_kept && !is_degraded(proxy).await {
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
    pulls(&mut world, &proxy, count).await;
    assert!(is_degraded(&proxy).await, "it does not say that the disk is full");
    world.verify(&proxy).await;
    std::fs::remove_file(filler).unwrap();
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a full disk ({filled} bytes of it not ours); kept again after {took:?}"
    ))
}

fn fill(path: &std::path::Path) -> u64 {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).unwrap();
    let mut filled = 0;
    for bytes in [65_536, 4096, 512, 1] {
        while file.write_all(&vec![7; bytes]).is_ok() {
            filled += bytes as u64;
        }
    }
    filled
}

/// A disk that is read-only when the program starts, and then is not.
pub async fn read_only(count: u32) -> Result<String, String> {
    let mut world = World::new(5).await;
    let setup = world.setup();
    let disk = Disk::in_memory(&setup.data(), 64 * 1024 * 1024)?;
    let proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 5).await;
    let mut proxy = proxy;
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
    disk.remount("ro")?;
    let proxy = setup.clone().start().await;
    world.verify(&proxy).await;
    pulls(&mut world, &proxy, count).await;
    assert!(
        is_degraded(&proxy).await,
        "it does not say that the disk is read-only"
    );
    disk.remount("rw")?;
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{count} of {count} pulls succeeded on a read-only disk; kept again after {took:?}"
    ))
}

/// A disk on which every call fails from one moment on.
pub async fn failing(count: u32) -> Result<String, String> {
    let mut world = World::new(6).await;
    let setup = world.setup();
    let image = setup.folder().join("disk");
    let disk = Disk::in_file("ext4", image, &setup.data(), 128 * 1024 * 1024)?;
    let mut proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 5).await;
    disk.cut()?;
    pulls(&mut world, &proxy, count).await;
    assert!(is_degraded(&proxy).await, "it does not say that the disk fails");
    proxy.kill();
    drop(proxy);
    Ok(format!("{count} of {count} pulls succeeded on a failing disk"))
}
