//! Revalidation: cached tags of an upstream that is 40 ms away, one after another and a hundred at once, through the cache and
//! directly. The direct clients keep their connections, so each response takes one round trip.

use crate::client::{one, timed};
use crate::connection::{Connection, Endpoint};
use crate::content::{Layered, manifest_by_tag};
use crate::distance::{Distance, Limit};
use crate::peers::Kind;
use crate::program::free_address;
use crate::servers::{site, start_nginx};
use crate::table::{Better, Row, Table};
use crate::{Outcome, Plan};
use std::path::Path;
use std::sync::Barrier;
use std::time::Instant;

const TAGS: u64 = 100;
/// Requests for one tag in a round.
const REPEATS: usize = 20;
const BYTES_PER_SECOND: f64 = 40e6;

pub(crate) fn revalidation(plan: &Plan, scratch: &Path, table: &mut Table) -> Outcome<()> {
    let root = scratch.join("tags");
    let images = (0..TAGS)
        .map(|number| {
            let tag = Box::leak(format!("tag-{number}").into_boxed_str());
            Layered::make(&root, tag, 1_000 + number, 1, 64)
        })
        .collect::<Outcome<Vec<_>>>()?;
    let manifests: Vec<_> = images.iter().map(|image| (image.tag, &*image.manifest)).collect();
    let paths: Vec<_> = images.iter().map(|image| manifest_by_tag(image.tag)).collect();
    let address = free_address()?;
    let sites = site(&root, &manifests, &format!("listen {address};"), "");
    let _origin = start_nginx(
        &scratch.join("tags-origin"),
        &format!("access_log off; {sites}"),
        address,
    )?;
    let line = Distance::before(address, Limit::Each(BYTES_PER_SECOND))?;
    let cache = Kind::Ifnewer.start(scratch, line.address)?;
    let direct = Endpoint::plain(line.address);
    for path in &paths {
        one(&cache.endpoint, path)?;
    }

    let mut single = Row::new(
        "revalidation of a cached tag, 40 ms away: ms".to_owned(),
        Better::Lower,
    )
    .target_difference(1.0);
    let mut burst = Row::new(format!("{TAGS} cached tags at once: ms"), Better::Lower);
    let mut opened = Row::new(
        format!("{TAGS} cached tags at once: new connections"),
        Better::Lower,
    );
    let (mut ours, mut theirs) = (connections(&cache.endpoint)?, connections(&direct)?);
    // Opens the connections of both sides.
    at_once(&mut ours, &paths)?;
    at_once(&mut theirs, &paths)?;
    for _ in 0..plan.rounds {
        single.round(median_ms(&mut ours, &paths)?, median_ms(&mut theirs, &paths)?);
        let before = line.passed();
        let through = at_once(&mut ours, &paths)?;
        opened.alone(line.passed().since(before).connections as f64);
        burst.round(through, at_once(&mut theirs, &paths)?);
    }
    for row in [single, burst, opened] {
        table.add(row);
    }
    Ok(())
}

fn connections(endpoint: &Endpoint) -> Outcome<Vec<Connection>> {
    (0..TAGS).map(|_| endpoint.connect()).collect()
}

/// Median of some requests for the first tag, one after another.
fn median_ms(connections: &mut [Connection], paths: &[String]) -> Outcome<f64> {
    let (connection, path) = connections.first_mut().zip(paths.first()).ok_or("no tag")?;
    let mut times = (0..REPEATS)
        .map(|_| Ok(timed(connection, path)?.total.as_secs_f64() * 1e3))
        .collect::<Outcome<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times.get(REPEATS / 2).copied().unwrap_or(f64::NAN))
}

/// All tags at once, each on its connection: milliseconds until the last one.
fn at_once(connections: &mut [Connection], paths: &[String]) -> Outcome<f64> {
    let ready = Barrier::new(connections.len() + 1);
    std::thread::scope(|scope| {
        let clients: Vec<_> = connections
            .iter_mut()
            .zip(paths)
            .map(|(connection, path)| {
                let ready = &ready;
                scope.spawn(move || {
                    ready.wait();
                    timed(connection, path)
                })
            })
            .collect();
        ready.wait();
        let began = Instant::now();
        for client in clients {
            client.join().map_err(|_| "a client panicked")??;
        }
        Ok(began.elapsed().as_secs_f64() * 1e3)
    })
}
