//! Commands about verdicts: `block`, `unblock`, `blocks` and `approve`.

use serde_json::{Value, json};

use super::changes::Changes;
use super::inspect::print;
use super::table::Table;
use super::{Approve, Blocks, CommandError, Output, Style, Unblock, Verdict, list, text};
use crate::admin::client::Client;
use crate::cli::user_name;

pub(super) async fn block(
    client: &Client,
    args: &Verdict,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let changes = Changes::new(&args.images, args.json);
    let request = async |image: &str| {
        let body = json!({ "image": image, "blocked": true, "by": user_name(), "reason": args.reason });
        client.post("/api/v1/blocks", &body).await
    };
    let describe = |answer: &Value, output: &Output<'_>| {
        let state = if flag(answer, "was") {
            "was blocked already; the reason is updated"
        } else {
            "blocked"
        };
        let line = format!("{} {state}", text(answer, "image"));
        let images: Vec<_> = list(answer, "images").iter().filter_map(Value::as_str).collect();
        if images.is_empty() {
            return line;
        }
        let hint = "it lists images that are still served by their own digests; block them too:";
        let hint = output.paint(Style::Warning, hint);
        format!("{line}\n{hint}\nifnewer block {}", images.join(" "))
    };
    let failed = changes.send(output, request, describe).await?;
    changes.finish(failed, None)
}

pub(super) async fn unblock(
    client: &Client,
    args: &Unblock,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let changes = Changes::new(&args.images, args.json);
    let request = async |image: &str| {
        let body = json!({ "image": image, "blocked": false, "by": user_name() });
        client.post("/api/v1/blocks", &body).await
    };
    let mut still_blocked = 0;
    let describe = |answer: &Value, output: &Output<'_>| {
        let is_blocked = flag(answer, "still_blocked");
        still_blocked += usize::from(is_blocked);
        let state = match (flag(answer, "was"), is_blocked) {
            (true, false) => "unblocked",
            (false, false) => "was not blocked",
            (_, true) => "is still blocked in every repository; take that back by its digest alone",
        };
        let style = if is_blocked {
            Style::Warning
        } else {
            Style::Success
        };
        format!("{} {}", text(answer, "image"), output.paint(style, state))
    };
    let failed = changes.send(output, request, describe).await?;
    changes.finish(failed, Some((still_blocked, "are still blocked")))
}

pub(super) async fn approve(
    client: &Client,
    args: &Approve,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let Approve { verdict, undo } = args;
    let changes = Changes::new(&verdict.images, verdict.json);
    let request = async |image: &str| {
        let body = json!({ "image": image, "approved": !undo, "by": user_name(), "reason": verdict.reason });
        client.post("/api/v1/approvals", &body).await
    };
    let mut unmet = 0;
    let describe = |answer: &Value, output: &Output<'_>| {
        let name = text(answer, "image");
        let was = flag(answer, "was");
        let is_unmet = flag(answer, if *undo { "still_approved" } else { "still_blocked" });
        unmet += usize::from(is_unmet);
        match (*undo, was, is_unmet) {
            (false, _, _) => {
                let state = if was { "was approved already" } else { "approved" };
                let but = if is_unmet {
                    output.paint(Style::Warning, ", but it is blocked and not served")
                } else {
                    String::new()
                };
                format!("{name} {state}{but}")
            }
            (true, _, true) => {
                let state = "is still approved in every repository; take that back by its digest alone";
                format!("{name} {}", output.paint(Style::Warning, state))
            }
            (true, true, false) => format!("{name} is no longer approved"),
            (true, false, false) => format!("{name} was not approved"),
        }
    };
    let failed = changes.send(output, request, describe).await?;
    let what = if *undo {
        "are still approved"
    } else {
        "are blocked; `ifnewer unblock` takes that back"
    };
    changes.finish(failed, Some((unmet, what)))
}

pub(super) async fn blocks(
    client: &Client,
    args: &Blocks,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let blocks = client.get("/api/v1/blocks").await?;
    let approvals = client.get("/api/v1/approvals").await?;
    let (blocks, approvals) = (list(&blocks, "blocks"), list(&approvals, "approvals"));
    if args.json {
        return output.json(&json!({ "blocks": blocks, "approvals": approvals }));
    }
    let mut table = Table::new(&["state", "digest", "repository", "at", "by", "reason"]);
    let states = blocks.iter().map(|one| ("blocked", one));
    for (state, verdict) in states.chain(approvals.iter().map(|one| ("approved", one))) {
        let repository = match (text(verdict, "upstream"), text(verdict, "repository")) {
            ("", _) => "every repository".to_owned(),
            (upstream, repository) => format!("{upstream}/{repository}"),
        };
        table.row(vec![
            state.to_owned(),
            text(verdict, "digest").to_owned(),
            repository,
            text(verdict, "at").to_owned(),
            text(verdict, "by").to_owned(),
            text(verdict, "reason").to_owned(),
        ]);
    }
    print(&table, output)?;
    if blocks.is_empty() && approvals.is_empty() {
        output.line(&output.paint(Style::Dim, "no digest is blocked or approved"))?;
    }
    Ok(())
}

fn flag(answer: &Value, name: &str) -> bool {
    answer.get(name).and_then(Value::as_bool).unwrap_or_default()
}
