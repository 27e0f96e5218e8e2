//! `flowhn train`.

mod report;
pub mod watch;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use flowhn_train::run_dir::Start;
use flowhn_train::{Outcome, RunConfig, TrainOptions, Trainer};
use serde_json::json;
use tch::Device;

use crate::cli::policies_help;
use crate::config_args::{self, SetArgs};
use crate::console::{self, Console};
use crate::device::{DeviceArgs, device_name};
use crate::fail::INTERRUPTED;
use crate::interrupt::Interrupt;
use crate::threads;
use watch::Watch;

/// Arguments of `flowhn train`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = policies_help())]
pub struct Args {
    /// The configuration of the run, a TOML file; with --resume and --run-dir, the run's own by default
    #[arg(long, short, value_name = "FILE", required_unless_present_all = ["resume", "run_dir"])]
    config: Option<PathBuf>,
    #[command(flatten)]
    sets: SetArgs,
    /// Go on from the newest undamaged checkpoint in the run's directory
    #[arg(long)]
    resume: bool,
    /// Where the run is kept, instead of run.dir
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Checkpoints to keep, instead of train.keep_last; 0 keeps all
    #[arg(long, value_name = "N")]
    keep_last: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object at the end: that of summary.json, or where an interrupted run stopped
    #[arg(long)]
    json: bool,
}

/// Trains until the end or an interruption.
pub fn run(args: &Args) -> Result<ExitCode> {
    threads::let_sleep();
    flowhn_torch::keep_freed_host_memory();
    let console = Console::new();
    let device = args.device.device()?;
    let config = configuration(args)?;
    for warning in config.model.routing()?.warnings() {
        console.warn(warning);
    }
    let interrupt = Interrupt::install(&console)?;
    let start = if args.resume { Start::Resume } else { Start::Fresh };
    let options = TrainOptions { start, device, ..TrainOptions::default() };

    let mut watch = Watch::new(&console, &config);
    let mut trainer = Trainer::new(&config, &options, &mut watch)?;
    let complete = trainer.step() >= config.train.steps;
    if complete {
        let dir = trainer.run_dir().display();
        console.line(format_args!("{dir}: all {} steps are done; there is nothing to resume", config.train.steps));
    } else {
        console.line(report::intent(&trainer));
        if trainer.estimate().exceeds_memory() {
            console.warn("this is more memory than is free; lower train.batch_size and raise train.grad_accum instead");
        }
    }
    interrupt.training_starts();
    watch.start(trainer.step());
    let outcome = trainer.run(&mut watch, interrupt.stop_flag());
    watch.finish();
    match outcome? {
        Outcome::Done(summary) if args.json => console::print_json(&*summary)?,
        Outcome::Done(summary) => console::print(&report::outcome(&trainer, &summary))?,
        Outcome::Stopped { step, checkpoint } => {
            let command = resume_command(std::env::args_os().collect(), device);
            console.line(format_args!(
                "stopped after step {step} of {}; checkpoint {}\nresume with: {command}",
                config.train.steps,
                checkpoint.display(),
            ));
            if args.json {
                let checkpoint = checkpoint.display().to_string();
                console::print_json(
                    &json!({"stopped": true, "step": step, "checkpoint": checkpoint, "resume": command}),
                )?;
            }
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn configuration(args: &Args) -> Result<RunConfig> {
    let mut config = match (&args.config, &args.run_dir) {
        (Some(file), _) => config_args::load(file, &args.sets.sets)?,
        (None, Some(dir)) => config_args::load_of_run(dir, &args.sets.sets)?,
        (None, None) => anyhow::bail!("name the configuration with --config FILE"),
    };
    if let Some(dir) = &args.run_dir {
        config.run.dir.clone_from(dir);
    }
    if let Some(keep_last) = args.keep_last {
        config.train.keep_last = keep_last;
    }
    Ok(config)
}

/// This command line with `--resume`, as a shell reads it. It names the device, since another one sums in another order.
fn resume_command(mut words: Vec<OsString>, device: Device) -> String {
    let names = |word: &OsString, option: &str| {
        word.to_str().is_some_and(|word| word == option || word.starts_with(&format!("{option}=")))
    };
    if !words.iter().any(|word| names(word, "--device")) {
        words.extend(["--device".into(), device_name(device).into()]);
    }
    if !words.iter().any(|word| names(word, "--resume")) {
        words.push("--resume".into());
    }
    words.iter().map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_resumed_on_its_device() {
        let command = |line: &str, device| resume_command(line.split(' ').map(OsString::from).collect(), device);
        assert_eq!(command("flowhn train", Device::Cpu), "flowhn train --device cpu --resume");
        assert_eq!(command("flowhn train --resume", Device::Cuda(0)), "flowhn train --resume --device cuda:0");
        for named in ["flowhn train --device cuda --resume", "flowhn train --device=cuda:1 --resume"] {
            assert_eq!(command(named, Device::Cuda(1)), named);
        }
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("configs/tiny.toml"), "configs/tiny.toml");
        assert_eq!(quoted("data.train=[\"a b.txt\"]"), "'data.train=[\"a b.txt\"]'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
