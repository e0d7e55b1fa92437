//! Commands that change images: `refresh`, `rm`, `pin` and `unpin`.

use serde_json::{Value, json};

use super::changes::Changes;
use super::{CommandError, Output, Pin, Refresh, Rm, Style, list, number, text};
use crate::admin::client::Client;
use crate::admin::format::bytes;
use crate::oci::percent;

pub(super) async fn refresh(
    client: &Client,
    args: &Refresh,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let mut credential = json!({});
    args.credential.write_to(&mut credential)?;
    let request = async |image: &str| {
        let mut body = credential.clone();
        if let Some(fields) = body.as_object_mut() {
            fields.insert("image".to_owned(), json!(image));
        }
        client.post("/api/v1/refresh", &body).await
    };
    let mut undone = 0;
    let describe = |answer: &Value, output: &Output<'_>| {
        let is_done = matches!(text(answer, "result"), "revalidated" | "new-digest");
        undone += usize::from(!is_done);
        let style = if is_done { Style::Success } else { Style::Warning };
        let (name, sentence) = (text(answer, "image"), text(answer, "sentence"));
        format!("{name}: {}", output.paint(style, sentence))
    };
    let changes = Changes::new(&args.images, args.json);
    let failed = changes.send(output, request, describe).await?;
    changes.finish(failed, Some((undone, "could not be refreshed")))
}

pub(super) async fn rm(client: &Client, args: &Rm, output: &mut Output<'_>) -> Result<(), CommandError> {
    let request = async |image: &str| {
        let path = format!(
            "/api/v1/images?image={}&all_tags={}&dry_run={}",
            percent::query_value(image),
            args.all_tags,
            !args.yes
        );
        client.delete(&path).await
    };
    let describe = |freed: &Value, output: &Output<'_>| {
        let deed = if args.yes { "removed" } else { "would remove" };
        let names = list(freed, "images").iter().filter_map(Value::as_str);
        let mut lines: Vec<_> = names.map(|name| format!("{deed} {name}")).collect();
        let (tags, blobs) = (number(freed, "tags"), number(freed, "blobs"));
        let size = output.paint(Style::Bold, &bytes(number(freed, "bytes_freed")));
        lines.push(format!("{size} in {tags} tags and {blobs} blobs"));
        lines.join("\n")
    };
    let changes = Changes::new(&args.images, args.json);
    let failed = changes.send(output, request, describe).await?;
    if !args.yes && !args.json {
        output.line(&output.paint(Style::Dim, "nothing was removed; add --yes to do it"))?;
    }
    changes.finish(failed, None)
}

pub(super) async fn pin(
    client: &Client,
    args: &Pin,
    pinned: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let request = async |image: &str| {
        let body = json!({ "image": image, "pinned": pinned });
        client.post("/api/v1/pins", &body).await
    };
    let describe = |answer: &Value, _: &Output<'_>| {
        let was = answer.get("was").and_then(Value::as_bool).unwrap_or_default();
        let state = match (pinned, was) {
            (true, false) => "pinned",
            (true, true) => "was pinned already",
            (false, true) => "unpinned",
            (false, false) => "was not pinned",
        };
        format!("{} {state}", text(answer, "image"))
    };
    let changes = Changes::new(&args.images, args.json);
    let failed = changes.send(output, request, describe).await?;
    changes.finish(failed, None)
}
