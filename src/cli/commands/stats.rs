//! `ifnewer stats`: health, savings, upstreams and clients.

use std::time::Duration;

use serde_json::{Value, json};

use super::inspect::{ago, print};
use super::table::Table;
use super::{CommandError, Output, Stats, Style, list, number, text};
use crate::admin::client::Client;
use crate::admin::format::{bytes, duration};

pub(super) async fn stats(
    client: &Client,
    args: &Stats,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let status = client.get("/api/v1/status").await?;
    let upstreams = client.get("/api/v1/upstreams").await?;
    let shared = client.get("/api/v1/shared").await?;
    let clients = client.get("/api/v1/clients").await?;
    if args.json {
        return output.json(&json!({
            "status": status,
            "upstreams": upstreams.get("upstreams"),
            "shared": shared.get("storage"),
            "clients": clients.get("clients"),
        }));
    }
    let is_healthy = status.get("healthy").and_then(Value::as_bool).unwrap_or_default();
    let style = if is_healthy {
        Style::Success
    } else {
        Style::Warning
    };
    output.line(&output.paint(style, text(&status, "summary")))?;
    for problem in list(&status, "problems")
        .iter()
        .filter(|_| list(&status, "problems").len() > 1)
        .filter_map(Value::as_str)
    {
        output.line(&output.paint(Style::Warning, problem))?;
    }
    let part = |name: &str| status.get(name).cloned().unwrap_or_default();
    let (start, day, store) = (part("since_start"), part("last_day"), part("store"));
    let ratio = |counted: &Value| match counted.get("byte_hit_ratio").and_then(Value::as_f64) {
        Some(ratio) => format!("{:.0} %", ratio * 100.0),
        None => "-".to_owned(),
    };
    output.line("")?;
    let mut table = Table::new(&["", ">last day", ">since the start"]);
    for (name, field) in [
        ("pulls", "pulls"),
        ("served stale", "served_stale"),
        ("denied", "denied"),
    ] {
        table.row(vec![
            name.to_owned(),
            number(&day, field).to_string(),
            number(&start, field).to_string(),
        ]);
    }
    for (name, field) in [
        ("bytes sent", "sent_bytes"),
        ("bytes fetched", "fetched_bytes"),
        ("bytes saved", "saved_bytes"),
    ] {
        table.row(vec![
            name.to_owned(),
            bytes(number(&day, field)),
            bytes(number(&start, field)),
        ]);
    }
    table.row(vec!["byte hit ratio".to_owned(), ratio(&day), ratio(&start)]);
    print(&table, output)?;
    output.line("")?;
    output.line(&format!(
        "{} of {} used by {} tags and {} blobs; up {}",
        bytes(number(&store, "bytes")),
        bytes(number(&store, "size")),
        number(&store, "tags"),
        number(&store, "blobs"),
        duration(Duration::from_secs(number(&status, "uptime_seconds"))),
    ))?;
    output.line("")?;
    print(&upstream_table(&upstreams), output)?;
    if let Some(shared) = shared.get("storage").filter(|shared| shared.is_object()) {
        output.line("")?;
        output.line(&shared_line(shared))?;
    }
    output.line("")?;
    let mut table = Table::new(&["client", "address", "last seen", ">pulls", "last image"]);
    for client in list(&clients, "clients") {
        table.row(vec![
            text(client, "kind").to_owned(),
            text(client, "address").to_owned(),
            ago(number(client, "seconds_ago")),
            number(client, "pulls").to_string(),
            text(client, "last_image").to_owned(),
        ]);
    }
    print(&table, output)
}

fn shared_line(shared: &Value) -> String {
    let counts = shared.get("since_start").cloned().unwrap_or_default();
    let stopped = ["reads", "writes"].into_iter().find_map(|kind| {
        let stopped = shared
            .get(format!("{kind}_stopped"))
            .filter(|one| one.is_object())?;
        let since = duration(Duration::from_secs(number(stopped, "seconds")));
        Some(format!(
            "{kind} stopped for {since}, {}",
            text(stopped, "failure")
        ))
    });
    let denials = shared.get("revocations_waiting").filter(|one| one.is_object());
    let denials = denials.map(|denials| {
        let since = duration(Duration::from_secs(number(denials, "oldest_seconds")));
        format!(
            "; {} denials not in the bucket, the oldest for {since}",
            number(denials, "count")
        )
    });
    format!(
        "shared storage {}: {}; {} objects read ({}), {} written ({}), {} waiting{}",
        text(shared, "name"),
        stopped.as_deref().unwrap_or("ok"),
        number(&counts, "objects_read"),
        bytes(number(&counts, "received_bytes")),
        number(&counts, "objects_uploaded"),
        bytes(number(&counts, "sent_bytes")),
        number(shared, "uploads_waiting"),
        denials.unwrap_or_default(),
    )
}

fn upstream_table(upstreams: &Value) -> Table {
    let mut table = Table::new(&[
        "upstream",
        "state",
        "last request",
        "as",
        "last failure",
        "rate limit left",
    ]);
    for upstream in list(upstreams, "upstreams") {
        let object = |name: &str| upstream.get(name).filter(|one| one.is_object());
        let state = match object("unavailable") {
            Some(failure) => format!(
                "unavailable for {}",
                duration(Duration::from_secs(number(failure, "seconds")))
            ),
            None => "ok".to_owned(),
        };
        let last_failure = object("last_failure").map_or_else(
            || "-".to_owned(),
            |last| format!("{}, {}", text(last, "cause"), ago(number(last, "seconds"))),
        );
        let quotas: Vec<String> = list(upstream, "rate_limits")
            .iter()
            .filter_map(|limit| {
                let left = limit.get("remaining").and_then(Value::as_u64)?;
                let reset = text(limit, "resets_at").get(11..16);
                let until = reset.map_or_else(String::new, |hour| format!(", reset by {hour} UTC"));
                Some(format!("{}: {left}{until}", text(limit, "credential")))
            })
            .collect();
        let quotas = if quotas.is_empty() {
            "-".to_owned()
        } else {
            quotas.join(", ")
        };
        let last_request = object("last_head").map_or_else(
            || "-".to_owned(),
            |head| format!("{}, {} ms", ago(number(head, "seconds_ago")), number(head, "ms")),
        );
        table.row(vec![
            text(upstream, "name").to_owned(),
            state,
            last_request,
            text(upstream, "identity").to_owned(),
            last_failure,
            quotas,
        ]);
    }
    table
}
