//! Text tables with aligned columns.

use std::borrow::Cow;

use crate::terminal::printable;

/// A table.
pub(in crate::cli) struct Table {
    heads: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Creates a table with these column names. A name that begins with `>` is right-aligned.
    pub(in crate::cli) fn new(heads: &[&'static str]) -> Self {
        Self {
            heads: heads.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(in crate::cli) fn row(&mut self, cells: Vec<String>) {
        // The width is that of the escaped text.
        let cells = cells.into_iter().map(|cell| match printable(&cell) {
            Cow::Borrowed(_) => cell,
            Cow::Owned(escaped) => escaped,
        });
        self.rows.push(cells.collect());
    }

    /// The lines including the header, without trailing spaces.
    pub(in crate::cli) fn lines(&self) -> Vec<String> {
        let names: Vec<String> = self
            .heads
            .iter()
            .map(|head| head.trim_start_matches('>').to_uppercase())
            .collect();
        let all = || std::iter::once(&names).chain(&self.rows);
        let wide = |column: usize| {
            all()
                .filter_map(|cells| cells.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.heads.len()).map(wide).collect();
        let line = |cells: &Vec<String>| {
            let cells = cells.iter().zip(&self.heads).zip(&widths);
            let cells: Vec<String> = cells
                .map(|((cell, head), width)| {
                    let blanks = " ".repeat(width.saturating_sub(cell.chars().count()));
                    if head.starts_with('>') {
                        format!("{blanks}{cell}")
                    } else {
                        format!("{cell}{blanks}")
                    }
                })
                .collect();
            cells.join("  ").trim_end().to_owned()
        };
        all().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_fit_their_content() {
        let mut table = Table::new(&["image", ">size"]);
        table.row(vec!["alpine".to_owned(), "7 MiB".to_owned()]);
        table.row(vec!["é".to_owned(), "900 KiB".to_owned()]);
        assert_eq!(
            table.lines(),
            ["IMAGE      SIZE", "alpine    7 MiB", "é       900 KiB"]
        );
    }
}
