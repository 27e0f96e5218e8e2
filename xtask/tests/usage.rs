//! The command line of xtask itself.

#![forbid(unsafe_code)]

use std::process::Command;

fn xtask(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(args).output().expect("xtask starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("xtask speaks UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn help_goes_to_standard_output() {
    let (code, stdout, stderr) = xtask(&["--help"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    for word in ["setup", "test", "check", "train", "bench", "--cpu"] {
        assert!(stdout.contains(word), "{word}");
    }
}

#[test]
fn a_senseless_command_line_is_exit_code_two() {
    for (args, words) in [
        (&["chekc"][..], "no `cargo xtask chekc`"),
        (&[], "Usage: cargo xtask"),
        (&["setup", "--force"], "takes no arguments"),
        (&["check", "tests"], "no step `tests`"),
        (&["bench"], "--cpu"),
    ] {
        let (code, stdout, stderr) = xtask(args);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}");
        assert!(stderr.contains(words), "{args:?}: {stderr}");
    }
}
