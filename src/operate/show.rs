//! The commands that ask once and print.

use std::time::Duration;

use serde_json::{Value, json};

use super::table::Table;
use super::{
    Failed, Log, Ls, Offline, OnOff, Output, Pin, Refresh, Rm, Show, Sort, Stats, Tone, Why, escaped, list,
    number, text,
};
use crate::admin::client::Client;
use crate::admin::words::{bytes, duration, short};

/// Images asked for at a time.
const PAGE: usize = 1_000;

pub(super) async fn ls(client: &Client, words: &Ls, output: &mut Output<'_>) -> Result<(), Failed> {
    let filter = escaped(words.filter.as_deref().unwrap_or_default());
    let sort = match words.sort {
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
    if words.json {
        return output.json(&json!({ "images": images, "total": total }));
    }
    let mut table = Table::new(&[
        "image",
        "digest",
        "state",
        ">size",
        ">its own",
        "confirmed",
        "policy",
    ]);
    for image in &images {
        let is_whole = image.get("whole").and_then(Value::as_bool).unwrap_or_default();
        table.row(vec![
            text(image, "image").to_owned(),
            short(text(image, "digest")),
            state(is_whole, image).to_owned(),
            bytes(number(image, "bytes")),
            bytes(number(image, "unique_bytes")),
            confirmed(image),
            text(image, "policy").to_owned(),
        ]);
    }
    print(&table, output)?;
    if images.is_empty() {
        output.line(&output.paint(Tone::Dim, "no image is held"))?;
    }
    Ok(())
}

pub(super) async fn show(client: &Client, words: &Show, output: &mut Output<'_>) -> Result<(), Failed> {
    let image = client
        .get(&format!("/api/v1/image?image={}", escaped(&words.image)))
        .await?;
    if words.json {
        return output.json(&image);
    }
    output.line(&output.paint(Tone::Strong, text(&image, "image")))?;
    let is_whole = image.get("whole").and_then(Value::as_bool).unwrap_or_default();
    let state = if is_whole {
        output.paint(Tone::Good, "whole: it can be pulled without the upstream")
    } else {
        output.paint(Tone::Warm, "in part: the rest must still be fetched")
    };
    let confirmed = match text(&image, "confirmed_at") {
        "" => confirmed(&image),
        at => format!("{at} ({})", confirmed(&image)),
    };
    let fresh = match text(&image, "fresh_until") {
        "" => "no: it is asked about at the next pull".to_owned(),
        until => format!("until {until}"),
    };
    let pulled = match text(&image, "last_pulled_at") {
        "" => "-",
        at => at,
    };
    let size = format!(
        "{}, {} its own",
        bytes(number(&image, "bytes")),
        bytes(number(&image, "unique_bytes"))
    );
    let readers = match (text(&image, "public_since"), number(&image, "grants")) {
        ("", grants) => format!("{grants} credentials have been let in by the upstream"),
        (since, grants) => format!("anyone, proven at {since}; {grants} credentials besides"),
    };
    for (name, value) in [
        ("digest", text(&image, "digest").to_owned()),
        ("held", state),
        ("size", size),
        ("confirmed", confirmed),
        ("fresh", fresh),
        ("pulled", pulled.to_owned()),
        (
            "policy",
            format!("{}, by {}", text(&image, "policy"), text(&image, "rule")),
        ),
        ("readers", readers),
    ] {
        output.line(&format!("  {name:<10} {value}"))?;
    }
    let earlier = list(&image, "variants")
        .iter()
        .filter_map(|variant| variant.get("earlier"))
        .find(|one| one.is_object());
    if let Some(earlier) = earlier {
        let at = earlier
            .get("confirmed_at")
            .and_then(Value::as_str)
            .unwrap_or("never");
        let digest = text(earlier, "digest");
        output.line(&format!(
            "  {:<10} {} (the last whole one, confirmed {at})",
            "before",
            short(digest)
        ))?;
    }
    for past in list(&image, "history") {
        output.line(&format!(
            "  {:<10} {} from {} to {}",
            "named",
            short(text(past, "digest")),
            text(past, "first_seen_at"),
            text(past, "confirmed_at"),
        ))?;
    }
    output.line("")?;
    let mut table = Table::new(&["part", "digest", "platform", ">size", "held", ">shared with"]);
    for part in list(&image, "parts") {
        let is_held = part.get("held").and_then(Value::as_bool).unwrap_or_default();
        table.row(vec![
            text(part, "role").to_owned(),
            short(text(part, "digest")),
            text(part, "platform").to_owned(),
            bytes(number(part, "bytes")),
            if is_held { "yes" } else { "no" }.to_owned(),
            number(part, "shared_with").to_string(),
        ]);
    }
    print(&table, output)
}

pub(super) async fn why(client: &Client, words: &Why, output: &mut Output<'_>) -> Result<(), Failed> {
    let mut body = json!({ "image": words.image });
    words.login.add_to(&mut body)?;
    let why = client.post("/api/v1/why", &body).await?;
    if words.json {
        return output.json(&why);
    }
    output.line(&format!(
        "{}: {}",
        output.paint(Tone::Strong, text(&why, "image")),
        text(&why, "sentence")
    ))?;
    output.line(&output.paint(Tone::Dim, "because"))?;
    for line in list(&why, "because").iter().filter_map(Value::as_str) {
        output.line(&format!("  - {line}"))?;
    }
    if !list(&why, "then").is_empty() {
        output.line(&output.paint(Tone::Dim, "then, if the upstream says"))?;
        for case in list(&why, "then") {
            output.line(&format!(
                "  {:<16} {}",
                text(case, "upstream_says"),
                text(case, "client_gets")
            ))?;
        }
    }
    Ok(())
}

pub(super) async fn stats(client: &Client, words: &Stats, output: &mut Output<'_>) -> Result<(), Failed> {
    let status = client.get("/api/v1/status").await?;
    let upstreams = client.get("/api/v1/upstreams").await?;
    let clients = client.get("/api/v1/clients").await?;
    if words.json {
        return output.json(&json!({
            "status": status,
            "upstreams": upstreams.get("upstreams"),
            "clients": clients.get("clients"),
        }));
    }
    let is_healthy = status.get("healthy").and_then(Value::as_bool).unwrap_or_default();
    let tone = if is_healthy { Tone::Good } else { Tone::Warm };
    output.line(&output.paint(tone, text(&status, "verdict")))?;
    for problem in list(&status, "problems")
        .iter()
        .filter(|_| list(&status, "problems").len() > 1)
        .filter_map(Value::as_str)
    {
        output.line(&output.paint(Tone::Warm, problem))?;
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
        ("served while silent", "served_while_silent"),
        ("refused", "refused"),
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
        "holding {} of {} in {} tags, {} blobs; up {}",
        bytes(number(&store, "bytes")),
        bytes(number(&store, "size")),
        number(&store, "tags"),
        number(&store, "blobs"),
        duration(Duration::from_secs(number(&status, "uptime_seconds"))),
    ))?;
    output.line("")?;
    print(&upstream_table(&upstreams), output)?;
    output.line("")?;
    let mut table = Table::new(&["client", "where", "last seen", ">pulls", "last image"]);
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

fn upstream_table(upstreams: &Value) -> Table {
    let mut table = Table::new(&[
        "upstream",
        "state",
        "last asked",
        "as",
        "last trouble",
        "quota left",
    ]);
    for upstream in list(upstreams, "upstreams") {
        let silence = |name: &str| upstream.get(name).filter(|one| one.is_object());
        let state = match silence("silent") {
            Some(silent) => format!(
                "silent for {}",
                duration(Duration::from_secs(number(silent, "seconds")))
            ),
            None => "ok".to_owned(),
        };
        let trouble = silence("last_silence").map_or_else(
            || "-".to_owned(),
            |last| format!("{}, {}", text(last, "cause"), ago(number(last, "seconds"))),
        );
        let quotas: Vec<String> = list(upstream, "rate_limits")
            .iter()
            .filter_map(|limit| {
                let left = limit.get("remaining").and_then(Value::as_u64)?;
                let reset = text(limit, "resets_at").get(11..16);
                let until = reset.map_or_else(String::new, |hour| format!(", all by {hour} UTC"));
                Some(format!("{}: {left}{until}", text(limit, "credential")))
            })
            .collect();
        let quotas = if quotas.is_empty() {
            "-".to_owned()
        } else {
            quotas.join(", ")
        };
        let asked = silence("last_head").map_or_else(
            || "-".to_owned(),
            |head| format!("{}, {} ms", ago(number(head, "seconds_ago")), number(head, "ms")),
        );
        table.row(vec![
            text(upstream, "name").to_owned(),
            state,
            asked,
            text(upstream, "identity").to_owned(),
            trouble,
            quotas,
        ]);
    }
    table
}

pub(super) async fn log(client: &Client, words: &Log, output: &mut Output<'_>) -> Result<(), Failed> {
    let image = escaped(words.image.as_deref().unwrap_or_default());
    let events = client
        .get(&format!("/api/v1/events?limit={}&image={image}", words.limit))
        .await?;
    if words.json {
        return output.json(&events);
    }
    for event in list(&events, "events").iter().rev() {
        let tone = match text(event, "outcome") {
            "hit" | "coalesced" => Tone::Good,
            "stale" => Tone::Warm,
            "refused" => Tone::Bad,
            _ => Tone::Strong,
        };
        let name = match text(event, "image").split_once('@') {
            Some((name, digest)) => format!("{name}@{}", short(digest)),
            None => text(event, "image").to_owned(),
        };
        let at = text(event, "time")
            .replace('T', " ")
            .chars()
            .take(19)
            .collect::<String>();
        output.line(&format!(
            "{}  {}  {}/{name}  {}",
            output.paint(Tone::Dim, &at),
            output.paint(tone, &format!("{:<9}", text(event, "outcome"))),
            text(event, "upstream"),
            text(event, "sentence"),
        ))?;
    }
    Ok(())
}

pub(super) async fn refresh(client: &Client, words: &Refresh, output: &mut Output<'_>) -> Result<(), Failed> {
    let mut undone = 0;
    for image in &words.images {
        let mut body = json!({ "image": image });
        words.login.add_to(&mut body)?;
        let refreshed = client.post("/api/v1/refresh", &body).await?;
        let result = text(&refreshed, "result");
        let is_done = matches!(result, "unchanged" | "newer");
        undone += usize::from(!is_done);
        if words.json {
            output.json_line(&refreshed)?;
            continue;
        }
        let tone = if is_done { Tone::Good } else { Tone::Warm };
        let (name, sentence) = (text(&refreshed, "image"), text(&refreshed, "sentence"));
        output.line(&format!("{name}: {}", output.paint(tone, sentence)))?;
    }
    if undone > 0 {
        return Err(Failed::Undone(format!(
            "{undone} of {} could not be refreshed",
            words.images.len()
        )));
    }
    Ok(())
}

pub(super) async fn rm(client: &Client, words: &Rm, output: &mut Output<'_>) -> Result<(), Failed> {
    for image in &words.images {
        let path = format!(
            "/api/v1/images?image={}&all_tags={}&dry_run={}",
            escaped(image),
            words.all_tags,
            !words.yes
        );
        let freed = client.delete(&path).await?;
        if words.json {
            output.json_line(&freed)?;
            continue;
        }
        let (tags, blobs) = (number(&freed, "tags"), number(&freed, "blobs"));
        let (deed, size) = (
            if words.yes { "removed" } else { "would remove" },
            bytes(number(&freed, "bytes_freed")),
        );
        for name in list(&freed, "images").iter().filter_map(Value::as_str) {
            output.line(&format!("{deed} {name}"))?;
        }
        output.line(&format!(
            "{} in {tags} tags and {blobs} blobs",
            output.paint(Tone::Strong, &size)
        ))?;
    }
    if !words.yes && !words.json {
        output.line(&output.paint(Tone::Dim, "nothing was removed; add --yes to do it"))?;
    }
    Ok(())
}

pub(super) async fn pin(
    client: &Client,
    words: &Pin,
    pinned: bool,
    output: &mut Output<'_>,
) -> Result<(), Failed> {
    for image in &words.images {
        let body = json!({ "image": image, "pinned": pinned });
        let answer = client.post("/api/v1/pins", &body).await?;
        if words.json {
            output.json_line(&answer)?;
            continue;
        }
        let was = answer.get("was").and_then(Value::as_bool).unwrap_or_default();
        let state = match (pinned, was) {
            (true, false) => "pinned",
            (true, true) => "was pinned already",
            (false, true) => "unpinned",
            (false, false) => "was not pinned",
        };
        output.line(&format!("{} {state}", text(&answer, "image")))?;
    }
    Ok(())
}

pub(super) async fn offline(client: &Client, words: &Offline, output: &mut Output<'_>) -> Result<(), Failed> {
    let answer = match words.state {
        None => client.get("/api/v1/offline").await?,
        Some(state) => {
            let body = json!({ "offline": state == OnOff::On });
            client.post("/api/v1/offline", &body).await?
        }
    };
    if words.json {
        return output.json(&answer);
    }
    let is_on = answer.get("offline").and_then(Value::as_bool).unwrap_or_default();
    output.line(if is_on {
        "offline: no upstream is asked; what is held is served"
    } else {
        "online: upstreams are asked as the rules say"
    })
}

fn print(table: &Table, output: &mut Output<'_>) -> Result<(), Failed> {
    for (place, line) in table.lines().iter().enumerate() {
        let line = if place == 0 {
            output.paint(Tone::Dim, line)
        } else {
            line.clone()
        };
        output.line(&line)?;
    }
    Ok(())
}

fn state(is_whole: bool, image: &Value) -> &'static str {
    let is_pinned = image.get("pinned").and_then(Value::as_bool).unwrap_or_default();
    match (is_whole, is_pinned) {
        (true, false) => "whole",
        (true, true) => "whole, pinned",
        (false, false) => "part",
        (false, true) => "part, pinned",
    }
}

fn confirmed(image: &Value) -> String {
    let seconds = image.get("confirmed_seconds_ago").and_then(Value::as_u64);
    seconds.map_or_else(|| "never (imported)".to_owned(), ago)
}

fn ago(seconds: u64) -> String {
    match seconds {
        0 => "now".to_owned(),
        seconds => format!("{} ago", duration(Duration::from_secs(seconds))),
    }
}
