//! Benchmark of ifnewer beside nginx and docker-registry, in one run on one machine, because only ratios are
//! meaningful.
//!
//! nginx serves the same files that ifnewer caches, and a third nginx is the upstream. The client discards the
//! bodies. In the stampedes nothing is cached, and nginx and docker-registry are caches like ifnewer. The measure is
//! the server's own CPU time from `/proc`, which a client on the same cores does not affect. Rounds alternate between
//! the two. A figure is the median of its rounds, and a ratio is the median of the rounds' ratios. There are no
//! absolute targets, because they would measure the machine.
//!
//! Run it by `benches/run`, which installs the others and wrk. `--quick`: shorter windows; `--rounds N`;
//! `--large`, `--small`, `--stampede`, `--access`: only that part; `--cold-parallel`, `--revalidation`, `--comparison`: a part that the other runs
//! leave out; `--strict`: exit 1 if a target is missed. Wrong bytes always exit 1.
//! `--scale`: instead, how the cost of ifnewer alone grows (`scale`); `--long`: with its largest steps;
//! `--axis NAME`: only that axis; `--plot FILE.svg`: its results as a plot.

#![allow(clippy::print_stdout, reason = "the table is the product")]
#![allow(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
#![allow(clippy::cast_precision_loss, reason = "figures are rounded to three digits")]

mod access;
mod bottleneck;
mod chunks;
mod client;
mod cold;
mod comparison;
mod connection;
mod content;
mod distance;
mod peers;
mod program;
mod revalidation;
mod scale;
mod servers;
mod stampede;
mod table;
mod wrk;

use connection::{Endpoint, Scheme};
use content::{Content, blob, manifest_by_digest, manifest_by_tag};
use servers::{FRESH, Server, Sites};
use std::path::{Path, PathBuf};
use std::time::Duration;
use table::{Better, Row, Table};

/// Any error ends the run with its cause.
pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const MIB: u64 = 1024 * 1024;
const BLOB_BYTES: u64 = 300 * MIB;
const CLIENTS: usize = 64;

/// How long and how often.
struct Plan {
    window: Duration,
    rounds: usize,
    cold_rounds: usize,
    stampede_rounds: usize,
    comparison_rounds: usize,
    /// Time limit of docker-registry in a stampede.
    patience: Duration,
    strict: bool,
    /// Only this part.
    only: Option<Part>,
    scale: ScaleOptions,
}

/// Options of `--scale`.
#[derive(Default)]
struct ScaleOptions {
    /// With the largest steps.
    long: bool,
    /// Only the axis of this name.
    axis: Option<String>,
    /// The file of the plot.
    plot: Option<PathBuf>,
}

/// A part that can run alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Access,
    ColdParallel,
    Revalidation,
    Comparison,
    Large,
    Scale,
    Small,
    Stampede,
}

fn main() -> Outcome<()> {
    let plan = Plan::from_arguments()?;
    // Other load affects every figure, so a run that started or ended under load reports it.
    println!("load average before: {}", load()?);
    let scratch = tempfile::tempdir()?;
    let mut table = Table::new(["ifnewer", "other"]);
    match plan.only {
        Some(Part::ColdParallel) => cold::cold_parallel(&plan, scratch.path(), &mut table)?,
        Some(Part::Revalidation) => revalidation::revalidation(&plan, scratch.path(), &mut table)?,
        Some(Part::Scale) => table = scale::scale(&plan, scratch.path())?,
        Some(Part::Comparison) => return comparison::comparison(&plan, scratch.path()),
        None | Some(Part::Access | Part::Large | Part::Small | Part::Stampede) => {
            beside_others(&plan, scratch.path(), &mut table)?;
        }
    }
    table.print();
    println!("load average after: {}", load()?);
    if plan.strict && !table.all_met() {
        Err("a target is missed".into())
    } else {
        Ok(())
    }
}

/// The parts that share one image and one set of programs.
fn beside_others(plan: &Plan, scratch: &Path, table: &mut Table) -> Outcome<()> {
    println!(
        "making {} blobs of {} MiB",
        plan.cold_rounds + 2,
        BLOB_BYTES / MIB
    );
    let content = Content::make(scratch, BLOB_BYTES, plan.cold_rounds)?;
    let sites = Sites::start(scratch, &content)?;
    check_bytes(&sites, &content)?;
    if plan.runs(Part::Large) {
        warm_blob(plan, &sites, &content, table)?;
    }
    if plan.runs(Part::Small) {
        small_replies(plan, &sites, &content, table)?;
    }
    if plan.only.is_none() {
        cold_blob(&sites, &content, table)?;
        memory(plan, &sites, &content, table)?;
    }
    if plan.runs(Part::Access) {
        access::access(plan, &sites, &content, table)?;
    }
    if plan.runs(Part::Stampede) {
        stampede::stampede(plan, scratch, &sites, &content, table)?;
    }
    Ok(())
}

fn load() -> Outcome<String> {
    Ok(std::fs::read_to_string("/proc/loadavg")?.trim().to_owned())
}

impl Plan {
    fn runs(&self, part: Part) -> bool {
        self.only.is_none_or(|only| only == part)
    }

    fn from_arguments() -> Outcome<Self> {
        let mut plan = Plan {
            window: Duration::from_secs(4),
            rounds: 3,
            cold_rounds: 3,
            stampede_rounds: 3,
            comparison_rounds: 1,
            patience: Duration::from_secs(60),
            strict: false,
            only: None,
            scale: ScaleOptions::default(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--quick" => {
                    plan = Plan {
                        window: Duration::from_secs(2),
                        rounds: 3,
                        cold_rounds: 1,
                        stampede_rounds: 1,
                        patience: Duration::from_secs(12),
                        ..plan
                    }
                }
                "--rounds" => {
                    plan.rounds = arguments.next().ok_or("--rounds needs a number")?.parse()?;
                    plan.cold_rounds = plan.rounds;
                    plan.stampede_rounds = plan.rounds;
                    plan.comparison_rounds = plan.rounds;
                }
                "--cold-parallel" => plan.only = Some(Part::ColdParallel),
                "--revalidation" => plan.only = Some(Part::Revalidation),
                "--comparison" => plan.only = Some(Part::Comparison),
                "--stampede" => plan.only = Some(Part::Stampede),
                "--large" => plan.only = Some(Part::Large),
                "--access" => plan.only = Some(Part::Access),
                "--small" => plan.only = Some(Part::Small),
                "--scale" => plan.only = Some(Part::Scale),
                "--long" => plan.scale.long = true,
                "--axis" => plan.scale.axis = Some(arguments.next().ok_or("--axis needs a name")?),
                "--plot" => plan.scale.plot = Some(arguments.next().ok_or("--plot needs a file")?.into()),
                "--strict" => plan.strict = true,
                "--bench" => {} // cargo bench says so to every harness
                other => return Err(format!("unknown argument {other}").into()),
            }
        }
        if plan.only == Some(Part::Scale) && !plan.scale.long {
            plan.window /= 2; // It has many steps.
        }
        Ok(plan)
    }
}

/// Measurement starts after every server has served the right bytes.
fn check_bytes(sites: &Sites, content: &Content) -> Outcome<()> {
    for server in [&sites.ifnewer, &sites.nginx] {
        for scheme in [Scheme::Plain, Scheme::Tls] {
            let endpoint = server.endpoint(scheme);
            client::expect_digest(
                endpoint,
                &manifest_by_tag(content.image.tag),
                &content.image.manifest,
            )?;
            client::expect_digest(
                endpoint,
                &manifest_by_digest(&content.image.manifest),
                &content.image.manifest,
            )?;
            client::expect_digest(endpoint, &blob(&content.image.layer), &content.image.layer)?;
        }
    }
    Ok(())
}

/// A cached blob, with few and with many connections. On plain connections nginx runs in two configurations: as
/// usually tuned, and with the chunk size found to be best. A bare loop of `sendfile` shows the limit of the machine.
fn warm_blob(plan: &Plan, sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let peers = [
        (Scheme::Plain, "nginx", &sites.nginx, Some(1.0)),
        (
            Scheme::Plain,
            "nginx, 512k steps",
            &sites.nginx_in_small_steps,
            Some(1.0),
        ),
        (Scheme::Plain, "sendfile loop", &sites.bare_sendfile, None),
        (Scheme::Tls, "nginx", &sites.nginx, Some(1.5)),
    ];
    for connections in [8, CLIENTS] {
        for (scheme, name, peer, target) in peers {
            let what = format!("warm 300 MiB, {scheme}, {connections} conn., {name}");
            let mut speed = Row::new(format!("{what}: GB/s"), Better::Higher);
            let mut economy = Row::new(format!("{what}: GB per CPU s"), Better::Higher);
            if let Some(ratio) = target {
                economy = economy.target_ratio(ratio);
            }
            let mut cost = Row::new(format!("{what}: CPU s per GB"), Better::Lower);
            for _ in 0..plan.rounds {
                let [a, b] = [&sites.ifnewer, peer].map(|server| {
                    client::stream(
                        server,
                        scheme,
                        &blob(&content.image.layer),
                        connections,
                        plan.window,
                    )
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

/// Small responses: beside nginx, which serves a file without a decision, and beside hyper with nothing behind it.
fn small_replies(plan: &Plan, sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let image = &content.image;
    let by_tag = manifest_by_tag(image.tag);
    let fresh = format!("{by_tag}?ns={FRESH}");
    client::expect_digest(&sites.ifnewer.plain, &fresh, &image.manifest)?;
    // A complete image: each pull of an incomplete one looks for what to prefetch.
    for digest in [&image.config, &image.layer] {
        let path = format!("{}?ns={FRESH}", blob(digest));
        client::expect_digest(&sites.ifnewer.plain, &path, digest)?;
    }
    let by_digest = manifest_by_digest(&image.manifest);
    let small = blob(&image.config);
    client::expect_digest(&sites.ifnewer.plain, &small, &image.config)?;
    let kinds = [
        ("manifest by digest", &by_digest, &by_digest, Some(1.0), 1.45),
        ("manifest by tag within max_age", &fresh, &by_tag, None, 1.7),
        ("manifest by tag, revalidated", &by_tag, &by_tag, None, 1.95),
        ("blob of 80 B", &small, &small, None, 1.4),
    ];
    for (what, path, file, beside_nginx, beside_hyper) in kinds {
        let what = format!("{what}, {CLIENTS} conn.");
        let mut rate = Row::new(format!("{what}, nginx: requests/s"), Better::Higher);
        let mut cost = Row::new(format!("{what}, nginx: CPU µs each"), Better::Lower);
        if let Some(ratio) = beside_nginx {
            cost = cost.target_ratio(ratio);
        }
        let mut slowest = Row::new(format!("{what}, nginx: p99, ms"), Better::Lower).target_ratio(1.2);
        let mut over_hyper =
            Row::new(format!("{what}, bare hyper: CPU µs each"), Better::Lower).target_ratio(beside_hyper);
        for _ in 0..plan.rounds {
            let ours = wrk::wrk(&sites.ifnewer, path, &[], CLIENTS, plan.window)?;
            let nginx = wrk::wrk(&sites.nginx, file, &[], CLIENTS, plan.window)?;
            let hyper = wrk::wrk(&sites.bare_hyper, "/", &[], CLIENTS, plan.window)?;
            let each = |replied: &wrk::Replied| replied.cpu_seconds * 1e6 / replied.requests;
            rate.round(ours.requests / ours.seconds, nginx.requests / nginx.seconds);
            cost.round(each(&ours), each(&nginx));
            slowest.round(ours.p99_ms, nginx.p99_ms);
            over_hyper.round(each(&ours), each(&hyper));
        }
        for row in [rate, cost, slowest, over_hyper] {
            table.add(row);
        }
    }
    let mut handshakes =
        Row::new("TLS 1.3 handshakes per CPU s, nginx".to_owned(), Better::Higher).target_ratio(1.0);
    for _ in 0..plan.rounds {
        let ours = client::handshakes(&sites.ifnewer, plan.window)?;
        let nginx = client::handshakes(&sites.nginx, plan.window)?;
        handshakes.round(ours.count / ours.cpu_seconds, nginx.count / nginx.cpu_seconds);
    }
    table.add(handshakes);
    Ok(())
}

/// An uncached blob from an upstream of 50 MB/s per connection: through ifnewer, which uses up to four connections, and
/// direct.
fn cold_blob(sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let what = "cold 300 MiB at 50 MB/s";
    let mut total = Row::new(format!("{what}: seconds, against direct"), Better::Lower).target_ratio(0.5);
    let mut first = Row::new(
        format!("{what}: ms to the first byte, against direct"),
        Better::Lower,
    )
    .target_difference(3.0);
    // The manifest once, as every client does. Only the blob is timed.
    client::expect_digest(
        sites.ifnewer_slow.endpoint(Scheme::Plain),
        &manifest_by_tag(content.image.tag),
        &content.image.manifest,
    )?;
    for digest in &content.cold {
        let a = client::one(sites.ifnewer_slow.endpoint(Scheme::Plain), &blob(digest))?;
        let b = client::one(&sites.upstream_slow, &blob(digest))?;
        total.round(a.total.as_secs_f64(), b.total.as_secs_f64());
        first.round(a.first_byte.as_secs_f64() * 1e3, b.first_byte.as_secs_f64() * 1e3);
        client::expect_digest(sites.ifnewer_slow.endpoint(Scheme::Plain), &blob(digest), digest)?;
    }
    table.add(total);
    table.add(first);
    Ok(())
}

/// Peak resident memory with 64 clients on one blob: cached, cached over TLS, and during the shared download.
fn memory(plan: &Plan, sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let held = blob(&content.image.layer);
    for (scheme, target_mib) in [(Scheme::Plain, 32.0), (Scheme::Tls, 64.0)] {
        let mut peak = Row::new(
            format!("peak memory, {CLIENTS} clients, {scheme}: MiB"),
            Better::Lower,
        )
        .target_at_most(target_mib);
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
    let layer = &content.herd_image.layer;
    let before = sites.upstream_bytes_for(layer)?;
    client::herd(sites.ifnewer.endpoint(Scheme::Plain), &blob(layer), CLIENTS)?;
    peak.alone(sites.ifnewer.peak_memory_mib()?);
    table.add(peak);
    let mut sent = Row::new(
        format!("upstream bytes for {CLIENTS} cold clients, layers"),
        Better::Lower,
    )
    .target_at_most(1.001);
    sent.alone((sites.upstream_bytes_for(layer)? - before) as f64 / content.herd_image.layer_bytes as f64);
    table.add(sent);
    client::expect_digest(sites.ifnewer.endpoint(Scheme::Plain), &blob(layer), layer)
}

impl Server {
    fn endpoint(&self, scheme: Scheme) -> &Endpoint {
        match scheme {
            Scheme::Plain => &self.plain,
            Scheme::Tls => &self.tls,
        }
    }
}
