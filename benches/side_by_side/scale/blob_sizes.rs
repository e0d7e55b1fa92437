//! Axis of sizes: a blob of 1 B to 8 GiB, cached and not. CPU time has a part per request, that of the smallest blob,
//! and a part per byte. Peak memory must not grow.

use super::cache::{Cache, Step, Work, milliseconds};
use super::registry::{Repository, upstream};
use super::{Axis, GROWTH_MAX, Series};
use crate::client::{STEP_BYTES, expect_digest};
use crate::connection::Connection;
use crate::content::blob;
use crate::table::{Better, Row, Table};
use crate::{MIB, Outcome, Plan};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

/// Size, its label, and blobs that are fetched while they are not cached.
const STEPS: [(u64, &str, usize); 6] = [
    (1, "1 B", 200),
    (1024, "1 KiB", 200),
    (MIB, "1 MiB", 40),
    (64 * MIB, "64 MiB", 3),
    (1024 * MIB, "1 GiB", 1),
    (8192 * MIB, "8 GiB", 1),
];
/// The last of them only with `--long`.
const SHORT: usize = 5;
/// The step to which larger ones are compared. In smaller ones the part per request dominates, and the blob fits in the
/// buffers of a download.
const COMPARED_FROM: u64 = 64 * MIB;

pub(super) fn measure(plan: &Plan, folder: &Path, table: &mut Table) -> Outcome<Vec<Axis>> {
    let mut repository = Repository::make(folder)?;
    let image = repository.image(1, 4096)?;
    let mut steps = Vec::new();
    for (bytes, label, blobs) in STEPS
        .into_iter()
        .take(if plan.scale.long { STEPS.len() } else { SHORT })
    {
        println!("making {blobs} blobs of {label}");
        // Blobs of one byte repeat.
        let digests: BTreeSet<String> = (0..blobs)
            .map(|_| repository.blob(bytes))
            .collect::<Outcome<_>>()?;
        steps.push((bytes, label, digests));
    }
    let registry = repository.serve(folder)?;
    let cache = Cache::start(&folder.join("cache"), &upstream(registry.open))?;
    // The manifest once, as every client does: it shows that the repository is public.
    image.check(&mut cache.endpoint.connect()?)?;
    let (mut warm, mut cold) = (Series::new("cached"), Series::new("not cached"));
    let mut buffer = vec![0; STEP_BYTES];
    for (bytes, label, digests) in &steps {
        let (at, label) = (*bytes as f64, (*label).to_owned());
        let mut connection = cache.endpoint.connect()?;
        cold.steps.push(cache.measure(at, label.clone(), || {
            let get = |digest: &String| timed(&mut connection, digest, *bytes, &mut buffer);
            Ok(Work::of(digests.iter().map(get).collect::<Outcome<_>>()?))
        })?);
        for digest in digests {
            expect_digest(&cache.endpoint, &blob(digest), digest)?;
        }
        let fetched = registry.requests()?;
        let digest = digests.first().ok_or("a step without a blob")?;
        // The other one may have been idle for too long.
        let mut connection = cache.endpoint.connect()?;
        warm.steps.push(cache.measure(at, label.clone(), || {
            let (mut latencies, began) = (Vec::new(), Instant::now());
            while began.elapsed() < plan.window {
                latencies.push(timed(&mut connection, digest, *bytes, &mut buffer)?);
            }
            Ok(Work::of(latencies))
        })?);
        if registry.requests()? > fetched {
            return Err(format!("a cached blob of {label} was requested upstream").into());
        }
    }
    for series in [&mut warm, &mut cold] {
        judge(series, table)?;
    }
    Ok(vec![Axis {
        title: "size of a blob",
        unit: "",
        per: "request",
        series: vec![warm, cold],
    }])
}

fn timed(connection: &mut Connection, digest: &str, bytes: u64, buffer: &mut [u8]) -> Outcome<f64> {
    let began = Instant::now();
    let received = connection.fetch(&blob(digest), buffer)?;
    if received != bytes {
        return Err(format!("{digest}: {received} bytes instead of {bytes}").into());
    }
    Ok(milliseconds(began.elapsed()))
}

/// Adds the verdicts on time per byte and on memory, and notes the time per byte.
fn judge(series: &mut Series, table: &mut Table) -> Outcome<()> {
    let nanos_per_byte = |step: &Step| step.cpu_micros * 1e3 / step.at;
    for step in &mut series.steps {
        if step.at >= MIB as f64 {
            step.note = format!("{:.3} CPU ns/B", nanos_per_byte(step));
        }
    }
    let (base, largest) = series.between(COMPARED_FROM as f64)?;
    let what = format!("size of a blob, {}, from 64 MiB", series.name);
    let row = |figure: &str| Row::new(format!("{what}: {figure}"), Better::Lower).target_ratio(GROWTH_MAX);
    let (mut time, mut memory) = (row("CPU ns per byte"), row("peak MiB"));
    time.round(nanos_per_byte(largest), nanos_per_byte(base));
    memory.round(largest.peak_mib, base.peak_mib);
    table.add(time);
    table.add(memory);
    Ok(())
}
