//! What was said last, for the page that a browser is sent on to. Kept here and not in the address, where anybody could
//! write something.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Notices remembered.
const NOTICES_MAX: usize = 32;

#[derive(Default)]
pub(super) struct Notices(Mutex<(u64, VecDeque<(u64, String)>)>);

impl Notices {
    /// Keeps a notice; its number.
    pub(super) fn keep(&self, text: String) -> u64 {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.0 += 1;
        let number = kept.0;
        if kept.1.len() >= NOTICES_MAX {
            kept.1.pop_front();
        }
        kept.1.push_back((number, text));
        number
    }

    pub(super) fn find(&self, number: u64) -> Option<String> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.1
            .iter()
            .find(|(kept, _)| *kept == number)
            .map(|(_, text)| text.clone())
    }
}
