//! Files are flipped, zeroed, cut and deleted behind its back.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::proxy::{Proxy, files_below};
use crate::world::{Chance, World, asks, pull, until_kept};

const IMAGES: usize = 40;

/// So many are damaged before it is started again.
const AT_ONCE: u32 = 10;

/// How often a client tries: the reply in which damage is found may break off.
const TRIES: usize = 3;

const KINDS: [&str; 6] = ["blobs", "manifests", "refs", "index", "seen", "blobs"];

pub async fn campaign(count: u32) -> Result<String, String> {
    let mut world = World::new(3).await;
    let setup = world.setup();
    let mut proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, IMAGES).await;
    let (mut done, mut retried) = (0, 0);
    while done < count {
        proxy = ended(proxy).await;
        for _ in 0..AT_ONCE.min(count - done) {
            let kind = KINDS[done as usize % KINDS.len()];
            let mut files = files_below(&setup.data().join(kind));
            if files.is_empty() {
                // The last of its kind went just before.
                files = files_below(&setup.data().join("blobs"));
            }
            let file = files[world.chance.below(files.len())].clone();
            damage(&file, &mut world.chance);
            done += 1;
        }
        proxy = proxy.setup().clone().start().await;
        retried += pulls_all(&world, &proxy).await;
        until_kept(&proxy).await;
        // Healed: now without the upstream too.
        world.verify(&proxy).await;
    }
    Ok(format!(
        "{done} files damaged; {} images looked for, 0 wrong bytes, 0 deaths; {retried} replies broke off and came right",
        world.checked + u64::from(done / AT_ONCE) * IMAGES as u64
    ))
}

/// An orderly end, so that everything is on the disk.
async fn ended(mut proxy: Proxy) -> Proxy {
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0), "an orderly end");
    proxy
}

/// Pulls every image, as often as it takes; how often it took more than one try.
async fn pulls_all(world: &World, proxy: &Proxy) -> u32 {
    let mut retried = 0;
    for number in &world.acknowledged {
        let image = world.of(*number);
        let mut tries = 0;
        while !pull(asks(proxy, *number, &image), &image).await {
            tries += 1;
            retried += 1;
            assert!(tries < TRIES, "image {number} does not heal");
        }
    }
    retried
}

fn damage(path: &Path, chance: &mut Chance) {
    // A sealed file is nobody's to write; whatever damages it does not ask.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    match chance.below(4) {
        0 if !bytes.is_empty() => {
            let place = chance.below(bytes.len());
            bytes[place] ^= 1 << chance.below(8);
            write(path, &bytes);
        }
        1 if !bytes.is_empty() => {
            let start = chance.below(bytes.len());
            let end = (start + 4096).min(bytes.len());
            bytes[start..end].fill(0);
            write(path, &bytes);
        }
        2 => write(path, &bytes[..chance.below(bytes.len().max(1))]),
        _ => std::fs::remove_file(path).unwrap(),
    }
}

/// In place, so that it stays the same file.
fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}
