//! Credential helpers: programs named `docker-credential-…`, asked `get` with the registry's name on standard input
//! (docker-credential-helpers, "Development"). Nothing secret is on the command line or in the environment that we give
//! them, and nothing they say is logged but the error they report in words.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::process::Stdio;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::{OwnCredential, Unavailable};

/// How long a helper may take.
const WITHIN: Duration = Duration::from_secs(15);

/// Longest answer of a helper.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// How long an answer is used. The shortest-lived that are known (Artifact Registry's) live for an hour, ECR's for twelve.
const GOOD_FOR: Duration = Duration::from_secs(30 * 60);

/// How long a helper is left alone that failed, had nothing, or gave again what the registry refuses.
const ASK_AFTER: Duration = Duration::from_secs(30);

/// Longest error of a helper that is told on.
const ERROR_CHARS_MAX: usize = 200;

const PREFIX: &str = "docker-credential-";

/// What a helper says where it has nothing.
const NOT_FOUND: &str = "credentials not found";

/// The name of a helper: `ecr-login` for the program `docker-credential-ecr-login`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HelperName(String);

/// A text that cannot be the end of a program's name. The operator's mistake.
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

/// What helpers have given, by helper and registry.
pub(super) struct Helpers {
    answers: Mutex<HashMap<(HelperName, String), Arc<Place>>>,
    ask: Ask,
}

/// Asks the program (first) about a registry (second). `Err` says in words what went wrong.
pub(super) type Ask = Box<dyn Fn(String, String) -> Asking + Send + Sync>;

/// The answer, on its way.
pub(super) type Asking = Pin<Box<dyn Future<Output = Result<Option<OwnCredential>, String>> + Send>>;

/// One helper's answer about one registry.
#[derive(Default)]
struct Place {
    state: tokio::sync::Mutex<State>,
    /// The serial of the credential that was refused.
    refused: Mutex<Option<u64>>,
}

#[derive(Default)]
struct State {
    answer: Option<Given>,
    /// Until when it is left alone: it failed, or was asked because of a refusal.
    rests_until: Option<Instant>,
}

struct Given {
    /// `None`: it has none.
    credential: Option<Arc<OwnCredential>>,
    at: Instant,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: Zeroizing<String>,
}

impl Default for Helpers {
    fn default() -> Self {
        Self::asking(Box::new(|program, server| Box::pin(run(program, server))))
    }
}

impl Helpers {
    pub(super) fn asking(ask: Ask) -> Self {
        Self {
            answers: Mutex::default(),
            ask,
        }
    }

    /// What the helper gives for `server`; asked once however many want it.
    pub(super) async fn get(
        &self,
        helper: &HelperName,
        server: &str,
    ) -> Result<Option<Arc<OwnCredential>>, Unavailable> {
        let place = self.place(helper, server);
        let mut state = place.state.lock().await;
        let refused = *place.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let (is_refused, is_due) = match &state.answer {
            None => (false, true),
            Some(Given { credential: None, at }) => (false, at.elapsed() >= ASK_AFTER),
            Some(Given {
                credential: Some(kept),
                at,
            }) => {
                let is_refused = refused == Some(kept.serial);
                (is_refused, is_refused || at.elapsed() >= GOOD_FOR)
            }
        };
        let now = Instant::now();
        if is_due && state.rests_until.is_none_or(|until| until <= now) {
            state.rests_until = is_refused.then(|| now + ASK_AFTER);
            match (self.ask)(helper.to_string(), server.to_owned()).await {
                Ok(answer) => state.take(answer),
                Err(error) => {
                    state.rests_until = Some(now + ASK_AFTER);
                    tracing::warn!(%helper, server, error, "the credential helper gave no credential; what it gave before stays");
                }
            }
        }
        let given = state.answer.as_ref().ok_or(Unavailable)?;
        Ok(given.credential.clone())
    }

    /// The registry has refused what was given: it is not used again without asking the helper.
    pub(super) fn look_again(&self, used: &OwnCredential) {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        for place in answers.values() {
            *place.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(used.serial);
        }
    }

    fn place(&self, helper: &HelperName, server: &str) -> Arc<Place> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (helper.clone(), server.to_owned());
        Arc::clone(answers.entry(key).or_default())
    }
}

impl State {
    /// What says the same as before is the same: the tokens got with it stay good.
    fn take(&mut self, new: Option<OwnCredential>) {
        let old = self.answer.take().and_then(|given| given.credential);
        let credential = match (new, old) {
            (Some(new), Some(old)) if new.says_the_same_as(&old) => Some(old),
            (new, _) => new.map(Arc::new),
        };
        let at = Instant::now();
        self.answer = Some(Given { credential, at });
    }
}

pub(super) async fn run(program: String, server: String) -> Result<Option<OwnCredential>, String> {
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
    let asking = async {
        if let Some(mut stdin) = stdin {
            // One that needs no input may have closed it.
            let _ = stdin.write_all(server.as_bytes()).await;
        }
        let mut said = Zeroizing::new(Vec::new());
        if let Some(stdout) = stdout {
            let limit = ANSWER_BYTES_MAX as u64 + 1;
            stdout
                .take(limit)
                .read_to_end(&mut said)
                .await
                .map_err(|error| error.to_string())?;
        }
        if said.len() > ANSWER_BYTES_MAX {
            return Err(format!("its answer is longer than {ANSWER_BYTES_MAX} bytes"));
        }
        let status = child.wait().await.map_err(|error| error.to_string())?;
        understand(status.success(), &said)
    };
    timeout(WITHIN, asking)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", WITHIN.as_secs())))
}

fn understand(succeeded: bool, said: &[u8]) -> Result<Option<OwnCredential>, String> {
    if succeeded {
        let answer: Answer =
            serde_json::from_slice(said).map_err(|_| "its answer is not a credential".to_owned())?;
        let is_empty = answer.secret.is_empty();
        return Ok((!is_empty).then(|| OwnCredential::new(answer.username, answer.secret.as_str())));
    }
    let text = String::from_utf8_lossy(said);
    if text.to_ascii_lowercase().contains(NOT_FOUND) {
        return Ok(None);
    }
    // Whoever fails says why in words, and not in JSON.
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
