//! The real program is killed, its power is cut, its files are damaged, its disk fills up, its memory is short. What it
//! had acknowledged must be there afterwards, and no client may ever get wrong bytes whole.
//!
//! `tests/crash/run` brings what is needed and runs this. Each campaign is `name` or `name=count`; without any, all of
//! them run in their short form. What needs root, loop devices or a memory cgroup that is not there fails in CI
//! (CI=true) and is skipped with a loud word elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]
#![allow(clippy::panic, clippy::indexing_slicing, reason = "tests may fail loudly")]
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a campaign tells how it goes"
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
mod power;
mod refusal;
mod start;
mod world;

/// Each campaign, and how often it does its deed when nobody says so.
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
    ("descriptors", 64),
    ("memory", 64),
    (START, 100_000),
];

/// Holds times against goals, which is no matter for a machine that has other things to do: run only by its name.
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
        let told = runtime.block_on(async {
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
                "descriptors" => descriptors::campaign(count).await,
                "memory" => memory::campaign(count).await,
                _ => start::campaign(count).await,
            }
        });
        match told {
            Ok(told) => println!("   {told}"),
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
