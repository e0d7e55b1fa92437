//! ifnewer beside nginx, in one run on one machine: the only way a figure of speed means anything.
//!
//! nginx serves the very files that ifnewer holds; a third nginx is the upstream. The client discards what it reads.
//! What counts is the server's own CPU time from `/proc`, so that a client on the same cores does not blur it. Rounds
//! alternate between the two; a figure is the median of its rounds and a ratio is the median of the rounds' ratios.
//! Deliberately not here: absolute targets. They would measure the machine.
//!
//! Run it by `benches/run`, which brings nginx and wrk. `--quick`: shorter windows; `--rounds N`; `--strict`: exit 1
//! when a target is missed. Wrong bytes always exit 1.

#![allow(clippy::print_stdout, reason = "the table is the product")]
#![allow(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
#![allow(clippy::cast_precision_loss, reason = "figures are rounded to three digits")]

mod client;
mod content;
mod servers;
mod table;

use client::{Door, Scheme};
use content::{Content, blob, manifest_by_digest, manifest_by_tag};
use servers::{Server, Sites};
use std::time::Duration;
use table::{Better, Row, Table};

/// Whatever goes wrong ends the run with its reason.
pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const MIB: u64 = 1024 * 1024;
const BLOB_BYTES: u64 = 300 * MIB;
const CLIENTS: usize = 64;

/// How long and how often.
struct Plan {
    window: Duration,
    rounds: usize,
    cold_rounds: usize,
    strict: bool,
}

fn main() -> Outcome<()> {
    let plan = Plan::from_arguments()?;
    let scratch = tempfile::tempdir()?;
    println!(
        "making {} blobs of {} MiB",
        plan.cold_rounds + 2,
        BLOB_BYTES / MIB
    );
    let content = Content::make(scratch.path(), BLOB_BYTES, plan.cold_rounds)?;
    let sites = Sites::start(scratch.path(), &content)?;
    check_bytes(&sites, &content)?;

    let mut table = Table::new();
    warm_blob(&plan, &sites, &content, &mut table)?;
    small_replies(&plan, &sites, &content, &mut table)?;
    cold_blob(&sites, &content, &mut table)?;
    memory(&plan, &sites, &content, &mut table)?;
    table.print();
    if plan.strict && !table.all_met() {
        Err("a target is missed".into())
    } else {
        Ok(())
    }
}

impl Plan {
    fn from_arguments() -> Outcome<Self> {
        let mut plan = Plan {
            window: Duration::from_secs(4),
            rounds: 3,
            cold_rounds: 3,
            strict: false,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--quick" => {
                    plan = Plan {
                        window: Duration::from_secs(2),
                        rounds: 3,
                        cold_rounds: 1,
                        ..plan
                    }
                }
                "--rounds" => {
                    plan.rounds = arguments.next().ok_or("--rounds needs a number")?.parse()?;
                    plan.cold_rounds = plan.rounds;
                }
                "--strict" => plan.strict = true,
                "--bench" => {} // cargo bench says so to every harness
                other => return Err(format!("unknown argument {other}").into()),
            }
        }
        Ok(plan)
    }
}

/// Nothing is measured before every server has proved that it serves the right bytes.
fn check_bytes(sites: &Sites, content: &Content) -> Outcome<()> {
    for server in [&sites.ifnewer, &sites.nginx] {
        for scheme in [Scheme::Plain, Scheme::Tls] {
            let door = server.door(scheme);
            client::expect_digest(door, &manifest_by_tag(), &content.manifest)?;
            client::expect_digest(door, &manifest_by_digest(&content.manifest), &content.manifest)?;
            client::expect_digest(door, &blob(&content.warm), &content.warm)?;
        }
    }
    Ok(())
}

/// A blob that is held, to few and to many connections. On plain connections nginx is asked twice: as it is usually
/// tuned, and in the steps that were found to suit it best.
fn warm_blob(plan: &Plan, sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let peers = [
        (Scheme::Plain, "nginx", &sites.nginx, 0.8),
        (
            Scheme::Plain,
            "nginx, 512k steps",
            &sites.nginx_in_small_steps,
            0.8,
        ),
        (Scheme::Tls, "nginx", &sites.nginx, 1.5),
    ];
    for connections in [8, CLIENTS] {
        for (scheme, name, peer, target) in peers {
            let what = format!("warm 300 MiB, {scheme}, {connections} conn., {name}");
            let mut speed = Row::new(format!("{what}: GB/s"), Better::Higher);
            let mut economy = Row::new(format!("{what}: GB per CPU s"), Better::Higher).target_ratio(target);
            let mut cost = Row::new(format!("{what}: CPU s per GB"), Better::Lower);
            for _ in 0..plan.rounds {
                let [a, b] = [&sites.ifnewer, peer].map(|server| {
                    client::stream(server, scheme, &blob(&content.warm), connections, plan.window)
                });
                let (a, b) = (a?, b?);
                speed.round(a.gigabytes / a.seconds, b.gigabytes / b.seconds);
                economy.round(a.gigabytes / a.cpu_seconds, b.gigabytes / b.cpu_seconds);
                cost.round(a.cpu_seconds / a.gigabytes, b.cpu_seconds / b.gigabytes);
            }
            table.add(speed);
            table.add(economy);
            table.add(cost);
        }
    }
    Ok(())
}

/// A manifest, by digest (never asks upstream) and by tag (asks by HEAD; nginx does not check, and serves as a bound).
fn small_replies(plan: &Plan, sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let kinds = [
        ("digest", manifest_by_digest(&content.manifest), Some(1.0)),
        ("tag", manifest_by_tag(), None),
    ];
    for (by, path, target) in kinds {
        let what = format!("manifest by {by}, {CLIENTS} connections");
        let mut rate = Row::new(format!("{what}: requests/s"), Better::Higher);
        let mut cost = Row::new(format!("{what}: CPU µs each"), Better::Lower);
        if let Some(ratio) = target {
            cost = cost.target_ratio(ratio);
        }
        for _ in 0..plan.rounds {
            let a = client::wrk(&sites.ifnewer, &path, CLIENTS, plan.window)?;
            let b = client::wrk(&sites.nginx, &path, CLIENTS, plan.window)?;
            rate.round(a.requests / a.seconds, b.requests / b.seconds);
            cost.round(a.cpu_seconds * 1e6 / a.requests, b.cpu_seconds * 1e6 / b.requests);
        }
        table.add(rate);
        table.add(cost);
    }
    Ok(())
}

/// A blob nobody has asked for, from an upstream of 50 MB/s a connection: by way of ifnewer, and straight.
fn cold_blob(sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let what = "cold 300 MiB at 50 MB/s";
    let mut total = Row::new(format!("{what}: seconds, against direct"), Better::Lower).target_ratio(1.03);
    let mut first = Row::new(
        format!("{what}: ms to the first byte, against direct"),
        Better::Lower,
    )
    .target_difference(3.0);
    // The manifest once, as every client does: what is timed is the blob.
    client::expect_digest(
        sites.ifnewer_slow.door(Scheme::Plain),
        &manifest_by_tag(),
        &content.manifest,
    )?;
    for digest in &content.cold {
        let a = client::one(sites.ifnewer_slow.door(Scheme::Plain), &blob(digest))?;
        let b = client::one(&sites.upstream_slow, &blob(digest))?;
        total.round(a.total.as_secs_f64(), b.total.as_secs_f64());
        first.round(a.first_byte.as_secs_f64() * 1e3, b.first_byte.as_secs_f64() * 1e3);
        client::expect_digest(sites.ifnewer_slow.door(Scheme::Plain), &blob(digest), digest)?;
    }
    table.add(total);
    table.add(first);
    Ok(())
}

/// Peak resident memory with 64 clients on one blob: held, held over TLS, and arriving while all of them wait for it.
fn memory(plan: &Plan, sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let held = blob(&content.warm);
    for scheme in [Scheme::Plain, Scheme::Tls] {
        let mut peak = Row::new(
            format!("peak memory, {CLIENTS} clients, {scheme}: MiB"),
            Better::Lower,
        )
        .target_at_most(64.0);
        let [a, b] = [&sites.ifnewer, &sites.nginx].map(|server| -> Outcome<f64> {
            server.reset_peak_memory()?;
            client::stream(server, scheme, &held, CLIENTS, plan.window)?;
            server.peak_memory_mib()
        });
        peak.round(a?, b?);
        table.add(peak);
    }
    let mut peak = Row::new(
        format!("peak memory, {CLIENTS} clients, cold: MiB"),
        Better::Lower,
    )
    .target_at_most(64.0);
    sites.ifnewer.reset_peak_memory()?;
    let before = sites.upstream_requests_for(&content.herd)?;
    client::herd(sites.ifnewer.door(Scheme::Plain), &blob(&content.herd), CLIENTS)?;
    peak.alone(sites.ifnewer.peak_memory_mib()?);
    table.add(peak);
    let mut transfers = Row::new(
        format!("upstream transfers for {CLIENTS} cold clients"),
        Better::Lower,
    )
    .target_at_most(1.0);
    transfers.alone((sites.upstream_requests_for(&content.herd)? - before) as f64);
    table.add(transfers);
    client::expect_digest(
        sites.ifnewer.door(Scheme::Plain),
        &blob(&content.herd),
        &content.herd,
    )
}

impl Server {
    fn door(&self, scheme: Scheme) -> &Door {
        match scheme {
            Scheme::Plain => &self.plain,
            Scheme::Tls => &self.tls,
        }
    }
}
