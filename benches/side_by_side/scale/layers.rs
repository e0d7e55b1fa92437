//! Axis of layers: the pull of an image by one client over one connection, cached and not. Most requests of a large
//! image are for blobs, which need no revalidation, so the cost per request may fall.

use super::cache::{Cache, Work};
use super::registry::{Image, Repository, upstream};
use super::{Axis, Series, short_count};
use crate::client::STEP_BYTES;
use crate::table::Table;
use crate::{Outcome, Plan};
use std::path::Path;
use std::time::Instant;

/// Layers, and images that are pulled while they are not cached.
const STEPS: [(usize, usize); 4] = [(1, 160), (10, 40), (100, 5), (500, 2)];
/// The step to which larger ones are compared: of one layer, a third of the requests are for manifests, which cost more.
const COMPARED_FROM: f64 = 10.0;
const LAYER_BYTES: u64 = 4096;

pub(super) fn measure(plan: &Plan, folder: &Path, table: &mut Table) -> Outcome<Vec<Axis>> {
    let mut repository = Repository::make(folder)?;
    let mut steps = Vec::new();
    for (layers, images) in STEPS {
        let images: Vec<Image> = (0..images)
            .map(|_| repository.image(layers, LAYER_BYTES))
            .collect::<Outcome<_>>()?;
        steps.push((layers, images));
    }
    let registry = repository.serve(folder)?;
    let cache = Cache::start(&folder.join("cache"), &upstream(registry.open))?;
    let (mut warm, mut cold) = (Series::new("cached"), Series::new("not cached"));
    for (layers, images) in &steps {
        let (at, label) = (*layers as f64, short_count(*layers as u64));
        let mut connection = cache.endpoint.connect()?;
        let mut buffer = vec![0; STEP_BYTES];
        cold.steps.push(cache.measure(at, label.clone(), || {
            let (mut latencies, began) = (Vec::new(), Instant::now());
            for image in images {
                image.pull(&mut connection, &mut buffer, &mut latencies)?;
            }
            Ok(work(latencies, images.len(), began))
        })?);
        for image in images {
            image.check(&mut cache.endpoint.connect()?)?;
        }
        let image = images.first().ok_or("a step without an image")?;
        let mut connection = cache.endpoint.connect()?;
        let revalidated = registry.requests()?;
        warm.steps.push(cache.measure(at, label, || {
            let (mut latencies, mut pulls, began) = (Vec::new(), 0, Instant::now());
            while began.elapsed() < plan.window {
                image.pull(&mut connection, &mut buffer, &mut latencies)?;
                pulls += 1;
            }
            let upstream = registry.requests()? - revalidated;
            if upstream > pulls {
                return Err(
                    format!("{pulls} pulls of a cached image and {upstream} upstream requests").into(),
                );
            }
            Ok(work(latencies, pulls, began))
        })?);
    }
    let axis = Axis {
        title: "layers of an image",
        unit: "layers",
        per: "request",
        series: vec![warm, cold],
    };
    axis.judge(COMPARED_FROM, table)?;
    Ok(vec![axis])
}

fn work(latencies: Vec<f64>, pulls: usize, began: Instant) -> Work {
    Work {
        note: format!(
            "{:.2} ms a pull",
            began.elapsed().as_secs_f64() * 1e3 / pulls as f64
        ),
        ..Work::of(latencies)
    }
}
