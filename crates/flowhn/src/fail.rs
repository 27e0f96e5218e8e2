//! How failures are told: one message, one exit code.

use std::io::Write as _;
use std::panic;
use std::process::ExitCode;

use crate::console::StdoutClosed;

/// Exit code of a run that was interrupted, as shells give it.
pub const INTERRUPTED: u8 = 130;

/// Prints an error with its causes and returns the exit code. Whoever stopped reading our output has no wish for a message.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<StdoutClosed>() {
        return ExitCode::SUCCESS;
    }
    // Nobody is left to tell when standard error is closed too.
    let _ = writeln!(std::io::stderr(), "error: {}", message(error));
    ExitCode::FAILURE
}

/// What helps where memory ran out outside of a training step, whose error says it.
const LESS_MEMORY: &str =
    "Shorter sequences and smaller batches need less; a device of its own has more, --device cpu the machine's";

/// The error and those of its causes that it does not already quote, joined by colons.
fn message(error: &anyhow::Error) -> String {
    let told = causes(error);
    match told.contains("CUDA out of memory") && !told.contains("train.batch_size") {
        true => format!("{told} {LESS_MEMORY}"),
        false => told,
    }
}

fn causes(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |told, cause| {
        let cause = cause.to_string();
        match told.contains(cause.trim_end()) {
            true => told,
            false if told.is_empty() => cause.trim_end().to_owned(),
            false => format!("{told}: {}", cause.trim_end()),
        }
    })
}

/// Makes a panic, which is always a bug, end the program with one message and exit code 1.
pub fn report_panics() {
    panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let place = info.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        let text = text.unwrap_or("no message");
        let _ = writeln!(std::io::stderr(), "error: a bug in flowhn: {text}{place}; please report it");
        // A panic of a worker thread would otherwise be told a second time by the thread that waits for it.
        std::process::exit(1);
    }));
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn causes_are_told_once() {
        let error = anyhow!("disk full").context("cannot write x: disk full");
        assert_eq!(message(&error), "cannot write x: disk full");
        let error = Err::<(), _>(anyhow!("no such key\n")).context("a.toml").unwrap_err();
        assert_eq!(message(&error), "a.toml: no such key");
    }

    #[test]
    fn too_little_memory_comes_with_what_helps() {
        let said = "attention: CUDA out of memory. Tried to allocate 2.00 GiB.";
        assert_eq!(message(&anyhow!(said)), format!("{said} {LESS_MEMORY}"));
        let told = format!("step 3: {said} Lower train.batch_size");
        assert_eq!(message(&anyhow!(told.clone())), told);
    }
}
