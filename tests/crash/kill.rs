//! Kill campaign: `kill -9` at any moment, also during startup.

use std::time::{Duration, Instant};

use crate::proxy::Proxy;
use crate::world::World;

#[expect(clippy::disallowed_methods, reason = "this test measures the time of a start")]
pub async fn campaign(cycles: u32) -> Result<String, String> {
    let mut world = World::new(1).await;
    let setup = world.setup();
    let mut starts = Vec::new();
    let mut killed_starting = 0;
    for cycle in 0..cycles {
        if cycle % 5 == 4 {
            let mut program = setup.serve();
            world.chance.pause(Duration::from_millis(60)).await;
            program.kill();
            killed_starting += 1;
        }
        let began = Instant::now();
        let proxy: Proxy = setup.clone().start().await;
        starts.push(began.elapsed());
        world.verify(&proxy).await;
        world.acknowledge_new(&proxy, 4).await;
        let mut under_way = world.pull_new(&proxy, 12);
        world.chance.pause(Duration::from_millis(150)).await;
        // Dropping the process kills it.
        drop(proxy);
        while let Some(pulled) = under_way.join_next().await {
            // These pulls may be incomplete, because they were not acknowledged. Wrong bytes would have panicked.
            pulled.unwrap();
        }
    }
    let proxy = setup.clone().start().await;
    world.verify(&proxy).await;
    starts.sort();
    Ok(format!(
        "{cycles} kills under load and {killed_starting} while starting; {} images acknowledged, {} looked for, 0 lost, \
         0 wrong, 0 failed starts; slowest start {:?}",
        world.acknowledged.len(),
        world.checked,
        starts.last().unwrap()
    ))
}
