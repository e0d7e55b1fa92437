//! Stampede: a hundred clients pull one uncached image at once. Measured are the upstream's bytes, the last
//! completion, the time to first byte and the cache's memory. Once with a shared limit of 40 MB/s, where the upstream
//! is the bottleneck, and once without, where the cache is.
//!
//! docker-registry downloads once per client and would need many minutes, so it is stopped after a while. Its figures
//! are those reached by then, which flatters it. In some runs it responds 500 to some clients. Its rows name that,
//! and the run goes on; only a failure of ifnewer or nginx ends it.

use crate::bottleneck::Bottleneck;
use crate::client;
use crate::content::Content;
use crate::peers::Kind;
use crate::servers::Sites;
use crate::table::{Better, Row, Table};
use crate::{Outcome, Plan};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, mpsc};
use std::time::{Duration, Instant};

pub(crate) const CLIENTS: usize = 100;
pub(crate) const LINE_BYTES_PER_SECOND: f64 = 40e6;
const PATIENCE: Duration = Duration::from_secs(120);
/// No first byte yet.
const NEVER: u64 = u64::MAX;

/// The source of the bytes and their counter.
pub(crate) enum Line<'s> {
    Limited(Bottleneck),
    Unlimited(&'s Sites),
}

/// Results of one stampede.
pub(crate) struct StampedeResult {
    /// Every client got the complete image.
    pub(crate) done: bool,
    /// The first failure of a client's pull.
    pub(crate) failure: Option<String>,
    pub(crate) last_seconds: f64,
    /// Bytes sent by the upstream, in multiples of the image.
    pub(crate) upstream: f64,
    /// From the first client's first byte of the layer to the last client's.
    first_bytes_ms: f64,
    pub(crate) peak_mib: f64,
    /// Of the cache.
    cpu_seconds: f64,
}

pub(crate) fn stampede(
    plan: &Plan,
    scratch: &Path,
    sites: &Sites,
    content: &Content,
    table: &mut Table,
) -> Outcome<()> {
    for line in [Line::limited(sites.upstream)?, Line::Unlimited(sites)] {
        let run = |kind, clients, patience| line.run(kind, clients, patience, scratch, content);
        let (mut alone, mut ours, mut nginx, mut registry) = (vec![], vec![], vec![], vec![]);
        for _ in 0..plan.stampede_rounds {
            alone.push(run(Kind::Ifnewer, 1, PATIENCE)?.finished()?);
            ours.push(run(Kind::Ifnewer, CLIENTS, PATIENCE)?.finished()?);
            nginx.push(run(Kind::Nginx, CLIENTS, PATIENCE)?.finished()?);
            registry.push(run(Kind::DockerRegistry, CLIENTS, plan.patience)?);
        }
        let what = format!("{CLIENTS} cold, {}", line.name());
        let mut last = Row::new(format!("{what}, one alone: last done, s"), Better::Lower);
        if let Line::Limited(_) = line {
            last = last.target_ratio(1.05);
        }
        for (ours, alone) in ours.iter().zip(&alone) {
            last.round(ours.last_seconds, alone.last_seconds);
        }
        table.add(last);
        compare(&what, Kind::Nginx, &line, &ours, &nginx, table);
        compare(&what, Kind::DockerRegistry, &line, &ours, &registry, table);
    }
    Ok(())
}

impl StampedeResult {
    fn finished(self) -> Outcome<Self> {
        match self.failure {
            Some(failure) => Err(failure.into()),
            None if self.done => Ok(self),
            None => Err("a stampede was not over in time".into()),
        }
    }
}

/// One row per result. Targets are relative to nginx.
fn compare(
    what: &str,
    kind: Kind,
    line: &Line<'_>,
    ours: &[StampedeResult],
    theirs: &[StampedeResult],
    table: &mut Table,
) {
    let ended = if let Some(failure) = theirs.iter().find_map(|one| one.failure.as_ref()) {
        println!("{kind} failed clients: {failure}");
        ", failing"
    } else if theirs.iter().all(|one| one.done) {
        ""
    } else {
        ", stopped"
    };
    let row = |name: &str| Row::new(format!("{what}, {kind}{ended}: {name}"), Better::Lower);
    let (mut last, mut upstream, mut first, mut peak, mut cpu) = (
        row("last done, s"),
        row("upstream bytes, images"),
        row("first bytes within, ms"),
        row("peak memory, MiB"),
        row("CPU, s"),
    );
    if let Kind::Nginx = kind {
        // The counter of the bottleneck includes heads and the manifest.
        upstream = upstream.target_at_most(1.001);
        first = first.target_at_most(50.0);
        peak = peak.target_at_most(64.0);
        match line {
            Line::Limited(_) => cpu = cpu.target_ratio(1.3),
            Line::Unlimited(_) => last = last.target_ratio(0.7),
        }
    }
    for (a, b) in ours.iter().zip(theirs) {
        last.round(a.last_seconds, b.last_seconds);
        upstream.round(a.upstream, b.upstream);
        first.round(a.first_bytes_ms, b.first_bytes_ms);
        peak.round(a.peak_mib, b.peak_mib);
        cpu.round(a.cpu_seconds, b.cpu_seconds);
    }
    for row in [last, upstream, first, peak, cpu] {
        table.add(row);
    }
}

impl Line<'_> {
    pub(crate) fn limited(upstream: SocketAddr) -> Outcome<Self> {
        Ok(Line::Limited(Bottleneck::before(
            upstream,
            LINE_BYTES_PER_SECOND,
        )?))
    }

    fn name(&self) -> String {
        match self {
            Line::Limited(_) => format!("{} MB/s", LINE_BYTES_PER_SECOND / 1e6),
            Line::Unlimited(_) => String::from("no limit"),
        }
    }

    fn upstream(&self) -> SocketAddr {
        match self {
            Line::Limited(bottleneck) => bottleneck.address,
            Line::Unlimited(sites) => sites.upstream,
        }
    }

    fn sent(&self, layer: &str) -> Outcome<u64> {
        match self {
            Line::Limited(bottleneck) => Ok(bottleneck.passed()),
            Line::Unlimited(sites) => sites.upstream_bytes_for(layer),
        }
    }

    pub(crate) fn run(
        &self,
        kind: Kind,
        clients: usize,
        patience: Duration,
        scratch: &Path,
        content: &Content,
    ) -> Outcome<StampedeResult> {
        let image = &content.herd_image;
        let cache = kind.start(scratch, self.upstream())?;
        let endpoint = cache.endpoint.clone();
        let before = self.sent(&image.layer)?;
        let (ready, (tell, told)) = (Barrier::new(clients + 1), mpsc::channel());
        let first_bytes: Vec<AtomicU64> = (0..clients).map(|_| AtomicU64::new(NEVER)).collect();
        let (mut pulls, mut failure) = (Vec::new(), None::<String>);
        let (peak_mib, cpu_seconds, waited) = std::thread::scope(|scope| -> Outcome<_> {
            for (number, first_byte) in first_bytes.iter().enumerate() {
                let (endpoint, ready, tell) = (&endpoint, &ready, tell.clone());
                scope.spawn(move || tell.send(client::pull(endpoint, image, ready, number == 0, first_byte)));
            }
            drop(tell);
            ready.wait();
            let began = Instant::now();
            while let Ok(pull) = told.recv_timeout(patience.saturating_sub(began.elapsed())) {
                match pull {
                    Ok(pull) => pulls.push(pull),
                    Err(e) => failure = failure.take().or(Some(format!("{kind}: {e}"))),
                }
            }
            let waited = began.elapsed();
            let (peak, cpu) = (cache.peak_memory_mib()?, cache.cpu_seconds()?);
            // Stops clients that still read, and lets the upstream log their requests.
            drop(cache);
            Ok((peak, cpu, waited))
        })?;
        std::thread::sleep(Duration::from_millis(200));
        let done = pulls.len() == clients;
        let last = pulls.into_iter().max().filter(|_| done);
        let waited_micros = u64::try_from(waited.as_micros())?;
        let first = |first_byte: &AtomicU64| first_byte.load(Ordering::Relaxed).min(waited_micros);
        let (earliest, latest) = (
            first_bytes.iter().map(first).min(),
            first_bytes.iter().map(first).max(),
        );
        Ok(StampedeResult {
            done,
            failure,
            last_seconds: last.unwrap_or(waited).as_secs_f64(),
            upstream: (self.sent(&image.layer)? - before) as f64 / image.layer_bytes as f64,
            first_bytes_ms: (latest.unwrap_or(0) - earliest.unwrap_or(0)) as f64 / 1e3,
            peak_mib,
            cpu_seconds,
        })
    }
}
