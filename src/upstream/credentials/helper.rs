//! Credential helpers: programs named `docker-credential-…`, called with `get` and the registry's name on standard
//! input (docker-credential-helpers, "Development").
//!
//! No secret is on the command line or in the environment. Of a helper's output, only its error message is logged.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::process::Stdio;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::{CredentialUnavailable, UpstreamCredential};

/// Timeout of a helper.
const RUN_TIMEOUT: Duration = Duration::from_secs(15);

/// Maximum size of a helper's output.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// How long a credential is used. The shortest known lifetime is an hour (Artifact Registry); ECR's is twelve.
const OUTPUT_TTL: Duration = Duration::from_secs(30 * 60);

/// Delay before a helper runs again after it failed, had no credential, or returned the rejected one again.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// Maximum length of a helper's error message in the log.
const ERROR_CHARS_MAX: usize = 200;

const PREFIX: &str = "docker-credential-";

/// The error of a helper without a credential.
const NOT_FOUND: &str = "credentials not found";

/// Name of a helper: `ecr-login` for the program `docker-credential-ecr-login`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HelperName(String);

/// A text that cannot be part of a program's name. A configuration error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name of a credential helper has letters, digits, `-`, `_` and `.` only")]
pub struct HelperNameError;

impl FromStr for HelperName {
    type Err = HelperNameError;

    fn from_str(name: &str) -> Result<Self, HelperNameError> {
        let name = name.strip_prefix(PREFIX).unwrap_or(name);
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(is_allowed) {
            return Err(HelperNameError);
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for HelperName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

/// Cached credentials, by helper and registry.
pub(super) struct Helpers {
    outputs: Mutex<HashMap<(HelperName, String), Arc<HelperSlot>>>,
    run_helper: RunHelper,
}

/// Runs the program (first) for a registry (second). `Err` describes the failure.
pub(super) type RunHelper = Box<dyn Fn(String, String) -> HelperFuture + Send + Sync>;

/// The result of [`RunHelper`].
pub(super) type HelperFuture =
    Pin<Box<dyn Future<Output = Result<Option<UpstreamCredential>, String>> + Send>>;

/// Cache slot of one helper and registry.
#[derive(Default)]
struct HelperSlot {
    state: tokio::sync::Mutex<HelperState>,
    /// The serial of the rejected credential.
    refused: Mutex<Option<u64>>,
}

#[derive(Default)]
struct HelperState {
    output: Option<HelperOutput>,
    /// Earliest next run after a failure, or after a run because of a rejection.
    retry_at: Option<Instant>,
}

struct HelperOutput {
    /// `None`: the helper has none.
    credential: Option<Arc<UpstreamCredential>>,
    at: Instant,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperResponse {
    username: String,
    secret: Zeroizing<String>,
}

impl Default for Helpers {
    fn default() -> Self {
        Self::with_runner(Box::new(|program, server| Box::pin(run(program, server))))
    }
}

impl Helpers {
    pub(super) fn with_runner(run_helper: RunHelper) -> Self {
        Self {
            outputs: Mutex::default(),
            run_helper,
        }
    }

    /// The helper's credential for `server`. Concurrent callers share one run.
    pub(super) async fn get(
        &self,
        helper: &HelperName,
        server: &str,
    ) -> Result<Option<Arc<UpstreamCredential>>, CredentialUnavailable> {
        let slot = self.slot(helper, server);
        let mut state = slot.state.lock().await;
        let refused = *slot.refused.lock();
        let (is_refused, is_due) = match &state.output {
            None => (false, true),
            Some(HelperOutput { credential: None, at }) => (false, at.elapsed() >= RETRY_AFTER),
            Some(HelperOutput {
                credential: Some(loaded),
                at,
            }) => {
                let is_refused = refused == Some(loaded.serial);
                (is_refused, is_refused || at.elapsed() >= OUTPUT_TTL)
            }
        };
        let now = Instant::now();
        if is_due && state.retry_at.is_none_or(|until| until <= now) {
            state.retry_at = is_refused.then(|| now + RETRY_AFTER);
            match (self.run_helper)(helper.to_string(), server.to_owned()).await {
                Ok(response) => state.take(response),
                Err(error) => {
                    state.retry_at = Some(now + RETRY_AFTER);
                    tracing::warn!(%helper, server, error, "credential helper failed");
                }
            }
        }
        let output = state.output.as_ref().ok_or(CredentialUnavailable)?;
        Ok(output.credential.clone())
    }

    /// The registry rejected the credential: the helper runs before it is used again.
    pub(super) fn check_soon(&self, used: &UpstreamCredential) {
        let outputs = self.outputs.lock();
        for slot in outputs.values() {
            *slot.refused.lock() = Some(used.serial);
        }
    }

    fn slot(&self, helper: &HelperName, server: &str) -> Arc<HelperSlot> {
        let mut outputs = self.outputs.lock();
        let key = (helper.clone(), server.to_owned());
        Arc::clone(outputs.entry(key).or_default())
    }
}

impl HelperState {
    /// An unchanged credential keeps its serial, so that its tokens stay valid.
    fn take(&mut self, new: Option<UpstreamCredential>) {
        let old = self.output.take().and_then(|output| output.credential);
        let credential = match (new, old) {
            (Some(new), Some(old)) if new.is_same_as(&old) => Some(old),
            (new, _) => new.map(Arc::new),
        };
        let at = Instant::now();
        self.output = Some(HelperOutput { credential, at });
    }
}

pub(super) async fn run(program: String, server: String) -> Result<Option<UpstreamCredential>, String> {
    let mut command = Command::new(&program);
    command.arg("get").kill_on_drop(true);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command
        .spawn()
        .map_err(|error| format!("cannot run it: {error}"))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let running = async {
        if let Some(mut stdin) = stdin {
            // A helper without need of input may have closed it.
            let _ = stdin.write_all(server.as_bytes()).await;
        }
        let mut stdout_bytes = Zeroizing::new(Vec::new());
        if let Some(stdout) = stdout {
            let limit = OUTPUT_BYTES_MAX as u64 + 1;
            stdout
                .take(limit)
                .read_to_end(&mut stdout_bytes)
                .await
                .map_err(|error| error.to_string())?;
        }
        if stdout_bytes.len() > OUTPUT_BYTES_MAX {
            return Err(format!("its output is longer than {OUTPUT_BYTES_MAX} bytes"));
        }
        let status = child.wait().await.map_err(|error| error.to_string())?;
        parse_output(status.success(), &stdout_bytes)
    };
    timeout(RUN_TIMEOUT, running)
        .await
        .unwrap_or_else(|_| Err(format!("it timed out after {} s", RUN_TIMEOUT.as_secs())))
}

fn parse_output(succeeded: bool, stdout_bytes: &[u8]) -> Result<Option<UpstreamCredential>, String> {
    if succeeded {
        let response: HelperResponse =
            serde_json::from_slice(stdout_bytes).map_err(|_| "its output is not a credential".to_owned())?;
        let is_empty = response.secret.is_empty();
        return Ok((!is_empty).then(|| UpstreamCredential::new(response.username, response.secret.as_str())));
    }
    let text = String::from_utf8_lossy(stdout_bytes);
    if text.to_ascii_lowercase().contains(NOT_FOUND) {
        return Ok(None);
    }
    // A helper reports a failure as text, not as JSON; JSON could be a credential.
    if text.contains(['{', '}']) {
        return Err("it failed".to_owned());
    }
    let words: String = text
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(ERROR_CHARS_MAX)
        .collect();
    Err(if words.is_empty() {
        "it failed".to_owned()
    } else {
        words
    })
}
