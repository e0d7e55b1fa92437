//! Crash campaigns: the real program is killed, loses power, finds corrupt files, fills its disk and runs out of
//! memory. Acknowledged content must survive, and no client may receive a complete response with wrong bytes.
//!
//! `tests/crash/run` provides the prerequisites and runs this. An argument is `name` or `name=count`. Without
//! arguments all campaigns run in their short form. A campaign that needs root, loop devices or a memory cgroup
//! fails in CI (CI=true) if they are missing, and is skipped with a warning elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]
#![allow(clippy::panic, clippy::indexing_slicing, reason = "tests may fail loudly")]
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a campaign reports its progress"
)]
#![allow(
    unreachable_pub,
    dead_code,
    unused_imports,
    reason = "shared with the system tests, which use the rest"
)]
#![allow(
    clippy::unnecessary_debug_formatting,
    reason = "a quoted path is a TOML string"
)]

#[path = "../support/proxy/mod.rs"]
mod proxy;
#[path = "../support/registry/mod.rs"]
mod registry;

mod damage;
mod descriptors;
mod disk;
mod full;
mod kill;
mod memory;
mod parallel;
mod power;
mod refusal;
mod start;
mod world;

/// The campaigns with their default number of repetitions.
const CAMPAIGNS: &[(&str, u32)] = &[
    ("kill", 100),
    ("power-ext4", 30),
    ("power-xfs", 30),
    ("damage", 300),
    ("full", 200),
    ("inodes", 50),
    ("quota", 50),
    ("read-only", 50),
    ("failing", 50),
    ("bad-sectors", 50),
    ("parallel", 20),
    ("descriptors", 64),
    ("memory", 64),
    (START, 100_000),
];

/// Compares durations with goals, which a busy machine cannot meet. Runs only if it is named.
const START: &str = "start";

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let mut chosen: Vec<(&str, u32)> = Vec::new();
    for argument in &wanted {
        let (name, count) = argument.split_once('=').unwrap_or((argument, ""));
        let (name, usual) = CAMPAIGNS
            .iter()
            .find(|(known, _)| *known == name)
            .unwrap_or_else(|| panic!("`{name}` is not one of {CAMPAIGNS:?}"));
        chosen.push((name, count.parse().unwrap_or(*usual)));
    }
    if chosen.is_empty() {
        chosen = CAMPAIGNS.to_vec();
        chosen.retain(|(name, _)| *name != START);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    for (name, count) in chosen {
        println!("== {name}: {count}");
        let response = runtime.block_on(async {
            match name {
                "kill" => kill::campaign(count).await,
                "power-ext4" => power::campaign("ext4", count).await,
                "power-xfs" => power::campaign("xfs", count).await,
                "damage" => damage::campaign(count).await,
                "full" => full::full(count).await,
                "inodes" => full::inodes(count).await,
                "quota" => full::quota(count).await,
                "read-only" => full::read_only(count).await,
                "failing" => full::failing(count).await,
                "bad-sectors" => full::bad_sectors(count).await,
                "parallel" => parallel::campaign(count).await,
                "descriptors" => descriptors::campaign(count).await,
                "memory" => memory::campaign(count).await,
                _ => start::campaign(count).await,
            }
        });
        match response {
            Ok(response) => println!("   {response}"),
            Err(absent) if std::env::var("CI").as_deref() == Ok("true") => {
                panic!("{name} cannot run here, and CI must run it: {absent}")
            }
            Err(absent) => {
                eprintln!("==================================================================");
                eprintln!("SKIPPED: {name}: {absent}");
                eprintln!("==================================================================");
            }
        }
    }
}
