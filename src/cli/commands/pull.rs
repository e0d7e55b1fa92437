//! `ifnewer pull`: progress bars for images and layers on a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::{CommandError, Output, Pull, Style, list, number, text};
use crate::admin::client::{Client, ClientError};
use crate::admin::format::{bytes, short_digest};
use crate::terminal;

/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(150);

pub(super) async fn pull(client: &Client, args: &Pull, output: &mut Output<'_>) -> Result<(), CommandError> {
    let (mut begun, mut failed) = (Vec::new(), 0);
    for image in &args.images {
        let mut body = json!({ "image": image });
        args.credential.write_to(&mut body)?;
        if let (false, Some(fields)) = (args.platform.is_empty(), body.as_object_mut()) {
            fields.insert("platforms".to_owned(), json!(args.platform));
        }
        match client.post("/api/v1/pulls", &body).await {
            Ok(pull) => begun.push(number(&pull, "id")),
            Err(ClientError::Refused { detail, .. }) => {
                failed += 1;
                if args.json {
                    output.json_line(&json!({ "image": image, "error": detail }))?;
                } else {
                    output.line(&format!("{image}: {}", output.paint(Style::Error, &detail)))?;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    let mut bars = (output.progress && !args.json).then(Bars::default);
    let mut lines = Lines::default();
    while let Some(id) = begun.first().copied() {
        // Poll all jobs, so that each bar moves; wait for the first unfinished one.
        for id in &begun {
            let pull = client.get(&format!("/api/v1/pulls/{id}")).await?;
            match &mut bars {
                Some(bars) => bars.show(&pull),
                None if !args.json => lines.show(&pull, output)?,
                None => {}
            }
        }
        let pull = client.get(&format!("/api/v1/pulls/{id}")).await?;
        if !matches!(text(&pull, "state"), "done" | "failed") {
            tokio::time::sleep(POLL_INTERVAL).await;
            continue;
        }
        begun.remove(0);
        failed += usize::from(text(&pull, "state") == "failed");
        match &mut bars {
            Some(bars) => bars.finish(&pull, output),
            None if args.json => output.json_line(&pull)?,
            None => lines.finish(&pull, output)?,
        }
    }
    if failed > 0 {
        return Err(CommandError::Incomplete(format!(
            "{failed} of {} could not be pulled",
            args.images.len()
        )));
    }
    Ok(())
}

/// Result of a pull in one line.
fn result_line(pull: &Value, output: &Output<'_>) -> String {
    if text(pull, "state") == "failed" {
        return format!(
            "{}: {}",
            text(pull, "image"),
            output.paint(Style::Error, text(pull, "error"))
        );
    }
    let layers = list(pull, "layers");
    let is_cached = |layer: &&Value| text(layer, "state") == "cached";
    let cached = layers.iter().filter(is_cached).count();
    let fetched: u64 = layers
        .iter()
        .filter(|layer| !is_cached(layer))
        .map(|layer| number(layer, "size"))
        .sum();
    let digest = short_digest(text(pull, "digest"));
    let what = if cached == layers.len() {
        "already cached".to_owned()
    } else {
        format!(
            "{} fetched, {cached} of {} layers already cached",
            bytes(fetched),
            layers.len()
        )
    };
    format!(
        "{} {digest}: {}",
        text(pull, "image"),
        output.paint(Style::Success, &what)
    )
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    images: HashMap<u64, ProgressBar>,
    layers: HashMap<(u64, String), ProgressBar>,
}

impl Bars {
    fn show(&mut self, pull: &Value) {
        let id = number(pull, "id");
        let all = &self.all;
        let image = self.images.entry(id).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(0));
            // Long text is truncated, so that a bar stays one line on a narrow terminal.
            bar.set_style(bar_style("{wide_msg} {bar:12.cyan/dim} {binary_bytes:>10}"));
            bar
        });
        image.set_message(terminal::line(text(pull, "image"), false));
        let layers = list(pull, "layers");
        image.set_length(layers.iter().map(|layer| number(layer, "size")).sum());
        image.set_position(layers.iter().map(|layer| number(layer, "received")).sum());
        for layer in layers {
            let digest = text(layer, "digest").to_owned();
            let last = image.clone();
            let bar = self.layers.entry((id, digest.clone())).or_insert_with(|| {
                let bar = all.insert_after(&last, ProgressBar::new(number(layer, "size")));
                bar.set_style(bar_style("  {wide_msg} {bar:8.dim} {binary_total_bytes:>10}"));
                bar
            });
            bar.set_position(number(layer, "received"));
            let state = match text(layer, "state") {
                "cached" => "already cached",
                "fetched" => "fetched",
                "failed" => "failed",
                "waiting" => "waiting",
                _ => "fetching",
            };
            // The state comes first, because a narrow terminal cuts off the end.
            let digest = short_digest(&digest);
            let digest = digest.rsplit_once(':').map_or(digest.as_str(), |(_, hex)| hex);
            bar.set_message(terminal::line(&format!("{state} {digest}"), false));
        }
    }

    fn finish(&mut self, pull: &Value, output: &Output<'_>) {
        let id = number(pull, "id");
        self.layers.retain(|(of, _), bar| {
            if *of == id {
                bar.finish_and_clear();
            }
            *of != id
        });
        if let Some(bar) = self.images.remove(&id) {
            bar.finish_and_clear();
        }
        // Errors of a closed terminal are ignored; the exit code reports the result.
        let _ = self
            .all
            .println(terminal::line(&result_line(pull, output), output.colour));
    }
}

/// The template is constant. If it were invalid, a plain bar would be used.
fn bar_style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Prints each change once.
#[derive(Default)]
struct Lines {
    reported: HashMap<(u64, String), String>,
}

impl Lines {
    fn show(&mut self, pull: &Value, output: &mut Output<'_>) -> Result<(), CommandError> {
        let id = number(pull, "id");
        for layer in list(pull, "layers") {
            let (digest, state) = (text(layer, "digest"), text(layer, "state"));
            if matches!(state, "waiting" | "fetching") {
                continue;
            }
            let reported = self.reported.entry((id, digest.to_owned())).or_default();
            if reported != state {
                state.clone_into(reported);
                let args = if state == "cached" {
                    "already cached"
                } else {
                    state
                };
                let size = bytes(number(layer, "size"));
                output.line(&format!(
                    "{} {} {args}, {size}",
                    text(pull, "image"),
                    short_digest(digest)
                ))?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, pull: &Value, output: &mut Output<'_>) -> Result<(), CommandError> {
        self.show(pull, output)?;
        let line = result_line(pull, output);
        output.line(&line)
    }
}
