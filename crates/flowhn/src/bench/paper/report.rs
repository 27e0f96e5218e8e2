//! The table and the figure.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use flowhn_train::plot::{BarPanel, bars_svg};
use flowhn_train::storage::{Disk, write_atomically};
use flowhn_train::tasks::{Task, TaskScore};
use serde::ser::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::row::{Row, Speed};
use crate::bench::train::Peak;
use crate::eval::write_json;
use crate::units::{count, grouped};

/// What tokens a second and MFU mean here, and accuracy.
const DEFINITION: &str = "tokens_per_s: tokens of a training step (sequences x length) over the median time of a step, on random tokens: \
                          batches through the loader, forward, cross-entropy, backward, clipping, AdamW; the row's configuration in \
                          configs/paper, with attention kernels that need not give equal bits in every run. mfu: forward and backward \
                          FLOPs of the model for the tokens as they are routed, over time and peak; a multiply-add counts 2, backward \
                          twice forward, attention's scores the causal half, the head counts and the embedding look-up does not, the scan \
                          6 d_inner d_state a token, norms and activations nothing. accuracy: zero-shot, by acc_norm for arc_easy, \
                          arc_challenge, piqa and hellaswag, by acc for the others; a tie counts by its share.";

/// The tasks of the published table, with their names there.
const COLUMNS: [(&str, &str); 6] = [
    ("arc_easy", "arc_e"),
    ("arc_challenge", "arc_c"),
    ("winogrande", "wino"),
    ("piqa", "piqa"),
    ("hellaswag", "hella"),
    ("boolq", "boolq"),
];

/// The table.
#[derive(Debug)]
pub struct Report {
    size: String,
    /// What this command runs on.
    device: String,
    train_tokens: u64,
    tasks: Vec<String>,
    limit: Option<usize>,
    /// The rows that are done.
    pub rows: Vec<Row>,
}

impl Report {
    /// A table without rows.
    pub fn new(size: &str, device: String, train_tokens: u64, tasks: &[Task], limit: Option<usize>) -> Self {
        let tasks = tasks.iter().map(|task| task.name().to_owned()).collect();
        Self { size: size.to_owned(), device, train_tokens, tasks, limit, rows: Vec::new() }
    }

    /// Writes the table in all its forms.
    ///
    /// # Errors
    /// Those of the file system and of the plot.
    pub fn write(&self, out: &Path) -> Result<()> {
        write_json(&out.join("table.json"), self)?;
        write_atomically(&Disk, &out.join("table.md"), self.markdown().as_bytes())?;
        write_atomically(&Disk, &out.join("table.csv"), self.csv().as_bytes())?;
        let figure = out.join("figure.svg");
        Ok(write_atomically(&Disk, &figure, self.figure(&figure)?.as_bytes())?)
    }

    /// The table for people: ours and what was published in every cell.
    pub fn markdown(&self) -> String {
        let others = self.tasks.iter().filter(|task| COLUMNS.iter().all(|(name, _)| name != task));
        let tasks: Vec<(&str, &str)> =
            COLUMNS.into_iter().chain(others.map(|task| (task.as_str(), task.as_str()))).collect();
        let evaluated = self.rows.iter().any(|row| row.answers.is_some());
        let mut head = vec!["model", "parameters", "tokens/s", "MFU %"];
        if evaluated {
            head.extend(["trained on", "bits/byte"]);
            head.extend(tasks.iter().map(|(_, title)| *title));
            head.push("avg of six");
        }
        let mut text = format!("# {}: here / published\n\n", self.size);
        let _ = writeln!(
            text,
            "Here: {}; MFU of {}. Published: arXiv 2505.19472, a GPU that is not named, MFU of 45.158 TFLOP/s;\n\
             accuracy after 1 billion tokens of SlimPajama (2 billion at 1B).\n",
            self.devices(),
            self.peak_name()
        );
        if evaluated {
            let _ = writeln!(text, "Accuracy in percent, zero-shot, ± one standard error, {}.\n", self.items_told());
        }
        let _ = writeln!(text, "| {} |\n|{}", head.join(" | "), " --- |".repeat(head.len()));
        for row in &self.rows {
            let mut cells = vec![row.title.clone()];
            let parameters = row.speed.as_ref().map(|speed| speed.parameters);
            let parameters = parameters.or(row.trained.as_ref().map(|trained| trained.parameters));
            cells.push(or_dash(parameters.map(|n| count(n as f64))));
            let published = row.published.as_ref();
            cells.push(beside(
                row.speed.as_ref().map(|speed| grouped(speed.tokens_per_s as u64)),
                published.map(|row| grouped(row.tokens_per_s as u64)),
            ));
            cells.push(beside(
                row.speed.as_ref().map(|speed| format!("{:.2}", 100. * self.mfu(speed))),
                published.map(|row| format!("{:.2}", row.mfu_percent)),
            ));
            if evaluated {
                let trained = row.trained.as_ref();
                let told = trained.map(|it| format!("{} ({:.2} epochs)", count(it.trained_tokens as f64), it.epochs));
                cells.push(or_dash(told));
                cells.push(or_dash(trained.map(|it| format!("{:.4}", it.val_bits_per_byte))));
                let accuracy = row.accuracy();
                for (task, _) in &tasks {
                    let ours = accuracy.get(task).map(|&(value, stderr)| {
                        let stderr = stderr.map(|stderr| format!(" ± {:.2}", 100. * stderr)).unwrap_or_default();
                        format!("{:.2}{stderr}", 100. * value)
                    });
                    let theirs = published.and_then(|row| row.accuracy_percent.get(*task));
                    cells.push(beside(ours, theirs.map(|value| format!("{value:.2}"))));
                }
                let ours = average(row).map(|value| format!("{:.2}", 100. * value));
                cells.push(beside(ours, published.map(|row| format!("{:.2}", row.average_percent))));
            }
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        let _ = writeln!(text, "\n{DEFINITION}");
        text
    }

    /// The table for programs that read no JSON; percents are percents.
    fn csv(&self) -> String {
        let mut columns: Vec<String> =
            ["model", "parameters", "tokens_per_s", "tokens_per_s_published", "mfu", "mfu_published"]
                .into_iter()
                .chain(["trained_tokens", "epochs", "val_bits_per_byte"])
                .map(str::to_owned)
                .collect();
        let tasks: Vec<&str> = self.tasks.iter().map(String::as_str).collect();
        columns.extend(tasks.iter().flat_map(|task| ["", "_stderr", "_published"].map(|end| format!("{task}{end}"))));
        columns.extend(["average".to_owned(), "average_published".to_owned()]);
        let mut text = columns.join(",") + "\n";
        let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.6}"));
        let percent = |value: Option<f64>| value.map_or(String::new(), |value| format!("{:.4}", 100. * value));
        for row in &self.rows {
            let (speed, trained, published) = (row.speed.as_ref(), row.trained.as_ref(), row.published.as_ref());
            let accuracy = row.accuracy();
            let mut cells = vec![
                row.model.clone(),
                speed.map_or(String::new(), |speed| speed.parameters.to_string()),
                number(speed.map(|speed| speed.tokens_per_s)),
                number(published.map(|row| row.tokens_per_s)),
                percent(speed.map(|speed| self.mfu(speed))),
                number(published.map(|row| row.mfu_percent)),
                trained.map_or(String::new(), |trained| trained.trained_tokens.to_string()),
                number(trained.map(|trained| trained.epochs)),
                number(trained.map(|trained| trained.val_bits_per_byte)),
            ];
            for task in &tasks {
                cells.push(percent(accuracy.get(task).map(|found| found.0)));
                cells.push(percent(accuracy.get(task).and_then(|found| found.1)));
                cells.push(number(published.and_then(|row| row.accuracy_percent.get(*task)).copied()));
            }
            cells.push(percent(average(row)));
            cells.push(number(published.map(|row| row.average_percent)));
            text += &(cells.join(",") + "\n");
        }
        text
    }

    /// Tokens a second here, and MFU here and as published.
    fn figure(&self, path: &Path) -> Result<String> {
        let names: Vec<&str> = self.rows.iter().map(|row| row.title.as_str()).collect();
        let speeds = |of: &dyn Fn(&Speed) -> f64| self.rows.iter().map(|row| row.speed.as_ref().map(of)).collect();
        let mut mfu = vec![("here", speeds(&|speed| 100. * self.mfu(speed)))];
        if self.rows.iter().any(|row| row.published.is_some()) {
            let published = self.rows.iter().map(|row| row.published.as_ref().map(|row| row.mfu_percent));
            mfu.push(("published", published.collect()));
        }
        let panels = [
            BarPanel {
                title: "trained tokens a second",
                decimals: 0,
                series: vec![("here", speeds(&|speed| speed.tokens_per_s))],
            },
            BarPanel { title: "MFU in percent of the peak", decimals: 1, series: mfu },
        ];
        let title = format!("{} on {}; peak: {}", self.size, self.devices(), self.peak_name());
        Ok(bars_svg(path, &title, &names, &panels)?)
    }

    /// What the rows were found on, which for those that were kept may be another device than this command's.
    fn devices(&self) -> String {
        let of_row = |row: &Row| {
            let (speed, trained) = (row.speed.as_ref(), row.trained.as_ref());
            [speed.map(|speed| speed.device.clone()), trained.map(|trained| trained.device.clone())]
        };
        let mut names: Vec<String> = Vec::new();
        for name in self.rows.iter().flat_map(of_row).flatten().filter(|name| !name.is_empty()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        if names.is_empty() { self.device.clone() } else { names.join(" and ") }
    }

    /// One peak for all rows: what was measured varies from row to row, and its largest value is nearest to what the device can do.
    fn peak(&self) -> Option<&Peak> {
        let peaks = self.rows.iter().filter_map(|row| row.speed.as_ref()).map(|speed| &speed.peak);
        peaks.max_by(|a, b| a.flops_per_s.total_cmp(&b.flops_per_s))
    }

    fn mfu(&self, speed: &Speed) -> f64 {
        speed.flops_per_s / self.peak().map_or(f64::NAN, |peak| peak.flops_per_s)
    }

    fn row_json(&self, row: &Row) -> Value {
        let by_task = |of: &dyn Fn(&TaskScore) -> Option<f64>| -> Map<String, Value> {
            row.answers.iter().flatten().map(|score| (score.task.clone(), json!(of(score)))).collect()
        };
        let mut fields = json!({
            "model": row.model,
            "title": row.title,
            "tokens_per_s": row.speed.as_ref().map(|speed| speed.tokens_per_s),
            "mfu": row.speed.as_ref().map(|speed| self.mfu(speed)),
            "mfu_full_scores": row.speed.as_ref().map(|it| self.mfu(it) * it.flops_per_s_full_scores / it.flops_per_s),
            "accuracy": by_task(&|score| Some(score.accuracy)),
            "stderr": by_task(&|score| score.stderr),
            "average": average(row),
            "acc": by_task(&|score| Some(score.acc)),
            "acc_norm": by_task(&|score| score.acc_norm),
        });
        // What the phases found stands beside it under its own names.
        let found = [json!(row.speed), json!(row.trained)];
        if let Value::Object(fields) = &mut fields {
            for (key, value) in found.into_iter().filter_map(|found| found.as_object().cloned()).flatten() {
                fields.entry(key).or_insert(value);
            }
            fields.insert("tasks".to_owned(), json!(row.answers));
            fields.insert("published".to_owned(), json!(row.published));
        }
        fields
    }

    fn peak_name(&self) -> &str {
        self.peak().map_or("-", |peak| &peak.name)
    }

    fn items_told(&self) -> String {
        match self.limit {
            Some(limit) => format!("the first {} items of each task", grouped(limit as u64)),
            None => "all items of each task's file".to_owned(),
        }
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let rows: Vec<Value> = self.rows.iter().map(|row| self.row_json(row)).collect();
        let report = json!({
            "definition": DEFINITION,
            "device": self.devices(),
            "peak": self.peak(),
            "size": self.size,
            "train_tokens": self.train_tokens,
            "eval": {"tasks": self.tasks, "limit": self.limit},
            "rows": rows,
        });
        report.serialize(serializer)
    }
}

/// The mean of the six accuracies of the published table, where all of them are there.
fn average(row: &Row) -> Option<f64> {
    let accuracy = row.accuracy();
    let values: Option<Vec<f64>> = COLUMNS.iter().map(|(task, _)| accuracy.get(task).map(|found| found.0)).collect();
    values.map(|values| values.iter().sum::<f64>() / values.len() as f64)
}

fn or_dash(cell: Option<String>) -> String {
    cell.unwrap_or_else(|| "-".to_owned())
}

/// Ours, and what was published where there is something.
fn beside(ours: Option<String>, published: Option<String>) -> String {
    match published {
        Some(published) => format!("{} / {published}", or_dash(ours)),
        None => or_dash(ours),
    }
}
