//! Commands that print information: `ls`, `show`, `why` and `log`.

use std::time::Duration;

use serde_json::{Value, json};

use super::table::Table;
use super::{CommandError, Log, Ls, Output, Show, Sort, Style, Why, list, number, text};
use crate::admin::client::Client;
use crate::admin::format::{bytes, duration, short_digest};
use crate::oci::percent;

/// Page size of image lists.
const PAGE: usize = 1_000;

pub(super) async fn ls(client: &Client, args: &Ls, output: &mut Output<'_>) -> Result<(), CommandError> {
    let filter = percent::query_value(args.filter.as_deref().unwrap_or_default());
    let sort = match args.sort {
        Sort::Name => "name",
        Sort::Size => "size",
        Sort::Confirmed => "confirmed",
    };
    let (mut images, mut offset, mut total) = (Vec::new(), 0, 0);
    loop {
        let path = format!("/api/v1/images?filter={filter}&sort={sort}&limit={PAGE}&offset={offset}");
        let page = client.get(&path).await?;
        images.extend(list(&page, "images").iter().cloned());
        total = number(&page, "total").max(total);
        match page.get("next").and_then(Value::as_u64) {
            Some(next) => offset = next,
            None => break,
        }
    }
    if args.json {
        return output.json(&json!({ "images": images, "total": total }));
    }
    let heads = [
        "image",
        "digest",
        "state",
        ">size",
        ">unique",
        "confirmed",
        "policy",
        "refresh",
    ];
    // Without a refreshed image, the last column would be empty.
    let is_refreshed = images
        .iter()
        .any(|image| image.get("refresh").is_some_and(Value::is_object));
    let shown = heads.len() - usize::from(!is_refreshed);
    let mut table = Table::new(heads.get(..shown).unwrap_or_default());
    for image in &images {
        let is_complete = image.get("complete").and_then(Value::as_bool).unwrap_or_default();
        table.row(vec![
            text(image, "image").to_owned(),
            short_digest(text(image, "digest")),
            state(is_complete, image),
            bytes(number(image, "bytes")),
            bytes(number(image, "unique_bytes")),
            confirmed(image),
            text(image, "policy").to_owned(),
            refresh(image),
        ]);
    }
    print(&table, output)?;
    if images.is_empty() {
        output.line(&output.paint(Style::Dim, "no image is cached"))?;
    }
    Ok(())
}

/// The next scheduled refresh of an image, or why there is none.
fn refresh(image: &Value) -> String {
    let Some(refresh) = image.get("refresh").filter(|refresh| refresh.is_object()) else {
        return "-".to_owned();
    };
    match (text(refresh, "state"), text(refresh, "next_at")) {
        // 2026-11-29T04:03:16Z: the time of day, or the date if it is another.
        ("planned", at) => match at.split_once('T') {
            Some((_, time)) if number(refresh, "every_seconds") <= 86_400 => time.to_owned(),
            _ => at.to_owned(),
        },
        ("paused", _) => text(refresh, "paused_by").to_owned(),
        (state, _) => state.to_owned(),
    }
}

fn refresh_sentence(image: &Value) -> &str {
    match image.get("refresh").map(|refresh| text(refresh, "sentence")) {
        None | Some("") => "off",
        Some(sentence) => sentence,
    }
}

pub(super) async fn show(client: &Client, args: &Show, output: &mut Output<'_>) -> Result<(), CommandError> {
    let path = format!("/api/v1/image?image={}", percent::query_value(&args.image));
    let image = client.get(&path).await?;
    if args.json {
        return output.json(&image);
    }
    output.line(&output.paint(Style::Bold, text(&image, "image")))?;
    let is_complete = image.get("complete").and_then(Value::as_bool).unwrap_or_default();
    let state = if is_complete {
        output.paint(Style::Success, "complete: it can be pulled without the upstream")
    } else {
        output.paint(Style::Warning, "incomplete: layers must still be fetched")
    };
    let confirmed = match text(&image, "confirmed_at") {
        "" => confirmed(&image),
        at => format!("{at} ({})", confirmed(&image)),
    };
    let fresh = match text(&image, "fresh_until") {
        "" => "no: it is revalidated at the next pull".to_owned(),
        until => format!("until {until}"),
    };
    let pulled = match text(&image, "last_pulled_at") {
        "" => "-",
        at => at,
    };
    let size = format!(
        "{}, {} unique",
        bytes(number(&image, "bytes")),
        bytes(number(&image, "unique_bytes"))
    );
    let readers = match (text(&image, "public_since"), number(&image, "grants")) {
        ("", grants) => format!("{grants} credentials authorized by the upstream"),
        (since, grants) => format!("public, confirmed at {since}; {grants} credentials"),
    };
    for (name, value) in [
        ("digest", text(&image, "digest").to_owned()),
        ("cached", state),
        ("size", size),
        ("confirmed", confirmed),
        ("fresh", fresh),
        ("pulled", pulled.to_owned()),
        (
            "policy",
            format!("{}, by {}", text(&image, "policy"), text(&image, "rule")),
        ),
        ("refresh", refresh_sentence(&image).to_owned()),
        ("readers", readers),
    ] {
        output.line(&format!("  {name:<10} {value}"))?;
    }
    match text(&image, "cooling") {
        "" => {}
        cooling => output.line(&format!("  {:<10} {cooling}", "cooling"))?,
    }
    if image.get("blocked").and_then(Value::as_bool).unwrap_or_default() {
        let state = output.paint(Style::Error, "not served; see `ifnewer blocks`");
        output.line(&format!("  {:<10} {state}", "blocked"))?;
    }
    show_earlier_digests(&image, output)?;
    output.line("")?;
    let mut table = Table::new(&["part", "digest", "platform", ">size", "cached", ">shared with"]);
    for part in list(&image, "contents") {
        let is_cached = part.get("cached").and_then(Value::as_bool).unwrap_or_default();
        table.row(vec![
            text(part, "role").to_owned(),
            short_digest(text(part, "digest")),
            text(part, "platform").to_owned(),
            bytes(number(part, "bytes")),
            if is_cached { "yes" } else { "no" }.to_owned(),
            number(part, "shared_with").to_string(),
        ]);
    }
    print(&table, output)
}

/// The last complete digest of the tag, and the digests that it named before.
fn show_earlier_digests(image: &Value, output: &mut Output<'_>) -> Result<(), CommandError> {
    let previous = list(image, "variants")
        .iter()
        .filter_map(|variant| variant.get("previous"))
        .find(|one| one.is_object());
    if let Some(previous) = previous {
        let at = previous
            .get("confirmed_at")
            .and_then(Value::as_str)
            .unwrap_or("never");
        let digest = text(previous, "digest");
        output.line(&format!(
            "  {:<10} {} (the last complete one, confirmed {at})",
            "previous",
            short_digest(digest)
        ))?;
    }
    for past in list(image, "history") {
        output.line(&format!(
            "  {:<10} {} from {} to {}",
            "history",
            short_digest(text(past, "digest")),
            text(past, "first_seen_at"),
            text(past, "confirmed_at"),
        ))?;
    }
    Ok(())
}

pub(super) async fn why(client: &Client, args: &Why, output: &mut Output<'_>) -> Result<(), CommandError> {
    let mut body = json!({ "image": args.image });
    args.credential.write_to(&mut body)?;
    let why = client.post("/api/v1/why", &body).await?;
    if args.json {
        return output.json(&why);
    }
    output.line(&format!(
        "{}: {}",
        output.paint(Style::Bold, text(&why, "image")),
        text(&why, "sentence")
    ))?;
    output.line(&output.paint(Style::Dim, "because"))?;
    for line in list(&why, "because").iter().filter_map(Value::as_str) {
        output.line(&format!("  - {line}"))?;
    }
    if !list(&why, "what_if").is_empty() {
        output.line(&output.paint(Style::Dim, "then, if the upstream returns"))?;
        for case in list(&why, "what_if") {
            output.line(&format!(
                "  {:<16} {}",
                text(case, "upstream_response"),
                text(case, "client_gets")
            ))?;
        }
    }
    Ok(())
}

pub(super) async fn log(client: &Client, args: &Log, output: &mut Output<'_>) -> Result<(), CommandError> {
    let image = percent::query_value(args.image.as_deref().unwrap_or_default());
    let events = client
        .get(&format!("/api/v1/events?limit={}&image={image}", args.limit))
        .await?;
    if args.json {
        return output.json(&events);
    }
    for event in list(&events, "events").iter().rev() {
        let style = match text(event, "result") {
            "hit" | "collapsed" => Style::Success,
            "stale" => Style::Warning,
            "denied" => Style::Error,
            _ => Style::Bold,
        };
        let name = match text(event, "image").split_once('@') {
            Some((name, digest)) => format!("{name}@{}", short_digest(digest)),
            None => text(event, "image").to_owned(),
        };
        let at = text(event, "time")
            .replace('T', " ")
            .chars()
            .take(19)
            .collect::<String>();
        output.line(&format!(
            "{}  {}  {}/{name}  {}",
            output.paint(Style::Dim, &at),
            output.paint(style, &format!("{:<9}", text(event, "result"))),
            text(event, "upstream"),
            text(event, "sentence"),
        ))?;
    }
    Ok(())
}

pub(super) fn print(table: &Table, output: &mut Output<'_>) -> Result<(), CommandError> {
    for (place, line) in table.lines().iter().enumerate() {
        let line = if place == 0 {
            output.paint(Style::Dim, line)
        } else {
            line.clone()
        };
        output.line(&line)?;
    }
    Ok(())
}

fn state(is_complete: bool, image: &Value) -> String {
    let flag = |name: &str| image.get(name).and_then(Value::as_bool).unwrap_or_default();
    let mut state = if is_complete { "complete" } else { "incomplete" }.to_owned();
    for (name, word) in [("pinned", ", pinned"), ("blocked", ", blocked")] {
        if flag(name) {
            state.push_str(word);
        }
    }
    if !text(image, "cooling").is_empty() {
        state.push_str(", cooling");
    }
    state
}

fn confirmed(image: &Value) -> String {
    let seconds = image.get("confirmed_seconds_ago").and_then(Value::as_u64);
    seconds.map_or_else(|| "never (imported)".to_owned(), ago)
}

pub(super) fn ago(seconds: u64) -> String {
    match seconds {
        0 => "now".to_owned(),
        seconds => format!("{} ago", duration(Duration::from_secs(seconds))),
    }
}
