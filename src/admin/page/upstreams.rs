//! Upstreams section of the page.

use std::time::Duration;

use maud::{Markup, html};

use super::super::format::{bytes, duration};
use super::super::shared::SharedView;
use super::super::upstreams::UpstreamView;
use super::ago;

/// State of each upstream, and of the shared storage.
pub(super) fn section(upstreams: &[UpstreamView], shared: Option<&SharedView>) -> Markup {
    let until = |at: Option<&str>| {
        let hour = at.and_then(|at| at.get(11..16));
        hour.map(|hour| format!(", reset by {hour} UTC"))
            .unwrap_or_default()
    };
    html! {
        section #upstreams aria-labelledby="upstreams-title" {
            h2 #upstreams-title { "Upstreams" }
            ul.rows #upstreams-list data-live {
                @for upstream in upstreams {
                    li {
                        div {
                            strong { (upstream.name) }
                            @if let Some(head) = &upstream.last_head {
                                div.dim { "last request " (ago(head.seconds_ago)) ": " (head.ms) " ms, as " (upstream.identity) }
                            }
                            @for limit in &upstream.rate_limits {
                                @if let Some(left) = limit.remaining {
                                    div.dim { (limit.credential) ": " (left) " pulls left" (until(limit.resets_at.as_deref())) }
                                }
                            }
                            @for failure in upstream.failures.iter().filter(|failure| failure.open_seconds.is_some()) {
                                div.dim { "circuit breaker open: " (failure.scope) ", " (failure.cause) }
                            }
                            @for quirk in &upstream.quirks { div.dim { "quirk: " (quirk) } }
                        }
                        div.end {
                            @match (&upstream.unavailable, &upstream.last_failure) {
                                (Some(failure), _) => {
                                    span.mark.stale { "unavailable" }
                                    div.dim { (failure.cause) ", for " (duration(Duration::from_secs(failure.seconds))) }
                                    @if let Some(detail) = &failure.detail { div.dim { (detail) } }
                                }
                                (None, Some(last)) => {
                                    span.mark.hit { "available" }
                                    div.dim { "last failure " (ago(last.seconds)) ": " (last.cause) }
                                    @if let Some(detail) = &last.detail { div.dim { (detail) } }
                                }
                                (None, None) => { span.mark.local { "no failures" } }
                            }
                        }
                    }
                }
                @if let Some(shared) = shared { (shared_storage(shared)) }
            }
        }
    }
}

fn shared_storage(shared: &SharedView) -> Markup {
    let counts = &shared.since_start;
    html! {
        li {
            div {
                strong { "Shared storage" }
                div.dim { (shared.name) @if !shared.write { ", read only" } }
                div.dim { (counts.objects_read) " objects read, " (bytes(counts.received_bytes)) }
                @if shared.write {
                    div.dim {
                        (counts.objects_uploaded) " written, " (bytes(counts.sent_bytes))
                        @if shared.uploads_waiting > 0 { ", " (shared.uploads_waiting) " waiting" }
                        @if counts.uploads_lost > 0 { ", " (counts.uploads_lost) " lost" }
                    }
                }
                @if let Some(waiting) = &shared.revocations_waiting {
                    div.dim {
                        (waiting.count) " denials not in the bucket, the oldest for " (duration(Duration::from_secs(waiting.oldest_seconds)))
                    }
                }
                @if counts.wrong_objects > 0 { div.dim { (counts.wrong_objects) " objects with wrong bytes" } }
            }
            div.end {
                @match (&shared.reads_stopped, &shared.writes_stopped) {
                    (Some(stopped), _) => {
                        span.mark.stale { "unavailable" }
                        div.dim { (stopped.failure) ", for " (duration(Duration::from_secs(stopped.seconds))) }
                    }
                    (None, Some(stopped)) => {
                        span.mark.stale { "accepts no uploads" }
                        div.dim { (stopped.failure) ", for " (duration(Duration::from_secs(stopped.seconds))) }
                    }
                    (None, None) => { span.mark.hit { "available" } }
                }
            }
        }
    }
}
