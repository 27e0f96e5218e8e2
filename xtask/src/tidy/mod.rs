//! `cargo xtask tidy`: the repository's own rules, one function each.

mod code;
mod crates;
mod text;

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::cargo;
use crate::fail::{Fail, Result};
use crate::repo::Repo;

/// A rule: what it says, and what breaks it.
struct Rule {
    says: &'static str,
    check: fn(&Tree) -> Vec<Finding>,
}

const RULES: &[Rule] = &[
    Rule { says: "only flowhn-torch and flowhn-replay hold unsafe code", check: code::no_unsafe },
    Rule { says: "no todo!, unimplemented! or dbg! is left", check: code::no_leftovers },
    Rule { says: "source files have at most 600 lines", check: code::short_files },
    Rule { says: "each crate has a README.md and denies missing docs and unsafe code", check: crates::manners },
    Rule { says: "dependences between our crates point one way", check: crates::one_way },
    Rule { says: "the licence texts are there", check: text::licences },
    Rule { says: "no path leads out of the repository", check: text::no_outside_paths },
];

/// The repository's files: those git knows, and new ones that it does not ignore.
pub struct Tree {
    files: Vec<SourceFile>,
}

/// One file.
pub struct SourceFile {
    /// Path from the repository's root, with `/`.
    path: String,
    /// Its text; empty where it is not UTF-8.
    text: String,
}

/// One breach of a rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    path: String,
    /// Counted from 1; 0 is the file as a whole.
    line: usize,
    message: String,
}

impl Finding {
    fn new(path: impl Into<String>, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.into(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.message),
            line => write!(f, "{}:{line}: {}", self.path, self.message),
        }
    }
}

impl Tree {
    fn read(repo: &Repo) -> Result<Self> {
        let mut git = Command::new("git");
        git.current_dir(repo.root()).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        let list = cargo::output(&mut git).map_err(|fail| {
            fail.help("tidy reads the list of files from git: run it in a clone, with git installed")
        })?;
        let paths = list.split('\0').filter(|path| !path.is_empty());
        // A file deleted but not yet committed is listed and not there; a link is looked at where it leads.
        let read = |path: &str| {
            let bytes = fs::read(repo.path(path)).ok()?;
            Some(SourceFile { path: path.to_owned(), text: String::from_utf8(bytes).unwrap_or_default() })
        };
        Ok(Self { files: paths.filter_map(read).collect() })
    }

    /// Files with one of these extensions.
    fn with_extension<'a>(&'a self, extensions: &'a [&str]) -> impl Iterator<Item = &'a SourceFile> {
        self.files.iter().filter(|file| {
            Path::new(&file.path).extension().and_then(|ext| ext.to_str()).is_some_and(|ext| extensions.contains(&ext))
        })
    }

    /// The file at that path.
    fn file(&self, path: &str) -> Option<&SourceFile> {
        self.files.iter().find(|file| file.path == path)
    }

    /// A tree of these files.
    #[cfg(test)]
    fn of(files: &[(&str, &str)]) -> Self {
        let file = |(path, text): &(&str, &str)| SourceFile { path: (*path).into(), text: (*text).into() };
        Self { files: files.iter().map(file).collect() }
    }
}

/// Runs `cargo xtask tidy`.
pub fn command(repo: &Repo, args: Vec<OsString>) -> Result<ExitCode> {
    if let Some(arg) = args.first() {
        return Err(Fail::usage(format!("`cargo xtask tidy` takes no arguments, got {}", arg.to_string_lossy())));
    }
    run(repo)?;
    Ok(ExitCode::SUCCESS)
}

/// Holds the repository to every rule.
pub fn run(repo: &Repo) -> Result<()> {
    let tree = Tree::read(repo)?;
    let mut n_findings = 0;
    for rule in RULES {
        let findings = (rule.check)(&tree);
        if findings.is_empty() {
            continue;
        }
        eprintln!("{}:", rule.says);
        for finding in &findings {
            eprintln!("  {finding}");
        }
        n_findings += findings.len();
    }
    match n_findings {
        0 => {
            eprintln!("{} files keep {} rules", tree.files.len(), RULES.len());
            Ok(())
        }
        1 => Err(Fail::new("one breach of the repository's rules")),
        n => Err(Fail::new(format!("{n} breaches of the repository's rules"))),
    }
}
