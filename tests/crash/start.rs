//! Starts over a large store: how soon it serves, how long the index takes to be made anew, and how much memory it needs.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::proxy::{Program, Proxy, Setup};
use crate::upstream::{noise, sha256};
use crate::world::{REPOSITORY, World};

/// The goals; the time and the memory of the largest store for which they hold.
const SMALL_OBJECTS: u32 = 100_000;
const FIRST_BYTE_SMALL: Duration = Duration::from_secs(1);
const FIRST_BYTE: Duration = Duration::from_secs(3);
const REBUILD_PER_100_000: Duration = Duration::from_secs(if cfg!(debug_assertions) { 30 } else { 5 });
const IDLE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Blobs for each manifest, which has a tag of its own.
const BLOBS: u32 = 3;

/// A filled store is older than anything that is spared.
const AGE: Duration = Duration::from_secs(48 * 3600);

const COMMITS: usize = 100;
const REBUILT: &str = "every tag is in the index";

#[expect(
    clippy::disallowed_methods,
    reason = "the time of a start is what is measured"
)]
pub async fn campaign(objects: u32) -> Result<String, String> {
    let mut world = World::new(9).await;
    let setup = world.setup().tail("scrub = \"off\"");
    let proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 1).await;
    let began = Instant::now();
    world.acknowledge_new(&proxy, COMMITS).await;
    // Each has a config, a layer, a manifest and a tag of its own.
    let commits = (4 * COMMITS) as f64 / began.elapsed().as_secs_f64();
    println!("   {commits:.0} durable commits a second");
    stop(proxy).await;
    let began = Instant::now();
    let manifests = fill(&setup.data(), objects);
    println!("   filled in {:?}", began.elapsed());

    std::fs::remove_dir_all(setup.data().join("index")).unwrap();
    let began = Instant::now();
    let (proxy, first) = first_byte(&mut world, &setup).await;
    println!("   first byte without an index {first:?}");
    let mut slowest = Duration::ZERO;
    while !proxy.program().stderr().contains(REBUILT) {
        let asked = Instant::now();
        world.verify(&proxy).await;
        slowest = slowest.max(asked.elapsed());
        // A look now and then: the pulls are not to be what the time goes into.
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    let rebuilt = began.elapsed();
    println!(
        "   {manifests} tags in the index after {rebuilt:?}; the slowest 21 pulls meanwhile {slowest:?}"
    );
    stop(proxy).await;

    let (proxy, again) = first_byte(&mut world, &setup).await;
    println!("   first byte with an index {again:?}");
    while !proxy.program().stderr().contains(REBUILT) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let idle = memory(proxy.program(), "VmRSS");
    println!("   {} MiB when idle", idle >> 20);
    stop(proxy).await;

    let half = setup
        .clone()
        .tail(&format!("size = \"{} KiB\"", (objects / 8).max(1024)));
    let proxy = half.start().await;
    while crate::world::store_status(&proxy).await["evicted"]["tags"] == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let peak = memory(proxy.program(), "VmHWM");
    println!("   {} MiB at most while making room", peak >> 20);
    drop(proxy);

    let within = if objects <= SMALL_OBJECTS {
        FIRST_BYTE_SMALL
    } else {
        FIRST_BYTE
    };
    let rebuild = REBUILD_PER_100_000.mul_f64(f64::from(manifests.max(SMALL_OBJECTS / 4)) / 100_000.0);
    assert!(first < within && again < within, "the first byte comes too late");
    assert!(rebuilt < rebuild, "the index takes too long");
    assert!(idle <= IDLE_BYTES_MAX, "it takes too much memory");
    Ok(format!("{objects} objects: within all goals"))
}

/// Starts, with the upstream gone, and pulls what is held.
#[expect(
    clippy::disallowed_methods,
    reason = "the time of a start is what is measured"
)]
async fn first_byte(world: &mut World, setup: &Setup) -> (Proxy, Duration) {
    world.upstream.resets();
    let began = Instant::now();
    let proxy = setup.clone().start().await;
    let reply = proxy.manifest(REPOSITORY, "v0").await;
    assert_eq!(reply.status, 200);
    let took = began.elapsed();
    world.upstream.recovers();
    (proxy, took)
}

async fn stop(mut proxy: Proxy) {
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
}

/// A line of what the kernel says of the process, in bytes.
fn memory(program: &Program, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kibibytes * 1024
}

/// So many blobs and manifests, and a tag for each manifest, as the program would have written them. Says how many
/// manifests.
fn fill(data: &Path, objects: u32) -> u32 {
    let manifests = objects / (BLOBS + 1);
    let template = files(&data.join("refs")).pop().unwrap();
    let template: serde_json::Value = serde_json::from_slice(&std::fs::read(template).unwrap()).unwrap();
    for number in 0..manifests {
        let blobs: Vec<_> = (0..BLOBS)
            .map(|blob| noise(u64::from(number * BLOBS + blob) + (1 << 40), 256))
            .map(|bytes| (sha256(&bytes), bytes))
            .collect();
        for (digest, bytes) in &blobs {
            place(data, "blobs/sha256", &digest[7..], bytes);
        }
        let descriptor = |kind: &str, digest: &str| {
            serde_json::json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": 256,
            })
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", &blobs[0].0),
            "layers": [descriptor("layer.v1.tar", &blobs[1].0), descriptor("layer.v1.tar", &blobs[2].0)],
        })
        .to_string();
        let digest = sha256(manifest.as_bytes());
        place(data, "manifests/sha256", &digest[7..], manifest.as_bytes());
        let mut record = template.clone();
        let (upstream, tag) = (
            record["upstream"].as_str().unwrap().to_owned(),
            format!("filled-{number}"),
        );
        record["tag"] = tag.clone().into();
        for variant in record["variants"].as_array_mut().unwrap() {
            variant["digest"] = digest.clone().into();
        }
        let name = sha256(
            [upstream.as_str(), REPOSITORY, tag.as_str()]
                .join("\0")
                .as_bytes(),
        );
        place(data, "refs", &name[7..], &sealed(&record));
    }
    manifests
}

/// A record with its checksum, as the store writes it.
fn sealed(record: &serde_json::Value) -> Vec<u8> {
    let mut record = record.clone();
    record.as_object_mut().unwrap().remove("checksum");
    let text = record.to_string();
    let text = text.strip_suffix('}').unwrap();
    let sum = &sha256(text.as_bytes())[7..23];
    format!("{text},\"checksum\":\"{sum}\"}}\n").into_bytes()
}

fn place(data: &Path, tree: &str, name: &str, bytes: &[u8]) {
    let folder = data.join(tree).join(&name[..2]);
    let path = folder.join(name);
    let mut file = std::fs::File::create(&path).unwrap_or_else(|_| {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::File::create(&path).unwrap()
    });
    file.write_all(bytes).unwrap();
    file.set_modified(crate::world::past(AGE)).unwrap();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    crate::proxy::files_below(folder)
}
