//! Axis of connections: a cached manifest by digest over 1 to 4096 connections, each with one request in flight.

use super::cache::{Cache, RAMP, Work};
use super::registry::{Repository, upstream};
use super::{Axis, Series, short_count};
use crate::content::manifest_by_digest;
use crate::table::Table;
use crate::{Outcome, Plan, client, wrk};
use rustix::process::{Resource, getrlimit};
use std::path::Path;

const STEPS: [usize; 5] = [1, 8, 64, 512, 4096];
/// Descriptors that ifnewer counts for each connection.
const DESCRIPTORS_EACH: u64 = 5;
/// Connections below the limit, for those of the checks.
const SPARE: u64 = 64;

pub(super) fn measure(plan: &Plan, folder: &Path, table: &mut Table) -> Outcome<Vec<Axis>> {
    let mut repository = Repository::make(folder)?;
    let image = repository.image(1, 4096)?;
    let registry = repository.serve(folder)?;
    let limits = "[limits]\nconnections_max = 5000\nconnections_per_peer_max = 5000\n";
    let cache = Cache::start(
        &folder.join("cache"),
        &(limits.to_owned() + &upstream(registry.open)),
    )?;
    image.check(&mut cache.endpoint.connect()?)?;
    let path = manifest_by_digest(&image.digest);
    client::expect_digest(&cache.endpoint, &path, &image.digest)?;

    let mut series = Series::new("manifest by digest");
    for connections in STEPS {
        let connections = connections.min(possible()?);
        let step = cache.measure_within(
            connections as f64,
            short_count(connections as u64),
            plan.window,
            || {
                let load = wrk::load(
                    &cache.endpoint,
                    &path,
                    &["--timeout", "20s"],
                    connections,
                    plan.window + 2 * RAMP,
                )?;
                Ok(Work {
                    count: load.requests,
                    p99_ms: load.p99_ms,
                    note: format!("{:.0} requests/s", load.requests / load.seconds),
                })
            },
        )?;
        series.steps.push(step);
    }
    let axis = Axis {
        title: "connections",
        unit: "conn.",
        per: "request",
        series: vec![series],
    };
    axis.judge(0.0, table)?;
    Ok(vec![axis])
}

/// Connections that the limit of descriptors allows.
fn possible() -> Outcome<usize> {
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    Ok(usize::try_from((limit / DESCRIPTORS_EACH).saturating_sub(SPARE))?)
}
