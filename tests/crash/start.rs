//! Startup campaign: measures a large store. It reports the time to the first byte, the time to rebuild the index,
//! the memory, and the scrub rate.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::memory::memory;
use crate::proxy::{Ask, Program, Proxy, Setup};
use crate::registry::{noise, sha256};
use crate::world::{REPOSITORY, World, sealed};

/// The goals. Time and memory are for the largest store for which they apply.
const SMALL_OBJECTS: u32 = 100_000;
const FIRST_BYTE_SMALL: Duration = Duration::from_secs(1);
const FIRST_BYTE: Duration = Duration::from_secs(3);
const REBUILD_PER_100_000: Duration = Duration::from_secs(if cfg!(debug_assertions) { 30 } else { 5 });
const IDLE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Blobs per manifest. Each manifest has a tag.
const BLOBS: u32 = 3;

/// Older than the minimum age of eviction.
const AGE: Duration = Duration::from_secs(48 * 3600);

const COMMITS: usize = 100;

/// Layer-sized blobs for the measurement of the scrub rate.
const LAYERS: u64 = 16;
const LAYER_BYTES: usize = 64 * 1024 * 1024;

const REBUILT: &str = "index rebuilt";
const READ: &str = "verify job finished";

pub async fn campaign(objects: u32) -> Result<String, String> {
    let mut world = World::new(9).await;
    let setup = world.setup().tail("scrub = \"off\"");
    let proxy = setup.clone().start().await;
    world.acknowledge_new(&proxy, 1).await;
    let ((), took) = timed(world.acknowledge_new(&proxy, COMMITS)).await;
    // Each image has a config, a layer, a manifest and a tag.
    figure("durable commits", per_second((4 * COMMITS) as f64, took), "/s");
    for layer in 0..LAYERS {
        let bytes = noise(layer + (1 << 50), LAYER_BYTES);
        place(&setup.data(), "blobs/sha256", &sha256(&bytes)[7..], &bytes);
    }
    let (read, took) = timed(read_everything(&proxy)).await;
    let mebibytes = read["bytes"].as_f64().unwrap() / f64::from(1 << 20);
    figure("scrub, large blobs", per_second(mebibytes, took), "MiB/s");
    stop(proxy).await;
    let (manifests, took) = timed(async { fill(&setup.data(), objects) }).await;
    println!("   ({objects} objects, {manifests} of them manifests with a tag each, made in {took:.0?})");

    std::fs::remove_dir_all(setup.data().join("index")).unwrap();
    let ((proxy, first, slowest), rebuilt) = timed(async {
        let (proxy, first) = first_byte(&mut world, &setup).await;
        let mut slowest = Duration::ZERO;
        while !proxy.program().stderr().contains(REBUILT) {
            let ((), took) = timed(world.verify(&proxy)).await;
            slowest = slowest.max(took);
            // Verify only now and then, so that the pulls do not dominate the time.
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        (proxy, first, slowest)
    })
    .await;
    let per_100_000 = rebuilt.div_f64(f64::from(manifests) / 100_000.0);
    figure("first byte, no index", milliseconds(first), "ms");
    figure("rebuild, per 100,000 manifests", per_100_000.as_secs_f64(), "s");
    let used = processor_time(proxy.program()).as_secs_f64();
    figure("CPU time until then", used, "s");
    figure("slowest 20 pulls meanwhile", milliseconds(slowest), "ms");
    stop(proxy).await;

    let (proxy, again) = first_byte(&mut world, &setup).await;
    figure("first byte, with the index", milliseconds(again), "ms");
    until_logged(&proxy, REBUILT).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let idle = memory(proxy.program(), "VmRSS");
    figure("memory when idle", mebibytes_of(idle), "MiB");
    figure(
        "anonymous memory when idle",
        mebibytes_of(memory(proxy.program(), "RssAnon")),
        "MiB",
    );
    let (read, took) = timed(read_everything(&proxy)).await;
    figure(
        "scrub, small objects",
        per_second(read["objects"].as_f64().unwrap(), took),
        "/s",
    );
    stop(proxy).await;

    let half = setup
        .clone()
        .tail(&format!("size = \"{} KiB\"", (objects / 8).max(1024)));
    let proxy = half.start().await;
    while crate::world::store_status(&proxy).await["evicted"]["tags"] == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    figure(
        "most memory during an eviction",
        mebibytes_of(memory(proxy.program(), "VmHWM")),
        "MiB",
    );
    drop(proxy);

    let within = if objects <= SMALL_OBJECTS {
        FIRST_BYTE_SMALL
    } else {
        FIRST_BYTE
    };
    assert!(first < within && again < within, "the first byte comes too late");
    assert!(per_100_000 < REBUILD_PER_100_000, "the index takes too long");
    assert!(idle <= IDLE_BYTES_MAX, "too much memory when idle");
    Ok(format!("{objects} objects: within all goals"))
}

fn figure(name: &str, value: f64, unit: &str) {
    println!("   {name:<32} {value:>8.1} {unit}");
}

fn per_second(count: f64, took: Duration) -> f64 {
    count / took.as_secs_f64()
}

/// CPU time of the process, which does not depend on the load of the machine.
fn processor_time(program: &Program) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", program.id())).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap());
    // Linux counts in units of 10 ms.
    Duration::from_millis(10 * ticks.sum::<u64>())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn mebibytes_of(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[expect(clippy::disallowed_methods, reason = "this test measures time")]
async fn timed<T>(operation: impl Future<Output = T>) -> (T, Duration) {
    let began = Instant::now();
    (operation.await, began.elapsed())
}

/// Waits for a log line without a timeout, because a large store takes long.
async fn until_logged(proxy: &Proxy, line: &str) {
    while !proxy.program().stderr().contains(line) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs the verify job. Returns its result.
async fn read_everything(proxy: &Proxy) -> serde_json::Value {
    let begin = Ask::new(proxy.admin_address(), "POST", "/api/v1/verify").unchecked();
    let begun = begin.header("content-type", "application/json").body(b"{}").await;
    assert!(begun.status < 300, "{begun:?}");
    until_logged(proxy, READ).await;
    let response = proxy.admin("/api/v1/verify").await.json();
    assert_eq!(response["damaged"], 0, "{response}");
    response
}

/// Starts the program without the upstream and pulls stored content.
async fn first_byte(world: &mut World, setup: &Setup) -> (Proxy, Duration) {
    world.upstream.resets();
    let (proxy, took) = timed(async {
        let proxy = setup.clone().start().await;
        assert_eq!(proxy.manifest(REPOSITORY, "v0").await.status, 200);
        proxy
    })
    .await;
    world.upstream.recovers();
    (proxy, took)
}

async fn stop(mut proxy: Proxy) {
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
}

/// Writes `objects` blobs and manifests with a tag per manifest, in the program's own format. Returns the number of
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
