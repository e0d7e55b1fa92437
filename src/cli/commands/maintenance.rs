//! Commands for the store and the cache: `verify`, `gc` and `offline`.

use std::time::Duration;

use serde_json::{Value, json};

use super::{CommandError, Gc, Offline, OnOff, Output, Style, Verify, list, number};
use crate::admin::client::Client;
use crate::admin::format::bytes;

const POLL_INTERVAL: Duration = Duration::from_millis(500);

pub(super) async fn verify(
    client: &Client,
    args: &Verify,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let body = json!({ "rebuild_index": args.rebuild_index });
    let mut answer = client.post("/api/v1/verify", &body).await?;
    while bool_field(&answer, "running") {
        tokio::time::sleep(POLL_INTERVAL).await;
        answer = client.get("/api/v1/verify").await?;
    }
    let damaged = number(&answer, "damaged");
    if args.json {
        output.json(&answer)?;
    } else {
        let read = bytes(number(&answer, "bytes"));
        output.line(&format!(
            "{} manifests and blobs read, {read}; {damaged} damaged",
            number(&answer, "objects")
        ))?;
        for digest in list(&answer, "damaged_digests").iter().filter_map(Value::as_str) {
            output.line(&format!(
                "{digest} quarantined; it is fetched again when requested"
            ))?;
        }
    }
    if !bool_field(&answer, "complete") {
        return Err(CommandError::Incomplete(
            "the cache stopped before the verification was complete".to_owned(),
        ));
    }
    if damaged > 0 {
        return Err(CommandError::Incomplete(format!(
            "{damaged} objects did not match their digests"
        )));
    }
    Ok(())
}

pub(super) async fn gc(client: &Client, args: &Gc, output: &mut Output<'_>) -> Result<(), CommandError> {
    let body = json!({ "dry_run": !args.yes, "unused_for": args.unused_for });
    let freed = client.post("/api/v1/gc", &body).await?;
    if args.json {
        return output.json(&freed);
    }
    let size = bytes(number(&freed, "bytes_freed"));
    output.line(&format!(
        "{} {} in {} manifests and {} blobs without a tag",
        if args.yes { "freed" } else { "would free" },
        output.paint(Style::Bold, &size),
        number(&freed, "manifests"),
        number(&freed, "blobs"),
    ))?;
    if !args.yes {
        output.line(&output.paint(Style::Dim, "nothing was removed; add --yes to do it"))?;
    }
    Ok(())
}

pub(super) async fn offline(
    client: &Client,
    args: &Offline,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let answer = match args.state {
        None => client.get("/api/v1/offline").await?,
        Some(state) => {
            let body = json!({ "offline": state == OnOff::On });
            client.post("/api/v1/offline", &body).await?
        }
    };
    if args.json {
        return output.json(&answer);
    }
    let is_on = answer.get("offline").and_then(Value::as_bool).unwrap_or_default();
    output.line(if is_on {
        "offline: no upstream requests are sent; cached images are served"
    } else {
        "online: upstreams are requested by policy"
    })
}

fn bool_field(answer: &Value, name: &str) -> bool {
    answer.get(name).and_then(Value::as_bool).unwrap_or_default()
}
