//! The numbers that the authors published, out of `published.csv`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Serialize;

const TABLE: &str = include_str!("published.csv");

/// A row as it was published: percents are percents.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PublishedRow {
    /// Trained tokens a second, on a GPU that is not named.
    pub tokens_per_s: f64,
    /// Model FLOPs utilisation in percent of 45.158 TFLOP/s.
    pub mfu_percent: f64,
    /// Accuracy in percent by task.
    pub accuracy_percent: BTreeMap<String, f64>,
    /// Their mean as it was published, which is not always the mean of the columns.
    pub average_percent: f64,
}

/// All of them, by size and row.
#[derive(Debug)]
pub struct Published(BTreeMap<(String, String), PublishedRow>);

impl Published {
    /// Reads the table that ships in the program.
    ///
    /// # Errors
    /// Where a line is broken, which a test excludes.
    pub fn shipped() -> Result<Self> {
        let mut lines = TABLE.lines().filter(|line| !line.starts_with('#'));
        let columns: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
        let rows = lines.map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            let number = |column: &str| -> Result<f64> {
                let at = columns.iter().position(|name| *name == column);
                let cell = at.and_then(|at| cells.get(at)).with_context(|| format!("{line}: no {column}"))?;
                cell.parse().with_context(|| format!("{line}: {cell}"))
            };
            let tasks = &columns[4..columns.len() - 1];
            let row = PublishedRow {
                tokens_per_s: number("tokens_per_s")?,
                mfu_percent: number("mfu")?,
                accuracy_percent: tasks
                    .iter()
                    .map(|&task| Ok((task.to_owned(), number(task)?)))
                    .collect::<Result<_>>()?,
                average_percent: number("average")?,
            };
            Ok(((cells[0].to_owned(), cells[1].to_owned()), row))
        });
        rows.collect::<Result<_>>().map(Self)
    }

    /// A row, where the paper has it.
    pub fn of(&self, size: &str, row: &str) -> Option<&PublishedRow> {
        self.0.get(&(size.to_owned(), row.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::ROWS;
    use super::*;

    #[test]
    fn the_table_is_whole() {
        let published = Published::shipped().unwrap();
        let n_rows = |size: &str| ROWS.iter().filter(|(row, _)| published.of(size, row).is_some()).count();
        assert_eq!(["135m", "350m", "1b", "tiny"].map(n_rows), [10, 7, 7, 0]);
        assert_eq!(published.0.len(), 24, "no row goes by another name");
        let row = published.of("1b", "fac_split").unwrap();
        assert_eq!((row.tokens_per_s, row.mfu_percent, row.average_percent), (7926., 47.63, 41.97));
        assert_eq!((row.accuracy_percent["boolq"], row.accuracy_percent.len()), (56.78, 6));
    }

    #[test]
    fn published_means_are_those_of_their_columns_but_for_three_rows() {
        let published = Published::shipped().unwrap();
        let off = published.0.iter().filter(|(_, row)| {
            let mean = row.accuracy_percent.values().sum::<f64>() / row.accuracy_percent.len() as f64;
            (mean - row.average_percent).abs() > 0.011
        });
        let off: Vec<_> = off.map(|((size, row), _)| format!("{size} {row}")).collect();
        assert_eq!(off, ["135m no_split", "135m shm", "1b hymba"]);
    }
}
