//! Files are flipped, zeroed, cut and deleted behind its back: each of them is found, and mended.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::proxy::{Proxy, Setup, files_below};
use crate::registry::{sha256, within};
use crate::world::{Chance, REPOSITORY, World, asks, is_sealed, pull, until_kept};

const IMAGES: usize = 40;

/// So many are damaged before it is started again.
const AT_ONCE: u32 = 10;

/// How often a client tries: the reply in which damage is found may break off.
const TRIES: usize = 3;

/// Every kind happens in every place.
const KINDS: [&str; 4] = ["flipped", "zeroed", "cut", "deleted"];
const PLACES: [&str; 5] = ["blobs", "manifests", "refs", "seen", "index"];

pub async fn campaign(count: u32) -> Result<String, String> {
    let mut world = World::new(3).await;
    let setup = world.setup();
    let mut proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, IMAGES).await;
    let (mut done, mut retried, mut indexes) = (0, 0, 0);
    while done < count {
        end(proxy).await;
        let mut damaged = Vec::new();
        for _ in 0..AT_ONCE.min(count - done) {
            let (kind, place) = (
                done as usize % KINDS.len(),
                done as usize / KINDS.len() % PLACES.len(),
            );
            damaged.push(damage(&setup, PLACES[place], KINDS[kind], &mut world.chance));
            done += 1;
        }
        proxy = setup.clone().start().await;
        retried += pulls_all(&world, &proxy).await;
        until_kept(&proxy).await;
        proxy.program().says("every tag is in the index").await;
        for (place, file) in &damaged {
            until_mended(&world, place, file).await;
        }
        indexes += u32::from(is_index_new(&proxy));
        assert_eq!(tags_listed(&proxy).await, IMAGES, "the index has lost a tag");
        assert!(!proxy.program().stderr().contains("panicked at src/"), "a panic");
        // Now without the upstream too.
        world.upstream.resets();
        assert_eq!(
            pulls_all(&world, &proxy).await,
            0,
            "a reply broke off after it was mended"
        );
        world.upstream.recovers();
    }
    end(proxy).await;
    Ok(format!(
        "{done} files damaged ({} kinds in {} places), all found and mended, 0 wrong bytes, 0 deaths; {retried} replies \
         broke off and came right; {indexes} indexes set aside",
        KINDS.len(),
        PLACES.len()
    ))
}

/// An orderly end, so that everything is on the disk.
async fn end(mut proxy: Proxy) {
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0), "an orderly end");
}

/// Pulls every image, as often as it takes; how often it took more than one try.
pub async fn pulls_all(world: &World, proxy: &Proxy) -> u32 {
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

/// Damages a file of `place`; says which.
fn damage(setup: &Setup, place: &'static str, kind: &str, chance: &mut Chance) -> (&'static str, PathBuf) {
    let mut files = files_below(&setup.data().join(place));
    files.retain(|file| file.metadata().unwrap().len() > 0);
    let Some(path) = files.get(chance.below(files.len())).cloned() else {
        // The last of its place went just before, and comes back with the next start.
        return damage(setup, "blobs", kind, chance);
    };
    // A sealed file is nobody's to write; whatever damages it does not ask.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    // Most of an index is zeros that mean nothing.
    let mut places = std::iter::repeat_with(|| chance.below(bytes.len())).take(1000);
    let at = places.find(|at| bytes[*at] != 0).unwrap_or(0);
    drop(places);
    match kind {
        "flipped" => bytes[at] ^= 1 << chance.below(8),
        "zeroed" => {
            let end = (at + 4096).min(bytes.len());
            bytes[at..end].fill(0);
        }
        "cut" => bytes.truncate(at),
        _ => {
            std::fs::remove_file(&path).unwrap();
            return (place, path);
        }
    }
    // In place, so that it stays the same file.
    std::fs::write(&path, &bytes).unwrap();
    (place, path)
}

/// Proofs are written after the replies that they came with.
async fn until_mended(world: &World, place: &str, file: &Path) {
    within(&format!("{} to be mended", file.display()), async {
        while !is_mended(world, place, file) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Whether the file is again what it is to be. What is only believed, and not what was written, would not be.
fn is_mended(world: &World, place: &str, file: &Path) -> bool {
    if place == "index" {
        // Its files are sled's: asked for what is in them instead.
        return true;
    }
    let Ok(bytes) = std::fs::read(file) else {
        return false;
    };
    match (place, file.extension()) {
        ("seen", _) => says_seen(world, &bytes),
        ("refs", _) | (_, Some(_)) => is_sealed(&bytes),
        _ => sha256(&bytes)[7..] == *file.file_name().unwrap().to_str().unwrap(),
    }
}

/// Whether right lines prove everything that was pulled.
fn says_seen(world: &World, bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let right = text.lines().filter_map(|line| {
        let (content, sum) = line.rsplit_once(' ')?;
        let sealed = sha256(["docker.io", REPOSITORY, content].join("\0").as_bytes());
        (sealed[7..15] == *sum).then_some(content)
    });
    let right: BTreeSet<&str> = right.collect();
    let images = world.acknowledged.iter().map(|number| world.of(*number));
    images.into_iter().all(|image| {
        let blobs = image.blobs.iter().map(|blob| blob.digest.as_str());
        blobs
            .chain([image.digest.as_str()])
            .all(|digest| right.contains(digest))
    })
}

/// Whether it began with an index that was not the one it had left.
fn is_index_new(proxy: &Proxy) -> bool {
    let told = proxy.program().stderr();
    ["set the index aside", "the index had files but is empty"]
        .iter()
        .any(|word| told.contains(word))
}

async fn tags_listed(proxy: &Proxy) -> usize {
    let images = proxy.admin("/api/v1/images?limit=1000").await.json();
    images["images"].as_array().unwrap().len()
}
