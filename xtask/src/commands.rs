//! The table of commands: the dispatcher and `--help` both read it.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::process::ExitCode;

use crate::fail::Result;
use crate::repo::Repo;
use crate::{bench, cargo, check, dist, forward, setup, tidy};

/// One word after `cargo xtask`.
#[derive(Debug)]
pub struct Command {
    name: &'static str,
    args: &'static str,
    summary: &'static str,
    action: Action,
}

/// What a command does.
#[derive(Debug, Clone, Copy)]
enum Action {
    /// A chore of xtask's own.
    Chore(fn(&Repo, Vec<OsString>) -> Result<ExitCode>),
    /// A subcommand of the `flowhn` program, built first and then put in xtask's place.
    Flowhn,
}

/// Every command, in the order in which `--help` shows them.
pub const COMMANDS: &[Command] = &[
    Command::flowhn("train", "train a model; configs/tiny.toml unless --config says otherwise"),
    Command::flowhn("eval", "loss of a checkpoint on text, accuracy on zero-shot tasks"),
    Command::flowhn("generate", "continue a prompt with a checkpoint"),
    Command::flowhn("plan", "who reads which token, and what it costs"),
    Command::flowhn("golden", "compare with files of recorded outputs and gradients"),
    Command::flowhn("import", "make a run of a Hugging Face checkpoint: --from DIR"),
    Command::flowhn("export", "write a checkpoint for Hugging Face's transformers: --to DIR"),
    Command::flowhn("data", "prepare data: tokenizer, token shards, samples of items"),
    Command::flowhn("selftest", "every operation, model and run on the first GPU, or the CPU"),
    Command::flowhn("kernels", "registers, shared memory and spills of every kernel"),
    Command::chore("setup", "", "find or install libtorch and link it as .libtorch", setup::command),
    Command::chore("test", "[args]", "every CPU test; arguments go to `cargo test`", cargo::test),
    Command::chore(
        "check",
        "[step…]",
        "what CI runs: tidy, fmt, clippy, test, docs, configs, outside, hf",
        check::command,
    ),
    Command::chore("tidy", "", "the repository's own rules", tidy::command),
    Command::chore(
        "dist",
        "[--out DIR]",
        "dist/flowhn-*.tar.gz, which runs without Rust beside a PyTorch",
        dist::command,
    ),
    Command::chore(
        "bench",
        "[what] [args]",
        "kernels, train, context, decode, paper; --cpu: criterion's benchmarks",
        bench::command,
    ),
];

impl Command {
    const fn flowhn(name: &'static str, summary: &'static str) -> Self {
        Self { name, args: "[args]", summary, action: Action::Flowhn }
    }

    const fn chore(
        name: &'static str,
        args: &'static str,
        summary: &'static str,
        run: fn(&Repo, Vec<OsString>) -> Result<ExitCode>,
    ) -> Self {
        Self { name, args, summary, action: Action::Chore(run) }
    }

    /// The command of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        COMMANDS.iter().find(|command| command.name == name)
    }

    /// Runs it and returns the code to exit with.
    pub fn run(&self, repo: &Repo, args: Vec<OsString>) -> Result<ExitCode> {
        match self.action {
            Action::Chore(run) => run(repo, args),
            Action::Flowhn => forward::exec(repo, self.name, args),
        }
    }
}

/// Names of the commands that are subcommands of `flowhn`.
pub fn of_flowhn() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().filter(|command| matches!(command.action, Action::Flowhn)).map(|command| command.name)
}

/// The text of `--help`.
pub fn help() -> String {
    let mut text = String::from("Usage: cargo xtask COMMAND [args]\n");
    let mut section = |title: &str, wanted: fn(&Action) -> bool| {
        let _ = writeln!(text, "\n{title}");
        for command in COMMANDS.iter().filter(|command| wanted(&command.action)) {
            let _ = writeln!(text, "  {:8} {:13} {}", command.name, command.args, command.summary);
        }
    };
    section(
        "The flowhn program, built in release mode and run in the repository's root (`COMMAND --help` tells its arguments):",
        |action| matches!(action, Action::Flowhn),
    );
    section("Chores:", |action| matches!(action, Action::Chore(_)));
    text.push_str(
        "\n\
         Whatever needs libtorch runs `setup` first. Setup looks at LIBTORCH, .libtorch, .venv, VIRTUAL_ENV,\n\
         CONDA_PREFIX and python3, in this order, for a PyTorch 2.11.0, and else installs one into .venv.\n\
         FLOWHN_INSTALL_GB: the free space that this asks for, 8 unless set.\n\
         Exit codes: 0 done, 1 failed, 2 the command line makes no sense.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn help_lists_every_command_once() {
        let help = help();
        let names: BTreeSet<_> = COMMANDS.iter().map(|command| command.name).collect();
        assert_eq!(names.len(), COMMANDS.len(), "two commands share a name");
        for command in COMMANDS {
            let lines = help.lines().filter(|line| line.split_whitespace().next() == Some(command.name));
            assert_eq!(lines.count(), 1, "{}", command.name);
            assert!(Command::find(command.name).is_some());
        }
        assert!(Command::find("chekc").is_none());
    }
}
