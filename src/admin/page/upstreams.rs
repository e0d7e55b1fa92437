//! Upstreams section of the page.

use std::time::Duration;

use maud::{Markup, html};
use serde_json::Value;

use super::super::format::duration;
use super::ago;

/// State of each upstream.
pub(super) fn section(listed: &Value) -> Markup {
    let upstreams = listed.get("upstreams").and_then(Value::as_array);
    let text = |value: &Value, name: &str| {
        value
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64).unwrap_or_default();
    let seconds = |value: &Value| number(value, "seconds");
    let until = |at: &str| {
        let hour = at.get(11..16).map(|hour| format!(", reset by {hour} UTC"));
        hour.unwrap_or_default()
    };
    html! {
        section #upstreams aria-labelledby="upstreams-title" {
            h2 #upstreams-title { "Upstreams" }
            ul.rows #upstreams-list data-live {
                @for upstream in upstreams.into_iter().flatten() {
                    @let unavailable = upstream.get("unavailable").filter(|failure| !failure.is_null());
                    @let last = upstream.get("last_failure").filter(|last| !last.is_null());
                    li {
                        div {
                            strong { (text(upstream, "name")) }
                            @if let Some(head) = upstream.get("last_head").filter(|head| head.is_object()) {
                                div.dim { "last request " (ago(number(head, "seconds_ago"))) ": " (number(head, "ms")) " ms, as " (text(upstream, "identity")) }
                            }
                            @for limit in upstream.get("rate_limits").and_then(Value::as_array).into_iter().flatten() {
                                @if let Some(left) = limit.get("remaining").and_then(Value::as_u64) {
                                    div.dim { (text(limit, "credential")) ": " (left) " pulls left" (until(&text(limit, "resets_at"))) }
                                }
                            }
                            @for failure in upstream.get("failures").and_then(Value::as_array).into_iter().flatten() {
                                @if failure.get("open_seconds").is_some_and(Value::is_u64) {
                                    div.dim { "circuit breaker open: " (text(failure, "scope")) ", " (text(failure, "cause")) }
                                }
                            }
                            @for quirk in upstream.get("quirks").and_then(Value::as_array).into_iter().flatten() {
                                @if let Some(quirk) = quirk.as_str() { div.dim { "quirk: " (quirk) } }
                            }
                        }
                        div.end {
                            @match (unavailable, last) {
                                (Some(failure), _) => {
                                    span.mark.stale { "unavailable" }
                                    div.dim { (text(failure, "cause")) ", for " (duration(Duration::from_secs(seconds(failure)))) }
                                    @if let Some(detail) = failure.get("detail").and_then(Value::as_str) { div.dim { (detail) } }
                                }
                                (None, Some(last)) => {
                                    span.mark.hit { "available" }
                                    div.dim { "last failure " (ago(seconds(last))) ": " (text(last, "cause")) }
                                    @if let Some(detail) = last.get("detail").and_then(Value::as_str) { div.dim { (detail) } }
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
