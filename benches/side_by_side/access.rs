//! Cost of authorization: the same cached blob, served by one process for an upstream with `auth = "per-client"` and
//! for one with `auth = "shared"`. The pairs differ in nothing else. A small blob shows it best; a large one is the
//! real use.

use crate::client::stream;
use crate::connection::Scheme;
use crate::content::{Content, blob, manifest_by_tag};
use crate::servers::{SHARED, Sites};
use crate::table::{Better, Row, Table};
use crate::wrk::wrk;
use crate::{CLIENTS, Outcome, Plan, client};

/// Sent to both. Only one checks it.
const CREDENTIAL: &str = "Authorization: Basic YWxpY2U6YS1zZWNyZXQ=";

pub(crate) fn access(plan: &Plan, sites: &Sites, content: &Content, table: &mut Table) -> Outcome<()> {
    let at = |path: &str, upstream: &str| format!("{path}?ns={upstream}");
    let [proven, shared] = ["docker.io", SHARED];
    let image = &content.image;
    // Cached and recorded in both repositories.
    for upstream in [proven, shared] {
        client::expect_digest(
            &sites.ifnewer.plain,
            &at(&manifest_by_tag(image.tag), upstream),
            &image.manifest,
        )?;
        for digest in [&image.config, &image.layer] {
            client::expect_digest(&sites.ifnewer.plain, &at(&blob(digest), upstream), digest)?;
        }
    }
    let small = blob(&image.config);
    for connections in [1, CLIENTS] {
        let what = format!("warm blob of 80 B, {connections} conn., proven beside shared");
        let mut time = Row::new(format!("{what}: µs each"), Better::Lower);
        let mut cost = Row::new(format!("{what}: CPU µs each"), Better::Lower).target_difference(3.0);
        for _ in 0..plan.rounds {
            let [a, b] = [proven, shared].map(|upstream| {
                wrk(
                    &sites.ifnewer,
                    &at(&small, upstream),
                    &[CREDENTIAL],
                    connections,
                    plan.window,
                )
            });
            let (a, b) = (a?, b?);
            time.round(a.seconds * 1e6 / a.requests, b.seconds * 1e6 / b.requests);
            cost.round(a.cpu_seconds * 1e6 / a.requests, b.cpu_seconds * 1e6 / b.requests);
        }
        table.add(time);
        table.add(cost);
    }
    let mut economy = Row::new(
        "warm 300 MiB, plain, 8 conn., proven beside shared: GB per CPU s".to_owned(),
        Better::Higher,
    )
    .target_ratio(0.95);
    for _ in 0..plan.rounds {
        let [a, b] = [proven, shared].map(|upstream| {
            let path = at(&blob(&image.layer), upstream);
            stream(&sites.ifnewer, Scheme::Plain, &path, 8, plan.window)
        });
        let (a, b) = (a?, b?);
        economy.round(a.gigabytes / a.cpu_seconds, b.gigabytes / b.cpu_seconds);
    }
    table.add(economy);
    Ok(())
}
