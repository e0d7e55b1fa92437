//! Commands that change images: `refresh`, `rm`, `pin` and `unpin`.

use serde_json::{Value, json};

use super::{CommandError, Output, Pin, Refresh, Rm, Style, list, number, percent_encode, text};
use crate::admin::client::Client;
use crate::admin::format::bytes;

pub(super) async fn refresh(
    client: &Client,
    args: &Refresh,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let mut undone = 0;
    for image in &args.images {
        let mut body = json!({ "image": image });
        args.credential.write_to(&mut body)?;
        let refreshed = client.post("/api/v1/refresh", &body).await?;
        let result = text(&refreshed, "result");
        let is_done = matches!(result, "revalidated" | "new-digest");
        undone += usize::from(!is_done);
        if args.json {
            output.json_line(&refreshed)?;
            continue;
        }
        let style = if is_done { Style::Success } else { Style::Warning };
        let (name, sentence) = (text(&refreshed, "image"), text(&refreshed, "sentence"));
        output.line(&format!("{name}: {}", output.paint(style, sentence)))?;
    }
    if undone > 0 {
        return Err(CommandError::Incomplete(format!(
            "{undone} of {} could not be refreshed",
            args.images.len()
        )));
    }
    Ok(())
}

pub(super) async fn rm(client: &Client, args: &Rm, output: &mut Output<'_>) -> Result<(), CommandError> {
    for image in &args.images {
        let path = format!(
            "/api/v1/images?image={}&all_tags={}&dry_run={}",
            percent_encode(image),
            args.all_tags,
            !args.yes
        );
        let freed = client.delete(&path).await?;
        if args.json {
            output.json_line(&freed)?;
            continue;
        }
        let (tags, blobs) = (number(&freed, "tags"), number(&freed, "blobs"));
        let (deed, size) = (
            if args.yes { "removed" } else { "would remove" },
            bytes(number(&freed, "bytes_freed")),
        );
        for name in list(&freed, "images").iter().filter_map(Value::as_str) {
            output.line(&format!("{deed} {name}"))?;
        }
        output.line(&format!(
            "{} in {tags} tags and {blobs} blobs",
            output.paint(Style::Bold, &size)
        ))?;
    }
    if !args.yes && !args.json {
        output.line(&output.paint(Style::Dim, "nothing was removed; add --yes to do it"))?;
    }
    Ok(())
}

pub(super) async fn pin(
    client: &Client,
    args: &Pin,
    pinned: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    for image in &args.images {
        let body = json!({ "image": image, "pinned": pinned });
        let answer = client.post("/api/v1/pins", &body).await?;
        if args.json {
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
