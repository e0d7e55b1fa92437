//! Comparison of caches in four situations: the image is cached, it is not, a hundred clients pull it at once, and the
//! upstream is unavailable. Each program is started empty for each, and does what its configuration in `peers` says.
//!
//! A figure of one client is from an upstream 40 ms away that sends 50 MB/s over a connection. The stampede is that of
//! `stampede`, behind a limit of 40 MB/s for all. For an outage the upstream is killed, or suspended, so that the kernel
//! accepts connections and nothing answers. The layer of the first pull is compared with its digest.

use crate::client::{self, Reply};
use crate::connection::{Endpoint, SILENCE_MAX};
use crate::content::{Content, blob, digest_of, manifest_by_tag};
use crate::distance::{Distance, Limit};
use crate::peers::{Cache, Kind};
use crate::program::{Running, free_address};
use crate::servers::{site, start_nginx};
use crate::stampede::{CLIENTS, LINE_BYTES_PER_SECOND, Line, StampedeResult};
use crate::table::median;
use crate::{BLOB_BYTES, Outcome, Plan};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

const KINDS: [Kind; 6] = [
    Kind::Ifnewer,
    Kind::Nginx,
    Kind::Interception,
    Kind::DockerRegistry,
    Kind::Varnish,
    Kind::Direct,
];
const BYTES_PER_SECOND: f64 = 50e6;
const PATIENCE: Duration = Duration::from_secs(120);
const SLOW_PATIENCE: Duration = Duration::from_secs(30);
/// Longer than varnish's validity of a tag, and than any program takes to store what it has sent.
const SETTLE: Duration = Duration::from_millis(1500);

/// Markdown, a line for each row.
struct Rows(Vec<(String, Vec<String>)>);

#[derive(Clone, Copy)]
enum Outage {
    Killed,
    Silent,
}

pub(crate) fn comparison(plan: &Plan, scratch: &Path) -> Outcome<()> {
    println!("making 2 blobs of {} MiB", BLOB_BYTES / crate::MIB);
    let content = Content::make(scratch, BLOB_BYTES, 0)?;
    let (_running, upstream) = start_upstream(&scratch.join("upstream"), &content)?;
    let mut rows = Rows(Vec::new());
    rows.one_client(plan, scratch, &content, upstream)?;
    rows.stampede(plan, scratch, &content, upstream)?;
    for (outage, name) in [(Outage::Killed, "killed"), (Outage::Silent, "silent")] {
        let cells = outage.cells(scratch, &content)?;
        rows.add(format!("outage, upstream {name}: a cached tag"), cells);
    }
    rows.print()
}

fn start_upstream(folder: &Path, content: &Content) -> Outcome<(Running, SocketAddr)> {
    let address = free_address()?;
    let images = [&content.image, &content.herd_image].map(|image| (image.tag, &*image.manifest));
    let site = site(&content.root, &images, &format!("listen {address};"), "");
    Ok((
        start_nginx(folder, &format!("access_log off; {site}"), address)?,
        address,
    ))
}

impl Rows {
    fn add(&mut self, what: String, cells: Vec<String>) {
        println!("measured: {what}: {}", cells.join(" | "));
        self.0.push((what, cells));
    }

    /// Cold, then warm with the same cache.
    fn one_client(
        &mut self,
        plan: &Plan,
        scratch: &Path,
        content: &Content,
        upstream: SocketAddr,
    ) -> Outcome<()> {
        let (mut cold, mut warm, mut cpu) = (vec![], vec![], vec![]);
        for kind in KINDS {
            let line = Distance::before(upstream, Limit::Each(BYTES_PER_SECOND))?;
            let mut cold_seconds = Vec::new();
            for _ in 1..plan.comparison_rounds {
                cold_seconds.push(pull(&kind.start(scratch, line.address)?, content, true)?);
            }
            let cache = kind.start(scratch, line.address)?;
            cold_seconds.push(pull(&cache, content, true)?);
            cold.push(format!("{:.2} s", median(cold_seconds)));
            std::thread::sleep(SETTLE);
            let (began, before, mut seconds) = (Instant::now(), cache.cpu_seconds()?, Vec::new());
            while seconds.is_empty() || began.elapsed() < plan.window {
                seconds.push(pull(&cache, content, false)?);
            }
            let gigabytes = (seconds.len() as u64 * BLOB_BYTES) as f64 / 1e9;
            let cpu_seconds = (cache.cpu_seconds()? - before) / gigabytes;
            warm.push(format!("{:.2} s", median(seconds)));
            cpu.push(match kind {
                Kind::Direct => String::from("-"),
                _ => format!("{cpu_seconds:.2}"),
            });
        }
        self.add(String::from("warm, one client"), warm);
        self.add(String::from("warm: CPU s per GB"), cpu);
        self.add(String::from("cold, one client"), cold);
        Ok(())
    }

    fn stampede(
        &mut self,
        plan: &Plan,
        scratch: &Path,
        content: &Content,
        upstream: SocketAddr,
    ) -> Outcome<()> {
        let line = Line::limited(upstream)?;
        let mut columns: Vec<Vec<StampedeResult>> = Vec::new();
        for kind in KINDS {
            let patience = match kind {
                Kind::Ifnewer | Kind::Nginx | Kind::Interception | Kind::Varnish => PATIENCE,
                // They fetch once a client, and would take many minutes.
                Kind::DockerRegistry | Kind::Direct => plan.patience.min(SLOW_PATIENCE),
            };
            let rounds = 0..plan.comparison_rounds;
            let results = rounds.map(|_| line.run(kind, CLIENTS, patience, scratch, content));
            columns.push(results.collect::<Outcome<_>>()?);
        }
        let figure = |of: fn(&StampedeResult) -> f64, format: fn(f64) -> String| {
            let cells = columns
                .iter()
                .map(|column| format(median(column.iter().map(of).collect())));
            cells.collect::<Vec<_>>()
        };
        let ended = columns
            .iter()
            .zip(figure(|one| one.last_seconds, |last| format!("{last:.1} s")));
        let last = ended.map(|(column, last)| {
            if let Some(failure) = column.iter().find_map(|one| one.failure.as_ref()) {
                format!("no: {failure}")
            } else if column.iter().all(|one| one.done) {
                last
            } else {
                format!("no, stopped after {last}")
            }
        });
        let what = format!("stampede of {CLIENTS}");
        self.add(format!("{what}: the last client has it"), last.collect());
        self.add(
            format!("{what}: bytes from the upstream, in images"),
            figure(|one| one.upstream, |images| format!("{images:.2}")),
        );
        self.add(
            format!("{what}: peak memory, MiB"),
            figure(
                |one| one.peak_mib,
                |peak| {
                    if peak > 0.0 {
                        format!("{peak:.0}")
                    } else {
                        String::from("-")
                    }
                },
            ),
        );
        Ok(())
    }

    fn print(&self) -> Outcome<()> {
        let mut programs = Vec::new();
        for kind in KINDS {
            programs.push(kind.with_version()?);
        }
        println!("\n| | {} |", programs.join(" | "));
        println!("|---|{}", "---|".repeat(programs.len()));
        for (what, cells) in &self.0 {
            println!("| {what} | {} |", cells.join(" | "));
        }
        println!(
            "\nA pull is the manifest by tag, the config and a layer of {} MiB. The stampede's upstream sends {} MB/s in all,\n\
             the others' {} MB/s over each connection, 40 ms away. The tuned nginx uses a cached tag for a day\n\
             without a question, varnish for a second, and then once more while it asks; the interception rules store\n\
             no tag. varnish maps its storage, which counts as memory.",
            BLOB_BYTES / crate::MIB,
            LINE_BYTES_PER_SECOND / 1e6,
            BYTES_PER_SECOND / 1e6,
        );
        Ok(())
    }
}

/// Seconds of a pull by one client.
fn pull(cache: &Cache, content: &Content, is_hashed: bool) -> Outcome<f64> {
    let (alone, first_byte) = (Barrier::new(1), AtomicU64::new(0));
    let took = client::pull(&cache.endpoint, &content.image, &alone, is_hashed, &first_byte)?;
    Ok(took.as_secs_f64())
}

impl Outage {
    /// All programs at once, because some answer after half a minute.
    fn cells(self, scratch: &Path, content: &Content) -> Outcome<Vec<String>> {
        let mut caches = Vec::new();
        for kind in KINDS {
            let folder = tempfile::tempdir_in(scratch)?;
            let (running, upstream) = start_upstream(folder.path(), content)?;
            let cache = kind.start(scratch, upstream)?;
            pull(&cache, content, true)?;
            let endpoint = match kind {
                Kind::Direct => Endpoint::plain(upstream),
                _ => cache.endpoint.clone(),
            };
            caches.push((cache, endpoint, running, folder));
        }
        std::thread::sleep(SETTLE);
        let mut cases = Vec::new();
        for (cache, endpoint, running, folder) in caches {
            let suspended = match self {
                Outage::Killed => {
                    drop(running);
                    None
                }
                Outage::Silent => {
                    running.suspend()?;
                    Some(running)
                }
            };
            cases.push((cache, endpoint, suspended, folder));
        }
        std::thread::scope(|scope| {
            let asked: Vec<_> = cases
                .iter()
                .map(|(_, endpoint, ..)| scope.spawn(|| answer(endpoint, content)))
                .collect();
            asked
                .into_iter()
                .map(|one| one.join().map_err(|_| "a client panicked")?)
                .collect()
        })
    }
}

/// What a client gets for a tag, once more for it, and for its layer.
fn answer(endpoint: &Endpoint, content: &Content) -> Outcome<String> {
    let (image, began) = (&content.image, Instant::now());
    let ask = || client::reply(endpoint, &manifest_by_tag(image.tag));
    let first = match ask() {
        Ok(reply) => reply,
        Err(_) if began.elapsed() >= SILENCE_MAX => {
            return Ok(format!("no response in {} s", SILENCE_MAX.as_secs()));
        }
        Err(_) => return Ok(String::from("no connection")),
    };
    if first.status != 200 {
        return Ok(format!("no, {} in {}", first.status, milliseconds(&first)));
    }
    let again = ask()?;
    for reply in [&first, &again] {
        if reply.status != 200 || digest_of(&reply.body) != image.manifest {
            return Err(format!("a tag with status {} or wrong bytes", reply.status).into());
        }
    }
    client::expect_digest(endpoint, &blob(&image.layer), &image.layer)?;
    Ok(format!(
        "200 in {}, then in {}",
        milliseconds(&first),
        milliseconds(&again)
    ))
}

fn milliseconds(reply: &Reply) -> String {
    format!("{:.1} ms", reply.took.as_secs_f64() * 1e3)
}
