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
    let changes = Changes::new("/api/v1/blocks", &args.images, args.json);
    let body =
        |image: &str| json!({ "image": image, "blocked": true, "by": user_name(), "reason": args.reason });
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
    let failed = changes.send(client, output, body, describe).await?;
    changes.finish(failed, None)
}

pub(super) async fn unblock(
    client: &Client,
    args: &Unblock,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let changes = Changes::new("/api/v1/blocks", &args.images, args.json);
    let body = |image: &str| json!({ "image": image, "blocked": false, "by": user_name() });
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
    let failed = changes.send(client, output, body, describe).await?;
    changes.finish(failed, Some((still_blocked, "are still blocked")))
}

pub(super) async fn approve(
    client: &Client,
    args: &Approve,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let Approve { verdict, undo } = args;
    let changes = Changes::new("/api/v1/approvals", &verdict.images, verdict.json);
    let body = |image: &str| json!({ "image": image, "approved": !undo, "by": user_name(), "reason": verdict.reason });
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
    let failed = changes.send(client, output, body, describe).await?;
    let what = if *undo {
        "are still approved"
    } else {
        "are blocked; `ifnewer unblock` takes that back"
    };
    changes.finish(failed, Some((unmet, what)))
}

/// One change for each image of a command.
struct Changes<'a> {
    path: &'static str,
    images: &'a [String],
    is_json: bool,
}

impl<'a> Changes<'a> {
    fn new(path: &'static str, images: &'a [String], is_json: bool) -> Self {
        Self {
            path,
            images,
            is_json,
        }
    }

    /// Sends every change and prints its result. In an incident the other digests must be blocked too, so neither a
    /// failed change nor closed output ends this early. Returns the number of failed changes; the error of a single
    /// one is returned.
    async fn send(
        &self,
        client: &Client,
        output: &mut Output<'_>,
        body: impl Fn(&str) -> Value,
        mut describe: impl FnMut(&Value, &Output<'_>) -> String,
    ) -> Result<usize, CommandError> {
        let (mut failed, mut printed) = (0, Ok(()));
        for image in self.images {
            let line = match client.post(self.path, &body(image)).await {
                Ok(answer) => {
                    let lines = describe(&answer, output);
                    if self.is_json { answer.to_string() } else { lines }
                }
                Err(error) if self.images.len() == 1 => return Err(error.into()),
                Err(error) => {
                    failed += 1;
                    let error = error.to_string();
                    if self.is_json {
                        json!({ "image": image, "error": error }).to_string()
                    } else {
                        format!("{image}: {}", output.paint(Style::Error, &error))
                    }
                }
            };
            printed = printed.and(output.line(&line));
        }
        printed.map(|()| failed)
    }

    /// The result of the command: an error if changes failed, or if some have no effect yet.
    fn finish(&self, failed: usize, unmet: Option<(usize, &str)>) -> Result<(), CommandError> {
        let counts = [(failed, "failed")].into_iter().chain(unmet);
        let counts: Vec<_> = counts
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} of {} {what}", self.images.len()))
            .collect();
        if counts.is_empty() {
            Ok(())
        } else {
            Err(CommandError::Incomplete(counts.join("; ")))
        }
    }
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
