//! The commands that change something, each with what came of it.

use serde_json::{Value, json};

use super::{Failed, Offline, OnOff, Output, Pin, Refresh, Rm, Tone, escaped, list, number, text};
use crate::admin::client::Client;
use crate::admin::format::bytes;

pub(super) async fn refresh(client: &Client, words: &Refresh, output: &mut Output<'_>) -> Result<(), Failed> {
    let mut undone = 0;
    for image in &words.images {
        let mut body = json!({ "image": image });
        words.login.add_to(&mut body)?;
        let refreshed = client.post("/api/v1/refresh", &body).await?;
        let result = text(&refreshed, "result");
        let is_done = matches!(result, "revalidated" | "new-digest");
        undone += usize::from(!is_done);
        if words.json {
            output.json_line(&refreshed)?;
            continue;
        }
        let tone = if is_done { Tone::Good } else { Tone::Warm };
        let (name, sentence) = (text(&refreshed, "image"), text(&refreshed, "sentence"));
        output.line(&format!("{name}: {}", output.paint(tone, sentence)))?;
    }
    if undone > 0 {
        return Err(Failed::Undone(format!(
            "{undone} of {} could not be refreshed",
            words.images.len()
        )));
    }
    Ok(())
}

pub(super) async fn rm(client: &Client, words: &Rm, output: &mut Output<'_>) -> Result<(), Failed> {
    for image in &words.images {
        let path = format!(
            "/api/v1/images?image={}&all_tags={}&dry_run={}",
            escaped(image),
            words.all_tags,
            !words.yes
        );
        let freed = client.delete(&path).await?;
        if words.json {
            output.json_line(&freed)?;
            continue;
        }
        let (tags, blobs) = (number(&freed, "tags"), number(&freed, "blobs"));
        let (deed, size) = (
            if words.yes { "removed" } else { "would remove" },
            bytes(number(&freed, "bytes_freed")),
        );
        for name in list(&freed, "images").iter().filter_map(Value::as_str) {
            output.line(&format!("{deed} {name}"))?;
        }
        output.line(&format!(
            "{} in {tags} tags and {blobs} blobs",
            output.paint(Tone::Strong, &size)
        ))?;
    }
    if !words.yes && !words.json {
        output.line(&output.paint(Tone::Dim, "nothing was removed; add --yes to do it"))?;
    }
    Ok(())
}

pub(super) async fn pin(
    client: &Client,
    words: &Pin,
    pinned: bool,
    output: &mut Output<'_>,
) -> Result<(), Failed> {
    for image in &words.images {
        let body = json!({ "image": image, "pinned": pinned });
        let answer = client.post("/api/v1/pins", &body).await?;
        if words.json {
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

pub(super) async fn offline(client: &Client, words: &Offline, output: &mut Output<'_>) -> Result<(), Failed> {
    let answer = match words.state {
        None => client.get("/api/v1/offline").await?,
        Some(state) => {
            let body = json!({ "offline": state == OnOff::On });
            client.post("/api/v1/offline", &body).await?
        }
    };
    if words.json {
        return output.json(&answer);
    }
    let is_on = answer.get("offline").and_then(Value::as_bool).unwrap_or_default();
    output.line(if is_on {
        "offline: no upstream is asked; what is held is served"
    } else {
        "online: upstreams are asked as the rules say"
    })
}
