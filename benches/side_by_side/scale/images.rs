//! Axis of cached images: 1,000 to 1,000,000 images, each with a tag. Measured are the start, responses of which the
//! images are chosen at random, and the list of images of the admin API.
//!
//! Of a larger store the same number of images is in use, so that only the size of the store differs. A last measure
//! has more images in use than the program keeps open, and no target.

use super::cache::{Cache, Step, Work, milliseconds};
use super::filled::{Sample, fill};
use super::registry::{Image, Registry, Repository, upstream};
use super::{Axis, Series, short_count};
use crate::client::{STEP_BYTES, expect_digest};
use crate::program::program_output;
use crate::table::{Better, Row, Table};
use crate::wrk::load;
use crate::{Outcome, Plan};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

const STEPS: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// The last of them only with `--long`.
const SHORT: usize = 3;
const CONNECTIONS: usize = 8;
/// Responses of each kind whose bytes are checked.
const CHECKED: usize = 50;
/// Time of a page of the admin API, for this number of images.
const PAGE_MS: f64 = 10.0;
const PAGE_IMAGES: u64 = 100_000;
const PAGES: [(&str, &str); 4] = [
    ("list by name", "/api/v1/images?limit=100&sort=name"),
    ("list by size", "/api/v1/images?limit=100&sort=size"),
    ("list by confirmed", "/api/v1/images?limit=100&sort=confirmed"),
    ("status page", "/"),
];
const PAGE_REQUESTS: usize = 3;
/// A list of a million images takes longer than a client waits otherwise.
const PAGE_MAX: Duration = Duration::from_secs(600);
/// Images in use.
const IN_USE: usize = 1000;
const INDEXED: &str = "index rebuilt";
const INDEXED_MAX: Duration = Duration::from_secs(900);

/// Reads by clients.
const READS: [&str; 4] = [
    "manifest by digest",
    "tag within max_age",
    "config blob",
    "10,000 in use, by digest",
];

pub(super) fn measure(plan: &Plan, folder: &Path, table: &mut Table) -> Outcome<Vec<Axis>> {
    let mut repository = Repository::make(folder)?;
    let image = repository.image(1, 4096)?;
    let registry = repository.serve(folder)?;
    let mut reads = READS.map(Series::new);
    let mut pages = PAGES.map(|(name, _)| Series::new(name));
    let mut starts = Series::new("start");
    for images in STEPS
        .into_iter()
        .take(if plan.scale.long { STEPS.len() } else { SHORT })
    {
        let folder = tempfile::tempdir_in(folder)?;
        let folder = folder.path();
        let sample = prepare(folder, &registry, &image, images)?;
        let (cache, start) = started(folder, registry.open, &sample)?;
        starts.steps.push(Step {
            at: images as f64,
            label: short_count(images),
            ..start
        });
        check(&cache, &sample)?;
        let at = (images as f64, short_count(images));
        read_all(plan, folder, &cache, &sample, &at, &mut reads)?;
        for ((name, path), series) in PAGES.iter().zip(&mut pages) {
            let (step, median) = page(&cache, path, &at)?;
            if images == PAGE_IMAGES {
                let mut row = Row::new(format!("{name}, {} images: median, ms", at.1), Better::Lower)
                    .target_at_most(PAGE_MS);
                row.alone(median);
                table.add(row);
            }
            series.steps.push(step);
        }
    }
    let axis = |title, per, series| Axis {
        title,
        unit: "images",
        per,
        series,
    };
    let mut reads = axis("cached images", "request", reads.into());
    // The last one has no target.
    let more_in_use = reads.series.pop();
    reads.judge(0.0, table)?;
    reads.series.extend(more_in_use);
    let pages: Vec<Series> = pages.into_iter().chain([starts]).collect();
    Ok(vec![
        reads,
        axis("cached images, admin API and start", "request", pages),
    ])
}

/// Fills a store in `folder`, and starts the program once so that it creates the index.
fn prepare(folder: &Path, registry: &Registry, image: &Image, images: u64) -> Outcome<Sample> {
    let cache = Cache::start(folder, &sections(registry.open))?;
    image.check(&mut cache.endpoint.connect()?)?;
    drop(cache);
    let began = Instant::now();
    let sample = fill(&folder.join("data"), images)?;
    let filled = began.elapsed();
    drop(started(folder, registry.open, &sample)?);
    println!(
        "made {images} images in {filled:.0?}, with the index in {:.0?}",
        began.elapsed()
    );
    Ok(sample)
}

/// Tags stay fresh. The scrub would add to the CPU time.
fn sections(address: SocketAddr) -> String {
    format!(
        "[default]\nmax_age = \"7d\"\n[store]\nscrub = \"off\"\n{}",
        upstream(address)
    )
}

/// Starts the program and waits until it has read the whole store. The step has the time and the CPU time to the
/// first response.
fn started(folder: &Path, upstream: SocketAddr, sample: &Sample) -> Outcome<(Cache, Step)> {
    let began = Instant::now();
    let cache = Cache::start(folder, &sections(upstream))?;
    let (path, digest) = sample.by_tag.last().ok_or("a store without images")?;
    expect_digest(&cache.endpoint, path, digest)?;
    let (took, cpu) = (began.elapsed(), cache.cpu_seconds()?);
    while !program_output(folder).contains(INDEXED) {
        if began.elapsed() > INDEXED_MAX {
            return Err(format!("no index in time: {}", program_output(folder)).into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let indexed = began.elapsed();
    cache.settle()?;
    let step = Step {
        at: 0.0,
        label: String::new(),
        count: 1.0,
        cpu_micros: cpu * 1e6,
        p99_ms: milliseconds(took),
        resident_mib: cache.resident_mib()?,
        peak_mib: cache.peak_mib()?,
        note: format!("store read after {:.2} s", indexed.as_secs_f64()),
    };
    Ok((cache, step))
}

fn check(cache: &Cache, sample: &Sample) -> Outcome<()> {
    for all in [&sample.by_digest, &sample.by_tag, &sample.configs] {
        for (path, digest) in all.iter().step_by(all.len().div_ceil(CHECKED)) {
            expect_digest(&cache.endpoint, path, digest)?;
        }
    }
    Ok(())
}

fn read_all(
    plan: &Plan,
    folder: &Path,
    cache: &Cache,
    sample: &Sample,
    (at, label): &(f64, String),
    series: &mut [Series; 4],
) -> Outcome<()> {
    let all = &sample.by_digest;
    let of_each = [
        (all, IN_USE),
        (&sample.by_tag, IN_USE),
        (&sample.configs, IN_USE),
        (all, all.len()),
    ];
    for ((paths, in_use), series) in of_each.into_iter().zip(series) {
        let script = folder.join("paths.lua");
        std::fs::write(&script, choose_from(paths, in_use))?;
        let step = cache.measure(*at, label.clone(), || {
            let options = ["--script", &script.display().to_string()];
            let load = load(&cache.endpoint, "/", &options, CONNECTIONS, plan.window)?;
            Ok(Work {
                count: load.requests,
                p99_ms: load.p99_ms,
                note: format!("{:.0} requests/s", load.requests / load.seconds),
            })
        })?;
        series.steps.push(step);
    }
    Ok(())
}

/// A script of wrk that requests one of `in_use` paths at random, spread over all.
fn choose_from(paths: &[(String, String)], in_use: usize) -> String {
    let paths = paths.iter().step_by(paths.len() / in_use);
    let quoted: Vec<String> = paths.map(|(path, _)| format!("'{path}'")).collect();
    format!(
        "local paths = {{ {} }}\nrequest = function() return wrk.format('GET', paths[math.random(#paths)]) end\n",
        quoted.join(",\n")
    )
}

fn page(cache: &Cache, path: &str, (at, label): &(f64, String)) -> Outcome<(Step, f64)> {
    let mut median = f64::NAN;
    let mut buffer = vec![0; STEP_BYTES];
    let mut connection = cache.admin.connect_for(PAGE_MAX)?;
    let step = cache.measure(*at, label.clone(), || {
        let mut latencies = Vec::new();
        for _ in 0..PAGE_REQUESTS {
            let began = Instant::now();
            connection.fetch(path, &mut buffer)?;
            latencies.push(milliseconds(began.elapsed()));
        }
        let first = latencies.first().copied().unwrap_or(f64::NAN);
        let mut sorted = latencies.clone();
        sorted.sort_by(f64::total_cmp);
        median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        Ok(Work {
            note: format!("first {first:.1} ms, median {median:.1} ms"),
            ..Work::of(latencies)
        })
    })?;
    Ok((step, median))
}
