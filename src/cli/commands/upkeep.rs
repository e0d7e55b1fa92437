//! `verify` and `gc`.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Failed, Gc, Output, Tone, Verify, list, number};
use crate::admin::client::Client;
use crate::admin::format::bytes;

const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(super) async fn verify(client: &Client, words: &Verify, output: &mut Output<'_>) -> Result<(), Failed> {
    let body = json!({ "rebuild_index": words.rebuild_index });
    let mut answer = client.post("/api/v1/verify", &body).await?;
    while flag(&answer, "running") {
        tokio::time::sleep(LOOK_EVERY).await;
        answer = client.get("/api/v1/verify").await?;
    }
    let damaged = number(&answer, "damaged");
    if words.json {
        output.json(&answer)?;
    } else {
        let read = bytes(number(&answer, "bytes"));
        output.line(&format!(
            "{} manifests and blobs read, {read}; {damaged} damaged",
            number(&answer, "objects")
        ))?;
        for digest in list(&answer, "damaged_digests").iter().filter_map(Value::as_str) {
            output.line(&format!("{digest} set aside; it is fetched again when asked for"))?;
        }
    }
    if !flag(&answer, "complete") {
        return Err(Failed::Undone(
            "the cache ended before everything was read".to_owned(),
        ));
    }
    if damaged > 0 {
        return Err(Failed::Undone(format!("{damaged} were not what their names say")));
    }
    Ok(())
}

pub(super) async fn gc(client: &Client, words: &Gc, output: &mut Output<'_>) -> Result<(), Failed> {
    let body = json!({ "dry_run": !words.yes, "unused_for": words.unused_for });
    let freed = client.post("/api/v1/gc", &body).await?;
    if words.json {
        return output.json(&freed);
    }
    let size = bytes(number(&freed, "bytes_freed"));
    output.line(&format!(
        "{} {} in {} manifests and {} blobs that no tag leads to",
        if words.yes { "freed" } else { "would free" },
        output.paint(Tone::Strong, &size),
        number(&freed, "manifests"),
        number(&freed, "blobs"),
    ))?;
    if !words.yes {
        output.line(&output.paint(Tone::Dim, "nothing was removed; add --yes to do it"))?;
    }
    Ok(())
}

fn flag(answer: &Value, name: &str) -> bool {
    answer.get(name).and_then(Value::as_bool).unwrap_or_default()
}
