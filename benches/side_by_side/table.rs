//! Result table: both figures, the target, and whether it is met.

use std::fmt::Write as _;

/// The better direction.
#[derive(Clone, Copy)]
pub(crate) enum Better {
    Higher,
    Lower,
}

/// The reference of a ratio.
#[derive(Clone, Copy, Default)]
pub(crate) enum Target {
    #[default]
    None,
    /// ifnewer ÷ other.
    Ratio(f64),
    /// ifnewer − other.
    Difference(f64),
    /// ifnewer alone.
    AtMost(f64),
}

/// One measure: a pair of figures per round.
pub(crate) struct Row {
    what: String,
    better: Better,
    target: Target,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

/// All measures of a run.
pub(crate) struct Table {
    /// Headings of the two columns of figures.
    heads: [&'static str; 2],
    rows: Vec<Row>,
}

impl Row {
    pub(crate) fn new(what: String, better: Better) -> Self {
        Row {
            what,
            better,
            target: Target::None,
            ours: Vec::new(),
            theirs: Vec::new(),
        }
    }

    pub(crate) fn target_ratio(self, ratio: f64) -> Self {
        Row {
            target: Target::Ratio(ratio),
            ..self
        }
    }

    pub(crate) fn target_difference(self, difference: f64) -> Self {
        Row {
            target: Target::Difference(difference),
            ..self
        }
    }

    pub(crate) fn target_at_most(self, limit: f64) -> Self {
        Row {
            target: Target::AtMost(limit),
            ..self
        }
    }

    pub(crate) fn target(self, target: Target) -> Self {
        Row { target, ..self }
    }

    pub(crate) fn round(&mut self, ours: f64, theirs: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }

    pub(crate) fn alone(&mut self, ours: f64) {
        self.ours.push(ours);
    }

    fn paired(&self, by: impl Fn(f64, f64) -> f64) -> f64 {
        median(
            self.ours
                .iter()
                .zip(&self.theirs)
                .map(|(a, b)| by(*a, *b))
                .collect(),
        )
    }

    fn ratio(&self) -> f64 {
        self.paired(|a, b| a / b)
    }

    fn met(&self) -> Option<bool> {
        let within = |value: f64, limit: f64| match self.better {
            Better::Higher => value >= limit,
            Better::Lower => value <= limit,
        };
        match self.target {
            Target::None => None,
            Target::Ratio(limit) => Some(within(self.ratio(), limit)),
            Target::Difference(limit) => Some(within(self.paired(|a, b| a - b), limit)),
            Target::AtMost(limit) => Some(within(median(self.ours.clone()), limit)),
        }
    }

    fn limit(&self) -> String {
        let sign = match self.better {
            Better::Higher => '≥',
            Better::Lower => '≤',
        };
        match self.target {
            Target::None => String::from("-"),
            Target::Ratio(limit) => format!("{sign} {limit} ×"),
            Target::Difference(limit) => format!("{sign} +{limit}"),
            Target::AtMost(limit) => format!("{sign} {}", (limit * 1e3).round() / 1e3),
        }
    }

    fn line(&self) -> String {
        let (theirs, ratio) = if self.theirs.is_empty() {
            (String::from("-"), String::from("-"))
        } else {
            (
                short(median(self.theirs.clone())),
                format!("{:.2} ×", self.ratio()),
            )
        };
        let verdict = match self.met() {
            None => "",
            Some(true) => "met",
            Some(false) => "NOT MET",
        };
        let mut line = format!("{:<66}", self.what);
        let ours = short(median(self.ours.clone()));
        let _ = write!(
            line,
            " {ours:>9} {theirs:>9} {ratio:>8} {:>9}  {verdict}",
            self.limit()
        );
        line.trim_end().to_owned()
    }
}

impl Table {
    pub(crate) fn new(heads: [&'static str; 2]) -> Self {
        Table {
            heads,
            rows: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, row: Row) {
        println!("measured: {}", row.line());
        self.rows.push(row);
    }

    pub(crate) fn print(&self) {
        let [ours, theirs] = self.heads;
        println!(
            "\n{:<66} {ours:>9} {theirs:>9} {:>8} {:>9}",
            "", "ratio", "target"
        );
        for row in &self.rows {
            println!("{}", row.line());
        }
        let targets: Vec<bool> = self.rows.iter().filter_map(Row::met).collect();
        println!(
            "\ntargets: {} met, {} not met",
            count(&targets, true),
            count(&targets, false)
        );
    }

    pub(crate) fn all_met(&self) -> bool {
        self.rows.iter().filter_map(Row::met).all(|met| met)
    }
}

fn count(all: &[bool], wanted: bool) -> usize {
    all.iter().filter(|one| **one == wanted).count()
}

pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Formats three significant digits.
fn short(figure: f64) -> String {
    match figure.abs() {
        large if large >= 100.0 => format!("{figure:.0}"),
        middle if middle >= 10.0 => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}
