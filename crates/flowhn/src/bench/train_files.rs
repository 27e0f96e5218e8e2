//! The files that `flowhn bench train --out` writes: the report as JSON, CSV and a figure.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use flowhn_train::plot::{BarPanel, bars_svg};
use serde::Deserialize;

use super::train::{Report, Row};

/// What another program reached, to stand beside our rows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Beside {
    /// What the program is called in the figure.
    name: String,
    rows: Vec<BesideRow>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BesideRow {
    model: String,
    policy: String,
    tokens_per_s: f64,
    /// A fraction of the same peak.
    mfu: f64,
}

impl Beside {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read --beside {}", path.display()))?;
        let want = "it takes a JSON object {name, rows: a list of {model, policy, tokens_per_s, mfu}}";
        serde_json::from_str(&text).with_context(|| format!("cannot read --beside {}: {want}", path.display()))
    }

    fn of(&self, row: &Row) -> Option<&BesideRow> {
        self.rows.iter().find(|other| other.model == row.model && other.policy == row.policy)
    }
}

/// A report that was kept.
pub(super) fn read(path: &Path) -> Result<Report> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read --from {}", path.display()))?;
    let want = "it takes a train.json that `flowhn bench train --out` wrote";
    serde_json::from_str(&text).with_context(|| format!("cannot read --from {}: {want}", path.display()))
}

/// Writes train.json, train.csv and train.svg.
pub(super) fn write(dir: &Path, report: &Report, beside: Option<&Beside>) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
    let save = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    save("train.json", &format!("{}\n", serde_json::to_string_pretty(report)?))?;
    save("train.csv", &csv(report, beside))?;
    save("train.svg", &figure(&dir.join("train.svg"), report, beside)?)
}

fn csv(report: &Report, beside: Option<&Beside>) -> String {
    // Models differ in their parts.
    let mut parts: Vec<&str> = Vec::new();
    for part in report.rows.iter().flat_map(|row| &row.parts) {
        if !parts.contains(&part.name.as_str()) {
            parts.push(&part.name);
        }
    }
    let part_columns: String = parts.iter().map(|name| format!("ms_{},", name.replace(' ', "_"))).collect();
    let mut text = format!(
        "model,policy,parameters,tokens_per_step,tokens_per_s,recomputed_flops_per_step,ms_median,ms_min,ms_max,mfu,mfu_full_scores,\
         matmul_frac,max_memory_bytes,busy_frac,watts,joules_per_token,{part_columns}beside_tokens_per_s,beside_mfu\n"
    );
    for row in &report.rows {
        let other = beside.and_then(|beside| beside.of(row));
        let opt = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        let of_part = |name: &&str| opt(row.parts.iter().find(|part| part.name == **name).map(|part| part.ms));
        let cells = [
            row.model.clone(),
            row.policy.clone(),
            row.parameters.to_string(),
            row.tokens_per_step.to_string(),
            row.tokens_per_s.to_string(),
            row.recomputed_flops_per_step.to_string(),
            row.step_ms.median.to_string(),
            row.step_ms.min.to_string(),
            row.step_ms.max.to_string(),
            row.mfu.to_string(),
            row.mfu_full_scores.to_string(),
            row.matmul_frac.to_string(),
            row.max_memory_bytes.to_string(),
            opt(row.busy_frac),
            opt(row.power.map(|power| power.watts)),
            opt(row.joules_per_token),
        ];
        let beside = [opt(other.map(|other| other.tokens_per_s)), opt(other.map(|other| other.mfu))];
        let cells: Vec<String> = cells.into_iter().chain(parts.iter().map(of_part)).chain(beside).collect();
        text += &(cells.join(",") + "\n");
    }
    text
}

/// Bars of tokens a second and MFU, ours and the other program's.
fn figure(path: &Path, report: &Report, beside: Option<&Beside>) -> Result<String> {
    let names: Vec<String> = report.rows.iter().map(|row| format!("{} {}", row.model, row.policy)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let series = |ours: fn(&Row) -> f64, theirs: fn(&BesideRow) -> f64| {
        let mut series = vec![("FlowHN", report.rows.iter().map(|row| Some(ours(row))).collect())];
        if let Some(beside) = beside {
            let others = report.rows.iter().map(|row| beside.of(row).map(theirs));
            series.push((beside.name.as_str(), others.collect()));
        }
        series
    };
    let panels = [
        BarPanel {
            title: "thousand tokens a second",
            decimals: 1,
            series: series(|row| row.tokens_per_s / 1e3, |row| row.tokens_per_s / 1e3),
        },
        BarPanel {
            title: "MFU in percent of the peak",
            decimals: 1,
            series: series(|row| 100. * row.mfu, |row| 100. * row.mfu),
        },
    ];
    let peak = report.peak.as_ref().map_or("unknown", |peak| peak.name.as_str());
    Ok(bars_svg(path, &format!("Training on {}; peak: {peak}", report.device), &names, &panels)?)
}
