//! Commands about verdicts: `block`, `unblock`, `blocks` and `approve`.

use serde_json::{Value, json};

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
    for image in &args.images {
        let body = json!({ "image": image, "blocked": true, "by": user_name(), "reason": args.reason });
        let answer = client.post("/api/v1/blocks", &body).await?;
        if args.json {
            output.json_line(&answer)?;
            continue;
        }
        let state = if flag(&answer, "was") {
            "was blocked already; the reason is updated"
        } else {
            "blocked"
        };
        output.line(&format!("{} {state}", text(&answer, "image")))?;
        let images: Vec<_> = list(&answer, "images").iter().filter_map(Value::as_str).collect();
        if !images.is_empty() {
            let hint = "it lists images that are still served by their own digests; block them too:";
            output.line(&output.paint(Style::Warning, hint))?;
            output.line(&format!("ifnewer block {}", images.join(" ")))?;
        }
    }
    Ok(())
}

pub(super) async fn unblock(
    client: &Client,
    args: &Unblock,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let mut still_blocked = 0;
    for image in &args.images {
        let body = json!({ "image": image, "blocked": false, "by": user_name() });
        let answer = client.post("/api/v1/blocks", &body).await?;
        let is_blocked = flag(&answer, "still_blocked");
        still_blocked += usize::from(is_blocked);
        if args.json {
            output.json_line(&answer)?;
            continue;
        }
        let name = text(&answer, "image");
        let state = match (flag(&answer, "was"), is_blocked) {
            (true, false) => "unblocked",
            (false, false) => "was not blocked",
            (_, true) => "is still blocked in every repository; take that back by its digest alone",
        };
        let style = if is_blocked {
            Style::Warning
        } else {
            Style::Success
        };
        output.line(&format!("{name} {}", output.paint(style, state)))?;
    }
    if still_blocked > 0 {
        return Err(CommandError::Incomplete(format!(
            "{still_blocked} of {} are still blocked",
            args.images.len()
        )));
    }
    Ok(())
}

pub(super) async fn approve(
    client: &Client,
    args: &Approve,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let Approve { verdict, undo } = args;
    let mut blocked = 0;
    for image in &verdict.images {
        let body = json!({ "image": image, "approved": !undo, "by": user_name(), "reason": verdict.reason });
        let answer = client.post("/api/v1/approvals", &body).await?;
        let is_blocked = !undo && flag(&answer, "still_blocked");
        blocked += usize::from(is_blocked);
        if verdict.json {
            output.json_line(&answer)?;
            continue;
        }
        let state = match (*undo, flag(&answer, "was")) {
            (false, false) => "approved",
            (false, true) => "was approved already",
            (true, true) => "is no longer approved",
            (true, false) => "was not approved",
        };
        let but = if is_blocked {
            output.paint(Style::Warning, ", but it is blocked and not served")
        } else {
            String::new()
        };
        output.line(&format!("{} {state}{but}", text(&answer, "image")))?;
    }
    if blocked > 0 {
        return Err(CommandError::Incomplete(format!(
            "{blocked} of {} are blocked; `ifnewer unblock` takes that back",
            verdict.images.len()
        )));
    }
    Ok(())
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
