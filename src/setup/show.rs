//! A plan and what came of it, in words. What is to be copied stands alone on its lines.

use std::fmt::{self, Display, Formatter, Write as _};

use similar::TextDiff;

use super::Refused;
use super::apply::Done;
use super::plan::{Files, Plan};

/// The files whole where they are new, and else what changes in them. Beside it an objection, if a file cannot be read.
pub(super) fn plan(plan: &Plan, files: &dyn Files) -> (String, Option<Refused>) {
    let mut text = String::new();
    let mut objection = None;
    for wanted in &plan.files {
        let path = wanted.path.display();
        let now = files.read(&wanted.path).unwrap_or_else(|refused| {
            objection = Some(refused);
            None
        });
        let _ = match now {
            Some(now) if now == wanted.bytes => writeln!(text, "# {path} is already so"),
            Some(now) => writeln!(text, "# {path} changes:\n{}", difference(&now, &wanted.bytes)),
            None => writeln!(text, "# {path}\n{}", String::from_utf8_lossy(&wanted.bytes)),
        };
    }
    for what in &plan.by_hand {
        let _ = writeln!(text, "# then: {what}");
    }
    for note in &plan.notes {
        let _ = writeln!(text, "# note: {note}");
    }
    (text, objection)
}

/// A unified diff.
pub(super) fn difference(before: &[u8], after: &[u8]) -> String {
    let (before, after) = (String::from_utf8_lossy(before), String::from_utf8_lossy(after));
    let difference = TextDiff::from_lines(&*before, &*after);
    difference.unified_diff().context_radius(2).to_string()
}

impl Display for Done {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.changed.is_empty() {
            writeln!(f, "nothing to do: everything is already so")?;
        }
        for line in self.changed.iter().chain(&self.told) {
            writeln!(f, "{line}")?;
        }
        for line in &self.by_hand {
            writeln!(f, "now by hand: {line}")?;
        }
        for line in &self.notes {
            writeln!(f, "note: {line}")?;
        }
        Ok(())
    }
}
