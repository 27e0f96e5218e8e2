//! The command line as a whole.

use std::sync::LazyLock;

use clap::{Parser, Subcommand};

use crate::{bench, data, eval, export, generate, golden, import, kernels, plan, selftest, train};

const AFTER_HELP: &str = "\
Results go to standard output, progress and warnings to standard error.
Exit codes: 0 done, 1 failed with a message, 2 the command line makes no sense, 130 interrupted.";

/// Language models in which attention and a state-space model share the tokens of every block.
#[derive(Debug, Parser)]
#[command(name = "flowhn", version, long_version = LONG_VERSION.as_str(), after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model, or go on with a run that was interrupted.
    Train(train::Args),
    /// Measure the loss and the bits per byte of a checkpoint on text.
    Eval(eval::Args),
    /// Continue a prompt with a checkpoint.
    Generate(generate::Args),
    /// Show who reads which token in each block, and what that costs.
    Plan(plan::Args),
    /// Compare models with files of recorded outputs and gradients.
    Golden(golden::Args),
    /// Make a run of a checkpoint of transformers: Llama, Mamba, Mamba-2, Jamba, Falcon-H1.
    Import(import::Args),
    /// Write a checkpoint as transformers reads it.
    Export(export::Args),
    /// Check every operation, model and run on this machine's devices.
    Selftest(selftest::Args),
    /// Show what every kernel takes of a GPU: registers, shared memory, spills.
    Kernels(kernels::Args),
    /// Measure speed.
    Bench(bench::Args),
    /// Prepare data: a vocabulary, token shards.
    Data(data::Args),
}

/// The split policies, for help texts.
pub fn policies_help() -> String {
    let mut text = "Split policies (model.split.policy):".to_owned();
    for policy in flowhn_split::POLICIES {
        let mut column = usize::MAX;
        for word in policy.summary().split(' ') {
            // Wrapped here, as clap would begin the second line at the margin.
            if column.saturating_add(word.len()) > 78 {
                let name = if column == usize::MAX { policy.name() } else { "" };
                text += &format!("\n  {name:<13}");
                column = 15;
            }
            text += " ";
            text += word;
            column += 1 + word.len();
        }
    }
    text
}

static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    let cuda = match (flowhn_torch::BUILT_WITH_CUDA, flowhn_torch::n_cuda_devices()) {
        (false, _) => "no".to_owned(),
        (true, 0) => {
            let problem =
                flowhn_torch::cuda_problem().map_or_else(String::new, |problem| format!(": {}", problem.message));
            format!("built in, no device here{problem}")
        }
        (true, n) => format!("yes, {n} device(s)"),
    };
    let (dir, version) = match flowhn_torch::torch_lib_dir() {
        Ok(dir) => (dir.display().to_string(), torch_version(&dir)),
        Err(error) => (error.to_string(), None),
    };
    let version = version.unwrap_or_else(|| "of unknown version".to_owned());
    format!("{}\nlibtorch {version} in {dir}\nCUDA     {cuda}", env!("CARGO_PKG_VERSION"))
});

/// The version that a libtorch says of itself: the Python package in `version.py`, the C++ archive in `build-version`.
fn torch_version(lib: &std::path::Path) -> Option<String> {
    let root = lib.parent()?;
    if let Ok(text) = std::fs::read_to_string(root.join("build-version")) {
        return Some(text.trim().to_owned());
    }
    let text = std::fs::read_to_string(root.join("version.py")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(line.trim_matches(['\'', '"']).to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_policy_is_in_the_help() {
        let help = policies_help();
        assert!(flowhn_split::POLICIES.iter().all(|policy| help.contains(policy.name())), "{help}");
    }
}
