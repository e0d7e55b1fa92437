//! Blocked and approved digests: the list, and the form that gives and takes back verdicts.

use maud::{Markup, html};

use super::super::Admin;
use super::super::format::short_digest;
use super::super::response::Problem;
use super::super::verdicts::{Motive, VerdictView, list};
use crate::server::ServingState;
use crate::store::verdicts::VerdictKind;

/// Verdicts of a kind that the page shows; `ifnewer blocks` lists all.
const VERDICTS_SHOWN: usize = 100;

/// Images of a blocked index that a notice names; `ifnewer block` names all.
const IMAGES_SHOWN: usize = 32;

/// The section. Reads memory only.
pub(super) fn section(registry: &ServingState, secret: &str) -> Markup {
    let (blocks, approvals) = (
        list(registry, VerdictKind::Blocked, VERDICTS_SHOWN),
        list(registry, VerdictKind::Approved, VERDICTS_SHOWN),
    );
    html! {
        section #verdicts aria-labelledby="verdicts-title" {
            h2 #verdicts-title { "Blocked and approved digests " span.count { (blocks.total + approvals.total) } }
            form.act method="post" action="/act" {
                input type="hidden" name="secret" value=(secret);
                label { "Digest" input type="text" name="image" placeholder="docker.io/library/alpine@sha256:… or sha256:…" required; }
                label { "Reason" input type="text" name="reason" placeholder="CVE-2026-1234"; }
                button.warm name="action" value="block" title="Never serve it, also in an outage and offline" { "Block" }
                " "
                button name="action" value="approve" title="Serve it although it is younger than min_age" { "Approve" }
            }
            div #verdicts-list data-live {
                @if blocks.total == 0 && approvals.total == 0 {
                    p.empty { "No digest is blocked or approved." }
                } @else {
                    table {
                        thead { tr { th scope="col" { "Digest" } th scope="col" { "State" } th scope="col" { "By" } th.wide scope="col" { "Reason" } th scope="col" { span.hidden { "Actions" } } } }
                        tbody {
                            @for block in &blocks.verdicts { (row(block, "blocked", ("unblock", "Unblock"), secret)) }
                            @for approval in &approvals.verdicts { (row(approval, "approved", ("disapprove", "Take back"), secret)) }
                        }
                    }
                    @if blocks.total > VERDICTS_SHOWN || approvals.total > VERDICTS_SHOWN {
                        p.dim { "More are listed by " code { "ifnewer blocks" } "." }
                    }
                }
            }
        }
    }
}

fn row(verdict: &VerdictView, state: &str, (action, label): (&str, &str), secret: &str) -> Markup {
    let mark = if state == "blocked" {
        "mark denied"
    } else {
        "mark local"
    };
    let place = match (&verdict.upstream, &verdict.repository) {
        (Some(upstream), Some(repository)) => format!("{upstream}/{repository}"),
        _ => "every repository".to_owned(),
    };
    html! {
        tr {
            td data-label="Digest" { code title=(verdict.digest) { (short_digest(&verdict.digest)) } div.dim { (place) } }
            td data-label="State" { span class=(mark) { (state) } }
            td data-label="By" { (verdict.by) div.dim { time datetime=(verdict.at) { (verdict.at) } } }
            td.wide data-label="Reason" { (verdict.reason.as_deref().unwrap_or("–")) }
            td.actions {
                form method="post" action="/act" {
                    input type="hidden" name="secret" value=(secret);
                    input type="hidden" name="image" value=(verdict.image);
                    button.quiet name="action" value=(action) aria-label=(format!("{label} {}", verdict.image)) { (label) }
                }
            }
        }
    }
}

/// Executes a form action. Returns the notice.
pub(super) async fn submit(
    admin: &Admin,
    action: &str,
    image: &str,
    reason: Option<&str>,
) -> Result<String, Problem> {
    let motive = Motive {
        by: Some("the admin page".to_owned()),
        reason: reason.map(str::to_owned),
    };
    let change = match action {
        "block" => (VerdictKind::Blocked, true),
        "unblock" => (VerdictKind::Blocked, false),
        "approve" => (VerdictKind::Approved, true),
        _ => (VerdictKind::Approved, false),
    };
    let changed = admin.set_verdict(change, image.trim(), motive).await?;
    let name = &changed.image;
    Ok(match change {
        (VerdictKind::Blocked, true) => {
            let left = images_left(&changed.images);
            format!("{name} is blocked: it is not served until that is taken back.{left}")
        }
        (VerdictKind::Blocked, false) if changed.is_blocked => {
            format!("{name} is still blocked in every repository.")
        }
        (VerdictKind::Blocked, false) => format!("{name} is no longer blocked."),
        (VerdictKind::Approved, true) if changed.is_blocked => {
            format!("{name} is approved, but it is blocked and not served.")
        }
        (VerdictKind::Approved, true) => format!("{name} is approved: it is served before it is old enough."),
        (VerdictKind::Approved, false) if changed.is_approved => {
            format!("{name} is still approved in every repository.")
        }
        (VerdictKind::Approved, false) => format!("{name} is no longer approved."),
    })
}

/// The images that a blocked index lists and that are still served; empty if there are none.
fn images_left(images: &[String]) -> String {
    if images.is_empty() {
        return String::new();
    }
    let shown: Vec<_> = images.iter().take(IMAGES_SHOWN).map(String::as_str).collect();
    let more = match images.len().saturating_sub(IMAGES_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more, which `ifnewer block` lists"),
    };
    format!(
        " It lists images that are still served by their own digests; block them too: {}{more}.",
        shown.join(", ")
    )
}
