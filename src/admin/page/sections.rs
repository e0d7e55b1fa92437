//! Sections of the page. A section that updates itself has `data-live` and an id.

use maud::{Markup, html};

use super::super::events::{ClientView, Event};
use super::super::format::{bytes, duration, short_digest};
use super::super::images::Image;
use super::super::pull_jobs::{LayerState, PullView, State};
use super::super::refreshes::RefreshesStatus;
use super::super::status::{Counters, Quota, Status};
use super::super::transfers::TransferView;
use super::{PageQuery, RemovalPreview, ago};
use std::time::Duration;

pub(super) fn header(status: &Status, secret: &str) -> Markup {
    let mood = if status.healthy { "well" } else { "strained" };
    html! {
        header {
            div.bar {
                h1 { a href="/" { img src="/icon.svg" alt="" width="28" height="28"; "ifnewer" } }
                nav aria-label="On this page" {
                    a href="#decisions" { "Decisions" }
                    a href="#images" { "Images" }
                    a href="#verdicts" { "Blocks" }
                    a href="#upstreams" { "Upstreams" }
                    a href="#clients" { "Clients" }
                    a href="#setup" { "Set up" }
                }
                form.switch method="post" action="/act" {
                    input type="hidden" name="secret" value=(secret);
                    @if status.offline {
                        button.warm name="action" value="online" { "Go online" }
                    } @else {
                        button.quiet name="action" value="offline" title="Send no upstream requests; serve cached images" { "Go offline" }
                    }
                }
            }
            div #summary data-live class=(format!("summary {mood}")) role="status" {
                span.dot aria-hidden="true" {}
                p { strong { (status.summary) } }
                @if status.problems.len() > 1 {
                    ul { @for problem in &status.problems { li { (problem) } } }
                }
            }
        }
    }
}

pub(super) fn numbers(status: &Status) -> Markup {
    let Counters {
        saved_bytes,
        served_stale,
        pulls,
        sent_bytes,
        ..
    } = &status.since_start;
    html! {
        section #numbers data-live aria-label="In numbers" {
            dl.numbers {
                div {
                    dt { "Byte hit ratio, 24 h" }
                    dd {
                        @match status.last_day.byte_hit_ratio {
                            Some(ratio) => { (format!("{:.0}", ratio * 100.0)) span.unit { " %" } }
                            None => { "–" }
                        }
                    }
                    dd.note { (bytes(status.last_day.sent_bytes)) " sent, " (bytes(status.last_day.fetched_bytes)) " fetched" }
                }
                div {
                    dt { "Bytes saved" }
                    dd { (sized(*saved_bytes)) }
                    dd.note { "of " (bytes(*sent_bytes)) " sent since the start" }
                }
                div {
                    dt { "Served stale" }
                    dd { (served_stale) }
                    dd.note { "of " (pulls) " pulls since the start" }
                }
                div { (quota(status.quota.as_ref())) }
            }
            @if status.refreshes.tags + status.refreshes.unused + status.refreshes.private > 0 {
                p.store { (refreshes(&status.refreshes)) }
            }
            p.store {
                "Cached: " strong { (bytes(status.store.bytes)) } " of " (bytes(status.store.size)) " in "
                (status.store.tags) " tags, " (status.store.manifests) " manifests and " (status.store.blobs) " blobs."
                " " meter min="0" max=(status.store.size) value=(status.store.bytes) aria-label="Store used" {}
            }
        }
    }
}

/// One line about scheduled refreshes.
fn refreshes(refreshes: &RefreshesStatus) -> Markup {
    let count = |result: &str| refreshes.results.get(result).copied().unwrap_or_default();
    html! {
        "Refreshed in the background: " strong { (refreshes.tags) } " tags"
        @if refreshes.unused > 0 { ", " (refreshes.unused) " not in use" }
        @if refreshes.private > 0 { ", " (refreshes.private) " private" }
        ". Moved since the start: " (count("new-digest")) "."
        @if refreshes.longer_by > 1 { " Too many tags: intervals are " (refreshes.longer_by) " times as long." }
        @for paused in &refreshes.paused { " Paused at " (paused.upstream) ": " (paused.reason) "." }
    }
}

fn quota(quota: Option<&Quota>) -> Markup {
    html! {
        dt { "Quota left" }
        @match quota {
            Some(quota) => {
                dd {
                    (quota.remaining)
                    @if let Some(limit) = quota.limit { span.unit { " of " (limit) } }
                }
                dd.note {
                    (quota.upstream) ", " (quota.credential)
                    @if let Some(window) = quota.window_seconds { ", per " (duration(Duration::from_secs(window))) }
                    ", " (ago(quota.seconds_ago))
                }
            }
            None => { dd { "–" } dd.note { "no upstream has reported a quota" } }
        }
    }
}

/// A size, with its unit in small type.
fn sized(size: u64) -> Markup {
    let words = bytes(size);
    let (number, unit) = words.split_once(' ').unwrap_or((&words, ""));
    html! { (number) span.unit { " " (unit) } }
}

pub(super) fn transfers(transfers: &[TransferView], pulls: &[PullView]) -> Markup {
    let pulls: Vec<&PullView> = pulls.iter().take(5).collect();
    let is_busy = !transfers.is_empty()
        || pulls
            .iter()
            .any(|pull| matches!(pull.state, State::Waiting | State::Fetching));
    html! {
        section #transfers data-live data-busy[is_busy] aria-label="Transfers" {
            @if is_busy || !pulls.is_empty() {
                h2 { "Transfers" }
            }
            @for pull in pulls {
                div.transfer {
                    (pulled(pull))
                }
            }
            @for transfer in transfers {
                div.transfer {
                    span.name { code { (short_digest(&transfer.digest)) } }
                    @match transfer.size {
                        Some(size) => { progress max=(size) value=(transfer.received) aria-label="Received" {} }
                        None => { progress aria-label="Received" {} }
                    }
                    span.fact {
                        @if transfer.queued { "queued · " }
                        (bytes(transfer.received))
                        @if let Some(size) = transfer.size { " of " (bytes(size)) }
                        " · " (bytes(transfer.bytes_per_second)) "/s · "
                        (transfer.readers) @if transfer.readers == 1 { " client" } @else { " clients" }
                    }
                }
            }
        }
    }
}

fn pulled(pull: &PullView) -> Markup {
    let all: u64 = pull.layers.iter().filter_map(|layer| layer.size).sum();
    let received: u64 = pull.layers.iter().map(|layer| layer.received).sum();
    let cached = pull
        .layers
        .iter()
        .filter(|layer| layer.state == LayerState::Cached)
        .count();
    html! {
        span.name { (wrappable(&pull.image)) }
        @match pull.state {
            State::Waiting => { progress aria-label="Pulled" {} span.fact { "queued" } }
            State::Fetching => {
                @if all > 0 { progress max=(all) value=(received) aria-label="Pulled" {} } @else { progress aria-label="Pulled" {} }
                span.fact { (bytes(received)) " of " (bytes(all)) }
            }
            State::Done => { span.good { "pulled" } span.fact { (pull.layers.len()) " layers, " (cached) " already cached" } }
            State::Failed => { span.bad { "failed" } span.fact { (pull.error.as_deref().unwrap_or("see the log")) } }
        }
    }
}

pub(super) fn decisions(events: &[Event], shown: &PageQuery) -> Markup {
    html! {
        section #decisions aria-labelledby="decisions-title" {
            div.title {
                h2 #decisions-title { "Decisions" }
                form.search method="get" action="/#decisions" role="search" aria-label="Decisions" {
                    @if !shown.images.is_empty() { input type="hidden" name="images" value=(shown.images); }
                    input type="search" name="decisions" value=(shown.decisions) placeholder="image" aria-label="Decisions about an image";
                    button.quiet { "Find" }
                }
            }
            div #decisions-list data-live {
                @if events.is_empty() {
                    p.empty { "Nothing has been pulled yet. " a href="#setup" { "Set up a client" } "." }
                } @else {
                    table {
                        thead { tr { th scope="col" { "When" } th scope="col" { "Image" } th scope="col" { "Result and reason" } th.wide scope="col" { "Client" } th.end scope="col" { "Time" } } }
                        tbody {
                            @for event in events {
                                tr {
                                    td.when data-label="When" { time datetime=(event.time) title=(event.time) { (clock(&event.time)) } }
                                    td data-label="Image" { (image_name(&event.upstream, &event.image)) }
                                    td data-label="Result and reason" {
                                        span class=(format!("mark {}", event.result)) { (event.result) } " "
                                        (event.sentence)
                                    }
                                    td.wide.dim data-label="Client" { (event.client.as_deref().unwrap_or("–")) " " (program(&event.user_agent)) }
                                    td.end.dim data-label="Time" { (format!("{:.0} ms", event.ms)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The time of day of an RFC 3339 time.
fn clock(at: &str) -> &str {
    at.get(11..19).unwrap_or(at)
}

/// The first product of a user agent.
fn program(agent: &str) -> &str {
    agent.split(' ').next().unwrap_or(agent)
}

/// The name of an image, with a shortened digest.
fn image_name(upstream: &str, image: &str) -> Markup {
    let (name, digest) = match image.split_once('@') {
        Some((name, digest)) => (name, Some(short_digest(digest))),
        None => (image, None),
    };
    html! {
        span.image {
            span.upstream { (wrappable(upstream)) "/" } wbr; (wrappable(name))
            @if let Some(digest) = digest { wbr; span.dim { "@" (digest) } }
        }
    }
}

/// A name that wraps after `/` and before `:` and `@` only.
fn wrappable(name: &str) -> Markup {
    let parts = name.split_inclusive('/').map(|part| {
        let at = part.find([':', '@']).unwrap_or(part.len());
        part.split_at(at)
    });
    html! {
        @for (index, (word, rest)) in parts.enumerate() {
            @if index > 0 { wbr; }
            (word)
            @if !rest.is_empty() { wbr; (rest) }
        }
    }
}

pub(super) fn images(
    (images, total): &(Vec<Image>, usize),
    shown: &PageQuery,
    limit: usize,
    secret: &str,
) -> Markup {
    html! {
        section #images aria-labelledby="images-title" {
            div.title {
                h2 #images-title { "Images " span.count { (total) } }
                form.search method="get" action="/#images" role="search" aria-label="Images" {
                    @if !shown.decisions.is_empty() { input type="hidden" name="decisions" value=(shown.decisions); }
                    input type="search" name="images" value=(shown.images) placeholder="name" aria-label="Images by name";
                    button.quiet { "Find" }
                }
            }
            form.act method="post" action="/act" {
                input type="hidden" name="secret" value=(secret);
                label { "Pull in advance" input type="text" name="image" placeholder="docker.io/library/alpine:3.20" required; }
                button name="action" value="pull" { "Pull" }
            }
            div #images-list data-live {
                @if images.is_empty() {
                    p.empty { @if shown.images.is_empty() { "No image is cached yet." } @else { "No cached image matches." } }
                } @else {
                    table {
                        thead { tr { th scope="col" { "Image" } th scope="col" { "State" } th.end scope="col" { "Size" } th.wide scope="col" { "Confirmed" } th.wide scope="col" { "Policy" } th scope="col" { span.hidden { "Actions" } } } }
                        tbody { @for image in images { (row(image, secret)) } }
                    }
                    (pages(shown, limit, *total))
                }
            }
        }
    }
}

fn row(image: &Image, secret: &str) -> Markup {
    html! {
        tr {
            td data-label="Image" {
                span.image { span.upstream { (wrappable(&image.upstream)) "/" } wbr; (wrappable(&image.repository)) wbr; ":" strong { (image.tag) } }
                div.dim {
                    code title=(image.digest) { (short_digest(&image.digest)) }
                    @for platform in &image.platforms { " · " (platform) }
                }
            }
            td data-label="State" {
                @if image.complete { span.mark.hit { "complete" } } @else { span.mark.stale title="Some layers must still be fetched" { "incomplete" } }
                @if image.fresh_until.is_some() { " " span.mark.local { "fresh" } }
                @if image.pinned { " " span.mark.local { "pinned" } }
                @if let Some(refresh) = &image.refresh {
                    " " span.mark.local title=(refresh.sentence) { "refreshed" @if refresh.state != "planned" { ": " (refresh.paused_by.unwrap_or(refresh.state)) } }
                }
                @if image.blocked { " " span.mark.denied { "blocked" } }
                @if let Some(cooling) = &image.cooling { " " span.mark.stale title=(cooling) { "cooling" } }
            }
            td.end data-label="Size" { (bytes(image.bytes)) div.dim { (bytes(image.unique_bytes)) " unique" } }
            td.wide data-label="Confirmed" {
                @match (&image.confirmed_at, image.confirmed_seconds_ago) {
                    (Some(at), Some(seconds)) => time datetime=(at) title=(at) { (ago(seconds)) },
                    _ => "never (imported)",
                }
            }
            td.wide data-label="Policy" { (image.policy) div.dim { (image.rule) } }
            td.actions {
                form method="post" action="/act" {
                    input type="hidden" name="secret" value=(secret);
                    input type="hidden" name="image" value=(image.name);
                    button.quiet name="action" value="refresh" aria-label=(format!("Refresh {}", image.name)) { "Refresh" }
                    " "
                    @if image.pinned {
                        button.quiet name="action" value="unpin" aria-label=(format!("Unpin {}", image.name)) { "Unpin" }
                    } @else {
                        button.quiet name="action" value="pin" aria-label=(format!("Pin {}", image.name)) { "Pin" }
                    }
                }
                @if !image.blocked {
                    form method="post" action="/act" {
                        input type="hidden" name="secret" value=(secret);
                        input type="hidden" name="image" value=(format!("{}/{}@{}", image.upstream, image.repository, image.digest));
                        button.quiet name="action" value="block" title="Never serve this digest" aria-label=(format!("Block {}", image.name)) { "Block" }
                    }
                }
                @if !image.pinned {
                    form method="get" action="/" {
                        button.quiet name="remove" value=(image.name) aria-label=(format!("Remove {}", image.name)) { "Remove" }
                    }
                }
            }
        }
    }
}

fn pages(shown: &PageQuery, limit: usize, total: usize) -> Markup {
    let page = |from: usize, words: &str| {
        let mut query = vec![format!("from={from}")];
        if !shown.images.is_empty() {
            query.push(format!("images={}", escaped(&shown.images)));
        }
        html! { a href=(format!("/?{}#images", query.join("&"))) { (words) } }
    };
    let from = shown.from.unwrap_or_default();
    let next = from.saturating_add(limit);
    html! {
        @if total > limit {
            p.pages {
                @if from > 0 { (page(from.saturating_sub(limit), "Previous")) " " }
                (from.saturating_add(1)) "–" (next.min(total)) " of " (total) " "
                @if next < total { (page(next, "Next")) }
            }
        }
    }
}

/// Percent-encodes a query value.
fn escaped(text: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'/' | b':');
    text.bytes()
        .map(|c| {
            if plain(c) {
                char::from(c).to_string()
            } else {
                format!("%{c:02X}")
            }
        })
        .collect()
}

pub(super) fn confirm(trial: &RemovalPreview, secret: &str) -> Markup {
    html! {
        section.confirm role="alertdialog" aria-labelledby="confirm-title" aria-describedby="confirm-text" {
            h2 #confirm-title { "Remove " (wrappable(&trial.image)) "?" }
            p #confirm-text {
                @if trial.tags == 0 { "It is not cached." } @else {
                    "This frees " strong { (bytes(trial.bytes)) } " in " (trial.blobs) " blobs that no other image uses. "
                    "The next pull fetches it again."
                }
            }
            form method="post" action="/act" {
                input type="hidden" name="secret" value=(secret);
                input type="hidden" name="image" value=(trial.image);
                @if trial.tags > 0 { button.warm name="action" value="remove" autofocus { "Remove" } }
                a.button.quiet href="/#images" { "Cancel" }
            }
        }
    }
}

pub(super) fn clients(seen: &[ClientView]) -> Markup {
    html! {
        section #clients aria-labelledby="clients-title" {
            h2 #clients-title { "Clients seen" }
            div #clients-list data-live {
                @if seen.is_empty() { p.empty { "None yet. " a href="#setup" { "Set one up" } "." } }
                ul.rows {
                    @for client in seen.iter().take(20) {
                        li {
                            div {
                                strong { (client.kind) } " on " (client.address)
                                div.dim title=(client.agent) { (program(&client.agent)) @if let Some(image) = &client.last_image { ", last " (wrappable(image)) } }
                            }
                            div.end { (ago(client.seconds_ago)) div.dim { (client.pulls) " pulls" } }
                        }
                    }
                }
            }
        }
    }
}

pub(super) fn footer(status: &Status) -> Markup {
    html! {
        footer {
            p {
                "ifnewer " (status.version) ", up " (duration(Duration::from_secs(status.uptime_seconds))) ". "
                a href="/api/openapi.json" { "API" } " · " a href="/metrics" { "Metrics" } " · " a href="/readyz" { "Readiness" }
            }
        }
    }
}
