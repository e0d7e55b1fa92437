//! Growth of ifnewer's cost with the amount of work: connections, pulls with new tokens, cached images, layers of an
//! image, size of a blob.
//!
//! Each axis has steps, and each step has the CPU time per request, the latency at the 99th percentile, and the
//! memory. The target is linear growth: a request at the largest step costs at most 1.3 times as much CPU time as at
//! the smallest. A step starts and ends when the program is idle, so that its CPU time includes what it does after
//! the last response. Where clients have connections of their own and wait for each response, the latency includes
//! the wait for the CPU, so it grows with the connections.

mod blob_sizes;
mod cache;
mod connections;
mod filled;
mod images;
mod layers;
mod plot;
mod pulls;
mod registry;

use crate::table::{Better, Row, Table};
use crate::{Outcome, Plan};
use cache::Step;
use std::path::Path;

/// CPU time per request at the largest step, relative to the smallest.
const GROWTH_MAX: f64 = 1.3;

/// One measure along an axis.
struct Series {
    name: &'static str,
    steps: Vec<Step>,
}

/// All measures along an axis.
struct Axis {
    title: &'static str,
    /// The unit of the steps.
    unit: &'static str,
    /// What the CPU time is divided by.
    per: &'static str,
    series: Vec<Series>,
}

type Measure = fn(&Plan, &Path, &mut Table) -> Outcome<Vec<Axis>>;

pub(crate) fn scale(plan: &Plan, scratch: &Path) -> Outcome<Table> {
    raise_descriptor_limit()?;
    let all: [(&str, Measure); 5] = [
        ("connections", connections::measure),
        ("pulls", pulls::measure),
        ("images", images::measure),
        ("layers", layers::measure),
        ("sizes", blob_sizes::measure),
    ];
    let names = all.map(|(name, _)| name);
    if let Some(axis) = plan.scale.axis.as_deref().filter(|axis| !names.contains(axis)) {
        return Err(format!("no axis {axis}: {}", names.join(", ")).into());
    }
    let mut table = Table::new(["largest", "smallest"]);
    let mut axes = Vec::new();
    for (name, measure) in all {
        if plan.scale.axis.as_deref().is_none_or(|axis| axis == name) {
            let folder = tempfile::tempdir_in(scratch)?;
            axes.extend(measure(plan, folder.path(), &mut table)?);
        }
    }
    for axis in &axes {
        axis.print();
    }
    if let Some(file) = &plan.scale.plot {
        std::fs::write(file, plot::svg(&axes))?;
    }
    Ok(table)
}

/// Raises the limit for this process and those that it starts: each connection needs descriptors at both ends.
fn raise_descriptor_limit() -> Outcome<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

impl Series {
    fn new(name: &'static str) -> Self {
        Series {
            name,
            steps: Vec::new(),
        }
    }

    /// The first step at `from` or beyond, and the last one.
    fn between(&self, from: f64) -> Outcome<(&Step, &Step)> {
        let smallest = self.steps.iter().find(|step| step.at >= from);
        smallest
            .zip(self.steps.last())
            .ok_or_else(|| format!("{} has no steps", self.name).into())
    }
}

impl Axis {
    /// Adds a verdict of each series to `table`: its last step compared to the first one at `from` or beyond.
    fn judge(&self, from: f64, table: &mut Table) -> Outcome<()> {
        for series in &self.series {
            let (smallest, largest) = series.between(from)?;
            let what = format!("{}, {}: CPU µs each {}", self.title, series.name, self.per);
            let mut row = Row::new(what, Better::Lower).target_ratio(GROWTH_MAX);
            row.round(largest.cpu_micros, smallest.cpu_micros);
            table.add(row);
        }
        Ok(())
    }

    fn print(&self) {
        let cpu = format!("CPU µs/{}", self.per);
        println!(
            "\n{:<40} {:>10} {cpu:>14} {:>9} {:>9} {:>9}",
            self.title, "count", "p99 ms", "RSS MiB", "peak MiB"
        );
        for series in &self.series {
            for step in &series.steps {
                let what = format!("{}, {} {}", series.name, step.label, self.unit);
                let line = format!(
                    "{what:<40} {:>10.0} {:>14.1} {:>9.2} {:>9.1} {:>9.1}  {}",
                    step.count, step.cpu_micros, step.p99_ms, step.resident_mib, step.peak_mib, step.note
                );
                println!("{}", line.trim_end());
            }
        }
    }
}

/// The label of a step: `4096`, `100k`, `1M`.
fn short_count(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => format!("{}k", count / 1000),
        _ => format!("{}M", count / 1_000_000),
    }
}
