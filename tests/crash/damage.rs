//! Corruption campaign: flips, zeroes, truncates and deletes stored files. Each corruption must be detected and
//! repaired.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::proxy::{Proxy, Setup, files_below};
use crate::registry::{sha256, within};
use crate::world::{Chance, REPOSITORY, World, asks, is_sealed, pull, until_stored};

const IMAGES: usize = 40;

/// Files damaged between two starts.
const AT_ONCE: u32 = 10;

/// Attempts of a client. The response in which corruption is detected may be incomplete.
const TRIES: usize = 3;

/// Every kind occurs in every folder.
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
        until_stored(&proxy).await;
        proxy.program().says("index rebuilt").await;
        for (place, file) in &damaged {
            until_repaired(&world, place, file).await;
        }
        indexes += u32::from(is_index_new(&proxy));
        assert_eq!(tags_listed(&proxy).await, IMAGES, "the index has lost a tag");
        assert!(!proxy.program().stderr().contains("panicked at src/"), "a panic");
        // Again without the upstream.
        world.upstream.resets();
        assert_eq!(
            pulls_all(&world, &proxy).await,
            0,
            "a response broke off after the repair"
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

/// An orderly stop, so that everything is on disk.
async fn end(mut proxy: Proxy) {
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0), "an orderly exit");
}

/// Pulls every image until it succeeds. Returns the number of retries.
pub async fn pulls_all(world: &World, proxy: &Proxy) -> u32 {
    let mut retried = 0;
    for number in &world.acknowledged {
        let image = world.of(*number);
        let mut tries = 0;
        while !pull(asks(proxy, *number, &image), &image).await {
            tries += 1;
            retried += 1;
            assert!(tries < TRIES, "image {number} is not repaired");
        }
    }
    retried
}

/// Damages a file of `place`. Returns the file.
fn damage(setup: &Setup, place: &'static str, kind: &str, chance: &mut Chance) -> (&'static str, PathBuf) {
    let mut files = files_below(&setup.data().join(place));
    files.retain(|file| file.metadata().unwrap().len() > 0);
    let Some(path) = files.get(chance.below(files.len())).cloned() else {
        // The last file of the folder was damaged before. It is written again after the next start.
        return damage(setup, "blobs", kind, chance);
    };
    // The file is read-only. Corruption does not respect permissions.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    // Most of the index file is unused zeros.
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
    // Written in place, so that the inode stays the same.
    std::fs::write(&path, &bytes).unwrap();
    (place, path)
}

/// Membership is written after the responses that prove it.
async fn until_repaired(world: &World, place: &str, file: &Path) {
    within(&format!("{} to be repaired", file.display()), async {
        while !is_repaired(world, place, file) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Returns whether the file on disk is intact again. A repair in memory alone does not count.
fn is_repaired(world: &World, place: &str, file: &Path) -> bool {
    if place == "index" {
        // sled's files have no known content. The index is checked through its entries instead.
        return true;
    }
    let Ok(bytes) = std::fs::read(file) else {
        return false;
    };
    match (place, file.extension()) {
        ("seen", _) => proves_membership(world, &bytes),
        ("refs", _) | (_, Some(_)) => is_sealed(&bytes),
        _ => sha256(&bytes)[7..] == *file.file_name().unwrap().to_str().unwrap(),
    }
}

/// Returns whether valid lines cover everything that was pulled.
fn proves_membership(world: &World, bytes: &[u8]) -> bool {
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

/// Returns whether the process started with a new index.
fn is_index_new(proxy: &Proxy) -> bool {
    let response = proxy.program().stderr();
    ["index quarantined", "index lost its content"]
        .iter()
        .any(|word| response.contains(word))
}

async fn tags_listed(proxy: &Proxy) -> usize {
    let images = proxy.admin("/api/v1/images?limit=1000").await.json();
    images["images"].as_array().unwrap().len()
}
