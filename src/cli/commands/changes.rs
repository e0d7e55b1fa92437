//! Commands that change several images: one request for each, and one result.

use serde_json::{Value, json};

use super::{CommandError, Output, Style};
use crate::admin::client::ClientError;

/// One change for each image of a command.
pub(super) struct Changes<'a> {
    images: &'a [String],
    is_json: bool,
}

impl<'a> Changes<'a> {
    pub(super) fn new(images: &'a [String], is_json: bool) -> Self {
        Self { images, is_json }
    }

    /// Sends every change and prints its result. Neither a failed change nor closed output ends this early: in an
    /// incident the other digests must be blocked too. Returns the number of failed changes; the error of a single
    /// one is returned.
    pub(super) async fn send(
        &self,
        output: &mut Output<'_>,
        request: impl AsyncFn(&str) -> Result<Value, ClientError>,
        mut describe: impl FnMut(&Value, &Output<'_>) -> String,
    ) -> Result<usize, CommandError> {
        let (mut failed, mut printed) = (0, Ok(()));
        for image in self.images {
            let line = match request(image).await {
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
    pub(super) fn finish(&self, failed: usize, unmet: Option<(usize, &str)>) -> Result<(), CommandError> {
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
