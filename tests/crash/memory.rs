//! Memory campaign: many large pulls within a small memory limit.

use std::path::PathBuf;

use tokio::task::JoinSet;

use crate::proxy::{Program, Proxy, Setup};
use crate::registry::{Blob, Upstream, noise};

const LIMIT_BYTES: u64 = 160 * 1024 * 1024;

/// Blobs shared by the pulls. Each one alone is larger than the limit.
const BLOBS: u64 = 4;
const BLOB_BYTES: usize = 300 * 1024 * 1024;

/// A memory cgroup of version 1 or 2.
struct Group {
    at: PathBuf,
}

impl Group {
    fn new() -> Result<Group, String> {
        let name = format!("ifnewer-crash-{}", std::process::id());
        let (at, limit) = if PathBuf::from("/sys/fs/cgroup/memory").is_dir() {
            (
                PathBuf::from("/sys/fs/cgroup/memory").join(name),
                "memory.limit_in_bytes",
            )
        } else {
            (PathBuf::from("/sys/fs/cgroup").join(name), "memory.max")
        };
        std::fs::create_dir(&at)
            .map_err(|error| format!("cannot create a memory cgroup at {}: {error}", at.display()))?;
        let group = Group { at };
        std::fs::write(group.at.join(limit), LIMIT_BYTES.to_string())
            .map_err(|error| format!("cannot limit the memory cgroup: {error}"))?;
        Ok(group)
    }

    fn take(&self, process: u32) {
        std::fs::write(self.at.join("cgroup.procs"), process.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.at);
    }
}

pub async fn campaign(pulls: u32) -> Result<String, String> {
    let group = Group::new()?;
    let upstream = Upstream::start().await;
    let blobs: Vec<_> = (0..BLOBS)
        .map(|seed| upstream.push_blob("library/demo", &noise(seed, BLOB_BYTES)))
        .collect();
    let proxy = Setup::over(&upstream)
        .tail("[store]\nfree = \"0 B\"")
        .start()
        .await;
    group.take(proxy.program().id());
    // First from the upstream, then from the disk.
    for _ in 0..2 {
        pull_at_once(&proxy, &blobs, pulls).await;
    }
    assert_eq!(proxy.get("/v2/").await.status, 200, "it was killed");
    let peak = memory(proxy.program(), "VmHWM");
    drop(proxy);
    Ok(format!(
        "twice {pulls} pulls of {} MiB at once within {} MiB, not killed; at most {} MiB anonymous",
        BLOB_BYTES >> 20,
        LIMIT_BYTES >> 20,
        peak >> 20
    ))
}

async fn pull_at_once(proxy: &Proxy, blobs: &[Blob], pulls: u32) {
    let mut under_way = JoinSet::new();
    for pull in 0..pulls {
        let blob = &blobs[pull as usize % blobs.len()];
        let ask = proxy.blob("library/demo", &blob.digest);
        let bytes = blob.bytes.clone();
        under_way.spawn(async move {
            let mut flow = ask.stream().await;
            assert_eq!(flow.status, 200);
            for expected in bytes.chunks(1024 * 1024) {
                assert!(flow.read(expected.len()).await == expected, "wrong bytes");
            }
        });
    }
    while let Some(pulled) = under_way.join_next().await {
        pulled.unwrap();
    }
}

/// A field of the process status in `/proc`, in bytes.
pub fn memory(program: &Program, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kibibytes * 1024
}
