//! Cold pulls over several connections: an upstream that is 40 ms away and limits each connection to 40 MB/s, or all of
//! them together.
//!
//! The client and the cache have the same kind of connection, one after the other in each round, and each round has a new cache.
//! Every client has read the manifest and the config on a connection that it keeps, so only the layers are timed. All bytes are
//! compared with their digests, by the client or afterwards from the cache.

use crate::chunks::{Ranges, in_chunks};
use crate::client::{Timed, after_manifest, expect_digest, timed};
use crate::connection::Endpoint;
use crate::content::{Layered, blob};
use crate::distance::{Distance, Limit, Passed};
use crate::peers::Kind;
use crate::program::{Running, free_address};
use crate::servers::{site, start_nginx};
use crate::table::{Better, Row, Table, Target};
use crate::{MIB, Outcome, Plan};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

const BYTES_PER_SECOND: f64 = 40e6;
/// Longer than the connections of a transfer take to end after it.
const SETTLE: Duration = Duration::from_millis(300);

/// Images of the upstream.
struct Images {
    gigabyte: Layered,
    quarter: Layered,
    unwilling: Layered,
    three: Layered,
    ten: Layered,
    small: Layered,
}

/// The upstream, once for each kind of response to a range.
struct Origin {
    /// 206.
    ranges: SocketAddr,
    /// Other responses, with the name of each.
    unwilling: [(&'static str, SocketAddr); 3],
    _running: Running,
}

type Client = fn(&Endpoint, &Layered) -> Outcome<Timed>;

/// A pull, measured through the cache and directly.
struct Case<'c> {
    what: String,
    line: Distance,
    image: &'c Layered,
    client: Client,
    target: Targets,
}

#[derive(Default)]
struct Targets {
    seconds: Target,
    first_byte_ms: Target,
    /// Bytes of the upstream beyond the images, as a part of them.
    surplus: f64,
    peak_mib: Target,
}

/// One pull.
struct Pull {
    timed: Timed,
    passed: Passed,
    /// Of the cache.
    peak_mib: f64,
}

pub(crate) fn cold_parallel(plan: &Plan, scratch: &Path, table: &mut Table) -> Outcome<()> {
    let root = scratch.join("www");
    println!("making images of 2.4 GiB");
    let images = Images::make(&root)?;
    let origin = Origin::start(scratch, &root, &images)?;
    let mut gigabyte = origin.case("1 GiB, one GET", &images.gigabyte, layers, Target::Ratio(0.35))?;
    gigabyte.target.first_byte_ms = Target::Difference(3.0);
    gigabyte.target.peak_mib = Target::AtMost(64.0);
    // A round of it takes more than half a minute.
    gigabyte.measure(plan.cold_rounds.min(2), scratch, table)?;

    let open: Client = |endpoint, image| in_chunks(endpoint, image, Ranges::Open);
    let closed: Client = |endpoint, image| in_chunks(endpoint, image, Ranges::Closed);
    let Images {
        quarter,
        three,
        ten,
        small,
        ..
    } = &images;
    for (what, image, client, target) in [
        ("256 MiB, 8 open ranges", quarter, open, Target::Ratio(1.05)),
        ("256 MiB, 8 closed ranges", quarter, closed, Target::Ratio(1.05)),
        ("3 × 128 MiB, a GET each", three, layers, Target::Ratio(0.5)),
        ("10 × 64 MiB, a GET each", ten, layers, Target::None),
        ("10 × 1 MiB, a GET each", small, layers, Target::Ratio(1.05)),
    ] {
        let case = origin.case(what, image, client, target)?;
        case.measure(plan.cold_rounds, scratch, table)?;
    }

    let mut shared = origin.case("256 MiB, limit of all", quarter, layers, Target::Ratio(1.01))?;
    shared.line = Distance::before(origin.ranges, Limit::Total(BYTES_PER_SECOND))?;
    shared.measure(plan.cold_rounds.min(2), scratch, table)?;

    for (response, address) in origin.unwilling {
        let what = format!("128 MiB, {response} to ranges");
        let mut case = origin.case(&what, &images.unwilling, layers, Target::Ratio(1.02))?;
        case.line = Distance::before(address, Limit::Each(BYTES_PER_SECOND))?;
        // A 200 is sent for as long as its denial travels.
        case.target.surplus = if response == "200" { 0.02 } else { 0.001 };
        case.measure(1, scratch, table)?;
    }
    Ok(())
}

impl Images {
    fn make(root: &Path) -> Outcome<Self> {
        Ok(Images {
            gigabyte: Layered::make(root, "gigabyte", 1, 1, 1024 * MIB)?,
            quarter: Layered::make(root, "quarter", 2, 1, 256 * MIB)?,
            unwilling: Layered::make(root, "unwilling", 3, 1, 128 * MIB)?,
            three: Layered::make(root, "three", 4, 3, 128 * MIB)?,
            ten: Layered::make(root, "ten", 7, 10, 64 * MIB)?,
            small: Layered::make(root, "small", 17, 10, MIB)?,
        })
    }

    fn all(&self) -> [&Layered; 6] {
        let Images {
            gigabyte,
            quarter,
            unwilling,
            three,
            ten,
            small,
        } = self;
        [gigabyte, quarter, unwilling, three, ten, small]
    }
}

impl Origin {
    fn start(scratch: &Path, root: &Path, images: &Images) -> Outcome<Self> {
        let manifests = images.all().map(|image| (image.tag, &*image.manifest));
        let mut sites = String::from("access_log off;");
        let mut add = |blob_options| -> Outcome<SocketAddr> {
            let address = free_address()?;
            sites.push_str(&site(
                root,
                &manifests,
                &format!("listen {address};"),
                blob_options,
            ));
            Ok(address)
        };
        let ranges = add("")?;
        let unwilling = [
            ("200", add("max_ranges 0;")?),
            ("416", add("if ($http_range) { return 416; }")?),
            ("429", add("if ($http_range) { return 429; }")?),
        ];
        Ok(Origin {
            ranges,
            unwilling,
            _running: start_nginx(&scratch.join("origin"), &sites, ranges)?,
        })
    }
}

impl Origin {
    /// Each connection limited, and 206 to ranges.
    fn case<'c>(&self, what: &str, image: &'c Layered, client: Client, seconds: Target) -> Outcome<Case<'c>> {
        Ok(Case {
            what: format!("cold, {what}"),
            line: Distance::before(self.ranges, Limit::Each(BYTES_PER_SECOND))?,
            image,
            client,
            target: Targets {
                seconds,
                surplus: 0.001,
                ..Targets::default()
            },
        })
    }
}

/// One GET for each layer, all at once: the first on the connection of the manifest, as dockerd and containerd do.
fn layers(endpoint: &Endpoint, image: &Layered) -> Outcome<Timed> {
    let mut kept = after_manifest(endpoint, image)?;
    let mut layers = image.layers.iter().map(|layer| blob(layer));
    let first = layers.next().ok_or("an image without a layer")?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let others: Vec<_> = layers
            .map(|path| scope.spawn(move || timed(&mut endpoint.connect()?, &path)))
            .collect();
        let first = timed(&mut kept, &first)?;
        for other in others {
            other.join().map_err(|_| "a client panicked")??;
        }
        Ok(Timed {
            total: began.elapsed(),
            ..first
        })
    })
}

impl Case<'_> {
    fn measure(&self, rounds: usize, scratch: &Path, table: &mut Table) -> Outcome<()> {
        let row = |name: &str| Row::new(format!("{}: {name}", self.what), Better::Lower);
        let (mut total, mut first) = (row("s, against direct"), row("first byte, ms"));
        let (mut bytes, mut connections) = (
            row("upstream bytes beyond the images, MiB"),
            row("upstream connections"),
        );
        let mut peak = row("peak memory, MiB");
        let mib = self.image.bytes() as f64 / MIB as f64;
        for _ in 0..rounds {
            let (a, b) = (self.through(scratch)?, self.directly()?);
            total.round(a.timed.total.as_secs_f64(), b.timed.total.as_secs_f64());
            let [ours, theirs] = [&a, &b].map(|pull| pull.timed.first_byte.as_secs_f64() * 1e3);
            first.round(ours, theirs);
            bytes.alone(a.passed.bytes as f64 / MIB as f64 - mib);
            connections.round(a.passed.connections as f64, b.passed.connections as f64);
            peak.alone(a.peak_mib);
        }
        let target = &self.target;
        let rows = [
            total.target(target.seconds),
            first.target(target.first_byte_ms),
            bytes.target(Target::AtMost(target.surplus * mib)),
            connections,
            peak.target(target.peak_mib),
        ];
        for row in rows {
            table.add(row);
        }
        Ok(())
    }

    fn directly(&self) -> Outcome<Pull> {
        let before = self.line.passed();
        let timed = (self.client)(&Endpoint::plain(self.line.address), self.image)?;
        std::thread::sleep(SETTLE);
        Ok(Pull {
            timed,
            passed: self.line.passed().since(before),
            peak_mib: 0.0,
        })
    }

    /// The bytes of the upstream include what the cache still fetches after the client has all: a later client needs it.
    fn through(&self, scratch: &Path) -> Outcome<Pull> {
        let before = self.line.passed();
        let cache = Kind::Ifnewer.start(scratch, self.line.address)?;
        let timed = (self.client)(&cache.endpoint, self.image).map_err(|e| format!("{}: {e}", self.what))?;
        let peak_mib = cache.peak_memory_mib()?;
        for layer in &self.image.layers {
            expect_digest(&cache.endpoint, &blob(layer), layer)?;
        }
        std::thread::sleep(SETTLE);
        Ok(Pull {
            timed,
            passed: self.line.passed().since(before),
            peak_mib,
        })
    }
}
