//! Axis of pulls: so many pulls a second, each with a new bearer token and over a new connection, as CI jobs do. The
//! upstream authorizes each client (`auth = "per-client"`), so each token needs a request upstream. The pulls start on
//! time whether or not earlier ones have ended, and latency counts from that time.

use super::cache::{Cache, Work, milliseconds};
use super::registry::{Image, Registry, Repository, upstream};
use super::{Axis, Series, short_count};
use crate::client::STEP_BYTES;
use crate::connection::{Connection, Endpoint};
use crate::table::Table;
use crate::{Outcome, Plan};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Pulls a second.
const STEPS: [u32; 4] = [1, 100, 500, 2000];
const PULLS_MIN: usize = 10;
/// Pulls that can be in progress at once.
const THREADS: usize = 64;

pub(super) fn measure(plan: &Plan, folder: &Path, table: &mut Table) -> Outcome<Vec<Axis>> {
    let mut repository = Repository::make(folder)?;
    let image = repository.image(1, 4096)?;
    let registry = repository.serve(folder)?;
    let cache = Cache::start(&folder.join("cache"), &upstream(registry.private))?;
    image.check(&mut with_token(&cache.endpoint, "first")?)?;
    expect_denied(&cache.endpoint, &image)?;

    let mut series = Series::new("with a new token");
    for rate in STEPS {
        let pulls = usize::try_from(u64::from(rate) * plan.window.as_secs())?.max(PULLS_MIN);
        let step = cache.measure(f64::from(rate), short_count(rate.into()), || {
            run(&cache.endpoint, &registry, &image, rate, pulls)
        })?;
        series.steps.push(step);
    }
    let axis = Axis {
        title: "pulls a second",
        unit: "a second",
        per: "pull",
        series: vec![series],
    };
    axis.judge(0.0, table)?;
    Ok(vec![axis])
}

fn with_token(endpoint: &Endpoint, token: &str) -> Outcome<Connection> {
    Ok(endpoint
        .connect()?
        .with_line(&format!("Authorization: Bearer {token}")))
}

/// Without a token the cached image must not be served, or nothing would be proven.
fn expect_denied(endpoint: &Endpoint, image: &Image) -> Outcome<()> {
    let pulled = image.pull(
        &mut endpoint.connect()?,
        &mut vec![0; STEP_BYTES],
        &mut Vec::new(),
    );
    match pulled {
        Err(error) if error.to_string().ends_with(": 401") => Ok(()),
        Err(error) => Err(error),
        Ok(()) => Err("a private image was served without a token".into()),
    }
}

fn run(endpoint: &Endpoint, registry: &Registry, image: &Image, rate: u32, pulls: usize) -> Outcome<Work> {
    let before = registry.requests()?;
    let (next, began) = (AtomicUsize::new(0), Instant::now());
    let pull_all = || -> Outcome<Vec<f64>> {
        let (mut took, mut buffer) = (Vec::new(), vec![0; STEP_BYTES]);
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= pulls {
                return Ok(took);
            }
            let due = Duration::from_secs_f64(number as f64 / f64::from(rate));
            std::thread::sleep(due.saturating_sub(began.elapsed()));
            let mut connection = with_token(endpoint, &format!("{rate}-{number}"))?;
            image.pull(&mut connection, &mut buffer, &mut Vec::new())?;
            took.push(milliseconds(began.elapsed().saturating_sub(due)));
        }
    };
    let latencies = std::thread::scope(|scope| -> Outcome<Vec<f64>> {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(pull_all)).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| "a client panicked")??);
        }
        Ok(all)
    })?;
    let reached = pulls as f64 / began.elapsed().as_secs_f64();
    let upstream = registry.requests()? - before;
    if upstream < pulls {
        return Err(format!("{pulls} tokens and only {upstream} upstream requests").into());
    }
    Ok(Work {
        note: format!(
            "reached {reached:.0}/s, {:.2} upstream requests each",
            upstream as f64 / pulls as f64
        ),
        ..Work::of(latencies)
    })
}
