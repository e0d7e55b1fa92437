//! Upstreams section of the page.

use std::time::Duration;

use maud::{Markup, html};

use super::super::format::duration;
use super::super::upstreams::UpstreamView;
use super::ago;

/// State of each upstream.
pub(super) fn section(upstreams: &[UpstreamView]) -> Markup {
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
            }
        }
    }
}
