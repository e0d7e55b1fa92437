//! Power cut campaigns on separate file systems.

use std::time::Duration;

use crate::disk::Disk;
use crate::world::World;

const DISK_BYTES: u64 = 1024 * 1024 * 1024;

pub async fn campaign(kind: &str, cuts: u32) -> Result<String, String> {
    let mut world = World::new(2).await;
    let setup = world.setup();
    let image = setup.folder().join("disk");
    let disk = Disk::in_file(kind, image, &setup.data(), DISK_BYTES)?;
    for _ in 0..cuts {
        let mut proxy = setup.clone().start().await;
        world.verify(&proxy).await;
        world.acknowledge_new(&proxy, 3).await;
        let mut under_way = world.pull_new(&proxy, 8);
        world.chance.pause(Duration::from_millis(120)).await;
        disk.cut().unwrap();
        // The process runs without its disk until it is ended.
        world.chance.pause(Duration::from_millis(30)).await;
        assert_eq!(
            proxy.get("/v2/").await.status,
            200,
            "the process died with its disk"
        );
        proxy.kill();
        while let Some(pulled) = under_way.join_next().await {
            pulled.unwrap();
        }
        drop(proxy);
        disk.unmount().unwrap();
        disk.mount().unwrap();
    }
    let proxy = setup.clone().start().await;
    world.verify(&proxy).await;
    drop(proxy);
    Ok(format!(
        "{cuts} power cuts on {kind}; {} images acknowledged, {} verified, 0 lost, 0 wrong, 0 failed starts",
        world.acknowledged.len(),
        world.checked
    ))
}
