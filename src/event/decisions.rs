//! The last decisions: what each pull asked for, and what came of it. In memory, for the operator's question "is it used,
//! and why did I get *that*".
//!
//! One for each manifest asked for: that is where a pull is decided; its blobs follow from it.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::Outcome;

/// How many are kept; older ones are forgotten.
pub const DECISIONS_MAX: usize = 1_000;

/// What a client says it is, of that much is kept.
const USER_AGENT_BYTES_MAX: usize = 128;

/// A pull that was decided.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Counts up from 1 since the start; one who has seen the last asks for what is newer.
    pub number: u64,
    /// When the request came.
    pub at: SystemTime,
    /// Who asked; `None` for one that came through a unix socket.
    pub client: Option<IpAddr>,
    /// What the client says it is; cut, and empty where it says nothing.
    pub user_agent: String,
    /// Through which door.
    pub door: &'static str,
    /// The upstream's name.
    pub upstream: String,
    /// The repository.
    pub repository: String,
    /// The tag or digest.
    pub reference: String,
    /// How the answer came about.
    pub outcome: Outcome,
    /// The reason's name, the same as in the log and in `Cache-Status`.
    pub reason: &'static str,
    /// The status sent.
    pub status: u16,
    /// From the request's head to the answer's head.
    pub took: Duration,
}

impl Decision {
    /// What is kept of a `User-Agent`.
    pub fn shortened(user_agent: &str) -> String {
        let mut end = user_agent.len().min(USER_AGENT_BYTES_MAX);
        while !user_agent.is_char_boundary(end) {
            end -= 1;
        }
        user_agent.get(..end).unwrap_or_default().to_owned()
    }
}

/// The last of them.
#[derive(Clone, Default)]
pub(super) struct Decisions(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    last: u64,
    kept: VecDeque<Arc<Decision>>,
}

impl Decisions {
    /// Keeps one, under the next number.
    pub(super) fn keep(&self, mut decision: Decision) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.last += 1;
        decision.number = held.last;
        if held.kept.len() >= DECISIONS_MAX {
            held.kept.pop_front();
        }
        held.kept.push_back(Arc::new(decision));
    }

    /// Those after `number`, the newest first, at most `limit`.
    pub(super) fn after(&self, number: u64, limit: usize) -> Vec<Arc<Decision>> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = held
            .kept
            .iter()
            .rev()
            .take_while(|decision| decision.number > number);
        newer.take(limit).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(repository: &str) -> Decision {
        Decision {
            number: 0,
            at: SystemTime::UNIX_EPOCH,
            client: Some([127, 0, 0, 1].into()),
            user_agent: String::new(),
            door: "mirror",
            upstream: "docker.io".to_owned(),
            repository: repository.to_owned(),
            reference: "latest".to_owned(),
            outcome: Outcome::Hit,
            reason: "unchanged",
            status: 200,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn the_newest_come_first_and_the_oldest_are_forgotten() {
        let decisions = Decisions::default();
        for number in 1..=DECISIONS_MAX + 5 {
            decisions.keep(decision(&number.to_string()));
        }
        let all = decisions.after(0, usize::MAX);
        assert_eq!(all.len(), DECISIONS_MAX);
        assert_eq!(all.first().unwrap().repository, (DECISIONS_MAX + 5).to_string());
        assert_eq!(all.last().unwrap().number, 6);
        let newest = decisions.after(all[2].number, 10);
        let numbers: Vec<_> = newest.iter().map(|decision| decision.number).collect();
        assert_eq!(numbers, [all[0].number, all[1].number]);
        assert_eq!(decisions.after(0, 1).len(), 1);
    }

    #[test]
    fn a_long_name_is_cut_between_letters() {
        assert_eq!(Decision::shortened("docker/29"), "docker/29");
        let long = "é".repeat(100) + "x";
        assert_eq!(Decision::shortened(&long), "é".repeat(64));
        assert_eq!(Decision::shortened(&format!("x{long}")).len(), 127);
    }
}
