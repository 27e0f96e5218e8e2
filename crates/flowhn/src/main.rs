#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod bench;
mod checkpoint_args;
mod cli;
mod config_args;
mod console;
mod data;
mod device;
mod eval;
mod export;
mod fail;
mod generate;
mod golden;
mod import;
mod interrupt;
mod kernels;
mod plan;
mod selftest;
mod shards;
mod threads;
mod train;
mod units;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    fail::report_panics();
    let cli = Cli::parse();
    let outcome = match &cli.command {
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Golden(args) => golden::run(args),
        Command::Import(args) => import::run(args),
        Command::Export(args) => export::run(args),
        Command::Selftest(args) => selftest::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Data(args) => data::run(args),
    };
    if let Some(problem) = flowhn_torch::kernel::cache_problem() {
        console::Console::new().line(format!("note: {problem}"));
    }
    outcome.unwrap_or_else(|error| fail::exit_code(&error))
}
