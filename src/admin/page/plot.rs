//! Plots of the last hour and day: bytes sent to clients and fetched from upstreams.

use maud::{Markup, html};

use super::super::format::bytes;
use super::super::status::Point;

const WIDTH: u64 = 720;
const HEIGHT: u64 = 96;

pub(super) fn section(hour: &[Point], day: &[Point]) -> Markup {
    html! {
        section #plots data-live.pair aria-label="The last hour and day" {
            (figure("Last hour", hour))
            (figure("Last day", day))
        }
    }
}

fn figure(name: &str, points: &[Point]) -> Markup {
    let sent: u64 = points.iter().map(|point| point.counted.sent_bytes).sum();
    let fetched: u64 = points.iter().map(|point| point.counted.fetched_bytes).sum();
    let pulls: u64 = points.iter().map(|point| point.counted.pulls).sum();
    let stale: u64 = points.iter().map(|point| point.counted.served_stale).sum();
    let words = format!(
        "{name}: {pulls} pulls, {} sent to clients, {} fetched from upstreams, {stale} served stale",
        bytes(sent),
        bytes(fetched)
    );
    html! {
        figure {
            figcaption {
                strong { (name) }
                span.dim { (pulls) " pulls · " (bytes(sent)) " sent · " (bytes(fetched)) " fetched" @if stale > 0 { " · " (stale) " stale" } }
            }
            (drawing(points, &words))
            p.legend aria-hidden="true" { span.key.cache { "from the cache" } span.key.fetch { "from upstreams" } span.key.stale { "pulls served stale" } }
        }
    }
}

/// One bar per interval: bytes from upstreams below, bytes from the cache above, and a dot for pulls served stale.
fn drawing(points: &[Point], words: &str) -> Markup {
    let tallest = points
        .iter()
        .map(|point| point.counted.sent_bytes.max(point.counted.fetched_bytes))
        .max()
        .unwrap_or(0)
        .max(1);
    let count = u64::try_from(points.len()).unwrap_or(1).max(1);
    let step = WIDTH / count;
    let tall = |value: u64| {
        // Values above zero stay visible.
        let height =
            u64::try_from(u128::from(value) * u128::from(HEIGHT) / u128::from(tallest)).unwrap_or(HEIGHT);
        if value > 0 { height.max(2) } else { 0 }
    };
    html! {
        svg viewBox=(format!("0 0 {} {}", step * count, HEIGHT + 10)) role="img" aria-label=(words) preserveAspectRatio="none" {
            line.axis x1="0" y1=(HEIGHT + 9) x2=(step * count) y2=(HEIGHT + 9) {}
            @for (index, point) in (0_u64..).zip(points) {
                @let fetched = tall(point.counted.fetched_bytes);
                @let sent = tall(point.counted.sent_bytes).max(fetched);
                @let x = index * step;
                @if sent > fetched { rect.cache x=(x) y=(HEIGHT + 8 - sent) width=(step - 1) height=(sent - fetched) rx="1" {} }
                @if fetched > 0 { rect.fetch x=(x) y=(HEIGHT + 8 - fetched) width=(step - 1) height=(fetched) rx="1" {} }
                @if point.counted.served_stale > 0 { rect.stale x=(x) y="0" width=(step - 1) height="5" rx="1" {} }
            }
        }
    }
}
