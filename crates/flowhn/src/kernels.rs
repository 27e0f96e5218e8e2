//! `flowhn kernels`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use flowhn_torch::kernel::{ARCHITECTURES, KernelSpec, compile};
use serde::Serialize;

use crate::console;

const AFTER_HELP: &str = "\
No GPU is needed. --json prints a list of {crate, source, entry, defines, arch, registers, shared_bytes, stack_bytes, spill_bytes};
`defines` is an object of the macros that make the variant, `shared_bytes` the static shared memory alone.";

/// Arguments of `flowhn kernels`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The architecture to compile for; may be repeated
    #[arg(long, value_name = "ARCH", default_value = "sm_90a", value_parser = clap::builder::PossibleValuesParser::new(ARCHITECTURES))]
    arch: Vec<String>,
    /// Only kernels whose source or entry contains this text
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Print one JSON list
    #[arg(long)]
    json: bool,
}

/// One entry of one variant.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(rename = "crate")]
    krate: &'static str,
    source: &'static str,
    entry: String,
    defines: serde_json::Map<String, serde_json::Value>,
    arch: String,
    registers: u32,
    shared_bytes: u32,
    stack_bytes: u32,
    spill_bytes: u32,
}

/// The tables of kernels.
const CRATES: [(&str, &[KernelSpec]); 6] = [
    ("flowhn-torch", flowhn_torch::kernel::KERNELS),
    ("flowhn-nn", flowhn_nn::KERNELS),
    ("flowhn-ssm", flowhn_ssm::KERNELS),
    ("flowhn-attn", flowhn_attn::KERNELS),
    ("flowhn-fuse", flowhn_fuse::KERNELS),
    ("flowhn-train", flowhn_train::KERNELS),
];

/// Compiles every variant and shows what it takes.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut rows = Vec::new();
    for (krate, spec) in CRATES.into_iter().flat_map(|(krate, specs)| specs.iter().map(move |spec| (krate, spec))) {
        for variant in spec.variants {
            for arch in &args.arch {
                let compiled = compile(spec.source, variant, arch)?;
                let defines = variant.iter().map(|&(name, value)| (name.to_owned(), value.into())).collect();
                let row = |entry: flowhn_torch::kernel::EntryResources| Row {
                    krate,
                    source: spec.source.name,
                    entry: entry.entry,
                    defines: serde_json::Map::clone(&defines),
                    arch: arch.clone(),
                    registers: entry.registers,
                    shared_bytes: entry.shared_bytes,
                    stack_bytes: entry.stack_bytes,
                    spill_bytes: entry.spill_bytes,
                };
                rows.extend(compiled.entries.into_iter().map(row).filter(|row| args.wants(row)));
            }
        }
    }
    if rows.is_empty() {
        bail!("no kernel is called `{}`", args.filter.as_deref().unwrap_or_default());
    }
    match args.json {
        true => console::print_json(&rows)?,
        false => console::print(&table(&rows))?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn wants(&self, row: &Row) -> bool {
        self.filter.as_ref().is_none_or(|text| row.source.contains(text) || row.entry.contains(text))
    }
}

fn table(rows: &[Row]) -> String {
    let names: Vec<String> = rows.iter().map(|row| format!("{}/{}", row.source, row.entry)).collect();
    let width = names.iter().map(String::len).max().unwrap_or(0).max("kernel".len());
    let mut text = format!("{:<width$}  arch    registers  shared bytes  spilled bytes  variant\n", "kernel");
    for (row, name) in rows.iter().zip(&names) {
        let variant: Vec<String> = row.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let Row { arch, registers, shared_bytes, spill_bytes, .. } = row;
        text += &format!(
            "{name:<width$}  {arch:<7} {registers:>9}  {shared_bytes:>12}  {spill_bytes:>13}  {}\n",
            variant.join(" ")
        );
    }
    text
}
